"""Mailbox names on the server to directory entries, and back. Names of messages: `imapfs.message_names`.

Pure and deterministic: no locale, no time zone, no I/O. Directory entries are ``bytes`` in UTF-8, at most
255 bytes long (NAME_MAX), and never contain ``/`` or NUL.

A hierarchy component of a mailbox name is shown in one of these forms, where ``%XX`` stands for one byte:

``Entwürfe``
    A component in canonical modified UTF-7 is shown as its text. Escaped are ``/``, control characters, the
    dots of ``.`` and ``..``, the last dot of ``*.eml`` (a mailbox never takes the name of a message), and a
    ``%`` that would otherwise read as an escape.
``%~Entwürfe``
    The bytes of the component are this text: raw UTF-8 (RFC 6855), or raw control bytes. Some servers hold
    mailboxes in both spellings, so the two must differ. ``%~`` alone is the empty component.
``R%26D``
    A malformed component is shown as its bytes, with every ``&`` and 8-bit byte escaped.
``Start of a long name%~0123456789abcdef``
    An entry of more than 255 bytes is cut, and ends with the start of the component's SHA-256. Only this form
    has no inverse.
"""

import hashlib
import re
from typing import Final

from imapfs.encoding import decode_utf7, encode_utf7

MAX_NAME = 255
"""Bytes of a directory entry, as statfs says."""
MESSAGE_SUFFIX: Final = b".eml"
_MARKER = b"%~"
_HASH_DIGITS = 16

# C1 control characters are escaped like C0 ones: terminals obey U+009B as they do ESC [. So are line
# separators and what turns the direction of writing (U+2028 to U+202E, U+2066 to U+2069).
_IN_TEXT = re.compile(
    rb"[/\x00-\x1f\x7f]|\xc2[\x80-\x9f]|\xe2\x80[\xa8-\xae]|\xe2\x81[\xa6-\xa9]|%(?=~|[0-9A-Fa-f]{2})"
)
_IN_MALFORMED = re.compile(rb"[/&\x00-\x1f\x7f-\xff]|%(?=~|[0-9A-Fa-f]{2})")
_ESCAPE = re.compile(rb"%([0-9A-F]{2})")


def decode_mailbox(raw: bytes) -> str | None:
    """Decode a mailbox name, or one hierarchy component of it.

    ASCII is modified UTF-7 (RFC 3501 section 5.1.3); anything with 8-bit bytes is UTF-8 (RFC 6855 section 3).
    Return None where ``raw`` is neither, or is not the canonical spelling of its text: such a name cannot be
    sent back to the server from its text. Never raises.
    """
    if raw.isascii():
        return decode_utf7(raw)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return None


def entry_name(component: bytes) -> bytes:
    """Return the directory entry for one raw hierarchy component of a mailbox name.

    Distinct components have distinct entries (beyond 255 bytes: unless 64 bits of SHA-256 collide). The entry
    is never ``.``, ``..`` or ``*.eml``. Never raises.
    """
    text = decode_mailbox(component)
    if text is None and (b"&" in component or not component.isascii()):
        entry = _escaped(_IN_MALFORMED, component)
    elif text and component.isascii():
        entry = _escaped(_IN_TEXT, text.encode("utf-8"))
    else:
        entry = _MARKER + _escaped(_IN_TEXT, component)
    if len(entry) <= MAX_NAME:
        return entry
    start = entry[: MAX_NAME - len(_MARKER) - _HASH_DIGITS].decode("utf-8", "ignore").encode("utf-8")
    return start + _MARKER + hashlib.sha256(component).hexdigest()[:_HASH_DIGITS].encode("ascii")


def is_inbox(server_name: bytes | None) -> bool:
    """Whether a mailbox name means INBOX, in any case (RFC 9051 section 5.1)."""
    return server_name is not None and server_name.upper() == b"INBOX"


def is_message_name(name: bytes) -> bool:
    """Return whether a new file with this name becomes a message. Other files stay local."""
    return name.lower().endswith(MESSAGE_SUFFIX) and not name.startswith(b".")


def is_file_name(name: bytes) -> bool:
    """Whether a directory can have an entry of this name."""
    return 0 < len(name) <= MAX_NAME and name not in (b".", b"..") and not {*b"/\0"} & {*name}


def shortened(name: bytes, limit: int = MAX_NAME) -> bytes:
    """Return ``name``, cut before its suffix if it is longer than ``limit`` bytes, as names once could be."""
    if len(name) <= limit:
        return name
    stem, dot, suffix = name.rpartition(b".")
    end = (dot + suffix)[-16:] if stem else b""
    return (stem or name)[: limit - len(end)].decode("utf-8", "ignore").encode() + end


def as_text(name: bytes) -> str:
    """Return a name as text that JSON can hold, whatever bytes it has; `as_bytes` is the inverse."""
    return name.decode("utf-8", "surrogateescape")


def as_bytes(text: str) -> bytes:
    """Return the name that `as_text` was called with."""
    return text.encode("utf-8", "surrogateescape")


def renamed(server_name: bytes, old: bytes, new: bytes, delimiter: bytes) -> bytes | None:
    """The name of a mailbox after ``old`` was renamed to ``new``; None if it is neither that nor below it."""
    if server_name == old or (delimiter and server_name.startswith(old + delimiter)):
        return new + server_name[len(old) :]
    return None


def server_component(entry: bytes) -> bytes | None:
    """Return the raw component whose `entry_name` is ``entry``: the inverse, for names that a user chooses.

    Return None if no mailbox can have that entry: it is not UTF-8, ends in ``.eml``, is too long, has an
    escape that `entry_name` would not write, or stands for an empty, malformed or cut component. The result
    may contain the server's hierarchy delimiter (``a%2Fb``), which only the caller knows. Never raises.
    """
    try:
        if entry.startswith(_MARKER):
            component = _unescaped(entry.removeprefix(_MARKER))
        else:
            component = encode_utf7(_unescaped(entry).decode("utf-8"))
    except UnicodeDecodeError:
        return None
    return component if decode_mailbox(component) and entry_name(component) == entry else None


def _escaped(special: re.Pattern[bytes], name: bytes) -> bytes:
    shown = special.sub(lambda match: b"".join(b"%%%02X" % byte for byte in match[0]), name)
    if shown in (b".", b".."):
        return shown.replace(b".", b"%2E")
    if shown[-4:].lower() == b".eml":
        return shown[:-4] + b"%2E" + shown[-3:]
    return shown


def _unescaped(shown: bytes) -> bytes:
    return _ESCAPE.sub(lambda match: bytes([int(match[1], 16)]), shown)
