"""What is asked again and again is answered at once, and with no more queries than it needs."""

import os
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

import pytest
from pyfuse3 import FUSEError, InodeT

from imapfs.fs.events import EventStream
from imapfs.fs.files import Files
from imapfs.fs.filesystem import Filesystem
from imapfs.kernel.adapter import Adapter
from imapfs.kernel.inotify import Announcer
from imapfs.kernel.invalidation import KernelCache
from tests.support.model import Model

T = TypeVar("T")
unused: Any = None


class Asked:
    """An adapter for an account, and the SQL statements that its answers need."""

    def __init__(self, account: Model) -> None:
        self.statements: list[str] = []
        self.kernel = KernelCache(account.tree)
        files = Files(account.cache, unused, unused, unused, account.spool, account.tree, unused)
        fs = Filesystem(
            account.tree, unused, files, unused, unused, unused, unused, account.cache, account.spool,
            unused, unused, unused, unused, unused, unused, unused,
        )  # fmt: skip
        announcer = Announcer(fs, account.tree, self.kernel, Path("/"), read_only=False)
        self.adapter = Adapter(
            fs, files, unused, unused, self.kernel, announcer, EventStream(), timeout=1, read_only=False
        )
        account.cache._database._db.set_trace_callback(self.statements.append)

    def answer(self, handler: Coroutine[Any, Any, T]) -> T:
        """Return what a handler answers at its first step; not even trio runs, so that it cannot wait."""
        try:
            handler.send(None)
        except StopIteration as done:
            return done.value  # type: ignore[no-any-return]
        pytest.fail("it waited")


def test_a_file_that_the_kernel_has_is_opened_and_closed_without_a_query(account: Model) -> None:
    (ino,) = account.deliver("INBOX", 1)
    asked = Asked(account)
    asked.kernel.pushed.add(ino)
    for _ in range(2):
        handle = asked.answer(asked.adapter.open(InodeT(ino), os.O_RDONLY, unused)).fh
        asked.answer(asked.adapter.flush(handle))
        asked.answer(asked.adapter.release(handle))
    assert asked.statements == []


def test_a_known_name_and_its_attributes_are_a_query_each(account: Model) -> None:
    (ino,) = account.deliver("INBOX", 1)
    inbox = InodeT(account.ino("INBOX"))
    asked = Asked(account)
    assert asked.answer(asked.adapter.lookup(inbox, b"1.eml", unused)).st_ino == ino
    assert len(asked.statements) == 1
    assert asked.answer(asked.adapter.getattr(InodeT(ino), unused)).st_size == 100
    assert len(asked.statements) == 2


def test_what_fails_at_once_is_an_errno(account: Model) -> None:
    """An answer at the first step is guarded like any other: nothing but FUSEError leaves it."""
    asked = Asked(account)
    with pytest.raises(FUSEError):
        asked.answer(asked.adapter.getattr(InodeT(12345), unused))
