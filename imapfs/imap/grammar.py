"""Parsers for the responses that imapfs asks for (RFC 9051 section 9): pure functions.

One regular expression reads each item of FETCH data, in whatever order the server sends them. Items that were
not asked for are skipped. A malformed item costs the items after it, not the message.

Parsing is linear in the size of the response, whatever a server sends. So repetitions are possessive,
what is searched once without success is not searched again, and no rest of a text is copied for an item.
"""

import contextlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta, timezone

from imapfs.encoding import MAX_EPOCH
from imapfs.errors import Malformed
from imapfs.imap.budget import MAX_FLAGS, MAX_MAILBOX_NAME, MAX_RANGES, MAX_TEXT, MAX_VALUES
from imapfs.model import ModSeq, Uid

Response = list[bytes]
"""Text, literal, text, literal, ..., text: always an odd number of parts. A streamed literal is b""."""
Value = bytes | None | list["Value"]
"""A parsed value: an atom, string or number as bytes, NIL as None, or a parenthesised list."""

_STATUSES = frozenset({b"OK", b"NO", b"BAD", b"BYE", b"PREAUTH"})
_CODE = re.compile(rb"\[([A-Za-z0-9-]{1,64})")
_EXISTS = re.compile(rb"\* (\d{1,10}) EXISTS *+\r?\n", re.I)
_FETCH = re.compile(rb"\* \d++ FETCH \(", re.I)
_FETCH_ITEM = re.compile(
    rb"\s*+(?:"
    rb"UID (?P<uid>\d++)"
    rb"|FLAGS (?P<flags>\()"
    rb'|INTERNALDATE "(?P<date>[^"]{0,64})"'
    rb"|RFC822\.SIZE (?P<size>\d++)"
    rb"|MODSEQ \((?P<modseq>\d++)\)"
    rb"|(?:EMAILID \((?P<emailid>[A-Za-z0-9_-]{1,255})\)|X-GM-MSGID (?P<msgid>\d{1,20}))"
    rb"|BODY\[(?P<section>[^][]{0,1000})\](?:<\d++>)? (?P<value>NIL\b|\"(?:[^\"\\]++|\\.)*+\"|\Z)"
    rb")",
    re.I | re.S,
)
_FLAGS_END = re.compile(
    rb"\)(?= (?:UID|FLAGS|INTERNALDATE|RFC822|MODSEQ|EMAILID|THREADID|SAVEDATE|PREVIEW|ENVELOPE|BODY|BINARY"
    rb"|X-)|\)\r?\n?\Z)",
    re.I,
)
"""What ends FLAGS even if a keyword contains parentheses, which no keyword may."""
_PLAIN_FLAGS_END = re.compile(rb"[^()]*+\)(?= )")
_ODD_FLAG = re.compile(rb'[(){%"\x00-\x1f\x7f]')
"""What is in no flag (RFC 9051 flag-keyword); ``]`` is, as Gmail has such labels."""
_TOKEN = re.compile(
    rb'\s*+(?:(?P<open>\()|(?P<close>\))|"(?P<quoted>(?:[^"\\]++|\\.)*+)"|(?P<atom>[^ ()"\r\n]++))', re.S
)
_BLANK = re.compile(rb"\s*+\Z")
_UNQUOTE = re.compile(rb"\\(.)", re.S)
_WHOLE_ESCAPES = re.compile(rb"(?:[^\\]++|\\.)*+", re.S)
_UNQUOTE_AT_ONCE = 64 << 10
"""Bytes of a quoted string: a substitution takes 50 times the memory of what it replaces."""
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

    @property
    def is_metadata(self) -> bool:
        """Whether this answers a request for metadata, and is no mere change of flags.

        Some servers leave out the size of some messages, or the date.
        """
        return self.size is not None or self.date is not None or bool(self.section)


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
        line = line.partition(b"\n")[0].partition(b"\r")[0]
        status, _, rest = line.partition(b" ")
        if status.upper() not in _STATUSES:
            return None
        code = argument = b""
        if m := _CODE.match(rest):
            # A keyword in PERMANENTFLAGS may contain "]" (Gmail).
            listed = rest.find(b")]", m.end()) if rest.startswith(b" (", m.end()) else -1
            end = listed + 1 if listed >= 0 else rest.find(b"]", m.end())
            if end >= 0:
                code, argument, rest = m[1], rest[m.end() : end], rest[end + 1 :]
        return cls(
            status.decode().upper(),
            code.decode().upper(),
            argument.strip(),
            rest[:MAX_TEXT].decode("utf-8", "replace").strip(),
        )


def parse_exists(line: bytes) -> int | None:
    """Return the number of messages in an EXISTS response (RFC 9051 section 7.4.1); None for another kind."""
    m = _EXISTS.match(line)
    return int(m[1]) if m else None


def number(raw: bytes) -> int:
    """Parse a number of at most 63 bits. Raises Malformed for anything else."""
    # Python's int() takes quadratic time for long digit strings, and refuses them from some length on.
    if len(raw) > 19 or not raw.isdigit() or (value := int(raw)) > _MAX_NUMBER:
        raise Malformed(f"not an IMAP number: {raw[:80]!r}")
    return value


def flag_list(raw: bytes) -> str:
    """Return the flags to store: all but ``\\Recent``, which only has a meaning within one session, and what
    cannot be a flag."""
    if len(raw) > MAX_FLAGS:
        raw = raw[:MAX_FLAGS].rpartition(b" ")[0]
    text = raw.decode("utf-8", "replace")
    if "\\recent" in text.lower() or _ODD_FLAG.search(raw):
        return " ".join(
            flag
            for flag in text.split()
            if flag.lower() != "\\recent" and not _ODD_FLAG.search(flag.encode())
        )
    return text


def _unquoted(text: bytes) -> bytes:
    """Undo the escapes of a quoted string (RFC 9051 section 4.3)."""
    if b"\\" not in text:
        return text
    pieces: list[bytes] = []
    at = 0
    while (m := _WHOLE_ESCAPES.match(text, at, at + _UNQUOTE_AT_ONCE)) and m[0]:
        pieces.append(_UNQUOTE.sub(rb"\1", m[0]))
        at = m.end()
    return b"".join(pieces)


def parse_fetch(response: Response) -> FetchData | None:
    """Return the data of a FETCH response, as far as it can be read; None for another kind."""
    text = response[0]
    m = _FETCH.match(text)
    if not m:
        return None
    data = FetchData()
    part, at = 0, m.end()
    flags_end: re.Pattern[bytes] | None = _FLAGS_END
    while True:
        m = _FETCH_ITEM.match(text, at)
        if m is None:
            following = _skip_item(response, part, at)
            if following is None:
                return data
            part, at = following
            text = response[part]
            continue
        at = m.end()
        kind = m.lastgroup
        if kind == "flags":
            end = flags_end.search(text, at) if flags_end else None
            if end is None:
                flags_end, end = None, _PLAIN_FLAGS_END.match(text, at)
            if end is None:
                return data
            data.flags = flag_list(text[at : end.end() - 1])
            at = end.end()
        elif kind != "value":
            with contextlib.suppress(Malformed):
                _note_item(data, kind, m)
        elif m["value"]:
            value = m["value"]
            data.section = m["section"].upper()
            data.body = None if value.upper() == b"NIL" else _unquoted(value[1:-1])
        elif part + 2 < len(response):
            data.section = m["section"].upper()
            data.body = response[part + 1]
            part, at = part + 2, 0
            text = response[part]
        else:
            return data


def _note_item(data: FetchData, kind: str | None, m: re.Match[bytes]) -> None:
    """Store an item that is one word. Raises Malformed."""
    match kind:
        case "uid":
            data.uid = Uid(number(m["uid"]))
        case "date":
            data.date = m["date"]
        case "size":
            data.size = number(m["size"])
        case "modseq":
            data.modseq = ModSeq(number(m["modseq"]))
        case "emailid" | "msgid":
            data.object_id = m[kind].decode()


def _skip_item(response: Response, part: int, at: int) -> tuple[int, int] | None:
    """Skip an item that was not asked for, name and value; return the part and the position after it.

    Return None at the end of the data, and where nothing can be skipped.
    """
    depth, seen = 0, 0
    while seen < 2:
        m = _TOKEN.match(response[part], at)
        if m is None:
            if part + 2 >= len(response) or not _BLANK.match(response[part], at):
                return None
            part, at = part + 2, 0  # a literal is a token of its own
        else:
            at = m.end()
            if m["open"]:
                depth += 1
            elif m["close"]:
                depth -= 1
                if depth < 0:
                    return None
        if depth == 0:
            seen += 1
    return part, at


def values(response: Response, skip: int) -> list[Value]:
    """Parse ``response`` after its first ``skip`` bytes. Raises Malformed."""
    top: list[Value] = []
    stack: list[list[Value]] = [top]
    left = MAX_VALUES
    for index, text in enumerate(response):
        if index % 2:
            stack[-1].append(text)
            continue
        at = skip if index == 0 else 0
        end = len(text.rstrip())
        while at < end:
            m = _TOKEN.match(text, at)
            left -= 1
            if m is None or not left:
                raise Malformed(f"malformed response: {text[:80]!r}")
            at = m.end()
            if m["open"]:
                inner: list[Value] = []
                stack[-1].append(inner)
                stack.append(inner)
            elif m["close"]:
                stack.pop()
                if not stack:
                    raise Malformed(f"malformed response: {text[:80]!r}")
            elif m["quoted"] is not None:
                stack[-1].append(_unquoted(m["quoted"]))
            else:
                atom = m["atom"]
                stack[-1].append(None if atom.upper() == b"NIL" else atom)
    if len(stack) != 1:
        raise Malformed(f"malformed response: {response[0][:80]!r}")
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
    """Parse a LIST response; None for another kind. Raises Malformed."""
    if response[0][:7].upper() != b"* LIST ":
        return None
    match values(response, 7):
        case [[*attributes], (bytes() | None) as delimiter, bytes(name), *_] if len(name) <= MAX_MAILBOX_NAME:
            return ListEntry(
                name,
                delimiter or b"",
                frozenset(a.decode("ascii", "replace").lower() for a in attributes if isinstance(a, bytes)),
            )
    raise Malformed(f"malformed LIST response: {response[0][:80]!r}")


def parse_status(response: Response) -> tuple[bytes, dict[str, int]] | None:
    """Return mailbox name and numbers of a STATUS response (RFC 9051 section 7.3.4); None for another
    kind. Raises Malformed."""
    if response[0][:9].upper() != b"* STATUS ":
        return None
    words: list[bytes] = []
    for part in values(response, 9):
        if isinstance(part, list) and words:
            numbers = {}
            for key, value in zip(part[::2], part[1::2], strict=False):
                if not (isinstance(key, bytes) and isinstance(value, bytes)):
                    continue
                with contextlib.suppress(Malformed):
                    numbers[key.decode("ascii", "replace").upper()] = number(value)
            # Twisted does not quote a name with spaces.
            return b" ".join(words), numbers
        if not isinstance(part, bytes):
            break
        words.append(part)
    raise Malformed(f"malformed STATUS response: {response[0][:80]!r}")


def parse_search(response: Response) -> list[int] | None:
    """Return the numbers of a SEARCH response (RFC 3501 section 7.2.5); None for another kind.

    Raises Malformed.
    """
    if response[0][:8].upper() != b"* SEARCH":
        return None
    # CONDSTORE adds "(MODSEQ 7)" to some (RFC 7162 section 3.1.5).
    return [number(word) for word in response[0][8:].partition(b"(")[0].split()]


def parse_sequence_set(raw: bytes) -> list[tuple[int, int]]:
    """Return UID ranges, both ends included, lower end first (RFC 9051 sequence-set without ``*``)."""
    ranges = []
    if raw.count(b",") >= MAX_RANGES:
        raise Malformed(f"a UID set of more than {MAX_RANGES} ranges")
    try:
        for piece in raw.split(b","):
            low, _, high = piece.partition(b":")
            first, last = number(low), number(high or low)
            ranges.append((min(first, last), max(first, last)))
    except Malformed:
        raise Malformed(f"malformed UID set: {raw[:80]!r}") from None
    return ranges


def sequence_sets(uids: Iterable[int], limit: int = 4000) -> Iterator[bytes]:
    """Yield ``uids`` as sequence sets; see `range_sets`."""
    return range_sets(_runs(uids), limit)


def range_sets(ranges: Iterable[tuple[int, int]], limit: int = 4000) -> Iterator[bytes]:
    """Yield UID ranges, both ends included, as sequence sets of about ``limit`` bytes at most.

    Servers answer BAD to long command lines; where a line becomes too long, between a few KiB and 64 KiB,
    depends on the server.
    """
    pieces: list[bytes] = []
    length = 0
    for low, high in ranges:
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
