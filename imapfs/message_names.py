"""File names of messages: a template with fields, and the name that it gives a message.

Pure and deterministic: no locale, no time zone, no I/O. The same message has the same name on every computer.

A template is text with fields in braces, such as ``{date}_{time}_{from}_{subject}.{uid}``; ``.eml`` is added.

``{date}``, ``{time}``
    When the message arrived (INTERNALDATE), in UTC: ``2026-11-20`` and ``1432``.
``{from}``
    The sender. In a mailbox of the user's own mail (Sent, Drafts) it is the recipient instead, unless the
    template has ``{to}``.
``{to}``
    The first recipient in To.
``{subject}``
    The subject, shortened if necessary.
``{uid}``
    The UID, which makes the name unique in its mailbox. It is compulsory.
"""

import datetime
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

SHORT_FORMS: Final = {"subject": "{date}_{time}_{from}_{subject}.{uid}", "uid": "{uid}"}
FIELDS: Final = ("date", "time", "from", "to", "subject", "uid")
_FREE_TEXT: Final = frozenset({"from", "to", "subject"})
"""The fields that strangers write. They may be empty, and have any length."""

MAX_LENGTH: Final = 150
"""Maximum length of the name of a message, in bytes. Some programs fail well below NAME_MAX, because they add
a suffix to the name, or have room for a path of limited length."""
_MAX_LITERAL: Final = 32
"""Maximum length of the text between fields, in bytes, so that enough room is left for the fields."""
_MAX_PERSON: Final = 40
"""Maximum length of the sender or the recipient in a name, in bytes."""
_MAX_CHARACTERS: Final = 1_000
"""Characters of a field that are considered: more than fit into a name. Normalisation takes quadratic time
for long runs of combining marks."""

_SUFFIX: Final = ".eml"
_MAX_STEM: Final = MAX_LENGTH - len(_SUFFIX) - len("~99999")
"""Maximum length of what a template makes, which leaves room for `variant`."""
_FIELD: Final = re.compile(r"\{([^{}]*)\}")
# Characters that other file systems (FAT, exFAT, NTFS) do not allow, or that programs misread
# (``host:path``).
_NOT_PORTABLE: Final = '/:*?"<>|\\'
# Such characters in a field become spaces, so that each run of them is one underscore in the end.
_TO_SPACE: Final = str.maketrans(dict.fromkeys(_NOT_PORTABLE + "_", " "))
_NEVER_FIRST: Final = ".-~_ "
"""A file whose name begins with a dot is hidden, and a program takes a name with a dash for an option."""

_SECONDS_PER_DAY: Final = 86_400
_EPOCH_DAY: Final = datetime.date(1970, 1, 1).toordinal()
_FIRST_SECOND: Final = (datetime.date.min.toordinal() - _EPOCH_DAY) * _SECONDS_PER_DAY
_LAST_SECOND: Final = (datetime.date.max.toordinal() - _EPOCH_DAY + 1) * _SECONDS_PER_DAY - 1


@dataclass(frozen=True, slots=True)
class NameTemplate:
    """A checked template: the names that it makes are unique, portable and short enough."""

    start: str
    """The text before the first field."""
    fields: tuple[str, ...]
    separators: tuple[str, ...]
    """The text before each field; "" for the first."""
    end: str
    """The text after the last field."""

    @classmethod
    def parse(cls, text: str) -> "NameTemplate":
        """Parse a template or a short form. Raises ValueError with the end of a sentence."""
        text = unicodedata.normalize("NFC", SHORT_FORMS.get(text, text))
        start, *rest = _FIELD.split(text)
        fields, literals = tuple(rest[::2]), rest[1::2]
        if not fields:
            raise ValueError('must be "subject", "uid" or a template such as "{date}_{subject}.{uid}"')
        for field in fields:
            if field not in FIELDS:
                known = " ".join(f"{{{one}}}" for one in FIELDS)
                raise ValueError(f"has an unknown field {f'{{{field}}}'!a}; known are {known}")
            if fields.count(field) > 1:
                raise ValueError(f"has the field {{{field}}} twice")
        if "uid" not in fields:
            raise ValueError("must have the field {uid}, which makes each name unique")
        *separators, end = "", *literals
        _check_text(start, *separators, end)
        _check_uid(fields, separators)
        return cls(start, fields, tuple(separators), end)

    @property
    def text(self) -> str:
        """The template in its long form, from which `parse` makes an equal one."""
        pieces = zip(self.separators, self.fields, strict=True)
        return self.start + "".join(f"{before}{{{field}}}" for before, field in pieces) + self.end

    def name(
        self, date: int, sender: str, recipient: str, subject: str, uid: int, *, is_own: bool = False
    ) -> bytes:
        """Return the file name of a message, such as ``2026-11-20_1432_Alice_Example_Report.1234.eml``.

        ``date`` is in seconds since the epoch. Any integer is valid; a date outside the years 1 to 9999
        becomes the nearest second inside. ``is_own`` says that the mailbox holds the user's own mail. A field
        that is empty is left out, and with it the separator before it (after it, at the beginning).

        The name has at most 144 bytes, is printable and in normalisation form C, and never begins with a dot
        or a dash. It is unique in a mailbox because ``uid`` is. A field has one ``_`` for each run of
        whitespace and of characters that other file systems do not allow. Characters newer than Python's
        Unicode tables count as not printable, and are left out. Never raises for a UID of up to 64 bits.
        """
        if is_own and "to" not in self.fields:
            sender = recipient
        day, minute = _moment(min(max(date, _FIRST_SECOND), _LAST_SECOND) // 60)
        values = {
            "date": day,
            "time": minute,
            "from": _person(sender),
            "to": _person(recipient),
            "subject": _portable(subject),
            "uid": str(uid),
        }
        name = self._filled(values)
        excess = len(name.encode()) - _MAX_STEM
        if excess > 0:
            for field in ("subject", "to", "from"):
                if field in self.fields and excess > 0:
                    length = len(values[field].encode())
                    values[field] = _clipped(values[field], max(length - excess, 0))
                    excess -= length - len(values[field].encode())
            name = self._filled(values)
        return (name + _SUFFIX).encode()

    def _filled(self, values: Mapping[str, str]) -> str:
        """Return the name without its suffix, however long."""
        name = ""
        for separator, field in zip(self.separators, self.fields, strict=True):
            if value := values[field]:
                name += separator + value if name else value
        name = self.start + name + self.end
        if not name.isascii():
            # Two texts in normalisation form C are not always in it together.
            name = unicodedata.normalize("NFC", name)
        return name.lstrip(_NEVER_FIRST)


def variant(name: bytes, n: int) -> bytes:
    """Return the ``n``-th substitute for a name that a template made, for when that name is taken."""
    return b"%s~%d%s" % (name.removesuffix(_SUFFIX.encode()), n, _SUFFIX.encode())


def _check_text(start: str, *others: str) -> None:
    """Check the text of a template outside its fields. Raises ValueError with the end of a sentence."""
    text = "".join([start, *others])
    for char in text:
        if char in "{}":
            raise ValueError(f"has a {char} that encloses no field")
        if char in _NOT_PORTABLE or not char.isprintable():
            raise ValueError(f"must not contain {char!a}: not every file system takes it")
    if start and start[0] in _NEVER_FIRST:
        raise ValueError(f"must not begin with {start[0]!r}")
    if others[-1].lower().endswith(_SUFFIX):
        raise ValueError(f"must not end in {others[-1][-len(_SUFFIX) :]}, which is added")
    if len(text.encode()) > _MAX_LITERAL:
        raise ValueError(f"must not have more than {_MAX_LITERAL} bytes of text beside its fields")


def _check_uid(fields: tuple[str, ...], separators: list[str]) -> None:
    """Check that the UID can be told from the rest of any name. Raises ValueError with the end of a sentence.

    Otherwise a subject could imitate the name of another message.
    """
    at = fields.index("uid")
    if not _FREE_TEXT.isdisjoint(fields[:at]) and not _FREE_TEXT.isdisjoint(fields[at + 1 :]):
        raise ValueError("must have {from}, {to} and {subject} all on one side of {uid}")
    beside = [separators[at][-1:]] if at else []
    for separator, field in zip(separators[at + 1 :], fields[at + 1 :], strict=True):
        beside.append(separator[:1])
        if field not in _FREE_TEXT:
            break
    if not all(beside) or any(char.isdecimal() for char in beside):
        raise ValueError("must separate {uid} from the other fields by a character that is no digit")


@lru_cache(maxsize=4096)
def _moment(minute: int) -> tuple[str, str]:
    """Return day and time of day of a minute since the epoch."""
    day, minute = divmod(minute, 24 * 60)
    hour, minute = divmod(minute, 60)
    return datetime.date.fromordinal(_EPOCH_DAY + day).isoformat(), f"{hour:02}{minute:02}"


@lru_cache(maxsize=1024)
def _person(text: str) -> str:
    return _clipped(_portable(text), _MAX_PERSON)


def _portable(text: str) -> str:
    text = text[:_MAX_CHARACTERS]
    if not text.isprintable():
        text = "".join(c for c in text if c.isprintable() or c.isspace())
    if not text.isascii():
        text = unicodedata.normalize("NFC", text)
    return "_".join(text.translate(_TO_SPACE).split())


def _clipped(text: str, limit: int) -> str:
    """Cut ``text`` to at most ``limit`` bytes of UTF-8.

    The cut is between characters, never before a combining mark, and leaves no underscore at the end.
    """
    encoded = text.encode()
    if len(encoded) <= limit:
        return text
    longest = len(encoded[:limit].decode("utf-8", "ignore"))
    end = longest
    while end and unicodedata.category(text[end]).startswith("M"):
        end -= 1
    return text[: end or longest].rstrip("_")
