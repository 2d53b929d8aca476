"""What is in the spool survives everything, and what leaves it is meant to."""

import errno
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from imapfs.errors import CacheError
from imapfs.model import ROOT, Ino, MessageRef, Uid, UidValidity
from imapfs.names import MAX_NAME, is_file_name
from imapfs.store import spool as spool_module
from imapfs.store.journal import Journal
from imapfs.store.spool import Base, Draft, Spool
from tests.conftest import ExpectedLog

NAMES = st.binary(min_size=1, max_size=255)
FILE_NAMES = NAMES.filter(is_file_name)
NUMBERS = st.integers(0, 2**63 - 1)
REFS = st.builds(MessageRef, NAMES, NUMBERS, NUMBERS)
BASES = st.builds(Base, REFS, st.integers(-(2**40), 2**40), st.integers(-1440, 1440))


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    return Spool(tmp_path / "spool")


def made(spool: Spool, name: bytes = b"new.eml", content: bytes = b"From: me\r\n\r\n", ino: int = 7) -> Draft:
    draft = spool.create(Ino(ino), ROOT, name, (b"INBOX",), 0o600)
    draft.file.write_bytes(content)
    return draft


@pytest.mark.parametrize("name", [b"new.eml", b"\xff", "é".encode() * 125 + b".eml", b"\xff" * 255])
def test_what_is_kept_aside_has_a_name_that_the_disk_takes(spool: Spool, name: bytes) -> None:
    draft = made(spool, name)
    kept = spool.keep_aside(draft)
    assert kept.read_bytes() == draft.file.read_bytes()
    assert spool.keep_aside(draft) == kept


def again(spool: Spool) -> Spool:
    """What a mount that follows finds."""
    return Spool(spool.directory)


@given(
    parent=NUMBERS, name=FILE_NAMES, path=st.lists(FILE_NAMES, max_size=4), mode=st.integers(0, 0o7777),
    mtime=st.integers(-(2**62), 2**62), timed=st.booleans(), flags=st.text(max_size=50),
    state=st.sampled_from(["local", "sending", "unsent"]), error=st.text(max_size=50),
    base=st.none() | BASES, dirty=st.booleans(),
    home=st.none() | st.lists(FILE_NAMES, max_size=3).map(tuple),
)  # fmt: skip
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=100, deadline=None)
def test_a_description_comes_back_as_it_was(
    spool: Spool, parent: int, name: bytes, path: list[bytes], **more: object
) -> None:
    written = made(spool)
    written.parent, written.name, written.path = Ino(parent), name, tuple(path)
    for field, value in more.items():
        setattr(written, field, value)
    written.save()
    read = again(spool).get(written.ino)
    assert read is not None
    for field in ("ino", "parent", "name", "path", "ctime", *more):
        assert getattr(read, field) == getattr(written, field), field


@pytest.mark.parametrize("damage", ["gone", "empty", "half", "a list", "of another version"])
def test_a_draft_without_its_description_is_rescued(
    spool: Spool, damage: str, expected_log: ExpectedLog
) -> None:
    made(spool, content=b"mail").save()
    description = spool.directory / "7.json"
    match damage:
        case "gone":
            description.unlink()
        case "empty":
            description.write_text("")
        case "half":
            description.write_text(description.read_text()[:100])
        case "a list":
            description.write_text("[]")
        case "of another version":
            described = json.loads(description.read_text())
            del described["flags"]
            description.write_text(json.dumps(described))
    expected_log("has lost its description")
    rescued = again(spool).child(ROOT, b"rescued-7")
    assert rescued is not None
    assert (rescued.state, rescued.error) == ("unsent", spool_module._RESCUED)
    assert rescued.file.read_bytes() == b"mail"


DAMAGES: list[tuple[str, object]] = [
    ("name", None), ("name", ""), ("name", "a/b.eml"), ("name", ".."), ("name", "a\0b"),
    ("name", "/" + "x" * 300),
    ("name", "\ud800"), ("name", 5), ("path", None), ("path", "INBOX"), ("path", [None]), ("path", ["a/b"]),
    ("parent", None), ("parent", 1 << 64), ("parent", -1), ("mode", "rw"), ("mode", 1 << 40),
    ("mtime", None), ("mtime", 1.5), ("mtime", 1 << 100), ("timed", None), ("flags", None), ("state", "lost"),
    ("state", None), ("state", []), ("error", None), ("dirty", 1), ("home", 1), ("home", [""]),
    ("base", "INBOX"),
    ("base", {"mailbox": None, "uidvalidity": 1, "uid": 1, "date": 1, "zone": 0}),
    ("base", {"mailbox": "INBOX", "uidvalidity": 1, "uid": 1 << 64, "date": 1, "zone": 0}),
    ("attempt", {"mailbox": None}), ("attempt", 3),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value"), DAMAGES)
def test_no_damage_of_a_description_stops_the_mount_or_hides_the_file(
    spool: Spool, field: str, value: object, expected_log: ExpectedLog
) -> None:
    """A null name ended the mount with a traceback; a name with a slash was in no listing."""
    made(spool, content=b"mail").save()
    description = spool.directory / "7.json"
    description.write_text(json.dumps(json.loads(description.read_text()) | {field: value}))
    damaged = description.read_bytes()
    expected_log("has lost its description")
    rescued = again(spool).child(ROOT, b"rescued-7")
    assert rescued is not None
    assert rescued.state == "unsent", "so that 'imapfs status' and 'imapfs sync' name it"
    assert rescued.file.read_bytes() == b"mail"
    assert description.read_bytes() == damaged, "a person may make something of it"


@pytest.mark.parametrize(
    ("name", "short"),
    [("x" * 300 + ".eml", "x" * 251 + ".eml"), ("ä" * 200, "ä" * 127), ("x." + "y" * 400, "x" + "y" * 16)],
)
def test_a_name_that_an_earlier_version_took_is_cut(spool: Spool, name: str, short: str) -> None:
    """A waiting file with such a name goes on: it is not damaged."""
    made(spool).save()
    description = spool.directory / "7.json"
    described = json.loads(description.read_text()) | {"name": name, "state": "sending"}
    description.write_text(json.dumps(described))
    read = again(spool).get(Ino(7))
    assert read is not None
    assert (read.name, read.state) == (short.encode(), "sending")


def test_a_time_that_nanoseconds_in_64_bits_do_not_hold_is_no_damage(spool: Spool) -> None:
    draft = made(spool)
    draft.mtime = 20_000_000_000 * 10**9
    draft.save()
    read = again(spool).get(draft.ino)
    assert read is not None
    assert read.mtime == draft.mtime


@pytest.mark.parametrize("name", [b"x" * 255, b"x" * 251 + b".eml", b"x." + b"y" * 253, b"." + b"y" * 254])
def test_a_variant_of_a_name_is_not_too_long_either(spool: Spool, name: bytes) -> None:
    made(spool, name)
    variants = set[bytes]()
    for ino in range(8, 20):
        variant = spool.free_name(ROOT, name)
        made(spool, variant, ino=ino)
        variants.add(variant)
    assert len(variants) == 12
    assert all(len(variant) <= MAX_NAME for variant in variants)


def test_a_file_that_was_being_written_when_the_process_ended_is_unsent(spool: Spool) -> None:
    draft = made(spool)
    draft.state, draft.dirty = "open", True
    draft.save()
    read = again(spool).get(draft.ino)
    assert read is not None
    assert read.state == "unsent"
    assert "retry" in read.error
    assert read.file.read_bytes() == b"From: me\r\n\r\n"


def test_what_proves_the_message_that_an_edit_began_from_comes_back(spool: Spool) -> None:
    """At stake: after a restore of the server the edit removes another message with that UID."""
    draft = made(spool)
    draft.base = Base(MessageRef(b"INBOX", UidValidity(1), Uid(2), 1_700_000_000, 2000), 1_700_000_000, 0)
    draft.state = "sending"
    draft.save()
    read = again(spool).get(draft.ino)
    assert read is not None
    assert read.base is not None
    assert (read.base.ref.date, read.base.ref.size) == (1_700_000_000, 2000)


def test_a_new_version_that_nobody_wrote_to_is_none(spool: Spool) -> None:
    draft = made(spool)
    draft.base = Base(MessageRef(b"INBOX", UidValidity(1), Uid(2)), 3, 0)
    draft.save()
    assert again(spool).get(draft.ino) is None
    assert [path.name for path in spool.directory.iterdir()] == []


@pytest.mark.parametrize("state", ["local", "sending", "unsent"])
def test_what_is_complete_stays_as_it_is(spool: Spool, state: str) -> None:
    draft = made(spool)
    draft.state = state  # type: ignore[assignment]
    draft.save()
    read = again(spool).get(draft.ino)
    assert read is not None
    assert (read.state, read.error) == (state, "")


OLD_REMOVAL = {
    "path": ["INBOX"], "name": "", "parent": 1, "mode": 384, "mtime": 0, "timed": False, "ctime": 0,
    "flags": "", "state": "sent", "error": "", "dirty": False, "attempt": None,
    "base": {"mailbox": "B\udcf6x", "uidvalidity": 1, "uid": 2, "date": 3, "zone": 0},
}  # fmt: skip
"""How an earlier version noted a removal that was still owed."""


def test_a_removal_that_an_earlier_version_noted_goes_to_the_journal(spool: Spool) -> None:
    made(spool, ino=7).save()
    (spool.directory / "9.json").write_text(json.dumps(OLD_REMOVAL))
    (spool.directory / "9").write_text("bytes of a draft that was uploaded")
    journal = spool.directory.parent / "journal.json"
    read = again(spool)
    assert [draft.ino for draft in read] == [7]
    assert (spool.directory / "9.json").exists(), "nothing goes before it is in the journal"
    read.hand_over_removals(Journal(journal))
    assert Journal(journal).removals == [MessageRef(b"B\xf6x", UidValidity(1), Uid(2))]
    assert sorted(path.name for path in spool.directory.iterdir()) == ["7", "7.json"]


def test_a_removal_that_cannot_be_handed_over_stays(spool: Spool, expected_log: ExpectedLog) -> None:
    (spool.directory / "9.json").write_text(json.dumps(OLD_REMOVAL))
    expected_log("removed at the next mount")
    again(spool).hand_over_removals(Journal(spool.directory / "missing" / "journal.json"))
    assert (spool.directory / "9.json").exists()


def test_a_kill_while_a_draft_is_deleted_leaves_nothing(spool: Spool) -> None:
    draft = made(spool)
    draft.file.unlink()
    read = again(spool)
    assert list(read) == []
    assert [path.name for path in spool.directory.iterdir()] == []


def test_half_written_descriptions_are_swept_away(spool: Spool) -> None:
    made(spool).save()
    (spool.directory / "7.json.tmp").write_text("{")
    (spool.directory / "7.tmp").write_text("half")
    read = again(spool)
    assert read.get(Ino(7)) is not None
    assert sorted(path.name for path in spool.directory.iterdir()) == ["7", "7.json"]


def test_two_drafts_of_one_name_are_both_kept(spool: Spool) -> None:
    first, second = made(spool, b"x.eml"), made(spool, b"y.eml", b"other", 8)
    second.name = b"x.eml"
    second.save()
    read = again(spool)
    assert {draft.name for draft in read} == {b"x.eml", b"x~2.eml"}
    assert read.child(ROOT, b"x.eml") is not read.child(ROOT, b"x~2.eml") is not None
    assert first.file.exists() and second.file.exists()


def test_a_rename_frees_the_old_name(spool: Spool) -> None:
    draft = made(spool)
    spool.rename(draft, Ino(5), b"there.eml", (b"Work",))
    assert spool.child(ROOT, b"new.eml") is None
    assert spool.child(Ino(5), b"there.eml") is draft
    assert again(spool).child(Ino(5), b"there.eml") is not None
    assert draft.shown == "Work/there.eml"


def test_files_are_for_their_owner_only(spool: Spool) -> None:
    made(spool).save()
    assert {path.stat().st_mode & 0o777 for path in spool.directory.glob("7*")} == {0o600}
    assert spool.directory.stat().st_mode & 0o777 == 0o700


@pytest.fixture
def full(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> Iterator[Spool]:
    """Let the disk be full for descriptions."""

    def no_space(*_: object, **__: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("imapfs.store.spool.replace_file", no_space)
        patched.setattr("imapfs.store.spool.create_file", no_space)
        yield spool


def test_a_full_disk_is_enospc_and_leaves_nothing_behind(full: Spool) -> None:
    with pytest.raises(CacheError) as caught:
        full.create(Ino(7), ROOT, b"new.eml", (), 0o600)
    assert caught.value.errno == errno.ENOSPC
    assert full.child(ROOT, b"new.eml") is None
    assert not (full.directory / "7").exists()


def test_a_rename_on_a_full_disk_changes_nothing(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The program is told that it failed, so it has to find the file where it was."""
    draft = made(spool)

    def no_space(*_: object, **__: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("imapfs.store.spool.replace_file", no_space)
    with pytest.raises(CacheError):
        spool.rename(draft, Ino(5), b"there.eml", (b"Work",))
    assert spool.child(ROOT, b"new.eml") is draft
    assert spool.child(Ino(5), b"there.eml") is None
    assert (draft.parent, draft.name, draft.path) == (ROOT, b"new.eml", (b"INBOX",))


def test_a_full_disk_leaves_the_old_description(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    draft = made(spool)
    draft.save()
    before = (spool.directory / "7.json").read_text()

    class Full(io.FileIO):
        def write(self, data: Any) -> int:
            super().write(data[:10])
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fdopen", lambda fd, mode: Full(fd, mode))
        draft.flags = "new"
        with pytest.raises(CacheError):
            draft.save()
    assert (spool.directory / "7.json").read_text() == before
    draft.save()
    assert (spool.directory / "7.json").read_text() != before


def test_flags_change_whatever_their_case(spool: Spool) -> None:
    draft = made(spool)
    draft.flags = "\\Seen Work"
    draft.change_flags(lambda has: ({"new"}, {"\\SEEN"}))
    assert draft.flags == "Work new"
    read = again(spool).get(draft.ino)
    assert read is not None
    assert read.flags == "Work new"


def test_another_directory_than_that_of_the_spool_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "spool").write_text("a file")
    with pytest.raises(CacheError, match="cannot use the spool"):
        Spool(tmp_path / "spool")
    assert os.path.isfile(tmp_path / "spool")


def test_a_closed_file_is_complete_whatever_the_kernel_does_not_say_any_more(spool: Spool) -> None:
    """After a power cut, files that were properly closed were ``unsent``: their description said ``open``."""
    draft = made(spool)
    draft.dirty = draft.closed = True
    draft.save()
    before = (spool.directory / "7.json").stat().st_ino
    read = again(spool).get(draft.ino)
    assert read is not None
    assert (read.state, read.dirty) == ("sending", False)
    draft.state, draft.dirty, draft.closed = "sending", False, False
    draft.save()
    assert (spool.directory / "7.json").stat().st_ino == before, "a durable description is not replaced"


def test_a_kill_before_the_description_is_written_leaves_a_file_that_is_listed(spool: Spool) -> None:
    """Its state was shown as ``sending``, but no list had it, and nothing ever sent it."""
    draft = made(spool)
    assert json.loads((spool.directory / "7.json").read_text())["dirty"] is False
    read = again(spool).get(draft.ino)
    assert read is not None
    assert read.state == "unsent"
