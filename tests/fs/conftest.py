"""Both drivers of `FileTree`: what an operation means is tested with each of them."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import pytest

from imapfs.model import DeletePolicy
from tests.conftest import ExpectedLog
from tests.support.filetree import FileTree, ModelTree, MountedTree
from tests.support.mounting import MailAccount, Mounter


class Start(Protocol):
    """Shows an account as files, with the driver of this test."""

    def __call__(
        self,
        account: MailAccount,
        *,
        cache: Path | None = None,
        delete: DeletePolicy = "trash",
        expected_log: Sequence[str] = (),
    ) -> FileTree:
        """Go on with ``cache``, that of another `FileTree`. Each of ``expected_log`` has to be logged."""


@pytest.fixture(params=["model", "mount"])
def start(request: pytest.FixtureRequest, tmp_path: Path, expected_log: ExpectedLog) -> Iterator[Start]:
    """Return a function that shows an account as files until the test ends."""
    if request.param == "mount":
        mount: Mounter = request.getfixturevalue("mount")

        def mounted(
            account: MailAccount,
            *,
            cache: Path | None = None,
            delete: DeletePolicy = "trash",
            expected_log: Sequence[str] = (),
        ) -> FileTree:
            arguments = "--delete", delete, "--fetch-ahead", "0"
            return MountedTree(mount(account, *arguments, cache=cache, expected_log=expected_log))

        yield mounted
        return

    with contextlib.ExitStack() as stack:
        expect = expected_log

        def modelled(
            account: MailAccount,
            *,
            cache: Path | None = None,
            delete: DeletePolicy = "trash",
            expected_log: Sequence[str] = (),
        ) -> FileTree:
            for pattern in expected_log:
                expect(pattern)
            made = ModelTree(account, cache or tmp_path / "cache", delete=delete)
            stack.callback(made.end)
            return made

        yield modelled
