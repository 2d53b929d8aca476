"""The fault matrix: what goes wrong, at which stage, and what the calling program sees of it.

`MATRIX` is the table in docs/faults.md, which a test compares. Each cell is a test of its own, named
``test_fault[STAGE-FAULT]``. They share two mounts: a cell begins when its mount is online, and ends when it
is online again and everything is right. Only cells that wait for the timeout use the mount whose timeout is
short. A mount in which a cell failed is not used again.
"""

import contextlib
import errno
import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from tests.support.compare import contents, served, shown
from tests.support.mail import plain
from tests.support.mailboxes import held, settle
from tests.support.mounting import ROOT, Mount, RobustMount, wait_until
from tests.support.servers.dovecot import Account, Dovecot
from tests.support.servers.proxy import Point, Proxy
from tests.support.servers.tls import CertificateAuthority

DATE = 1_700_000_000
LARGE = 100_000
"""Bytes of a message that comes in several pieces."""
TIMEOUT = 2
SILENT = {"stall", "trickle"}
"""Faults that nothing but the timeout ends."""

OK, LATE, AWAY, NO_TLS, EITHER = "-", "`ETIMEDOUT`", "`EHOSTUNREACH`", "`EPROTO`", "either"
"""What the program that makes the request sees; "-" for nothing."""
ERRORS = {
    OK: {0},
    LATE: {errno.ETIMEDOUT},
    AWAY: {errno.EHOSTUNREACH},
    NO_TLS: {errno.EPROTO},
    EITHER: {errno.ETIMEDOUT, errno.EHOSTUNREACH},
}

STAGES = {
    "connect": "making the connection, TLS included",
    "greeting": "the server's greeting",
    "login": "AUTHENTICATE",
    "list": "LIST: `ls` of the mountpoint",
    "select": "EXAMINE: the first `ls` of a directory",
    "status": "STATUS: `getfattr` of a directory not yet listed",
    "fetch": "in the literal of a FETCH: reading a message",
    "append": "in the literal of an APPEND: `cp` to the mount",
    "fsync": "the answer to an APPEND: `cp`, then `sync FILE`",
    "move": "UID MOVE, before it",
    "moved": "UID MOVE, after it: the answer",
}
FAULTS = {
    "cut": "reset",
    "close": "orderly end",
    "half-close": "end of one direction only",
    "corrupt": "bytes that are no TLS",
    "stall": "silence",
    "alert": "TLS alert",
    "refuse": "connection refused",
    "trickle": "a few bytes now and then",
    "delay": "0.3 s more a round trip",
}
MATRIX: dict[str, dict[str, str]] = {
    "connect": {
        **dict.fromkeys(("cut", "close", "half-close", "refuse"), AWAY),
        **dict.fromkeys(("corrupt", "alert"), NO_TLS),
        "stall": EITHER,
    },
    "greeting": {**dict.fromkeys(("cut", "close"), AWAY), "corrupt": NO_TLS, "stall": EITHER},
    "login": {**dict.fromkeys(("cut", "close", "half-close", "corrupt"), AWAY), "stall": EITHER},
    "list": dict.fromkeys(("cut", "stall"), OK),
    "select": {**dict.fromkeys(("cut", "close", "half-close", "corrupt", "delay"), OK), "stall": LATE},
    "status": {**dict.fromkeys(("cut", "close", "half-close", "corrupt"), OK), "stall": LATE},
    "fetch": {
        **dict.fromkeys(("cut", "close", "half-close", "corrupt", "delay"), OK),
        **dict.fromkeys(("stall", "trickle"), LATE),
    },
    "append": dict.fromkeys(("cut", "close", "half-close", "corrupt", "stall", "trickle"), OK),
    "fsync": {**dict.fromkeys(("cut", "close", "half-close", "corrupt", "delay"), OK), "stall": LATE},
    "move": {**dict.fromkeys(("cut", "close", "half-close", "corrupt", "delay"), OK), "stall": LATE},
    "moved": {**dict.fromkeys(("cut", "close", "half-close", "corrupt"), OK), "stall": LATE},
}
"""Stage -> fault -> what is seen."""
ALERT = b"\x15\x03\x03\x00\x02\x02\x28"
"""handshake_failure."""


def table() -> list[str]:
    """Return the lines of the table in docs/faults.md."""
    lines = ["| | " + " | ".join(FAULTS) + " |", "|---" * (len(FAULTS) + 1) + "|"]
    for stage, seen in MATRIX.items():
        lines.append(f"| **{stage}** | " + " | ".join(seen.get(fault, "") for fault in FAULTS) + " |")
    return lines


def test_the_documented_table_is_the_tested_one() -> None:
    text = (ROOT / "docs" / "faults.md").read_text()
    assert "\n".join(table()) in text, "\n".join(table())
    for word, meaning in (*STAGES.items(), *FAULTS.items()):
        assert f"| **{word}** | {meaning} |" in text


# -- what the cells share


@dataclass
class World:
    """The mount, the account behind it, and what stands between."""

    user: Account
    proxy: Proxy
    mount: Mount
    cached: Path
    """A message that has been read."""
    large: list[Path]
    """Messages that nobody has read yet: the nth has the content ``plain(n, LARGE)``."""
    small: list[Path]
    """Messages to be moved: the nth has the content ``plain(n)``."""
    mailboxes: list[Path]
    """Directories that nobody has looked into yet, with one message each."""
    numbers: Iterator[int]
    is_hasty: bool
    """Whether its timeout is `TIMEOUT`."""

    @property
    def inbox(self) -> Path:
        return self.mount.path / "INBOX"

    def state(self) -> str:
        return str(self.mount.status()["state"])

    def recover(self) -> None:
        """Wait until the mount is online by itself, and has a connection that was in use before."""
        wait_until(lambda: self.state() == "online", "online again")

        def asked() -> None:
            os.listxattr(self.cached)
            os.getxattr(self.inbox, "user.imap.uidnext")

        self.see(asked)

    def see(self, request: Callable[[], object]) -> None:
        """Make a request that succeeds, if not at once: this machine may be slower than a short timeout."""

        def succeeded() -> bool:
            try:
                request()
            except OSError as error:
                if not self.is_hasty or error.errno not in ERRORS[EITHER]:
                    raise
                return False
            return True

        wait_until(succeeded, "the server is asked in time")


class LongMount(RobustMount):
    patience = 600.0


@contextlib.contextmanager
def made_world(user: Account, directory: Path, *, hasty: bool) -> Iterator[World]:
    user.deliver("INBOX", [(plain(0), DATE, "")])
    user.deliver("Large", ((plain(n, LARGE), DATE, "") for n in range(1, 41)))
    user.deliver("Small", ((plain(n), DATE, "") for n in range(1, 21)))
    user.deliver("Work", [])
    for number in range(20):
        user.deliver(f"box{number}", [(plain(1), DATE, "")])
    patient = "--fetch-ahead", "0"
    arguments = (*patient, "--timeout", str(TIMEOUT)) if hasty else patient
    # A request is repeated if a connection breaks that was kept from earlier ones, and fails if it was new. A
    # watch would take the kept one at any time, so that there is none here.
    with Proxy(user.server, hide=["NOTIFY", "IDLE"]) as proxy:
        account = proxy.account(user)
        # The timeout is for the faults: what they need is looked at without it.
        with Mount(account, directory / "first", *patient) as first:
            (name,) = os.listdir(first.path / "INBOX")
            (first.path / "INBOX" / name).read_bytes()
            large, small = (
                sorted(shown(first.path / box).items(), reverse=True) for box in ("Large", "Small")
            )
        with LongMount(account, directory / "mount", *arguments, cache=first.cache) as mount:
            yield World(
                user,
                proxy,
                mount,
                mount.path / "INBOX" / name,
                [mount.path / "Large" / path.name for _, path in large],
                [mount.path / "Small" / path.name for _, path in small],
                [mount.path / f"box{number}" for number in range(20)],
                itertools.count(1),
                hasty,
            )


class Worlds:
    """Two worlds for all tests of the module, and others in the place of those in which a test failed."""

    def __init__(self, dovecot: Dovecot, directory: Path) -> None:
        self._dovecot = dovecot
        self._directory = directory
        self._made = 0
        self._running: dict[bool, tuple[World, contextlib.ExitStack]] = {}

    @contextlib.contextmanager
    def lend(self, *, hasty: bool) -> Iterator[World]:
        """Lend a world that is online; with ``hasty`` one whose timeout is `TIMEOUT`."""
        world = self._get(hasty)
        try:
            yield world
        except BaseException as error:
            _, stack = self._running.pop(hasty)
            stack.__exit__(type(error), error, error.__traceback__)
            raise

    def close(self) -> None:
        """End all of them."""
        with contextlib.ExitStack() as closing:
            for _, stack in self._running.values():
                closing.push(stack)

    def _get(self, hasty: bool) -> World:
        if hasty not in self._running:
            self._made += 1
            with contextlib.ExitStack() as stack:
                name = f"faults{self._made}"
                made = made_world(self._dovecot.account(name), self._directory / name, hasty=hasty)
                self._running[hasty] = stack.enter_context(made), stack.pop_all()
        return self._running[hasty][0]


@pytest.fixture(scope="module")
def worlds(dovecot: Dovecot, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worlds]:
    made = Worlds(dovecot, tmp_path_factory.mktemp("faults"))
    yield made
    made.close()


# -- what is done at each stage


Request = Callable[[], object]


def reading(world: World) -> tuple[Request, Request]:
    """Read a message; it has every byte in the end."""
    path = world.large.pop()

    def right() -> None:
        assert path.read_bytes() == plain(number_of(path), LARGE)

    return path.read_bytes, right


def number_of(path: Path) -> int:
    return int(path.name.split(".")[-2])


def listing_all(world: World) -> tuple[Request, Request]:
    """List the mountpoint until a mailbox that is new is there."""
    path = world.mount.path / f"new{next(world.numbers)}"
    with world.user.client() as client:
        client.create(path.name)

    def listed() -> bool:
        return path.name in os.listdir(world.mount.path)

    return lambda: wait_until(listed, "the new mailbox is listed"), listed


def listing(world: World) -> tuple[Request, Request]:
    path = world.mailboxes.pop()

    def right() -> None:
        assert contents(path) == {1: plain(1)}

    return lambda: os.listdir(path), right


def counting(world: World) -> tuple[Request, Request]:
    path = world.mailboxes.pop()

    def right() -> None:
        assert os.getxattr(path, "user.imap.messages") == b"1"

    return lambda: os.getxattr(path, "user.imap.messages"), right


def copying(world: World, *, sync: bool = False) -> tuple[Request, Request]:
    """cp, perhaps with fsync; the message is on the server once in the end."""
    number = next(world.numbers)
    path = world.mount.path / "Work" / f"{number}.eml"

    def copy() -> None:
        with path.open("wb", buffering=0) as file:
            file.write(plain(number, LARGE))
        if sync:
            with path.open("rb") as file:
                os.fsync(file.fileno())

    def right() -> None:
        settle(world.mount)
        wait_until(lambda: world.mount.status()["waiting"] == [], "everything is sent")
        assert [m.content for m in held(world.user, "Work").values()].count(plain(number, LARGE)) == 1
        assert path.read_bytes() == plain(number, LARGE)

    return copy, right


def moving(world: World) -> tuple[Request, Request]:
    """mv; the message is in one of the two places in the end, and the mount shows it there."""
    path = world.small.pop()
    content = plain(number_of(path))
    target = world.mount.path / "Work" / path.name

    def right() -> None:
        (place,) = [
            mailbox
            for mailbox in ("Small", "Work")
            for message in held(world.user, mailbox).values()
            if message.content == content
        ]
        there = world.mount.path / place
        wait_until(
            lambda: content in [path.read_bytes() for path in there.iterdir()], "it is shown where it is"
        )

    return lambda: path.rename(target), right


@dataclass(frozen=True)
class Stage:
    """Where the faults of a stage are put: at a point of a command."""

    prepare: Callable[[World], tuple[Request, Request]]
    point: Point
    command: bytes = b""
    after: int = 0


AT = {
    "connect": Stage(reading, "connect"),
    "greeting": Stage(reading, "greeting"),
    "login": Stage(reading, "command", b"AUTHENTICATE"),
    "list": Stage(listing_all, "command", b"LIST"),
    "select": Stage(listing, "command", b"EXAMINE"),
    "status": Stage(counting, "command", b"STATUS"),
    "fetch": Stage(reading, "literal", rb"UID FETCH .*BODY.PEEK\[\]", 5000),
    "append": Stage(copying, "upload", b"APPEND", 5000),
    "fsync": Stage(lambda world: copying(world, sync=True), "answer", b"APPEND"),
    "move": Stage(moving, "command", b"UID MOVE"),
    "moved": Stage(moving, "answer", b"UID MOVE"),
}


@contextlib.contextmanager
def fault(world: World, stage: Stage, what: str) -> Iterator[None]:
    """Have it go wrong once, or for as long as the block lasts where it is a matter of how."""
    proxy = world.proxy
    connecting = stage.point in {"connect", "greeting"} or stage.command == b"AUTHENTICATE"
    # The mount connects again by itself, perhaps before anybody asks for something.
    times = None if connecting else 1
    match what:
        case "refuse":
            proxy.refuse()
        case "trickle":
            proxy.bandwidth = 10_000
        case "delay":
            proxy.latency = 0.15
        case "cut" | "close" | "half-close" | "corrupt" | "stall":
            made = proxy.fault(stage.command, what, at=stage.point, after=stage.after, times=times)
        case "alert":
            made = proxy.fault(stage.command, ALERT, at=stage.point, times=times)
    if connecting:
        proxy.cut_all()
    try:
        yield
        if what not in {"refuse", "trickle", "delay"}:
            made.wait_hit()
    finally:
        proxy.bandwidth, proxy.latency = None, 0.0
        proxy.accept()
        proxy.resume()
        if what not in {"refuse", "trickle", "delay"}:
            made.cancel()


def outcome(request: Request) -> int:
    """Return the errno that a request fails with, 0 if it does not."""
    try:
        request()
    except OSError as error:
        return error.errno or -1
    return 0


@pytest.mark.parametrize(
    ("stage", "what"), [pytest.param(s, f, id=f"{s}-{f}") for s, seen in MATRIX.items() for f in seen]
)
def test_fault(worlds: Worlds, stage: str, what: str) -> None:
    with worlds.lend(hasty=what in SILENT) as world:
        world.recover()
        request, right = AT[stage].prepare(world)
        with fault(world, AT[stage], what):
            seen = outcome(request)
            # What is cached is served whatever happens.
            assert world.cached.read_bytes() == plain(0)
            assert world.cached.name in os.listdir(world.inbox)
        assert seen in ERRORS[MATRIX[stage][what]], errno.errorcode.get(seen, seen)
        world.recover()
        world.see(right)


# -- the server itself


def test_while_the_server_stands_still_one_request_waits_and_no_other(worlds: Worlds) -> None:
    """SIGSTOP: after one timeout the mount knows; EHOSTUNREACH, not ETIMEDOUT, says that nobody waited."""
    with worlds.lend(hasty=True) as world:
        world.recover()
        paths = [world.large.pop() for _ in range(2)]
        world.proxy.stall()
        try:
            assert outcome(paths[0].read_bytes) == errno.ETIMEDOUT
            wait_until(lambda: world.state() == "offline", "the mount knows that it is offline")
            for _ in range(20):
                assert outcome(paths[1].read_bytes) == errno.EHOSTUNREACH
                assert world.cached.read_bytes() == plain(0)
                assert world.cached.name in os.listdir(world.inbox)
            status = world.mount.status()
            assert "did not" in status["reason"]
            assert status["retry_in"] is not None
            assert status["retry_at"] is not None
        finally:
            world.proxy.resume()
        world.recover()
        for path in paths:
            world.see(path.read_bytes)
            assert path.read_bytes() == plain(number_of(path), LARGE)


@pytest.mark.parametrize("how", ["SIGSTOP", "SIGKILL"])
def test_server_process(ca: CertificateAuthority, tmp_path: Path, how: Literal["SIGSTOP", "SIGKILL"]) -> None:
    """A server that is stopped, or killed and started again: files that are written meanwhile are sent."""
    hasty = ("--timeout", str(TIMEOUT)) if how == "SIGSTOP" else ()
    with Dovecot(ca) as server, Proxy(server) as proxy:
        user = server.account("alice")
        account = proxy.account(user)
        user.deliver("INBOX", [(plain(n), DATE, "") for n in range(2)])
        with Mount(account, tmp_path / "first", "--fetch-ahead", "0") as looked:
            names = [path.name for _, path in sorted(shown(looked.path / "INBOX").items())]
            assert (looked.path / "INBOX" / names[0]).read_bytes() == plain(0)
        with RobustMount(account, tmp_path / "m", *hasty, cache=looked.cache) as mount:
            inbox = mount.path / "INBOX"
            first, second = (inbox / name for name in names)
            assert first.read_bytes() == plain(0)
            server.stop() if how == "SIGKILL" else server.freeze()
            assert outcome(second.read_bytes) in {errno.ETIMEDOUT, errno.EHOSTUNREACH}
            wait_until(lambda: mount.status()["state"] == "offline", "offline")
            (inbox / "new.eml").write_bytes(plain(9))
            assert (inbox / "new.eml").read_bytes() == plain(9)
            assert first.read_bytes() == plain(0)
            server.start_again() if how == "SIGKILL" else server.thaw()
            wait_until(lambda: mount.status()["waiting"] == [], "what was written is sent by itself")
            assert mount.status()["state"] == "online"
            assert second.read_bytes() == plain(1)
            assert sorted(served(user).values()) == sorted(plain(n) for n in (0, 1, 9))


# -- what is told without being asked


@pytest.mark.parametrize("what", ["cut", "close", "half-close", "corrupt", "stall"])
def test_fault_while_changes_are_watched(
    dovecot: Dovecot, tmp_path: Path, what: Literal["cut", "close", "half-close", "corrupt", "stall"]
) -> None:
    """Nobody sees an error, changes are shown meanwhile, and are told again soon."""
    user = dovecot.account(f"watched-{what}")
    user.deliver("INBOX", [(plain(0), DATE, "")])
    hasty = ("--timeout", str(TIMEOUT)) if what in SILENT else ()
    with Proxy(dovecot) as proxy:
        with Mount(proxy.account(user), tmp_path / "first") as first:
            assert contents(first.path / "INBOX") == {1: plain(0)}
        made = proxy.fault(b"IDLE", what)
        with RobustMount(proxy.account(user), tmp_path / "m", *hasty, cache=first.cache) as mount:
            inbox = mount.path / "INBOX"
            made.wait_hit()
            user.deliver("INBOX", [(plain(1), DATE, "")])
            wait_until(lambda: sorted(contents(inbox)) == [1, 2], "the change is shown")
            proxy.wait_for_command(b"IDLE", 2)
            wait_until(lambda: mount.status()["push"]["by"] == "notify", "changes are told again")
            assert mount.status()["state"] == "online"
