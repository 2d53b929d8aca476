"""When a file is complete, and that it then reaches the server, whatever is lost in between.

These need what a real kernel and a real disk do rarely, so they are on the model alone.
"""

import errno
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from imapfs.store import spool as spool_module
from tests.conftest import ExpectedLog
from tests.support.filetree import ModelTree
from tests.support.mail import plain
from tests.support.mailboxes import everything, held
from tests.support.mounting import wait_until
from tests.support.servers.dovecot import Account

TEXT = plain(10)
HALF = TEXT[:500]


@pytest.fixture
def files(user: Account, tmp_path: Path) -> Iterator[ModelTree]:
    user.deliver("Work", [])
    made = ModelTree(user, tmp_path / "cache", delete="trash")
    yield made
    made.end()


def described(files: ModelTree) -> dict[str, Any]:
    """The description on disk of the only file in the spool."""
    (path,) = files.cache.glob("*/spool/*.json")
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def test_a_closed_file_is_uploaded_though_the_mount_ends_before_its_release(
    user: Account, files: ModelTree
) -> None:
    """``cp`` and at once ``fusermount3 -u``: files became ``unsent`` although close() had returned."""
    file = files.open("Work/new.eml", "w")
    file.write(TEXT)
    file.flush()
    files.end()
    assert [message.content for message in held(user, "Work").values()] == [TEXT]


def test_a_file_that_is_still_written_when_the_mount_ends_is_not_uploaded(
    user: Account, files: ModelTree
) -> None:
    """Its writer was cut off: half a message never reaches the server."""
    file = files.open("Work/new.eml", "w")
    file.write(HALF)
    files.end()
    assert held(user, "Work") == {}
    assert described(files)["state"] == "open"


def test_a_duplicated_descriptor_goes_on_writing_after_a_close(user: Account, files: ModelTree) -> None:
    """A child process closes what it has inherited: the file of its parent is not complete."""
    file = files.open("Work/new.eml", "w")
    file.write(HALF)
    file.flush()
    assert described(files)["state"] == "sending", "after a power cut it is complete"
    file.write(TEXT[500:600])
    assert described(files)["state"] == "open"
    file.flush()
    assert described(files)["state"] == "sending"
    wait_until(lambda: described(files)["state"] == "open", "the kernel did not release it")
    files.end()
    assert held(user, "Work") == {}


def test_a_file_with_two_writers_is_complete_when_both_have_closed_it(
    user: Account, files: ModelTree
) -> None:
    first = files.open("Work/new.eml", "w")
    first.write(HALF)
    second = files.open("Work/new.eml", "a")
    second.write(TEXT[500:])
    first.flush()
    assert described(files)["state"] == "open"
    second.flush()
    assert described(files)["state"] == "sending"
    files.end()
    assert [message.content for message in held(user, "Work").values()] == [TEXT]


def test_a_closed_file_reaches_the_server_by_itself_once_the_disk_is_no_longer_full(
    user: Account, files: ModelTree, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It waited for ``imapfs sync``, which nobody runs after a close() that failed."""
    file = files.open("Work/new.eml", "w")
    file.write(TEXT)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(spool_module, "replace_file", full)
        with pytest.raises(OSError) as caught:
            file.close()
        assert caught.value.errno == errno.ENOSPC
    wait_until(lambda: held(user, "Work"), "it is uploaded")
    assert [message.content for message in held(user, "Work").values()] == [TEXT]


def test_a_full_disk_delays_the_note_and_with_it_the_upload(
    user: Account, files: ModelTree, monkeypatch: pytest.MonkeyPatch, expected_log: ExpectedLog
) -> None:
    """Nothing is sent without its note, or a power cut would double it; and nothing waits for a person."""
    expected_log("cannot write the journal")
    refused = list[str]()

    def full(*_: object, **__: object) -> None:
        refused.append("note")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("imapfs.store.journal._append", full)
        files.write("Work/new.eml", TEXT)
        wait_until(lambda: len(refused) > 1, "it was tried again")
        assert held(user, "Work") == {}
        assert files.waiting() == [("Work/new.eml", "sending")]
    wait_until(lambda: held(user, "Work"), "it is uploaded")
    files.end()
    assert [message.content for message in held(user, "Work").values()] == [TEXT]
    assert [*everything(user)] == ["Work"]
    assert not list(files.cache.glob("*/journal.json"))
