"""Parses the few header fields that names and attributes need, from real-world mail.

Nothing here raises, and all work is linear in the size of the header, because strangers choose its content.
The standard library's header parsers guarantee neither.
"""

import binascii
import re
from encodings.aliases import aliases
from functools import lru_cache
from typing import NamedTuple

_MAX_CHARACTERS = 2_000
"""Maximum length of a decoded field."""
_MAX_BYTES = 32_768
"""Bytes of a raw field that are read: enough for `_MAX_CHARACTERS`, even if each encoded word holds one
character, which takes about 16 bytes."""
_MAX_CACHED = 512
"""Maximum length of a raw From or To field that is cached, in bytes."""

_FOLD = re.compile(rb"(?:[ \t]?\n[ \t]+)+")
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029][\x00-\x20\x7f-\x9f\u2028\u2029]*")
_SURROGATE = re.compile("[\ud800-\udfff]")
_WORD_START = re.compile(rb"=\?([^?\s]{1,64})\?([BbQq])\?")
_QUOTED_PAIR = re.compile(rb"\\(.)", re.DOTALL)
# No backtracking: every alternative matches wherever its first byte does, or is bounded by the next "?".
_MAILBOX_TOKEN = re.compile(
    rb"""(?P<word>=\?[^?\s]{1,64}\?[BbQq]\?[^?]*\?=)
       | "(?P<quoted>(?:[^"\\]|\\.)*)"?
       | <(?P<address>[^>]*)>?
       | (?P<special>[(),:;])
       | (?P<text>[^="<(),:;]+|=)""",
    re.DOTALL | re.VERBOSE,
)

# A closed set instead of codecs.lookup() for names from mail: that would import a module for each name, cache
# each failure forever, and offer codecs that are not charsets (hex, zip) or are slow by design (idna).
_CODECS = {
    name: codec
    for name, codec in ({codec: codec for codec in aliases.values()} | aliases).items()
    if not codec.endswith("_codec") and codec not in ("ascii", "mbcs", "rot_13", "tactis")
} | {
    "iso_8859_8_e": "iso8859_8",
    "iso_8859_8_i": "iso8859_8",
    "koi8_t": "koi8_t",
    "koi8_u": "koi8_u",
    "windows_874": "cp874",
    "x_gbk": "gbk",
    "x_sjis": "cp932",
}
# Mail labelled with the first charset is usually written in the second, a superset.
_SUPERSETS = {
    "euc_kr": "cp949",
    "gb2312": "gb18030",
    "gbk": "gb18030",
    "latin_1": "cp1252",
    "iso8859_9": "cp1254",
    "shift_jis": "cp932",
}


class Headers(NamedTuple):
    """Decoded fields without control characters, of at most 2,000 characters each; "" for a missing field."""

    subject: str
    sender: str
    """Display name of the first mailbox in From, or else its address."""
    from_: str
    """The whole From field."""
    message_id: str
    """Unchanged, with its angle brackets."""
    recipient: str = ""
    """Display name of the first mailbox in To, or else its address."""


def parse_headers(block: bytes) -> Headers:
    """Parse a header block (RFC 5322), such as the literal of ``BODY[HEADER.FIELDS (...)]``. Never raises.

    If a field occurs twice, the first counts. Lines end with CRLF or LF. A bare CR ends a line only if the
    block has no other line ends; otherwise it is whitespace. Encoded words (RFC 2047) are decoded wherever
    they occur. Bytes that are not ASCII are read as UTF-8, or else as windows-1252 with U+FFFD for undefined
    bytes.
    """
    lines = block
    if b"\r" in lines:
        lines = lines.replace(b"\r\r\n", b"\n").replace(b"\r\n", b"\n")
        if b"\n" not in lines.rstrip():
            lines = lines.replace(b"\r", b"\n")
    if lines.startswith(b"\n"):
        return Headers("", "", "", "")
    lines = lines.partition(b"\n\n")[0]
    if b"\n " in lines or b"\n\t" in lines:
        lines = _FOLD.sub(b" ", lines)

    subject = sender = recipient = message_id = None
    for line in lines.split(b"\n"):
        name, colon, value = line.partition(b":")
        if not colon:
            continue
        match name.rstrip(b" \t").lower():
            case b"subject" if subject is None:
                subject = value
            case b"from" if sender is None:
                sender = value
            case b"to" if recipient is None:
                recipient = value
            case b"message-id" if message_id is None:
                message_id = value

    name_and_field = _decode_mailboxes(sender) if sender is not None else ("", "")
    return Headers(
        _clean(_decode_words(_bounded(subject))) if subject is not None else "",
        *name_and_field,
        _clean(_decode_8bit(_bounded(message_id))) if message_id is not None else "",
        _decode_mailboxes(recipient)[0] if recipient is not None else "",
    )


def _bounded(value: bytes) -> bytes:
    if len(value) <= _MAX_BYTES:
        return value
    end = _MAX_BYTES
    # A cut character would turn a UTF-8 field into windows-1252. No character has more than four bytes.
    while end > _MAX_BYTES - 4 and value[end] & 0xC0 == 0x80:
        end -= 1
    return value[:end]


def _clean(text: str) -> str:
    if not text.isprintable():
        text = _SURROGATE.sub("\ufffd", _CONTROL.sub(" ", text))
    return text.strip()[:_MAX_CHARACTERS]


def _decode_8bit(value: bytes) -> str:
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        return value.decode("cp1252", "replace")


def _decode_words(value: bytes) -> str:
    """Decode text with encoded words (RFC 2047 section 6.2), leniently about their surroundings and
    content."""
    if b"=?" not in value:
        return _decode_8bit(value)
    parts: list[str] = []
    charset, data = b"", b""
    done = 0
    start = value.find(b"=?")
    while start >= 0:
        opening = _WORD_START.match(value, start)
        if opening is None:
            start = value.find(b"=?", start + 2)
            continue
        end = value.find(b"?=", opening.end())
        if end < 0:
            break
        between = value[done:start]
        word_charset = opening[1].lower()
        adjacent = done > 0 and not between.strip()
        # Some senders split words inside a character, so adjacent words are joined before decoding.
        if not (adjacent and word_charset == charset):
            parts.append(_decode_charset(data, charset))
            charset, data = word_charset, b""
            if not adjacent:
                parts.append(_decode_8bit(between))
        payload = value[opening.end() : end]
        data += _decode_base64(payload) if opening[2] in b"Bb" else binascii.a2b_qp(payload, header=True)
        done = end + 2
        start = value.find(b"=?", done)
    parts += [_decode_charset(data, charset), _decode_8bit(value[done:])]
    return "".join(parts)


def _decode_base64(payload: bytes) -> bytes:
    try:
        return binascii.a2b_base64(payload)
    except binascii.Error:
        # Usually the padding is missing. A lone last digit holds only six bits, and so no byte.
        digits = re.sub(rb"[^A-Za-z0-9+/]", b"", payload)
        digits = digits[: len(digits) - (len(digits) % 4 == 1)]
        return binascii.a2b_base64(digits + b"=" * (-len(digits) % 4))


def _decode_charset(data: bytes, charset: bytes) -> str:
    # A language may follow after an asterisk (RFC 2231 section 5).
    name = charset.partition(b"*")[0].decode("ascii", "replace").replace("-", "_")
    codec = _CODECS.get(name)
    if codec is None:
        return _decode_8bit(data)
    return data.decode(_SUPERSETS.get(codec, codec), "replace")


def _decode_mailboxes(value: bytes) -> tuple[str, str]:
    value = _bounded(value)
    return _cached_field(value) if len(value) <= _MAX_CACHED else _decode_field(value)


def _decode_field(value: bytes) -> tuple[str, str]:
    """Return the display name of the first mailbox, or else its address, and the whole field."""
    name, comment, address = _first_mailbox(value)
    for candidate in (name, comment, address):
        if sender := " ".join(_clean(_decode_words(candidate)).split()):
            break
    return sender, _clean(_decode_words(value))


_cached_field = lru_cache(maxsize=2048)(_decode_field)


def _first_mailbox(value: bytes) -> tuple[bytes, bytes, bytes]:
    """Return display name, comment and address of the first mailbox (RFC 5322 section 3.4), still encoded.

    A mailbox ends only after an address, because names with a bare comma are common: ``Doe, Jane
    <jane@example.com>``. Old mail has a comment instead of a name: ``jane@example.com (Jane Doe)``.
    """
    phrase: list[bytes] = []
    comment: list[bytes] = []
    address: bytes | None = None
    bare_address = False
    depth = 0
    for token in _MAILBOX_TOKEN.finditer(value):
        kind, piece = token.lastgroup, token[0]
        if kind == "quoted":
            piece = _QUOTED_PAIR.sub(rb"\1", token["quoted"])
        if kind == "special" and piece == b"(":
            depth += 1
        elif kind == "special" and piece == b")":
            depth = max(depth - 1, 0)
        elif depth:
            comment.append(piece)
        elif kind == "address":
            address = token["address"] if address is None else address
        elif kind == "special" and piece == b":" and not bare_address:
            # The display name of a group ends here (RFC 6854); its first member follows.
            phrase.clear()
        elif kind == "special" and piece != b":" and (bare_address or address is not None):
            break
        elif piece != b";":
            bare_address |= kind == "text" and b"@" in piece
            phrase.append(piece)
    if address is None:
        return b"", b"".join(comment), b"".join(phrase)
    return b"".join(phrase), b"".join(comment), address
