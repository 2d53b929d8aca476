"""What is in the journal survives a kill at any byte, and what is done leaves it."""

import errno
import json
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from imapfs.errors import CacheError
from imapfs.model import MessageRef, Uid, UidValidity
from imapfs.store import journal as module
from imapfs.store.journal import Attempt, Journal, PendingMove
from tests.conftest import ExpectedLog

NAMES = st.binary(min_size=1, max_size=60)
NUMBERS = st.integers(0, 2**63 - 1)
REFS = st.builds(MessageRef, NAMES, NUMBERS, NUMBERS)
MOVES = st.builds(
    PendingMove, REFS, NAMES, NUMBERS, NUMBERS, st.integers(-(2**40), 2**40), st.text(max_size=30)
)


def ref(uid: int, mailbox: bytes = b"INBOX") -> MessageRef:
    return MessageRef(mailbox, UidValidity(1), Uid(uid))


def move(uid: int, target: bytes = b"Archive") -> PendingMove:
    return PendingMove(ref(uid), target, 10, 2000, 1_700_000_000, "<x@example.org>")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal.json"


@given(moves=st.lists(MOVES, max_size=3, unique=True), removals=st.lists(REFS, max_size=3, unique=True))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50, deadline=None)
def test_entries_come_back_as_they_were_until_they_are_done(
    path: Path, moves: list[PendingMove], removals: list[MessageRef]
) -> None:
    journal = Journal(path)
    for entry in moves:
        journal.begin(entry)
    for removal in removals:
        journal.add_removal(removal)
    journal = Journal(path)
    assert (journal.interrupted, journal.removals) == (moves, removals)
    for entry in moves:
        journal.finish(entry)
    for removal in removals:
        journal.end_removal(removal)
    assert not path.exists(), "without entries there is no file"
    assert (Journal(path).interrupted, Journal(path).removals) == ([], [])


def test_what_proves_a_message_comes_back_with_it(path: Path) -> None:
    """At stake: after a restore of the server, a removal that is owed removes another message."""
    Journal(path).add_removal(MessageRef(b"INBOX", UidValidity(1), Uid(2), 1_700_000_000, 2000))
    (found,) = Journal(path).removals
    assert (found.date, found.size) == (1_700_000_000, 2000)


def test_a_kill_at_any_byte_loses_no_entry_before_it(path: Path) -> None:
    journal = Journal(path)
    journal.begin(move(1))
    journal.add_removal(ref(2))
    kept = path.stat().st_size
    journal.add_removal(ref(3))
    whole = path.read_bytes()
    for end in range(kept, len(whole) + 1):
        path.write_bytes(whole[:end])
        after = Journal(path)
        assert after.interrupted == [move(1)]
        assert after.removals in ([ref(2)], [ref(2), ref(3)])
        # What comes after the remnant is not spoiled by it.
        after.add_removal(ref(4))
        assert Journal(path).removals == [*after.removals]


def test_a_remnant_that_cannot_be_tidied_up_spoils_nothing(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Journal(path).add_removal(ref(1))
    with path.open("ab") as file:
        file.write(b'\n{"add": {"rem')

    def no_space(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(module, "replace_file", no_space)
        journal = Journal(path)
    journal.add_removal(ref(2))
    read = path.read_bytes()
    assert b"}\n" in read
    assert {*journal.removals} == {ref(1), ref(2)}


def test_a_journal_of_an_earlier_version_is_read(path: Path) -> None:
    old = {
        "source": "B\xf6x", "uidvalidity": 1, "uid": 5, "target": "A\xe4", "uidnext": 10, "size": 2000,
        "date": 1_700_000_000, "message_id": "<x@example.org>",
    }  # fmt: skip
    path.write_text(json.dumps([old]))
    expected = PendingMove(ref(5, b"B\xf6x"), b"A\xe4", 10, 2000, 1_700_000_000, "<x@example.org>")
    journal = Journal(path)
    assert journal.interrupted == [expected]
    journal.add_removal(ref(6, b"B\xf6x"))
    assert (Journal(path).interrupted, Journal(path).removals) == ([expected], [ref(6, b"B\xf6x")])
    path.write_text("[]")
    assert (Journal(path).interrupted, path.exists()) == ([], False)


@pytest.mark.parametrize(
    "damage", ["garbage", "[", '["x"]', '{"add": {"move": {}}}\n', '{"undo": {}}\n', "\x00\x00"]
)
def test_damage_is_reported_and_the_rest_is_read(path: Path, damage: str, expected_log: ExpectedLog) -> None:
    journal = Journal(path)
    journal.begin(move(1))
    with path.open("a") as file:
        file.write(f"\n{damage}")
    expected_log("look for doubled messages")
    assert Journal(path).interrupted == [move(1)]


def test_a_full_disk_is_reported_before_a_copy_and_leaves_no_half_line(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal(path)
    journal.add_removal(ref(1))
    before = path.read_bytes()
    write = os.write

    def full(fd: int, data: bytes) -> int:
        if len(data) < 50:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(fd, data[:20])

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", full)
        with pytest.raises(CacheError) as caught:
            journal.begin(move(2))
        assert caught.value.errno == errno.ENOSPC
        with pytest.raises(CacheError):
            journal.add_removal(ref(3))
        assert path.read_bytes() == before
        # The last entry can leave a full disk, and one that cannot does no harm.
        journal.end_removal(ref(1))
    assert not path.exists()
    assert journal.removals == []


def test_a_removal_that_is_done_is_not_tried_again_in_this_process_on_a_full_disk(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal(path)
    journal.add_removal(ref(1))
    journal.add_removal(ref(2))

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", full)
        journal.end_removal(ref(1))
    assert journal.removals == [ref(2)]
    assert Journal(path).removals == [ref(1), ref(2)]


def test_the_file_does_not_grow_for_ever(path: Path) -> None:
    journal = Journal(path)
    journal.begin(move(1))
    for uid in range(2, 5000):
        journal.add_removal(ref(uid))
        journal.end_removal(ref(uid))
    assert path.read_bytes().count(b"\n{") <= 1001
    assert (Journal(path).interrupted, Journal(path).removals) == ([move(1)], [])


def test_removals_follow_a_renamed_mailbox(path: Path) -> None:
    journal = Journal(path)
    for mailbox in (b"Old", b"Old/below", b"Older", b"INBOX"):
        journal.add_removal(ref(1, mailbox))
    journal.rename_mailbox(b"Old", b"New", b"/")
    expected = {ref(1, mailbox) for mailbox in (b"New", b"New/below", b"Older", b"INBOX")}
    assert {*journal.removals} == {*Journal(path).removals} == expected


def attempt(uidnext: int, mailbox: bytes = b"INBOX") -> Attempt:
    return Attempt(mailbox, UidValidity(1), uidnext, 100, "ab", "<x@example.org>")


def test_the_uploads_of_a_batch_are_durable_with_one_fsync(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thousand files that are copied in must not wait for a thousand writes to the disk."""
    synced: list[str] = []
    real = os.fsync

    def fsync(fd: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{fd}"))
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    batch = {str(n): attempt(n, b"B\xf6x") for n in range(100)}
    Journal(path).begin_uploads(batch)
    assert synced == [str(path), str(path.parent)]
    assert Journal(path).uploads == batch


def test_a_new_note_replaces_the_one_that_is_no_longer_needed(path: Path) -> None:
    journal = Journal(path)
    journal.begin_uploads({"7": attempt(1), "8": attempt(2)})
    journal.begin_uploads({"7": attempt(5)}, ended={"7", "8", "9"})
    assert journal.uploads == Journal(path).uploads == {"7": attempt(5)}
    journal.begin_uploads({}, ended={"7"})
    assert not path.exists()


def test_uploads_follow_a_renamed_mailbox(path: Path) -> None:
    journal = Journal(path)
    journal.begin_uploads({"7": attempt(1, b"Work/May"), "8": attempt(2)})
    journal.rename_mailbox(b"Work", b"Old", b"/")
    assert journal.uploads == Journal(path).uploads == {"7": attempt(1, b"Old/May"), "8": attempt(2)}
