"""Parsers for the responses that imapfs asks for (RFC 9051 section 9): pure functions.

One regular expression reads each item of FETCH data, in whatever order the server sends them. Items that were
not asked for are skipped. Parsing is linear in the size of the response.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta, timezone

from imapfs.encoding import MAX_EPOCH
from imapfs.errors import ProtocolError
from imapfs.model import ModSeq, Uid

Response = list[bytes]
"""Text, literal, text, literal, ..., text: always an odd number of parts. A streamed literal is b""."""
Value = bytes | None | list["Value"]
"""A parsed value: an atom, string or number as bytes, NIL as None, or a parenthesised list."""

_STATUS = re.compile(rb"(OK|NO|BAD|BYE|PREAUTH)(?: \[([A-Za-z0-9-]+)([^\]\r\n]*)\])?[ ]?([^\r\n]*)", re.I)
_EXISTS = re.compile(rb"\* (\d{1,10}) EXISTS *\r?\n", re.I)
_FETCH = re.compile(rb"\* \d+ FETCH \(", re.I)
_FETCH_ITEM = re.compile(
    rb" *(?:"
    rb"UID (?P<uid>\d+)"
    rb"|FLAGS \((?P<flags>[^()]*)\)"
    rb'|INTERNALDATE "(?P<date>[^"]*)"'
    rb"|RFC822\.SIZE (?P<size>\d+)"
    rb"|MODSEQ \((?P<modseq>\d+)\)"
    rb"|(?:EMAILID \((?P<emailid>[A-Za-z0-9_-]{1,255})\)|X-GM-MSGID (?P<msgid>\d{1,20}))"
    rb"|BODY\[(?P<section>[^\]]*)\](?:<\d+>)? (?P<value>NIL\b|\"(?:[^\"\\]|\\.)*\"|\Z)"
    rb")",
    re.I | re.S,
)
_TOKEN = re.compile(
    rb' *(?:(?P<open>\()|(?P<close>\))|"(?P<quoted>(?:[^"\\]|\\.)*)"|(?P<atom>[^ ()"\r\n]+))', re.S
)
_UNQUOTE = re.compile(rb"\\(.)", re.S)
_DATE = re.compile(r" *(\d{1,2})-([A-Za-z]{3})-(\d{4}) (\d\d):(\d\d):(\d\d) ([+-])(\d\d)(\d\d)\Z")
_MINUTES_PER_DAY = 24 * 60
_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_MAX_NUMBER = (1 << 63) - 1
"""Largest number in IMAP (RFC 9051 number64), and in SQLite."""


@dataclass(slots=True)
class FetchData:
    """The items of one FETCH response; None for an item that it lacks."""

    uid: Uid | None = None
    flags: str | None = None
    """Space-separated as the server spells them, without ``\\Recent``."""
    date: bytes | None = None
    size: int | None = None
    modseq: ModSeq | None = None
    object_id: str | None = None
    """EMAILID (RFC 8474 section 5.1), or X-GM-MSGID (Gmail)."""
    section: bytes | None = None
    """The BODY section that `body` holds; None where the response has no BODY."""
    body: bytes | None = None
    """None also for NIL, with which a server reports that the message is gone. b"" where it was streamed."""


@dataclass(frozen=True, slots=True)
class Completion:
    """A status response (RFC 9051 section 7.1), mostly the tagged one that completes a command."""

    status: str
    """OK, NO, BAD, BYE or PREAUTH."""
    code: str
    """The response code in upper case, or ""."""
    argument: bytes
    """What follows the code in the brackets."""
    text: str

    @classmethod
    def parse(cls, line: bytes) -> "Completion | None":
        """Parse a response without its tag; None if it is another kind."""
        m = _STATUS.match(line)
        if not m:
            return None
        status, code, argument, text = m.groups()
        return cls(
            status.decode().upper(),
            (code or b"").decode().upper(),
            (argument or b"").strip(),
            text.decode("utf-8", "replace").strip(),
        )


def parse_exists(line: bytes) -> int | None:
    """Return the number of messages in an EXISTS response (RFC 9051 section 7.4.1); None for another kind."""
    m = _EXISTS.match(line)
    return int(m[1]) if m else None


def number(raw: bytes) -> int:
    """Parse a number of at most 63 bits. Raises ProtocolError for anything else."""
    # Python's int() takes quadratic time for long digit strings, and refuses them from some length on.
    if len(raw) > 19 or not raw.isdigit() or (value := int(raw)) > _MAX_NUMBER:
        raise ProtocolError(f"not an IMAP number: {raw[:80]!r}")
    return value


def flag_list(raw: bytes) -> str:
    """Return the flags to store: all but ``\\Recent``, which only has a meaning within one session."""
    text = raw.decode("utf-8", "replace")
    if "\\recent" in text.lower():
        return " ".join(flag for flag in text.split() if flag.lower() != "\\recent")
    return text


def parse_fetch(response: Response) -> FetchData | None:
    """Return the data of a FETCH response; None for another kind. Raises ProtocolError if it is malformed."""
    text = response[0]
    m = _FETCH.match(text)
    if not m:
        return None
    data = FetchData()
    part, at = 0, m.end()
    item = _FETCH_ITEM.match
    while True:
        m = item(text, at)
        if m is None:
            rest = text[at:].strip()
            if rest == b")":
                return data
            part, at = _skip_item(response, part, at)
            text = response[part]
            continue
        at = m.end()
        kind = m.lastgroup
        if kind == "uid":
            data.uid = Uid(number(m["uid"]))
        elif kind == "flags":
            data.flags = flag_list(m["flags"])
        elif kind == "date":
            data.date = m["date"]
        elif kind == "size":
            data.size = number(m["size"])
        elif kind == "modseq":
            data.modseq = ModSeq(number(m["modseq"]))
        elif kind in {"emailid", "msgid"}:
            data.object_id = m[kind].decode()
        else:
            data.section = m["section"].upper()
            value = m["value"]
            if value:
                data.body = None if value.upper() == b"NIL" else _UNQUOTE.sub(rb"\1", value[1:-1])
            elif part + 2 < len(response):
                data.body = response[part + 1]
                part, at = part + 2, 0
                text = response[part]
            else:
                raise ProtocolError(f"malformed FETCH response: {response[0][:80]!r}")


def _skip_item(response: Response, part: int, at: int) -> tuple[int, int]:
    """Skip an item that was not asked for, name and value; return the part and the position after it."""
    start = (part, at)
    depth, seen = 0, 0
    while seen < 2:
        m = _TOKEN.match(response[part], at)
        if m is None:
            if part + 2 >= len(response) or response[part][at:].strip():
                break
            part, at = part + 2, 0  # a literal is a token of its own
        else:
            at = m.end()
            if m["open"]:
                depth += 1
            elif m["close"]:
                depth -= 1
                if depth < 0:
                    break
        if depth == 0:
            seen += 1
    if seen < 2 or (part, at) == start:
        raise ProtocolError(f"malformed FETCH response: {response[0][:80]!r}")
    return part, at


def values(response: Response, skip: int) -> list[Value]:
    """Parse ``response`` after its first ``skip`` bytes. Raises ProtocolError."""
    top: list[Value] = []
    stack: list[list[Value]] = [top]
    for index, text in enumerate(response):
        if index % 2:
            stack[-1].append(text)
            continue
        at = skip if index == 0 else 0
        end = len(text.rstrip())
        while at < end:
            m = _TOKEN.match(text, at)
            if m is None:
                raise ProtocolError(f"malformed response: {text[:80]!r}")
            at = m.end()
            if m["open"]:
                inner: list[Value] = []
                stack[-1].append(inner)
                stack.append(inner)
            elif m["close"]:
                stack.pop()
                if not stack:
                    raise ProtocolError(f"malformed response: {text[:80]!r}")
            elif m["quoted"] is not None:
                stack[-1].append(_UNQUOTE.sub(rb"\1", m["quoted"]))
            else:
                atom = m["atom"]
                stack[-1].append(None if atom.upper() == b"NIL" else atom)
    if len(stack) != 1:
        raise ProtocolError(f"malformed response: {response[0][:80]!r}")
    return top


@dataclass(frozen=True, slots=True)
class ListEntry:
    """One mailbox of a LIST response (RFC 9051 section 7.3.1)."""

    name: bytes
    """As the server sends it, still encoded."""
    delimiter: bytes
    """One byte, or b"" where mailbox names have no hierarchy."""
    attributes: frozenset[str] = field(default_factory=frozenset)
    """In lower case, with the backslash."""

    @property
    def selectable(self) -> bool:
        """Whether the mailbox can be selected."""
        return not self.attributes & {"\\noselect", "\\nonexistent"}

    @property
    def special_use(self) -> str:
        """The RFC 6154 attribute as registered, such as ``\\Trash``, or ""."""
        for use in ("All", "Archive", "Drafts", "Flagged", "Junk", "Sent", "Trash"):
            if f"\\{use.lower()}" in self.attributes:
                return f"\\{use}"
        return ""


def parse_list(response: Response) -> ListEntry | None:
    """Parse a LIST response; None for another kind. Raises ProtocolError if it is malformed."""
    if response[0][:7].upper() != b"* LIST ":
        return None
    match values(response, 7):
        case [[*attributes], (bytes() | None) as delimiter, bytes(name), *_]:
            return ListEntry(
                name,
                delimiter or b"",
                frozenset(a.decode("ascii", "replace").lower() for a in attributes if isinstance(a, bytes)),
            )
    raise ProtocolError(f"malformed LIST response: {response[0][:80]!r}")


def parse_status(response: Response) -> tuple[bytes, dict[str, int]] | None:
    """Return mailbox name and numbers of a STATUS response (RFC 9051 section 7.3.4); None for another
    kind."""
    if response[0][:9].upper() != b"* STATUS ":
        return None
    match values(response, 9):
        case [bytes(name), [*items], *_]:
            numbers = {}
            for key, value in zip(items[::2], items[1::2], strict=False):
                if isinstance(key, bytes) and isinstance(value, bytes) and value.isdigit():
                    numbers[key.decode("ascii", "replace").upper()] = number(value)
            return name, numbers
    raise ProtocolError(f"malformed STATUS response: {response[0][:80]!r}")


def parse_sequence_set(raw: bytes) -> list[tuple[int, int]]:
    """Return UID ranges, both ends included, lower end first (RFC 9051 sequence-set without ``*``)."""
    ranges = []
    try:
        for piece in raw.split(b","):
            low, _, high = piece.partition(b":")
            first, last = number(low), number(high or low)
            ranges.append((min(first, last), max(first, last)))
    except ProtocolError:
        raise ProtocolError(f"malformed UID set: {raw[:80]!r}") from None
    return ranges


def sequence_sets(uids: Iterable[int], limit: int = 4000) -> Iterator[bytes]:
    """Yield ``uids`` as sequence sets of about ``limit`` bytes at most.

    Servers answer BAD to long command lines; where a line becomes too long, between a few KiB and 64 KiB,
    depends on the server.
    """
    pieces: list[bytes] = []
    length = 0
    for low, high in _runs(uids):
        piece = b"%d" % low if low == high else b"%d:%d" % (low, high)
        if pieces and length + len(piece) > limit:
            yield b",".join(pieces)
            pieces, length = [], 0
        pieces.append(piece)
        length += len(piece) + 1
    if pieces:
        yield b",".join(pieces)


def _runs(uids: Iterable[int]) -> Iterator[tuple[int, int]]:
    low = high = 0
    for uid in sorted(set(uids)):
        if uid == high + 1 and low:
            high = uid
            continue
        if low:
            yield low, high
        low = high = uid
    if low:
        yield low, high


def parse_date(raw: bytes) -> tuple[int, int]:
    """Return an INTERNALDATE as (seconds since the epoch, minutes east of UTC).

    Anything else becomes the epoch: a malformed date must not hide the message.
    """
    m = _DATE.match(raw.decode("ascii", "replace"))
    if m and m[2].lower() in _MONTHS:
        offset = (int(m[8]) * 60 + int(m[9])) * (-1 if m[7] == "-" else 1)
        if abs(offset) >= _MINUTES_PER_DAY:
            offset = 0  # no such zone exists, and none could be sent back with an edited message
        try:
            month = _MONTHS.index(m[2].lower()) + 1
            second = min(int(m[6]), 59)  # a leap second is a valid time
            local = datetime(int(m[3]), month, int(m[1]), int(m[4]), int(m[5]), second, tzinfo=UTC)
        except ValueError:
            return 0, 0
        return max(-MAX_EPOCH, min(MAX_EPOCH, int(local.timestamp()) - offset * 60)), offset
    return 0, 0


def format_iso(epoch: int, offset: int) -> str:
    """Return the time in ISO 8601, in the time zone ``offset`` minutes east of UTC."""
    try:
        return datetime.fromtimestamp(epoch, timezone(timedelta(minutes=offset))).isoformat()
    except (ValueError, OverflowError, OSError):
        return datetime.fromtimestamp(0, UTC).isoformat()
