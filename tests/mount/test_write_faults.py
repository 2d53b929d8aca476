"""Connections that break and daemons that are killed around each command that changes something.

Whatever happens, every message is on the server exactly once in the end, and what the program was told is so.
"""

import contextlib
import errno
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from tests.support.mail import plain
from tests.support.mailboxes import Held, everything, file_of, in_order, mailboxes, settle, waiting
from tests.support.mounting import DEADLINE, Mount, Mounter, wait_until
from tests.support.servers.dovecot import Account
from tests.support.servers.proxy import Fault, Point, Proxy

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
    ways: tuple[Way, ...] = ("cut once", "cut twice", "kill")

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

ONCE: tuple[Way, ...] = ("cut once",)
TWICE: tuple[Way, ...] = ("cut twice",)
KILL: tuple[Way, ...] = ("kill",)
FLAGGED = contents(INBOX=[OLD._replace(flags=frozenset({"$Work"})), OTHER])
HALF_FLAGGED = contents(INBOX=[OLD._replace(flags=frozenset({"$Work", "\\Seen"})), OTHER])

CASES = [
    Case("mv", move, b"UID MOVE", MOVED),
    Case("mv by copy", move, b"UID COPY", MOVED, hide=NO_MOVE, ways=TWICE + KILL),
    Case("mv by copy", move, b"UID STORE", MOVED, hide=NO_MOVE, ways=TWICE + KILL),
    Case("mv by copy", move, b"UID EXPUNGE", MOVED, hide=NO_MOVE, ways=TWICE + KILL),
    Case("mv without UIDPLUS", move, b"UID COPY", MOVED_MARKED, hide=NEITHER, ways=TWICE + KILL),
    Case("mv without UIDPLUS", move, b"UID STORE", MOVED_MARKED, hide=NEITHER, ways=TWICE + KILL),
    Case("rm", remove, b"UID MOVE", TRASHED, ways=TWICE + KILL),
    Case("rm by copy", remove, b"UID EXPUNGE", TRASHED, hide=NO_MOVE, ways=TWICE),
    Case("rm for good", remove, b"UID STORE", DELETED, (MARKED,), arguments=EXPUNGE, ways=TWICE + KILL),
    Case("rm for good", remove, b"UID EXPUNGE", DELETED, (MARKED,), arguments=EXPUNGE, ways=TWICE + KILL),
    Case("flag", flag, b"UID STORE .*\\+FLAGS", FLAGGED, (HALF_FLAGGED,), ways=ONCE + TWICE),
    Case("unflag", flag, b"UID STORE .*-FLAGS", FLAGGED, (HALF_FLAGGED,), ways=TWICE),
    Case("cp", copy_in, b"APPEND", ADDED),
    Case("cp without UIDPLUS", copy_in, b"APPEND", ADDED, hide=("UIDPLUS",), ways=ONCE + KILL),
    Case("cp without LITERAL+", copy_in, b"APPEND", ADDED, hide=("LITERAL+", "LITERAL-"), ways=ONCE),
    Case("rsync", copy_in_and_wait, b"APPEND", ADDED, ways=TWICE),
    Case("edit", edit, b"APPEND", REPLACED, ways=ONCE + KILL),
    Case("edit", edit, b"UID MOVE", REPLACED, ways=TWICE + KILL),
    Case("edit by copy", edit, b"UID COPY", REPLACED, hide=NO_MOVE, ways=KILL),
    Case("edit by copy", edit, b"UID EXPUNGE", REPLACED, hide=NO_MOVE, ways=KILL),
    Case("replace", replace, b"APPEND", REPLACED, ways=KILL),
    Case("replace", replace, b"UID MOVE", REPLACED, ways=TWICE + KILL),
]


def each(ways: Sequence[Way]) -> list[object]:
    return [
        pytest.param(case, point, way, id=f"{case.name}-{case.command.decode().split('.')[0]}-{point}-{way}")
        for case in CASES
        for point in case.points
        for way in ways
        if way in case.ways
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
        left = waiting(mount)
        assert not [one for one in left if one[1] == "unsent"], left
        return not left

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
    # What the person looks at first must not decide what becomes of an upload. What was uploaded is shown
    # twice until it is proven to be one message.
    with contextlib.suppress(FileNotFoundError):
        shown(mounted)
    drain(mounted)
    mounted.unmount()
    found = everything(user)
    if case.operation in (copy_in, edit):
        # The program was told that it is safe.
        assert found == case.after
    else:
        assert found in (BEFORE, case.after, *case.partly)


# ---- What only a certain order of events brings about


@pytest.fixture
def proxy(user: Account) -> Iterator[Proxy]:
    with Proxy(user.server) as made:
        yield made


def inbox(mount: Mount, name: str) -> Path:
    return mount.path / "INBOX" / name


def spool_of(mount: Mount) -> Path:
    (found,) = mount.cache.glob("*/spool")
    return found


def states_in_spool(mount: Mount) -> list[str]:
    """Return the states of the drafts on disk."""
    found = []
    for path in spool_of(mount).glob("*.json"):
        # It may be finished just now.
        with contextlib.suppress(FileNotFoundError):
            found.append(json.loads(path.read_text())["state"])
    return found


def text(number: int) -> Held:
    return Held(plain(number), LATER)


def put(path: Path, message: Held) -> None:
    path.write_bytes(message.content)
    os.utime(path, (message.date, message.date))


def of(account: Account) -> dict[str, list[bytes]]:
    """Return the bytes of all messages, where dates do not matter."""
    return {name: sorted(m.content for m in messages) for name, messages in everything(account).items()}


@pytest.mark.parametrize("point", ["command", "upload", "answer"])
@pytest.mark.parametrize("cut", ["both", "first", "second"])
def test_one_of_two_identical_files_cut_off(user: Account, mount: Mounter, point: Point, cut: str) -> None:
    with Proxy(user.server, hide=() if cut == "both" else ("MULTIAPPEND",)) as proxy:
        mounted = mount(proxy.account(user))
        after = 100 if point == "upload" else 0
        fault = proxy.fault(b"APPEND", "cut", at=point, nth=2 if cut == "second" else 1, after=after)
        for name in ("one.eml", "two.eml"):
            put(inbox(mounted, name), NEW)
        settle(mounted)
        fault.wait_hit()
        drain(mounted)
        assert sorted(os.listdir(mounted.path / "INBOX")) == ["one.eml", "two.eml"]
        mounted.unmount()
    assert everything(user) == {"INBOX": [NEW, NEW]}


def test_an_upload_is_found_again_though_the_directory_was_listed_first(
    user: Account, mount: Mounter, proxy: Proxy
) -> None:
    killed = mount(proxy.account(user))
    kill_within(
        proxy.fault(b"APPEND", "stall", at="answer"), proxy, lambda m: put(inbox(m, "new.eml"), NEW), killed
    )
    looked = proxy.fault(rb"UID FETCH \d+ \(UID BODY", "cut", times=None)
    mounted = mount(proxy.account(user), cache=killed.cache)
    looked.wait_hit()
    # Shown twice until the two are known to be one: it might be another message.
    wait_until(lambda: len(os.listdir(mounted.path / "INBOX")) == 2, "both are shown")
    looked.cancel()
    drain(mounted)
    assert os.listdir(mounted.path / "INBOX") == ["new.eml"]
    mounted.unmount()
    assert everything(user) == {"INBOX": [NEW]}


@pytest.mark.parametrize("changed", [False, True])
def test_an_edit_that_was_not_sent_before_the_end(
    user: Account, mount: Mounter, proxy: Proxy, changed: bool
) -> None:
    deliver(user)
    killed = mount(proxy.account(user))
    path = file_of(killed, 1)
    assert path.read_bytes() == OLD.content
    proxy.stall()
    path.write_bytes(EDITED.content if changed else OLD.content)
    # The kernel tells of the end of a file only after close() has returned.
    wait_until(lambda: "open" not in states_in_spool(killed), "closed")
    killed.kill()
    proxy.cut_all()
    proxy.resume()
    mounted = mount(proxy.account(user), cache=killed.cache)
    drain(mounted)
    mounted.unmount()
    assert everything(user) == (REPLACED if changed else BEFORE)


@pytest.mark.parametrize("left_by", ["this version", "an earlier version"])
def test_a_removal_that_is_still_owed_is_made_by_the_next_mount(
    user: Account, mount: Mounter, proxy: Proxy, left_by: str
) -> None:
    deliver(user)
    killed = mount(proxy.account(user))
    assert len(os.listdir(killed.path / "INBOX")) == 2
    kill_within(arm(proxy, b"UID MOVE", "command", "stall", 1), proxy, edit, killed)
    assert everything(user) == contents(INBOX=[OLD, OTHER, EDITED])
    journal = spool_of(killed).parent / "journal.json"
    (line,) = [line for line in journal.read_text().splitlines() if "removal" in line]
    assert not list(spool_of(killed).glob("[0-9]*")), "nothing of it is in the spool"
    if left_by == "an earlier version":
        base = {**json.loads(line)["add"]["removal"], "date": OLD.date, "zone": 0}
        note = {"path": ["INBOX"], "name": "", "parent": 1, "state": "sent", "base": base}
        (spool_of(killed) / "9.json").write_text(json.dumps(note))
        journal.unlink()
    mounted = mount(proxy.account(user), cache=killed.cache)
    assert shown(mounted)["INBOX"] == sorted([OTHER.content, EDITED.content]), "the old version is not shown"
    mounted.unmount()
    assert everything(user) == REPLACED
    assert not journal.exists()
    assert not list(spool_of(mounted).glob("[0-9]*"))


def test_what_an_earlier_version_began_to_upload_is_looked_for(
    user: Account, mount: Mounter, proxy: Proxy
) -> None:
    """It has its note in the description of the file, with a digest of other bytes."""
    killed = mount(proxy.account(user))
    kill_within(
        proxy.fault(b"APPEND", "stall", at="answer"), proxy, lambda m: put(inbox(m, "new.eml"), NEW), killed
    )
    journal = spool_of(killed).parent / "journal.json"
    (line,) = [line for line in journal.read_text().splitlines() if line]
    note = json.loads(line)["add"]["upload"]
    del note["file"], note["message_id"]
    note["digest"] = hashlib.sha256(NEW.content.rstrip(b"\r\n")).hexdigest()
    journal.unlink()
    (description,) = spool_of(killed).glob("*.json")
    description.write_text(json.dumps({**json.loads(description.read_text()), "attempt": note}))
    mounted = mount(proxy.account(user), cache=killed.cache)
    drain(mounted)
    mounted.unmount()
    assert everything(user) == {"INBOX": [NEW]}


def test_a_file_written_to_while_it_is_sent(user: Account, mount: Mounter, proxy: Proxy) -> None:
    mounted = mount(proxy.account(user))
    fault = proxy.fault(b"APPEND", "stall", at="answer")
    path = inbox(mounted, "new.eml")
    path.write_bytes(NEW.content)
    fault.wait_hit()
    with open(path, "ab") as file:
        file.write(b"more\n")
        file.flush()
        proxy.resume()
        proxy.wait_for_command(b"UID FETCH")
        file.write(b"and more\n")
    drain(mounted)
    assert path.read_bytes() == NEW.content + b"more\r\nand more\r\n"
    mounted.unmount()
    found = of(user)
    assert found["INBOX"] == [NEW.content + b"more\r\nand more\r\n"]
    assert NEW.content in found["Trash"]


@pytest.mark.parametrize("large", [False, True])
def test_a_file_truncated_while_it_is_sent(user: Account, mount: Mounter, proxy: Proxy, large: bool) -> None:
    first = plain(5, 3_000_000) if large else plain(5)
    mounted = mount(proxy.account(user))
    fault = proxy.fault(b"APPEND", "stall", at="upload", after=1000)
    path = inbox(mounted, "new.eml")
    path.write_bytes(first)
    fault.wait_hit()
    path.write_bytes(NEW.content)
    proxy.resume()
    drain(mounted)
    mounted.unmount()
    assert of(user) == {"INBOX": [NEW.content], "Trash": [first]}


def test_a_file_written_anew_when_it_is_not_known_whether_it_was_sent(
    user: Account, mount: Mounter, proxy: Proxy
) -> None:
    mounted = mount(proxy.account(user))
    path = inbox(mounted, "new.eml")
    fault = proxy.fault(b"APPEND", "cut", at="answer")
    looks = proxy.fault(rb"UID FETCH \d+ \(UID BODY", "cut", times=None)
    path.write_bytes(plain(5))
    fault.wait_hit()
    path.write_bytes(NEW.content)
    looks.cancel()
    drain(mounted)
    mounted.unmount()
    assert of(user) == {"INBOX": [NEW.content], "Trash": [plain(5)]}


@pytest.mark.parametrize("point", ["command", "upload", "answer"])
@pytest.mark.parametrize("what", ["rename", "move", "remove", "replace"])
def test_a_file_is_moved_or_deleted_while_it_is_sent(
    user: Account, mount: Mounter, proxy: Proxy, point: Point, what: str
) -> None:
    user.deliver("Work", [])
    mounted = mount(proxy.account(user))
    other = inbox(mounted, "other.eml")
    put(other, text(7))
    drain(mounted)
    fault = proxy.fault(b"APPEND", "stall", at=point, after=100 if point == "upload" else 0)
    path = inbox(mounted, "new.eml")
    put(path, text(8))
    fault.wait_hit()
    operations: dict[str, Operation] = {
        "rename": lambda _: os.rename(path, inbox(mounted, "renamed.eml")),
        "move": lambda _: os.rename(path, mounted.path / "Work" / "new.eml"),
        "remove": lambda _: os.unlink(path),
        "replace": lambda _: os.rename(other, path),
    }
    with in_background(operations[what], mounted) as done:
        proxy.resume()
        assert done.result(DEADLINE) is None
    drain(mounted)
    names = {directory: sorted(os.listdir(mounted.path / directory)) for directory in ("INBOX", "Work")}
    mounted.unmount()
    expected: dict[str, tuple[dict[str, list[str]], Contents]] = {
        "rename": (
            {"INBOX": ["other.eml", "renamed.eml"], "Work": []},
            contents(INBOX=[text(7), text(8)]),
        ),
        "move": (
            {"INBOX": ["other.eml"], "Work": ["new.eml"]},
            contents(INBOX=[text(7)], Work=[text(8)]),
        ),
        "remove": ({"INBOX": ["other.eml"], "Work": []}, contents(INBOX=[text(7)], Trash=[text(8)])),
        "replace": ({"INBOX": ["new.eml"], "Work": []}, contents(INBOX=[text(7)], Trash=[text(8)])),
    }
    assert names == expected[what][0]
    assert everything(user) == expected[what][1]


@pytest.mark.parametrize("what", ["move", "remove"])
@pytest.mark.parametrize("executed", [False, True])
def test_a_file_of_which_it_is_not_known_whether_it_was_sent(
    user: Account, mount: Mounter, proxy: Proxy, what: str, executed: bool
) -> None:
    user.deliver("Work", [])
    mounted = mount(proxy.account(user), expected_log=["offline"])
    path = inbox(mounted, "new.eml")
    fault = proxy.fault(b"APPEND", "stall", at="answer" if executed else "command")
    put(path, NEW)
    fault.wait_hit()
    proxy.refuse()
    proxy.cut_all()
    proxy.resume()

    def operation(_: Mount) -> None:
        if what == "move":
            os.rename(path, mounted.path / "Work" / "new.eml")
        else:
            os.unlink(path)

    # Nobody can say what there is to be moved or deleted.
    error = outcome(operation, mounted)
    assert error is not None
    assert error.errno == errno.EHOSTUNREACH
    assert path.read_bytes() == NEW.content
    proxy.accept()
    drain(mounted)
    assert outcome(operation, mounted) is None
    mounted.unmount()
    assert everything(user) == {"Work" if what == "move" else "Trash": [NEW]}


def test_one_of_two_identical_messages_moved_by_copy_and_a_kill(
    user: Account, mount: Mounter, proxies: Callable[..., Proxy]
) -> None:
    user.deliver("INBOX", [(OLD.content, DATE, "S")] * 2)
    user.deliver("Work", [])
    proxy = proxies(NO_MOVE)
    killed = mount(proxy.account(user))
    os.rename(file_of(killed, 1), killed.path / "Work" / "1.eml")
    second = file_of(killed, 2)
    fault = proxy.fault(b"UID COPY", "stall")
    kill_within(fault, proxy, lambda m: os.rename(second, m.path / "Work" / "2.eml"), killed)
    mounted = mount(proxy.account(user), cache=killed.cache)
    drain(mounted)
    mounted.unmount()
    assert everything(user) == contents(INBOX=[OLD], Work=[OLD])


def test_a_move_by_copy_tried_again_while_the_first_is_not_finished(
    user: Account, mount: Mounter, proxies: Callable[..., Proxy]
) -> None:
    deliver(user)
    proxy = proxies(NO_MOVE)
    mounted = mount(proxy.account(user))
    path = file_of(mounted, 1)
    fault = proxy.fault(b"UID STORE", "cut", times=None)
    for _ in range(2):
        assert outcome(lambda m: os.rename(path, m.path / "Work" / "moved.eml"), mounted) is not None
    fault.cancel()
    drain(mounted)
    mounted.unmount()
    assert everything(user) == MOVED


def test_flags_set_while_a_file_is_sent(user: Account, mount: Mounter, proxy: Proxy) -> None:
    mounted = mount(proxy.account(user))
    fault = proxy.fault(b"APPEND", "stall", at="answer")
    path = inbox(mounted, "new.eml")
    put(path, NEW)
    fault.wait_hit()
    os.setxattr(path, "user.imap.flags", b"\\Flagged")
    proxy.resume()
    drain(mounted)
    wait_until(
        lambda: everything(user) == {"INBOX": [NEW._replace(flags=frozenset({"\\Flagged"}))]}, "flagged"
    )
    mounted.unmount()


def test_a_directory_renamed_while_an_edit_in_it_is_sent(user: Account, mount: Mounter, proxy: Proxy) -> None:
    user.deliver("Work", [(OLD.content, OLD.date, "S")])
    mounted = mount(proxy.account(user))
    for point in ("command", "answer"):
        source, target = ("Work", "Home") if point == "command" else ("Home", "Work")
        (name,) = os.listdir(mounted.path / source)
        fault = proxy.fault(b"APPEND", "cut", at=point)
        with open(mounted.path / source / name, "ab") as file:
            file.write(b"edited\n")
        os.rename(mounted.path / source, mounted.path / target)
        drain(mounted)
        # The server may end the connection before it answers, as what was selected has another name.
        assert fault.hits or point == "answer"
        fault.cancel()
    mounted.unmount()
    once = OLD.content + b"edited\r\n"
    assert of(user) == {"Work": [once + b"edited\r\n"], "Trash": sorted([OLD.content, once])}


@pytest.mark.parametrize("target", ["OTHER", "new.eml", "scratch"])
def test_what_replaced_a_message_is_moved_before_it_was_sent(
    user: Account, mount: Mounter, proxy: Proxy, target: str
) -> None:
    deliver(user)
    mounted = mount(proxy.account(user))
    paths = {OLD.content: file_of(mounted, 1), OTHER.content: file_of(mounted, 2)}
    down = proxy.fault(b"APPEND", "cut", times=None)
    temporary = inbox(mounted, "tmp")
    temporary.write_bytes(EDITED.content)
    os.rename(temporary, paths[OLD.content])
    down.wait_hit()
    os.rename(paths[OLD.content], paths[OTHER.content] if target == "OTHER" else inbox(mounted, target))
    down.cancel()
    drain(mounted)
    mounted.unmount()
    expected = {"INBOX": [EDITED.content, OTHER.content], "Trash": [OLD.content]}
    if target == "OTHER":
        expected = {"INBOX": [EDITED.content], "Trash": [OLD.content, OTHER.content]}
    elif target == "scratch":
        expected = {"INBOX": [OTHER.content], "Trash": [OLD.content]}
    assert of(user) == {name: sorted(messages) for name, messages in expected.items()}


@pytest.mark.parametrize("source", ["message", "file"])
def test_what_was_to_be_replaced_stays_when_the_server_refuses(
    user: Account, mount: Mounter, proxy: Proxy, source: str
) -> None:
    deliver(user)
    mounted = mount(proxy.account(user), expected_log=["is not uploaded: .*OVERQUOTA"])
    full = proxy.fault(b"APPEND|UID MOVE", b"NO [OVERQUOTA] full", times=None)
    target = mounted.path / "Work" / "target.eml"
    put(target, NEW)
    settle(mounted)
    assert waiting(mounted) == [("Work/target.eml", "unsent")]
    path = file_of(mounted, 1)
    if source == "file":
        path = inbox(mounted, "tmp")
        put(path, text(5))
    with pytest.raises(OSError, match="quota"):
        os.rename(path, target)
    assert target.read_bytes() == NEW.content
    assert path.exists()
    full.cancel()
    os.setxattr(target, "user.imap.state", b"sending")
    drain(mounted)
    mounted.unmount()
    assert everything(user) == contents(INBOX=[OLD, OTHER], Work=[NEW])


def test_an_edit_stays_when_its_deletion_is_refused(user: Account, mount: Mounter, proxy: Proxy) -> None:
    deliver(user)
    mounted = mount(proxy.account(user), expected_log=["is not uploaded: .*OVERQUOTA"])
    path = file_of(mounted, 1)
    full = proxy.fault(b"APPEND|UID MOVE", b"NO [OVERQUOTA] full", times=None)
    path.write_bytes(EDITED.content)
    settle(mounted)
    with pytest.raises(OSError, match="quota"):
        path.unlink()
    assert path.read_bytes() == EDITED.content
    full.cancel()
    path.unlink()
    mounted.unmount()
    assert everything(user) == contents(INBOX=[OTHER], Trash=[OLD])


def test_a_file_that_was_being_written_is_not_sent_by_itself(
    user: Account, mount: Mounter, proxy: Proxy
) -> None:
    killed = mount(proxy.account(user))
    with contextlib.suppress(OSError), open(inbox(killed, "new.eml"), "wb", buffering=0) as file:
        file.write(NEW.content[:100])
        killed.kill()
    mounted = mount(proxy.account(user), cache=killed.cache)
    settle(mounted)
    assert waiting(mounted) == [("INBOX/new.eml", "unsent")]
    assert inbox(mounted, "new.eml").read_bytes() == NEW.content[:100]
    put(inbox(mounted, "new.eml"), NEW)
    drain(mounted)
    mounted.unmount()
    assert everything(user) == {"INBOX": [NEW]}


MAILBOX_CASES: list[tuple[str, bytes, Operation]] = [
    ("mkdir", b"CREATE", lambda m: os.mkdir(m.path / "Made")),
    ("rmdir", b"DELETE", lambda m: os.rmdir(m.path / "Empty")),
    ("rename", b"RENAME", lambda m: os.rename(m.path / "Full", m.path / "Made")),
]


@pytest.mark.parametrize("way", ["cut twice", "kill"])
@pytest.mark.parametrize("point", ["command", "answer"])
@pytest.mark.parametrize(("name", "command", "operation"), MAILBOX_CASES)
def test_a_change_of_mailboxes_cut_off(
    user: Account,
    mount: Mounter,
    proxy: Proxy,
    name: str,
    command: bytes,
    operation: Operation,
    point: Point,
    way: Way,
) -> None:
    user.deliver("Empty", [])
    user.deliver("Full", [(OLD.content, OLD.date, "S")])
    before = set(mailboxes(user))
    after = {
        "mkdir": before | {"Made"},
        "rmdir": before - {"Empty"},
        "rename": before - {"Full"} | {"Made"},
    }[name]
    mounted = mount(proxy.account(user))
    os.listdir(mounted.path / "Full")
    if way == "kill":
        kill_within(proxy.fault(command, "stall", at=point), proxy, operation, mounted)
        error: OSError | None = OSError()
    else:
        fault = proxy.fault(command, "cut", at=point, times=2)
        error = outcome(operation, mounted)
        fault.cancel()
        mounted.unmount()
    found = set(mailboxes(user))
    assert found == after or (error is not None and found == before)
    again = mount(user, cache=mounted.cache)
    assert set(os.listdir(again.path)) == found
    (full,) = [
        entry for entry in ("Full", "Made") if (again.path / entry / "").exists() and name != "mkdir"
    ] or ["Full"]
    assert [path.read_bytes() for path in (again.path / full).iterdir()] == [OLD.content]


# -- servers that were restored from a backup, and what is proven to be the known message


def restore(user: Account, mailbox: str, *messages: Held) -> None:
    """Let a mailbox be an older one, as after a restore: same UIDVALIDITY, other messages with its UIDs."""
    with user.client() as client:
        assert client.delete(mailbox)[0] == "OK"
        assert client.create(mailbox)[0] == "OK"
    keep_uidvalidity(user, mailbox)
    for message in messages:
        user.append(mailbox, message.content, message.date)


def keep_uidvalidity(user: Account, mailbox: str) -> None:
    user.server.doveadm("mailbox", "update", "-u", user.name, "--uid-validity", "4711", mailbox)


def shows(mount: Mount, mailbox: str, *messages: Held) -> None:
    """Wait until exactly these messages are shown in a mailbox."""

    def is_shown() -> bool:
        try:
            return shown(mount).get(mailbox) == sorted(m.content for m in messages)
        except OSError:
            return False  # what was listed is gone

    wait_until(is_shown, "all shown")


INNOCENT = Held(plain(7), LATER, frozenset())
MORE = Held(plain(8), LATER, frozenset())


@pytest.mark.parametrize("messages", [(INNOCENT,), (INNOCENT, MORE, NEW)], ids=["fewer", "more"])
def test_an_edit_that_waits_spares_the_message_that_has_the_old_uid_after_a_restore(
    user: Account, mount: Mounter, proxy: Proxy, messages: Sequence[Held]
) -> None:
    """At stake: an innocent message, which the waiting edit would replace and move to Trash."""
    user.deliver("x", [(m.content, m.date, "S") for m in (OLD, OTHER)])
    keep_uidvalidity(user, "x")
    killed = mount(proxy.account(user))
    path = file_of(killed, 1, "x")
    assert path.read_bytes() == OLD.content
    proxy.stall()
    path.write_bytes(EDITED.content)
    wait_until(lambda: [state for _, state in waiting(killed)] == ["sending"], "closed")
    killed.kill()
    proxy.cut_all()
    proxy.resume()
    restore(user, "x", *messages)
    mounted = mount(proxy.account(user), cache=killed.cache)
    drain(mounted)
    shows(mounted, "x", *messages, EDITED)
    # Unless the mailbox was being listed again just then.
    if "both stay" in mounted.log_text():
        mounted.expect_log("edited here is not removed, both stay")
    mounted.unmount()
    assert everything(user) == {"x": in_order(*messages, EDITED)}


@pytest.mark.parametrize("what", ["mv", "rm", "rm for good", "flag"])
def test_a_command_spares_the_message_that_has_the_uid_after_a_restore(
    user: Account, mount: Mounter, proxy: Proxy, what: str
) -> None:
    """At stake: `rm` of a message removes the one that has its UID now. UIDNEXT does not show it."""
    user.deliver("x", [(m.content, m.date, "S") for m in (OLD, OTHER)])
    user.deliver("Work", [])
    keep_uidvalidity(user, "x")
    mounted = mount(proxy.account(user), *(EXPUNGE if what == "rm for good" else ()))
    path = file_of(mounted, 1, "x")
    restore(user, "x", INNOCENT, MORE, NEW)
    before = everything(user)
    proxy.cut_all()
    operations: dict[str, Operation] = {
        "mv": lambda m: os.rename(path, m.path / "Work" / "1.eml"),
        "flag": lambda _: os.setxattr(path, "user.imap.flags", b"$Work"),
    }
    error = outcome(operations.get(what, lambda _: os.unlink(path)), mounted)
    assert error is not None
    assert error.errno in {errno.ENOENT, errno.ESTALE}
    shows(mounted, "x", INNOCENT, MORE, NEW)
    mounted.unmount()
    assert everything(user) == before


@pytest.mark.parametrize("messages", [(INNOCENT,), (INNOCENT, MORE, NEW)], ids=["fewer", "more"])
def test_a_message_is_not_read_with_the_bytes_of_the_one_that_has_its_uid_after_a_restore(
    user: Account, mount: Mounter, proxy: Proxy, messages: Sequence[Held]
) -> None:
    """At stake: one message is shown, and kept in the cache, with the bytes of another."""
    user.deliver("x", [(m.content, m.date, "S") for m in (OLD, OTHER)])
    keep_uidvalidity(user, "x")
    mounted = mount(proxy.account(user))
    path = file_of(mounted, 1, "x")
    path.stat()
    restore(user, "x", *messages)
    proxy.cut_all()
    try:
        raise AssertionError(path.read_bytes())
    except OSError as error:
        assert error.errno in {errno.ENOENT, errno.ESTALE}
    shows(mounted, "x", *messages)


def test_a_move_by_copy_whose_original_cannot_be_deleted_leaves_one_message(
    user: Account, mount: Mounter, proxies: Callable[..., Proxy]
) -> None:
    """At stake: the message is doubled, and no mailbox can be renamed any more."""
    deliver(user)
    proxy = proxies(NO_MOVE)
    mounted = mount(proxy.account(user))
    path = file_of(mounted, 1)
    fault = proxy.fault(b"UID STORE", b"NO [NOPERM] not yours")
    error = outcome(lambda m: os.rename(path, m.path / "Work" / "moved.eml"), mounted)
    assert error is not None
    assert error.errno == errno.EACCES
    fault.wait_hit()
    os.rename(mounted.path / "Work", mounted.path / "Renamed")
    assert path.read_bytes() == OLD.content
    journal = spool_of(mounted).parent / "journal.json"
    assert not journal.exists()
    mounted.unmount()
    assert everything(user) == BEFORE


def test_a_copy_that_cannot_be_removed_again_is_reported_and_blocks_nothing(
    user: Account, mount: Mounter, proxies: Callable[..., Proxy]
) -> None:
    """At stake: every mailbox rename fails from then on, and nobody knows of the second copy."""
    deliver(user)
    proxy = proxies(NO_MOVE)
    mounted = mount(proxy.account(user), expected_log=["it is there twice"])
    path = file_of(mounted, 1)
    proxy.fault(b"UID STORE", b"NO [NOPERM] not yours", times=None)
    assert outcome(lambda m: os.rename(path, m.path / "Work" / "moved.eml"), mounted) is not None
    os.rename(mounted.path / "Work", mounted.path / "Renamed")
    shows(mounted, "Renamed", OLD)
    shows(mounted, "INBOX", OLD, OTHER)
    mounted.unmount()
    assert everything(user) == contents(INBOX=[OLD, OTHER], Renamed=[OLD])


def test_a_moved_message_is_not_taken_for_one_that_looks_like_it(
    user: Account, mount: Mounter, proxies: Callable[..., Proxy]
) -> None:
    """At stake: the bytes of one message under the name of another, without COPYUID."""
    deliver(user)
    proxy = proxies(("UIDPLUS", "NOTIFY", "IDLE"))
    mounted = mount(proxy.account(user))
    path = file_of(mounted, 1)
    assert path.read_bytes() == OLD.content
    assert os.listdir(mounted.path / "Work") == []
    likeness = OLD._replace(content=OLD.content[:-3] + b"#\r\n")
    user.append("Work", likeness.content, likeness.date, "\\Seen")
    os.rename(path, mounted.path / "Work" / "moved.eml")
    shows(mounted, "Work", OLD, likeness)
    mounted.unmount()
    assert everything(user) == contents(INBOX=[OTHER], Work=[OLD, likeness])


def test_a_copy_of_unknown_outcome_proves_itself_by_its_bytes(
    user: Account, mount: Mounter, proxies: Callable[..., Proxy]
) -> None:
    """At stake: the original, if a message of the same size, date and Message-ID is taken for its copy."""
    deliver(user)
    proxy = proxies(NO_MOVE)
    killed = mount(proxy.account(user))
    path = file_of(killed, 1)
    fault = proxy.fault(b"UID COPY", "stall")
    kill_within(fault, proxy, lambda m: os.rename(path, m.path / "Work" / "moved.eml"), killed)
    likeness = OLD._replace(content=OLD.content[:-3] + b"#\r\n")
    assert len(likeness.content) == len(OLD.content)
    assert likeness != OLD
    user.append("Work", likeness.content, likeness.date, "\\Seen")
    mounted = mount(proxy.account(user), cache=killed.cache)
    drain(mounted)
    wait_until(lambda: not (spool_of(mounted).parent / "journal.json").exists(), "the move is settled")
    mounted.unmount()
    assert everything(user) == contents(INBOX=[OLD, OTHER], Work=[likeness])


def test_a_file_that_lost_its_description_is_named_until_a_person_has_decided(
    user: Account, mount: Mounter
) -> None:
    """It was at the top of the mount, but 'status' listed nothing and 'sync' said that all was sent."""
    first = mount(user)
    (first.path / "INBOX" / ".note").write_bytes(NEW.content)
    first.unmount()
    (description,) = first.cache.glob("*/spool/*.json")
    description.write_text(json.dumps(json.loads(description.read_text()) | {"name": None}))
    second = mount(user, mailbox="INBOX", cache=first.cache, expected_log=["has lost its description"])
    rescued = f"rescued-{description.stem}"
    assert waiting(second) == [(rescued, "unsent")]
    assert (second.path / rescued).read_bytes() == NEW.content
    done = subprocess.run(
        [sys.executable, "-m", "imapfs", "sync", second.path],
        env=second.environment, capture_output=True, text=True, timeout=DEADLINE,
    )  # fmt: skip
    assert done.returncode != 0
    assert f"{rescued}: unsent: its description was damaged" in done.stdout
    os.rename(second.path / rescued, second.path / "found.eml")
    os.utime(second.path / "found.eml", (LATER, LATER))
    assert waiting(second) == []
    second.unmount()
    assert [message.content for message in everything(user)["INBOX"]] == [NEW.content]


def test_an_upload_is_found_again_though_another_client_renamed_the_mailbox(
    user: Account, mount: Mounter
) -> None:
    """It is searched under the new name: to take it for missing would upload it twice."""
    user.deliver("Work", [(OLD.content, DATE, "S")])
    with Proxy(user.server, hide=("NOTIFY", "IDLE")) as proxy:
        mounted = mount(proxy.account(user))
        os.listdir(mounted.path / "Work")
        fault = proxy.fault(b"APPEND", "stall", at="answer")
        put(mounted.path / "Work" / "new.eml", NEW)
        fault.wait_hit()
        with user.client() as client:
            assert client.rename("Work", "Other")[0] == "OK"
        proxy.cut_all()
        proxy.resume()
        drain(mounted)
        wait_until(lambda: waiting(mounted) == [], "nothing waits")
        mounted.unmount()
    assert everything(user) == {"Other": in_order(OLD, NEW)}


def test_a_flag_set_while_the_outcome_of_an_upload_is_unknown_is_kept(user: Account, mount: Mounter) -> None:
    """At stake: the flag. The message was uploaded without it, and is found again by a search."""
    user.deliver("Work", [(OLD.content, DATE, "S")])
    with Proxy(user.server, hide=("NOTIFY", "IDLE")) as proxy:
        mounted = mount(proxy.account(user))
        os.listdir(mounted.path / "Work")
        fault = proxy.fault(b"APPEND", "stall", at="answer")
        path = mounted.path / "Work" / "new.eml"
        put(path, NEW)
        fault.wait_hit()
        os.setxattr(path, "user.imap.flagged", b"1")
        proxy.cut_all()
        proxy.resume()
        drain(mounted)
        wait_until(lambda: waiting(mounted) == [], "nothing waits")

        def is_flagged() -> bool:
            return any("\\Flagged" in message.flags for message in everything(user)["Work"])

        wait_until(is_flagged, "it has the flag")
        mounted.unmount()
    flagged = NEW._replace(flags=frozenset({"\\Flagged"}))
    assert everything(user) == {"Work": in_order(OLD, flagged)}
