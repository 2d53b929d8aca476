"""Spool and journal leave the cache: nothing is lost on the way, and nothing is there twice."""

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from imapfs.atomic import replace_file
from imapfs.errors import CacheError
from imapfs.model import ROOT, Ino, MessageRef, Uid, UidValidity
from imapfs.store import place
from imapfs.store.journal import Journal
from imapfs.store.place import JOURNAL, SPOOL, claim
from imapfs.store.spool import Spool
from tests.conftest import ExpectedLog

REF = MessageRef(b"INBOX", UidValidity(1), Uid(2))
NAMES = [b"one.eml", b"two.eml"]


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """Return the cache of an earlier version, with two files that wait and a removal that is owed."""
    cache = tmp_path / "cache"
    cache.mkdir()
    spool = Spool(cache / SPOOL)
    for ino, name in enumerate(NAMES, 7):
        draft = spool.create(Ino(ino), ROOT, name, (), 0o600)
        draft.file.write_bytes(name)
        draft.state = "sending"
        draft.save()
    (cache / SPOOL / "directories.json").write_text(json.dumps([[".tmp"]]))
    Journal(cache / JOURNAL).add_removal(REF)
    return cache


def has_all(directory: Path) -> bool:
    """Return whether the files and the removal are in a directory, each once."""
    drafts = sorted((draft.name, draft.file.read_bytes(), draft.state) for draft in Spool(directory / SPOOL))
    return (
        drafts == [(name, name, "sending") for name in NAMES]
        and Journal(directory / JOURNAL).removals == [REF]
        and json.loads((directory / SPOOL / "directories.json").read_text()) == [[".tmp"]]
    )


def is_empty(old: Path) -> bool:
    return not list((old / SPOOL).glob("[!b]*")) and not (old / JOURNAL).exists()


def test_what_an_earlier_version_left_is_taken_over(old: Path, tmp_path: Path) -> None:
    with claim(tmp_path / "data" / "me", old) as found:
        assert found == tmp_path / "data" / "me"
        assert has_all(found)
    assert is_empty(old)
    assert found.stat().st_mode & 0o777 == 0o700
    with claim(found, old):
        assert has_all(found)


class Killed(BaseException):
    """The process ends here."""


@pytest.mark.parametrize("again", [False, True], ids=["once", "and once more"])
def test_a_kill_on_the_way_loses_and_doubles_nothing(
    old: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: bool
) -> None:
    """Before and after each change of a file, of both places."""
    copy = tmp_path / "copy"
    kills = 0
    for n in range(100):
        for left in (copy, tmp_path / "new"):
            if left.exists():
                shutil.rmtree(left)
        shutil.copytree(old, copy)
        killed = False
        for _ in range(1 + again):
            with monkeypatch.context() as patched:
                steps = iter(range(1000))

                def step(real: Callable[..., Any], steps: Any = steps, n: int = n) -> Callable[..., Any]:
                    def stepped(*args: Any, **more: Any) -> Any:
                        if next(steps) == n:
                            raise Killed
                        result = real(*args, **more)
                        if next(steps) == n:
                            raise Killed
                        return result

                    return stepped

                patched.setattr(place, "replace_file", step(replace_file))
                patched.setattr(Path, "unlink", step(Path.unlink))
                try:
                    with claim(tmp_path / "new", copy):
                        pass
                except Killed:
                    killed = True
        kills += killed
        with claim(tmp_path / "new", copy) as found:
            assert has_all(found), n
        assert is_empty(copy), n
        if not killed:
            break
    assert kills > 10


def test_what_was_uploaded_meanwhile_does_not_come_back(
    old: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected_log: ExpectedLog
) -> None:
    """The old place could not be cleared. To copy from it again would upload its files twice."""
    expected_log("cannot be removed")

    def fails(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", fails)
        with claim(tmp_path / "new", old) as found:
            pass
    spool = Spool(found / SPOOL)
    for draft in spool:
        spool.forget(draft)
    with claim(tmp_path / "new", old) as found:
        assert list(Spool(found / SPOOL)) == []
    assert is_empty(old)


def test_without_room_the_old_place_is_used(
    old: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected_log: ExpectedLog
) -> None:
    expected_log("is not moved")

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(place, "replace_file", full)
        with claim(tmp_path / "new", old) as found:
            assert found == old
            assert has_all(old)
    with claim(tmp_path / "new", old) as found:
        assert found == tmp_path / "new"
        assert has_all(found)


def test_a_spool_has_one_mount(tmp_path: Path, old: Path) -> None:
    """The lock of a cache that somebody has deleted locks nothing."""
    used = pytest.raises(CacheError, match="another mount uses the spool")
    with claim(tmp_path / "new", old), used, claim(tmp_path / "new", old):
        pass
    with claim(tmp_path / "new", old):
        pass


def test_beside_the_cache_nothing_is_moved(old: Path) -> None:
    with claim(old, old) as found:
        assert found == old
        assert has_all(old)
