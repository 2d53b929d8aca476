"""Cache and spool are only where nobody else can lead them elsewhere."""

import os
from pathlib import Path

import pytest

from imapfs.errors import CacheError
from imapfs.store.private import make_private


def test_a_directory_is_made_with_its_parents(tmp_path: Path) -> None:
    made = tmp_path / "a" / "b"
    make_private(made, "cache")
    make_private(made, "cache")
    assert made.stat().st_mode & 0o777 == 0o700
    (tmp_path / "link").symlink_to("a/../a")
    make_private(tmp_path / "link" / "b", "cache")


def test_a_parent_that_everybody_may_write_is_refused(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    (shared / "cache").mkdir()
    (tmp_path / "link").symlink_to("shared/cache")
    shared.chmod(0o777)
    for path in (shared / "cache", tmp_path / "link", shared / "cache" / "below"):
        with pytest.raises(CacheError, match=r"others can replace .*shared/cache"):
            make_private(path, "cache")
    shared.chmod(0o1777)
    make_private(shared / "cache", "cache")


def test_what_belongs_to_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cache").mkdir()
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(CacheError, match=r"another user|others can replace"):
        make_private(tmp_path / "cache", "cache")


def test_a_circle_of_links_ends(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(CacheError):
        make_private(tmp_path / "a", "cache")
