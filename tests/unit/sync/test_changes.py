"""Everybody who caches or watches the account learns of each change."""

import errno

from imapfs.errors import CacheError
from imapfs.model import Ino
from imapfs.sync.changes import ChangeHub, Changes
from tests.conftest import ExpectedLog


def test_a_listener_that_fails_keeps_no_other_from_a_change(expected_log: ExpectedLog) -> None:
    """The kernel would go on showing what was removed, if drafts could not follow on a full disk."""
    expected_log("a change was not followed everywhere: the spool: No space left on device")
    hub, seen = ChangeHub(), list[Changes]()

    def fails(_: Changes) -> None:
        raise CacheError.from_os_error(OSError(errno.ENOSPC, "full"), "the spool")

    for listener in (fails, seen.append):
        hub.subscribe(listener)
    changes = Changes(Ino(2), flagged=[Ino(3)])
    hub.publish(changes)
    hub.publish(Changes(Ino(2)))
    assert seen == [changes]
