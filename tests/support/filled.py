"""An account with a few messages, for tests of what operations change."""

import errno
from collections.abc import Callable

import pytest

from tests.support.mail import plain
from tests.support.mailboxes import Held, in_order
from tests.support.servers.dovecot import Account

DATE = 1_700_000_000
MARKED = frozenset({"\\Seen", "\\Flagged"})


def fill(user: Account) -> Account:
    """Put three messages into INBOX, and make an empty mailbox."""
    user.deliver("INBOX", [(plain(n), DATE + n, "FS") for n in (1, 2, 3)])
    user.deliver("Work", [])
    return user


def inbox(*numbers: int) -> list[Held]:
    """What `fill` has put into INBOX."""
    return in_order(*(Held(plain(n), DATE + n, MARKED) for n in numbers))


def fails_with(number: int, call: Callable[..., object], *arguments: object) -> None:
    """Call something that must fail with an errno."""
    with pytest.raises(OSError) as caught:
        call(*arguments)
    assert errno.errorcode[caught.value.errno or 0] == errno.errorcode[number]
