"""Every parser of what comes from outside, as a function of bytes, with worst cases and material for fuzzing.

A parser that is missing here is held neither to linear time nor to bounded memory.
"""

import contextlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final
from xml.parsers.expat import ExpatError

from imapfs import mountinfo
from imapfs.account import config, discovery, oauth
from imapfs.errors import ProtocolError, UsageError
from imapfs.headers import parse_headers
from imapfs.imap import refusals, trace
from imapfs.imap.grammar import (
    Completion,
    ListEntry,
    flag_list,
    parse_date,
    parse_exists,
    parse_fetch,
    parse_list,
    parse_sequence_set,
    parse_status,
)
from imapfs.imap.responses import MailboxState, copied_message, parse_prefix, parse_quota
from imapfs.imap.throttle import asked_wait
from imapfs.message_names import NameTemplate
from imapfs.names import decode_mailbox, entry_name, server_component
from imapfs.sync.mailbox_list import display_name, plan_tree

_ADDRESS: Final = discovery.parse_address("alice@example.com")


@dataclass(frozen=True)
class Parser:
    """A parser, and what is known to be hard for parsers of its kind."""

    parse: Callable[[bytes], object]
    refuses: tuple[type[Exception], ...] = ()
    """What it may raise."""
    pieces: Sequence[bytes] = ()
    """Repeated, each is a worst case. Mixed, they are what the fuzzer writes."""
    starts: Sequence[bytes] = (b"",)
    """What worst cases begin with."""
    end: bytes = b""

    def __call__(self, data: bytes) -> None:
        """Parse ``data``; raise what the parser must not raise."""
        with contextlib.suppress(*self.refuses):
            self.parse(data)


def _response(parse: Callable[[list[bytes]], object]) -> Callable[[bytes], object]:
    """Make literals of what stands between NULs, as a literal cannot be told from text otherwise."""

    def parse_parts(data: bytes) -> object:
        parts = data.split(b"\0")
        return parse(parts if len(parts) % 2 else [*parts, b""])

    return parse_parts


def _traced(response: list[bytes]) -> None:
    log = logging.getLogger("imapfs.protocol")
    level = log.level
    log.setLevel(logging.DEBUG)
    try:
        shown = trace.Trace()
        shown.logged_in = True
        shown.received(response, [5] * (len(response) // 2))
    finally:
        log.setLevel(level)


def _config(data: bytes) -> object:
    with TemporaryDirectory() as directory:
        path = Path(directory, "config.toml")
        path.write_bytes(data)
        return config.load_accounts(path)


def _names(data: bytes) -> None:
    entry = entry_name(data)
    assert 0 < len(entry) <= 255
    assert not {*b"/\0"} & {*entry}
    assert not entry.endswith(b".eml")
    component = server_component(entry)
    assert component is None or component == data
    server_component(data)
    decode_mailbox(data)
    display_name(data)


def _message_names(data: bytes) -> None:
    headers = parse_headers(data)
    template = NameTemplate.parse("{date}_{from}_{to}_{subject}.{uid}")
    name = template.name(0, headers.sender, headers.recipient, headers.subject, 1)
    assert len(name) <= 255
    assert not {*b"/\0\n"} & {*name}


def _planned(data: bytes) -> None:
    logging.disable(logging.WARNING)
    try:
        tree = plan_tree([ListEntry(name, b"/") for name in data.split(b"\n")], b"a/")
    finally:
        logging.disable(logging.NOTSET)
    paths: set[tuple[bytes, ...]] = {()}
    for directory in tree:
        assert directory.path[:-1] in paths
        assert directory.path not in paths
        paths.add(directory.path)


_FETCH_PIECES: Final = (
    b"BODY[ 1 ", b"BODY[", b"X 1 ", b"X (1 ", b"(", b") ", b'" ', b'\\" ', b'"\\" ', b'BODY[] "',
    b"BODY[] NIL ",
    b'BODY[] "\\\\" ', b"BODY[] \0lit\0", b"FLAGS (", b"FLAGS (a) b ", b"FLAGS (a) ", b"FLAGS () ",
    b"FLAGS (a)) ",
    b'INTERNALDATE "', b'INTERNALDATE "20-Nov-2026 10:00:00 +0000" ', b"INTERNALDATE NIL ", b"UID 1 ",
    b"UID 0 ",
    b"UID 11111111111111111111111 ", b"UID NIL ", b"  \t", b"\r\n", b"UID  ", b"BODY[]<1", b"BODY[]<1> ",
    b"MODSEQ (1 ",
    b"MODSEQ (1) ", b"EMAILID (aaaaaaaaaaaaaa ", b"EMAILID (a) ", b"RFC822.SIZE 5 ", b"RFC822.SIZE NIL ",
    b"\0",
    b"BODY[HEADER.FIELDS (FROM TO)] \0Subject: x\r\n\r\n\0", b"\xff", b"\\Seen ", b"]",
)  # fmt: skip
_VALUE_PIECES: Final = (
    b"(", b")", b"()", b"a ", b'"a" ', b'"\\', b'"\\" ', b"NIL ", b"1 ", b"\0lit\0 ", b"{5}",
    b"\\HasNoChildren ",
    b'(\\Marked) "/" a', b"&AOQ-", b"MESSAGES 3 ", b"UIDNEXT NIL ", b"\r\n", b"\xff",
)  # fmt: skip
_CODE_PIECES: Final = (
    b"[", b"[A", b"A-", b"(", b")]", b" [a", b"]", b"[UIDVALIDITY 7] ", b"[PERMANENTFLAGS (\\* a)] ",
    b"9", b"x ",
    b"[MAILBOXID (F1)] ", b"[COPYUID 7 1:2 3:4] ", b"\\Recent ", b"\xff", b"\r\n",
)  # fmt: skip
_HEADER_PIECES: Final = (
    b"=?a?b?", b"=?utf-8?q?a?= ", b"=?utf-8?q?a?=x=?latin1?b?YQ==?= ", b'"', b"<", b"(", b"a,", b"\n ", b"\r",
    b"\r\n ", b"=?", b"?=", b"\\", b"a:", b"=", b"\xc3", b"\xff\n\t", b"From: a\n", b"From:", b"a@b.c ",
    b">", b")",
    b"\xe2\x80\xae", b"\n", b"=?utf-7?q?+2D3eAA-?= ", b"\nSubject: ",
)  # fmt: skip
_PHRASES: Final = (
    b"in 1 ", b"in ", b"too many ", b"exceeded ", b"connections ", b"throttl", b"account ", b"account a ",
    b"imap ",
    b"try again ", b"1", b"back-off ", b"[", b"time  \t", b"too many x ", b"wait 5 h ", b"\n", b"LIMIT] ",
)  # fmt: skip

# fmt: off
PARSERS: Final = {
    "FETCH": Parser(_response(parse_fetch), (), _FETCH_PIECES, (b"* 1 FETCH (",), b")\r\n"),
    "trace": Parser(_response(_traced), (), _FETCH_PIECES, (b"* 1 FETCH (",), b")\r\n"),
    "LIST": Parser(_response(parse_list), (ProtocolError,), _VALUE_PIECES, (b"* LIST ", b"* LIST () NIL ")),
    "STATUS": Parser(
        _response(parse_status), (ProtocolError,), _VALUE_PIECES, (b"* STATUS ", b"* STATUS a (")
    ),
    "QUOTA": Parser(_response(parse_quota), (ProtocolError,), _VALUE_PIECES, (b"* QUOTA ", b'* QUOTA "" (')),
    "NAMESPACE": Parser(
        _response(parse_prefix), (ProtocolError,), _VALUE_PIECES, (b"* NAMESPACE ", b"* NAMESPACE ((")
    ),
    "status response": Parser(
        Completion.parse, (), _CODE_PIECES, (b"OK ", b"OK [", b"OK [PERMANENTFLAGS (", b"BYE ")
    ),
    "mailbox state": Parser(
        lambda data: MailboxState().take([data]),
        (ProtocolError,),
        (*_CODE_PIECES, b"1,", b"1:2,", b",", b" "),
        (b"* OK [", b"* OK [PERMANENTFLAGS (", b"* VANISHED (EARLIER) ", b"* 1"),
    ),
    "flags": Parser(flag_list, (), (*_CODE_PIECES, b"a ", b"( ", b'" ')),
    "EXISTS": Parser(parse_exists, (), (b"1", b" ", b" EXISTS", b"\r"), (b"* ", b"* 1 EXISTS")),
    "UID set": Parser(parse_sequence_set, (ProtocolError,), (b"1,", b"1:2,", b",", b":", b"9", b"*")),
    "COPYUID": Parser(
        lambda data: copied_message(Completion("OK", "COPYUID", data, ""), 5, b"x"),
        (),
        (b" ", b"1,", b"1:2,", b"7 1:9 1:9 "),
        (b"7 ", b"7 1:9 "),
    ),
    "date": Parser(parse_date, (), (b" ", b"1", b"-Nov-2026 ", b"20-Nov-2026 10:00:00 +0000", b"\xff")),
    "phrases of a wait": Parser(lambda data: asked_wait("", data.decode("latin-1")), (), _PHRASES),
    "phrases of a refusal": Parser(
        lambda data: refusals.explain("imap.gmail.com", "", data.decode("latin-1")), (), _PHRASES
    ),
    "headers and message names": Parser(
        _message_names, (), _HEADER_PIECES, (b"Subject: ", b"From: ", b"To: ", b"Message-ID: ", b"X: ", b"")
    ),
    "mailbox names": Parser(
        _names,
        (),
        (
            b"&",
            b"&-",
            b"&AAA-",
            b"&A",
            b"%",
            b"%41",
            b"%~",
            b"\xc3\xa9",
            b"\xff",
            b"\x01",
            b"&2D3eAA-",
            b".eml",
            b".",
            b"a",
        ),
        (b"", b"%~", b"&"),
    ),
    "mailbox list": Parser(
        _planned,
        (),
        (b"/", b"a/", b"INBOX/", b"a\n", b"&AOQ-/", b"\n"),
        (b"", b"a/"),
    ),
    "config": Parser(
        _config,
        (UsageError,),
        (
            b"a.",
            b'"a".',
            b"[",
            b"[[a]]\n",
            b"[accounts.a]\n",
            b"a = 1\n",
            b'a = "',
            b"\\",
            b"a = [\n",
            b"{a = ",
            b"1",
            b"\xff",
            b"accounts.a.host = [[\n",
            b'host = "x"\n',
            b"#",
            b"\n",
            b'"""',
            b"'''",
            b" ",
        ),
        (b"", b"a = ", b"[accounts.a]\nhost = "),
    ),
    "autoconfig": Parser(
        lambda data: discovery.parse_autoconfig(data, _ADDRESS, "x"),
        (ValueError, ExpatError),
        (
            b"<a>",
            b"<a/>",
            b"</a>",
            b"%A",
            b"%EMAILDOMAIN%",
            b"&#65;",
            b"<!--",
            b"&a;",
            b"<!DOCTYPE a>",
            b"<incomingServer type='imap'><socketType>SSL</socketType><hostname>a.de</hostname>",
            b"<incomingServer type='imap'>",
            b"</incomingServer>",
            b"<authentication>OAuth2</authentication>",
            b"<hostname>%EMAILDOMAIN%</hostname>",
            b"<port>9999999999</port>",
            b" a='b'",
            b"\xff",
        ),
        (b"<c>", b"<c><incomingServer type='imap'><hostname>"),
        b"</incomingServer></c>",
    ),
    "mountinfo": Parser(
        mountinfo.parse,
        (),
        (
            b"1 2 3:4 / /m rw - fuse.imapfs src rw\n",
            b"\\040",
            b"\\",
            b" - ",
            b"\n",
            b"1 ",
            b"\r",
            b"\\777",
            b"\x1c",
            b"\xc2\x85",
            b"/",
            b"\xff",
        ),
        (b"", b"1 2 3:4 / /a"),
    ),
    "JSON": Parser(
        oauth.parse_json,
        (),
        (
            b"[",
            b'{"a":',
            b'"',
            b"\\",
            b"1",
            b"]",
            b"}",
            b",",
            b"\xff",
            b"\\ud800",
            json.dumps({"a": [1]}).encode(),
        ),
    ),
}
# fmt: on
