"""Connections that break and daemons that are killed around each command that changes something.

Whatever happens, every message is on the server exactly once in the end, and what the program was told is so.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from tests.mail import plain
from tests.mailboxes import Held, everything, file_of, in_order, mailboxes, settle, waiting
from tests.mounting import DEADLINE, Mount, Mounter, wait_until
from tests.servers.dovecot import Account
from tests.servers.proxy import Fault, Point, Proxy

DATE = 1_700_000_000
LATER = 1_750_000_000
SEEN = frozenset({"\\Seen"})
OLD = Held(plain(1), DATE, SEEN)
OTHER = Held(plain(2), DATE + 1, SEEN)
NEW = Held(plain(9), LATER, frozenset())
EDITED = Held(plain(1) + b"edited\r\n", DATE, SEEN)

Contents = dict[str, list[Held]]
Operation = Callable[[Mount], object]
Way = Literal["cut once", "cut twice", "kill"]


def contents(**mailboxes: Sequence[Held]) -> Contents:
    """What `everything` returns for these messages."""
    return {name: in_order(*messages) for name, messages in mailboxes.items() if messages}


BEFORE = contents(INBOX=[OLD, OTHER])


def move(mount: Mount) -> None:
    os.rename(file_of(mount, 1), mount.path / "Work" / "moved.eml")


def remove(mount: Mount) -> None:
    os.unlink(file_of(mount, 1))


def flag(mount: Mount) -> None:
    os.setxattr(file_of(mount, 1), "user.imap.flags", b"$Work")


def copy_in(mount: Mount) -> None:
    path = mount.path / "INBOX" / "new.eml"
    path.write_bytes(NEW.content)
    os.utime(path, (LATER, LATER))


def copy_in_and_wait(mount: Mount) -> None:
    """Copy a file in under a temporary name first, as rsync does: the rename waits for the server."""
    path = mount.path / "INBOX" / ".new.eml.Xy1"
    path.write_bytes(NEW.content)
    os.utime(path, (LATER, LATER))
    os.rename(path, mount.path / "INBOX" / "new.eml")


def edit(mount: Mount) -> None:
    with open(file_of(mount, 1), "ab") as file:
        file.write(b"edited\r\n")


def replace(mount: Mount) -> None:
    path = mount.path / "INBOX" / "tmp123"
    path.write_bytes(EDITED.content)
    os.rename(path, file_of(mount, 1))


@dataclass(frozen=True)
class Case:
    """``after`` is what the server holds when ``operation`` was carried out, ``partly`` when it failed."""

    name: str
    operation: Operation
    command: bytes
    after: Contents
    partly: tuple[Contents, ...] = ()
    hide: tuple[str, ...] = ()
    arguments: tuple[str, ...] = ()

    @property
    def points(self) -> tuple[Point, ...]:
        return ("command", "upload", "answer") if self.command == b"APPEND" else ("command", "answer")


def marked(message: Held) -> Held:
    return message._replace(flags=message.flags | {"\\Deleted"})


MOVED = contents(INBOX=[OTHER], Work=[OLD])
MOVED_MARKED = contents(INBOX=[marked(OLD), OTHER], Work=[OLD])
TRASHED = contents(INBOX=[OTHER], Trash=[OLD])
DELETED = contents(INBOX=[OTHER])
MARKED = contents(INBOX=[marked(OLD), OTHER])
ADDED = contents(INBOX=[OLD, OTHER, NEW])
REPLACED = contents(INBOX=[EDITED, OTHER], Trash=[OLD])
NO_MOVE = ("MOVE",)
NEITHER = ("MOVE", "UIDPLUS")
EXPUNGE = ("--delete", "expunge")

CASES = [
    Case("mv", move, b"UID MOVE", MOVED),
    Case("mv by copy", move, b"UID COPY", MOVED, hide=NO_MOVE),
    Case("mv by copy", move, b"UID STORE", MOVED, hide=NO_MOVE),
    Case("mv by copy", move, b"UID EXPUNGE", MOVED, hide=NO_MOVE),
    Case("mv without UIDPLUS", move, b"UID COPY", MOVED_MARKED, hide=NEITHER),
    Case("mv without UIDPLUS", move, b"UID STORE", MOVED_MARKED, hide=NEITHER),
    Case("rm", remove, b"UID MOVE", TRASHED),
    Case("rm by copy", remove, b"UID EXPUNGE", TRASHED, hide=NO_MOVE),
    Case("rm for good", remove, b"UID STORE", DELETED, (MARKED,), arguments=EXPUNGE),
    Case("rm for good", remove, b"UID EXPUNGE", DELETED, (MARKED,), arguments=EXPUNGE),
    Case("flag", flag, b"UID STORE .*\\+FLAGS",
         contents(INBOX=[OLD._replace(flags=frozenset({"$Work"})), OTHER]),
         (contents(INBOX=[OLD._replace(flags=frozenset({"$Work", "\\Seen"})), OTHER]),)),
    Case("flag", flag, b"UID STORE .*-FLAGS",
         contents(INBOX=[OLD._replace(flags=frozenset({"$Work"})), OTHER]),
         (contents(INBOX=[OLD._replace(flags=frozenset({"$Work", "\\Seen"})), OTHER]),)),
    Case("cp", copy_in, b"APPEND", ADDED),
    Case("cp without UIDPLUS", copy_in, b"APPEND", ADDED, hide=("UIDPLUS",)),
    Case("cp without LITERAL+", copy_in, b"APPEND", ADDED, hide=("LITERAL+", "LITERAL-")),
    Case("rsync", copy_in_and_wait, b"APPEND", ADDED),
    Case("edit", edit, b"APPEND", REPLACED),
    Case("edit", edit, b"UID MOVE", REPLACED),
    Case("edit by copy", edit, b"UID COPY", REPLACED, hide=NO_MOVE),
    Case("edit by copy", edit, b"UID EXPUNGE", REPLACED, hide=NO_MOVE),
    Case("replace", replace, b"APPEND", REPLACED),
    Case("replace", replace, b"UID MOVE", REPLACED),
]  # fmt: skip


def each(ways: Sequence[Way]) -> list[object]:
    return [
        pytest.param(case, point, way, id=f"{case.name}-{case.command.decode().split('.')[0]}-{point}-{way}")
        for case in CASES
        for point in case.points
        for way in ways
    ]


@pytest.fixture
def proxies(user: Account) -> Iterator[Callable[..., Proxy]]:
    with contextlib.ExitStack() as stack:
        yield lambda hide=(): stack.enter_context(Proxy(user.server, hide=hide))


def deliver(user: Account) -> None:
    user.deliver("INBOX", [(m.content, m.date, "S") for m in (OLD, OTHER)])
    user.deliver("Work", [])


def arm(proxy: Proxy, command: bytes, point: Point, action: Literal["cut", "stall"], times: int) -> Fault:
    after = len(NEW.content) // 2 if point == "upload" else 0
    return proxy.fault(command, action, at=point, times=times, after=after)


def outcome(operation: Operation, mount: Mount) -> OSError | None:
    try:
        operation(mount)
    except OSError as error:
        return error
    return None


@contextlib.contextmanager
def in_background(operation: Operation, mount: Mount) -> Iterator[Future[OSError | None]]:
    with ThreadPoolExecutor(1) as executor:
        yield executor.submit(outcome, operation, mount)


def kill_within(fault: Fault, proxy: Proxy, operation: Operation, mount: Mount) -> None:
    """SIGKILL the daemon while ``fault`` holds a command of ``operation``; the server hears no more of it."""
    with in_background(operation, mount):
        fault.wait_hit()
        mount.kill()
        proxy.cut_all()
    fault.cancel()
    proxy.resume()


def drain(mount: Mount) -> None:
    """Wait until nothing is waiting to be sent."""

    def done() -> bool:
        settle(mount)
        return not waiting(mount)

    wait_until(done, "everything is sent")


def shown(mount: Mount) -> dict[str, list[bytes]]:
    """Return the bytes of all files by directory."""
    found: dict[str, list[bytes]] = {}
    for directory, _, names in os.walk(mount.path):
        if names:
            found[os.path.relpath(directory, mount.path)] = sorted(
                Path(directory, name).read_bytes() for name in names
            )
    return found


def visible(held: Contents) -> dict[str, list[bytes]]:
    """Return what `shown` should: a message that could only be marked as deleted is hidden."""
    found = {
        name: sorted(m.content for m in messages if "\\Deleted" not in m.flags)
        for name, messages in held.items()
    }
    return {name: messages for name, messages in found.items() if messages}


@pytest.mark.parametrize(("case", "point", "way"), each(["cut once", "cut twice"]))
def test_a_connection_cut_neither_loses_nor_doubles(
    user: Account, mount: Mounter, proxies: Callable[..., Proxy], case: Case, point: Point, way: Way
) -> None:
    deliver(user)
    proxy = proxies(case.hide)
    mounted = mount(proxy.account(user), *case.arguments)
    assert len(os.listdir(mounted.path / "INBOX")) == 2
    fault = arm(proxy, case.command, point, "cut", 1 if way == "cut once" else 2)
    error = outcome(case.operation, mounted)
    fault.wait_hit()
    drain(mounted)
    fault.cancel()
    mounted.unmount()
    found = everything(user)
    if error is None:
        assert found == case.after
    else:
        assert found in (BEFORE, case.after, *case.partly), error
    again = mount(proxy.account(user), *case.arguments, cache=mounted.cache)
    settle(again)
    if error is None or found == case.after:
        assert shown(again) == visible(found)


@pytest.mark.parametrize(("case", "point", "way"), each(["kill"]))
def test_a_kill_neither_loses_nor_doubles(
    user: Account, mount: Mounter, proxies: Callable[..., Proxy], case: Case, point: Point, way: Way
) -> None:
    deliver(user)
    proxy = proxies(case.hide)
    killed = mount(proxy.account(user), *case.arguments)
    assert len(os.listdir(killed.path / "INBOX")) == 2
    kill_within(arm(proxy, case.command, point, "stall", 1), proxy, case.operation, killed)
    mounted = mount(proxy.account(user), *case.arguments, cache=killed.cache)
    # What the person looks at first must not decide what becomes of an upload.
    shown(mounted)
    drain(mounted)
    mounted.unmount()
    found = everything(user)
    if case.operation in (copy_in, edit):
        # The program was told that it is safe.
        assert found == case.after
    else:
        assert found in (BEFORE, case.after, *case.partly)
