"""What a server may make us hold in memory: every bound in one place.

What passes through, to a file or a table, is not held: bodies, and the metadata of a listing. Everything else
that a server sends counts, and more than the budget ends the connection. Together the bounds keep the process
below 200 MB whatever a server sends.
"""

from typing import Final

from imapfs.errors import ProtocolError

MAX_BEFORE_LOGIN: Final = 256 << 10
"""Bytes that may come in before the login."""
MAX_RESPONSE: Final = 8 << 20
"""Bytes of one response, text and literals together. Only a sink takes a larger literal."""
MAX_HELD: Final = 96 << 20
"""Cost of the responses to one command that are kept until it is complete."""
RESPONSE_COST: Final = 200
"""Bytes that a response costs beyond its length, for the objects made of it."""
MAX_VALUES: Final = 50_000
"""Atoms, strings and lists in a LIST, STATUS, NAMESPACE or QUOTA response."""
MAX_RANGES: Final = 200_000
"""Ranges in a UID set."""
MAX_MAILBOX_NAME: Final = 16 << 10
"""Bytes of a mailbox name, still encoded. A path in Linux has 4,096 at most."""
MAX_DEPTH: Final = 100
"""Levels of a mailbox."""
MAX_DIRECTORIES: Final = 50_000
"""Directories that the mailboxes of an account become."""
MAX_UNLISTED: Final = 20_000
"""Of these, directories that are only above mailboxes, as the server does not list them."""
MAX_FLAGS: Final = 32 << 10
"""Bytes of the flags of a message or a mailbox."""
MAX_TEXT: Final = 4000
"""Bytes of a server's text for people."""
MAX_CAPABILITIES: Final = 64 << 10
"""Bytes of a list of capabilities."""
MAX_CHALLENGE: Final = 64 << 10
"""Bytes of a challenge during the login, in base64."""
MAX_EVENTS: Final = 10_000
"""Events of a watched mailbox that wait for the trio thread."""


class Held:
    """Counts what the responses to one command cost while they are kept."""

    def __init__(self) -> None:
        self._left = MAX_HELD

    def add(self, size: int) -> None:
        """Count a response of ``size`` bytes. Raises ProtocolError if the budget is used up."""
        self._left -= size + RESPONSE_COST
        if self._left < 0:
            raise ProtocolError(
                f"the server sends more than {MAX_HELD >> 20} MiB in answer to one command: not read on"
            )
