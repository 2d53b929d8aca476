"""Encodings of IMAP that IMAPClient implements: mailbox names in modified UTF-7, date-time for APPEND.

It adds what IMAPClient leaves to its caller: malformed and non-canonical names are recognised, and nothing
that a server sends raises an exception.
"""

from datetime import datetime, timedelta, timezone
from typing import Final

from imapclient import datetime_util, imap_utf7

MAX_EPOCH: Final = 9_000_000_000
"""Latest supported time, in seconds since the epoch: about the year 2255, as 64-bit nanoseconds allow."""


def decode_utf7(raw: bytes) -> str | None:
    """Decode modified UTF-7 (RFC 3501 section 5.1.3).

    Return None unless ``raw`` is exactly what `encode_utf7` makes of the text: other spellings cannot be
    restored from the text. Never raises.
    """
    try:
        text: str = imap_utf7.decode(raw)
        return text if encode_utf7(text) == raw else None
    except ValueError:
        return None


def encode_utf7(text: str) -> bytes:
    """Encode ``text`` in modified UTF-7. Raises UnicodeEncodeError for a lone surrogate."""
    encoded: bytes = imap_utf7.encode(text)
    return encoded


def format_internaldate(epoch: int, offset: int) -> bytes:
    """Return a date-time for APPEND (RFC 9051 section 9), such as ``17-Jul-1996 02:44:25 -0700``.

    ``epoch`` is in seconds since 1970, ``offset`` in minutes east of UTC. A time before 1970 or after
    `MAX_EPOCH` becomes the nearest that is allowed.
    """
    local = datetime.fromtimestamp(max(0, min(MAX_EPOCH, epoch)), timezone(timedelta(minutes=offset)))
    formatted: str = datetime_util.datetime_to_INTERNALDATE(local)
    return formatted.encode("ascii")
