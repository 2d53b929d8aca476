"""Generated mail: ordinary messages in any number, a small account to look at, and what breaks parsers.

Everything here is the same in every run. Dates are epoch seconds, flags are the letters of Maildir.
"""

import base64
import random
import struct
import zlib
from collections.abc import Iterator
from datetime import UTC, datetime
from email.header import Header
from email.utils import format_datetime

Message = tuple[str, bytes, int, str]
"""Mailbox (decoded, ``/`` between its parts), the bytes, INTERNALDATE, flags."""

_WORDS = [
    "account",
    "agenda",
    "backup",
    "budget",
    "change",
    "delivery",
    "draft",
    "figure",
    "invoice",
    "kernel",
    "meeting",
    "order",
    "plan",
    "project",
    "question",
    "release",
    "report",
    "schedule",
    "server",
    "version",
]

_ALICE = '"Alice Example" <alice@example.org>'
_BOB = "Bob Builder <bob@example.net>"
_CLEO = "=?utf-8?q?Cl=C3=A9o_Lef=C3=A8vre?= <cleo@example.com>"
_DAVID = "=?utf-8?b?15PXldeT?= <david@example.com>"
_YUKI = "=?iso-2022-jp?b?GyRCOzNFRBsoQg==?= <yuki@example.jp>"
_ME = "Demo User <demo@example.org>"


def plain(number: int, size: int = 2000) -> bytes:
    """Return an ordinary message of exactly ``size`` bytes, or its header alone where that is longer."""
    rng = random.Random(number)
    header = _header(
        {
            "Return-Path": f"<sender{number % 97}@example.org>",
            "Received": "from mx.example.org (mx.example.org [192.0.2.1])\r\n\tby mail.example.net; "
            + format_datetime(_moment(number)),
            "From": f'"Sender {number % 97}" <sender{number % 97}@example.org>',
            "To": _ME,
            "Subject": f"{_sentence(rng, 4)} {number}",
            "Date": format_datetime(_moment(number)),
            "Message-ID": f"<{number}.{rng.getrandbits(64):016x}@example.org>",
            "MIME-Version": "1.0",
            "Content-Type": "text/plain; charset=us-ascii",
        }
    )
    line = _sentence(rng, 12)[:72].encode().ljust(72, b".") + b"\r\n"
    missing = max(0, size - len(header))
    return header + (line * (missing // len(line) + 1))[: max(0, missing - 2)] + b"\r\n"[: min(2, missing)]


def sample_account() -> list[Message]:
    """Return the mail of the demo: a few mailboxes of the sort that people have, and their odd messages."""
    return [*_inbox(), *_archive(), *_list(), *_projects(), *_own()]


def arriving() -> tuple[bytes, int]:
    """Return a message that arrives after those of the sample account, and its INTERNALDATE."""
    return _text(_BOB, "Tickets for Saturday", 20, "Two are left. Shall I take them?"), _at(20)


def wild() -> dict[str, bytes]:
    """Return messages that real mailboxes hold and that parsers fail on, by what is wrong with them."""
    body = b"Hello,\r\nhere is the text.\r\n"
    base = b"From: Alice Example <alice@example.org>\r\n"
    date = b"Date: Fri, 20 Nov 2026 10:00:00 +0100\r\n"
    subject = b"Subject: Quarterly report\r\n"
    same_id = b"Message-ID: <same@example.org>\r\n"
    return {
        "0 bytes": b"",
        "one newline": b"\r\n",
        "one CR": b"\r",
        "empty body": base + date + subject + b"\r\n",
        "header without the empty line": base + date + subject,
        "header without final newline": base + date + b"Subject: cut of",
        "no header": body,
        "empty header": b"\r\n" + body,
        "text without colon where the header is": b"this is no header\r\n\r\n" + body,
        "mbox line first": b"From alice@example.org Fri Nov 20 10:00:00 2026\r\n"
        + base
        + subject
        + b"\r\n"
        + body,
        "no date": base + subject + b"\r\n" + body,
        "no subject": base + date + b"\r\n" + body,
        "empty subject": base + date + b"Subject:\r\n\r\n" + body,
        "subject of dots": base + date + b"Subject: ...\r\n\r\n" + body,
        "subject with slashes": base + date + b"Subject: a/b/../c\r\n\r\n" + body,
        "subject with controls": base + date + b"Subject: a\x01b\x1b[31mc\x7f\td\r\n\r\n" + body,
        "newline inside an encoded subject": base
        + date
        + b"Subject: =?utf-8?q?one=0D=0Atwo?=\r\n\r\n"
        + body,
        "NUL inside an encoded subject": base + date + b"Subject: =?utf-8?q?a=00b?=\r\n\r\n" + body,
        "bidi override in the subject": base + date + "Subject: invoice\u202efdp.exe\r\n\r\n".encode() + body,
        "broken encoded words": base
        + date
        + b"Subject: =?nocharset?q?x?= =?utf-8?b?%%%?= =?utf-8?q?=ZZ\r\n\r\n"
        + body,
        "subject of 137 KB": base + date + b"Subject: " + b"long " * 28_000 + b"\r\n\r\n" + body,
        "subject of emoji": base
        + date
        + "Subject: {}\r\n\r\n".format("👩\u200d👩\u200d👧" * 60).encode()
        + body,
        "8-bit header in Latin-1": b"From: Ren\xe9 <rene@example.org>\r\n"
        + b"Subject: \xe9t\xe9\r\n\r\n"
        + body,
        "8-bit header in UTF-8": base + "Subject: Grüße aus Zürich\r\n\r\n".encode() + body,
        "no sender": date + subject + b"\r\n" + body,
        "sender without address": b'From: "Alice\r\n' + date + subject + b"\r\n" + body,
        "header of 210 KB": base
        + date
        + subject
        + b"X-Padding: 0123456789abcdef\r\n" * 7_300
        + b"\r\n"
        + body,
        "unterminated header field of 100 KB": base + b"X-" + b"y" * 100_000 + b"\r\n\r\n" + body,
        "year 102": base + b"Date: Fri, 20 Nov 102 10:00:00 +0000\r\n" + subject + b"\r\n" + body,
        "year 1969": base + b"Date: Wed, 31 Dec 1969 23:59:58 +0000\r\n" + subject + b"\r\n" + body,
        "year 3609": base + b"Date: Fri, 20 Nov 3609 10:00:00 +0000\r\n" + subject + b"\r\n" + body,
        "date with an impossible zone": base
        + b"Date: Fri, 20 Nov 2026 10:00:00 +9999\r\n"
        + subject
        + b"\r\n"
        + body,
        "date that is no date": base + b"Date: yesterday\r\n" + subject + b"\r\n" + body,
        "two dates": base + date + b"Date: Thu, 1 Jan 2026 00:00:00 +0000\r\n" + subject + b"\r\n" + body,
        "Message-ID in use, first": base + date + subject + same_id + b"\r\nfirst\r\n",
        "Message-ID in use, second": base + date + subject + same_id + b"\r\nsecond\r\n",
        "no final newline": base + date + subject + b"\r\nno newline at the end",
        "CR at the end": base + date + subject + b"\r\n" + body + b"\r",
        "line of 5,000 bytes": base + date + subject + b"\r\n" + b"x" * 5_000 + b"\r\n",
        "line of 1,200,000 bytes": base + date + subject + b"\r\n" + b"x" * 1_200_000 + b"\r\n",
        "bare CR": base + date + subject + b"\r\none\rtwo\r\rthree\r\r\n",
        "bare LF": (base + date + subject + b"\r\n" + body).replace(b"\r\n", b"\n"),
        "mixed line ends": base + date + subject + b"\n\r\none\ntwo\r\nthree\rfour\n\rfive\r\r\n\n",
        "NULs": base + date + b"Subject: a\0b\r\n\r\n" + b"one\0two\r\n\0\0\0\r\n",
        "every byte": base + date + subject + b"\r\n" + bytes(range(256)) * 4,
        "dots alone on lines": base + date + subject + b"\r\n.\r\n..\r\n.\r\n",
        "text like a protocol answer": base
        + date
        + subject
        + b"\r\n)\r\n* 1 FETCH (FLAGS ())\r\nA1 OK done\r\n{5}\r\n",
        "multipart without its boundary": base + date + b"Content-Type: multipart/mixed\r\n\r\n" + body,
        "multipart that never ends": base
        + date
        + b'Content-Type: multipart/mixed; boundary="b"\r\n\r\n'
        + b'--b\r\nContent-Type: multipart/mixed; boundary="b"\r\n\r\n' * 60,
    }


def _inbox() -> Iterator[Message]:
    yield (
        "INBOX",
        _text(_ALICE, "Quarterly report", 0, "The figures are in. Invoice 4711 is still open."),
        _at(0),
        "S",
    )
    yield (
        "INBOX",
        _text(_BOB, "Re: Quarterly report", 1, "Thanks! I will pay the invoice today.", reply=0),
        _at(1),
        "RS",
    )
    yield "INBOX", _text(_ALICE, "Re: Quarterly report", 2, "Perfect.", reply=1), _at(2), "S"
    yield (
        "INBOX",
        _text(_CLEO, "Réunion déplacée à jeudi", 3, "Rendez-vous à 14 h, salle Écureuil."),
        _at(3),
        "S",
    )
    yield "INBOX", _text(_YUKI, "東京からの写真", 4, "写真を送ります。"), _at(4), ""
    yield "INBOX", _text(_DAVID, "שלום עולם", 5, "טקסט מימין לשמאל"), _at(5), ""
    yield "INBOX", _text(_BOB, "Party on Friday 🎉🎂 (bring 🍰)", 6, "At eight, at my place."), _at(6), "F"
    yield (
        "INBOX",
        _text(_BOB, "Your bill \u202efdp.exe\u202c, open now", 7, "The name turns itself around."),
        _at(7),
        "",
    )
    yield (
        "INBOX",
        _text(_ALICE, "Either/or: 1/2 price on 20/11", 8, "A subject full of slashes."),
        _at(8),
        "S",
    )
    yield "INBOX", _text(_CLEO, "One subject that does not end " * 20, 9, "Sorry."), _at(9), ""
    yield "INBOX", _text(_ALICE, "", 10, "There is nothing to say about this."), _at(10), "S"
    yield "INBOX", _text(_BOB, None, 11, "This one has no Subject field."), _at(11), ""
    yield "INBOX", _text(_BOB, "Sent without a date", None, "Its Date field is missing."), _at(12), "S"
    yield "INBOX", _text(_BOB, "...", 13, "Dots are all there is."), _at(13), ""
    yield "INBOX", _with_attachments(_ALICE, "Logo and contract", 14), _at(14), "FS"
    yield "INBOX", _alternative(_CLEO, "Newsletter: été 2026", 15), _at(15), ""
    yield "INBOX", _forward(_BOB, "Fwd: Quarterly report", 16), _at(16), "PS"
    raw = "From: René <rene@example.org>\r\nSubject: Grüße, unencoded\r\n".encode("latin-1")
    yield "INBOX", raw + b"Date: " + _date(17).encode() + b"\r\n\r\n8-bit header.\r\n", _at(17), ""


def _archive() -> Iterator[Message]:
    for year, start in ((2024, -1015), (2025, -649)):
        for month in range(9):
            rng = random.Random(year + month)
            day = start + 30 * month
            subject = f"{_sentence(rng, 3).capitalize()} {month + 1}/{year}"
            yield f"Archive/{year}", _text(_ALICE, subject, day, _paragraph(rng)), _at(day), "S"


def _list() -> Iterator[Message]:
    for thread in range(3):
        rng = random.Random(thread)
        subject = f"[python-dev] {_sentence(rng, 4)}"
        for answer in range(4):
            day = -100 + 10 * thread + answer
            sender = (_ALICE, _BOB, _CLEO, _YUKI)[answer]
            title = f"Re: {subject}" if answer else subject
            reply = day - 1 if answer else None
            yield "Lists/python-dev", _text(sender, title, day, _paragraph(rng), reply=reply), _at(day), "S"


def _projects() -> Iterator[Message]:
    yield (
        "Projects/Zürich",
        _text(_ALICE, "Offerte für die Brücke", -50, "Im Anhang nichts, hier alles."),
        _at(-50),
        "S",
    )
    yield (
        "Projects/Zürich",
        _text(_BOB, "Re: Offerte für die Brücke", -49, "Einverstanden.", reply=-50),
        _at(-49),
        "S",
    )
    yield "Projects/Zürich", _with_attachments(_BOB, "Plan v2 (final) [new].pdf", -48), _at(-48), "S"
    yield "日本語", _text(_YUKI, "会議の議題", -40, "一、予算。二、日程。"), _at(-40), "S"
    yield "日本語", _text(_YUKI, "Re: 会議の議題", -39, "了解しました。", reply=-40), _at(-39), ""
    yield "R&D", _text(_CLEO, "Prototype <3 & results", -30, "It works & nobody knows why."), _at(-30), "S"
    yield (
        "R&D",
        _text(_ALICE, 'She said "ship it" | tee log', -29, "Quotes, pipes, $HOME and `ls`."),
        _at(-29),
        "F",
    )
    yield (
        "100% done",
        _text(_BOB, "50% of 100%", -20, "A percent sign and a space in the mailbox."),
        _at(-20),
        "S",
    )


def _own() -> Iterator[Message]:
    yield "Sent", _text(_ME, "Re: Party on Friday", 6, "I bring the cake.", reply=6), _at(6), "S"
    yield "Sent", _with_attachments(_ME, "My application", -10), _at(-10), "S"
    yield "Drafts", _text(_ME, "Not finished", 18, "Dear Alice,"), _at(18), "DS"
    yield "Junk", _text("Prince <prince@example.com>", "RE: $$$ 10,000,000 $$$", 12, "Trust me."), _at(12), ""


def _text(sender: str, subject: str | None, day: int | None, text: str, *, reply: int | None = None) -> bytes:
    fields = _fields(sender, subject, day, reply)
    fields["Content-Type"] = "text/plain; charset=utf-8"
    fields["Content-Transfer-Encoding"] = "8bit"
    return _header(fields) + text.encode() + b"\r\n"


def _with_attachments(sender: str, subject: str, day: int) -> bytes:
    contract = b"%PDF-1.4\n%\xe2\xe3\xcf\xd3\n1 0 obj << /Type /Catalog >> endobj\ntrailer << >>\n%%EOF\n"
    parts = [
        ({"Content-Type": "text/plain; charset=utf-8"}, b"See the two files.\r\n"),
        _attachment("image/png", "logo.png", _png(32)),
        _attachment("application/pdf", "contract.pdf", contract),
    ]
    return _multipart(_fields(sender, subject, day), "mixed", parts)


def _alternative(sender: str, subject: str, day: int) -> bytes:
    parts = [
        ({"Content-Type": "text/plain; charset=us-ascii"}, b"Summer is over.\r\n"),
        ({"Content-Type": "text/html; charset=us-ascii"}, b"<html><p>Summer is <b>over</b>.</p></html>\r\n"),
    ]
    return _multipart(_fields(sender, subject, day), "alternative", parts)


def _forward(sender: str, subject: str, day: int) -> bytes:
    original = _text(_ALICE, "Quarterly report", 0, "The figures are in. Invoice 4711 is still open.")
    parts = [
        ({"Content-Type": "text/plain; charset=us-ascii"}, b"For your information.\r\n"),
        ({"Content-Type": "message/rfc822"}, original),
    ]
    return _multipart(_fields(sender, subject, day), "mixed", parts)


def _fields(sender: str, subject: str | None, day: int | None, reply: int | None = None) -> dict[str, str]:
    fields = {"From": sender, "To": _ALICE if sender == _ME else _ME}
    if subject is not None:
        fields["Subject"] = subject if subject.isascii() else Header(subject, "utf-8").encode(linesep="\r\n")
    if day is not None:
        fields["Date"] = _date(day)
        fields["Message-ID"] = f"<day{day}@example.org>"
    if reply is not None:
        fields["In-Reply-To"] = fields["References"] = f"<day{reply}@example.org>"
    fields["MIME-Version"] = "1.0"
    return fields


def _header(fields: dict[str, str]) -> bytes:
    return "".join(f"{name}: {value}\r\n" for name, value in fields.items()).encode() + b"\r\n"


def _multipart(fields: dict[str, str], subtype: str, parts: list[tuple[dict[str, str], bytes]]) -> bytes:
    fields["Content-Type"] = f'multipart/{subtype}; boundary="=_part"'
    separated = b"".join(b"--=_part\r\n" + _header(header) + content + b"\r\n" for header, content in parts)
    return _header(fields) + separated + b"--=_part--\r\n"


def _attachment(kind: str, name: str, content: bytes) -> tuple[dict[str, str], bytes]:
    fields = {
        "Content-Type": f'{kind}; name="{name}"',
        "Content-Disposition": f'attachment; filename="{name}"',
        "Content-Transfer-Encoding": "base64",
    }
    return fields, base64.encodebytes(content).replace(b"\n", b"\r\n")


def _png(side: int) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    pixels = b"".join(b"\0" + bytes((x * y) % 256 for x in range(side)) for y in range(side))
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    # Stored, not compressed: the output of a compressor differs from one zlib to the next.
    content = zlib.compress(pixels, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", content) + chunk(b"IEND", b"")


def _at(day: int) -> int:
    return 1_793_000_000 + 86_400 * day + 7_919 * day % 36_000


def _date(day: int) -> str:
    return format_datetime(datetime.fromtimestamp(_at(day), UTC))


def _moment(number: int) -> datetime:
    return datetime.fromtimestamp(1_700_000_000 + 60 * number, UTC)


def _sentence(rng: random.Random, words: int) -> str:
    return " ".join(rng.choice(_WORDS) for _ in range(words))


def _paragraph(rng: random.Random) -> str:
    return "\r\n".join(f"{_sentence(rng, 9).capitalize()}." for _ in range(5))
