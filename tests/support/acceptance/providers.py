"""Providers that cannot be asked: Dovecot behind a proxy that says and refuses what is known of them.

What is known comes from reports of their users and from what they announce. Not shown: the labels of Gmail,
where deleting from one leaves the message in the others, and limits of a day.
"""

import hashlib
import re
from collections.abc import Iterable, Sequence
from typing import ClassVar, Final

from tests.support.acceptance.peers import DovecotPeer
from tests.support.servers.intermediary import Intermediary
from tests.support.servers.proxy import Edit, Proxy

_CAPABILITIES: Final = re.compile(rb"(\A\* |\[)CAPABILITY ([^\]\r\n]*)", re.I)
_SELECTED: Final = re.compile(rb"\* OK \[UIDNEXT (\d+)\]", re.I)
_SIZE: Final = re.compile(rb"(?<=RFC822\.SIZE )\d+")
_FIELDS: Final = re.compile(rb"(?<=HEADER\.FIELDS \()([^)\"]*)(?=\))")
_BODY_60: Final = rb"UID FETCH (?:\S+,)?(?:\d+:)?60(?:,\S+)? \(UID .*PEEK\[\]"


class ProviderPeer(DovecotPeer):
    """Dovecot with the words and the habits of a provider."""

    shown: ClassVar[str]
    announced: ClassVar[bytes]
    """Its capabilities after a login, as it says them."""
    hidden: ClassVar[Sequence[str]]
    """Extensions that it does not understand."""
    proxy: Proxy

    @property
    def title(self) -> str:
        return f"{self.shown} (emulated)"

    def _before(self) -> Intermediary:
        edits = [self._announce, *self._edits()]
        self.proxy = Proxy(self.dovecot, hide=self.hidden, edits=edits, rephrase=self._rephrase)
        self._refuse()
        return self.proxy

    def _refuse(self) -> None:
        """Have the proxy refuse what the provider refuses."""

    def _announce(self, line: bytes) -> bytes:
        return _CAPABILITIES.sub(lambda found: found[1] + b"CAPABILITY " + self.announced, line, count=1)

    def _edits(self) -> Iterable[Edit]:
        return ()

    def _rephrase(self, command: bytes) -> bytes:
        """Return a command as Dovecot understands it."""
        return command


class GmailPeer(ProviderPeer):
    """X-GM-MSGID, and keywords of PERMANENTFLAGS with brackets."""

    key = "gmail"
    shown = "Gmail"
    announced = (
        b"IMAP4rev1 UNSELECT IDLE NAMESPACE QUOTA ID XLIST CHILDREN X-GM-EXT-1 UIDPLUS COMPRESS=DEFLATE"
        b" ENABLE MOVE CONDSTORE ESEARCH UTF8=ACCEPT LIST-EXTENDED LIST-STATUS LITERAL- SPECIAL-USE"
        b" APPENDLIMIT=35651584 AUTH=PLAIN SASL-IR"
    )
    hidden = ("NOTIFY", "QRESYNC", "MULTIAPPEND")

    def _edits(self) -> Iterable[Edit]:
        return (_with_bracket_keyword, _with_gmail_ids)

    def _rephrase(self, command: bytes) -> bytes:
        return command.replace(b"X-GM-MSGID", b"X-GUID")


class ExchangePeer(ProviderPeer):
    """Wrong sizes, no UID of what was appended, copied or moved, and a wait that it asks for."""

    key = "exchange"
    shown = "Exchange"
    expected = ("Request is throttled",)
    announced = (
        b"IMAP4 IMAP4rev1 AUTH=PLAIN SASL-IR UIDPLUS MOVE ID UNSELECT CHILDREN IDLE NAMESPACE LITERAL+"
    )
    hidden = (
        "CONDSTORE", "ENABLE", "NOTIFY", "LIST-EXTENDED", "ESEARCH", "MULTIAPPEND", "SORT", "THREAD",
    )  # fmt: skip

    def _refuse(self) -> None:
        # As imapfs writes it: the second client is not asked to wait.
        self.proxy.fault(
            rb"UID FETCH \S+ \(UID ",
            b"NO Request is throttled. Suggested Backoff Time: 300 milliseconds",
            nth=7,
            times=3,
        )

    def _edits(self) -> Iterable[Edit]:
        return (_without_uids, _with_wrong_sizes)


class ICloudPeer(ProviderPeer):
    """Messages that are there are said to have vanished, and the Trash has a name of its own and no mark."""

    key = "icloud"
    shown = "iCloud"
    announced = (
        b"IMAP4 IMAP4rev1 AUTH=PLAIN SASL-IR ID IDLE UIDPLUS NAMESPACE CHILDREN LITERAL+ ENABLE CONDSTORE"
        b" QRESYNC ESEARCH MOVE UNSELECT"
    )
    hidden = ("NOTIFY", "SPECIAL-USE", "LIST-EXTENDED", "MULTIAPPEND")

    def _edits(self) -> Iterable[Edit]:
        return (_with_false_vanished, _with_deleted_messages)

    def _rephrase(self, command: bytes) -> bytes:
        return command.replace(b'"Deleted Messages', b'"Trash')


class YahooPeer(ProviderPeer):
    """HIGHESTMODSEQ without CONDSTORE, and a message that it never gives, UID 60 of each mailbox."""

    key = "yahoo"
    shown = "Yahoo"
    announced = (
        b"IMAP4rev1 ID MOVE NAMESPACE X-ID-ACLID UIDPLUS LITERAL+ CHILDREN AUTH=PLAIN SASL-IR IDLE UNSELECT"
        b" SPECIAL-USE APPENDLIMIT=41697280"
    )
    hidden = ("NOTIFY", "CONDSTORE", "ENABLE", "LIST-EXTENDED", "ESEARCH", "MULTIAPPEND")

    def _refuse(self) -> None:
        server_error = b"NO [UNAVAILABLE] UID FETCH Server error - Please try again later"
        self.proxy.fault(_BODY_60, server_error, times=None)
        argument_error = b"BAD [CLIENTBUG] Command Argument Error. 11"
        self.proxy.fault(rb".*(CONDSTORE|MODSEQ|CHANGEDSINCE)", argument_error, times=None)

    def _edits(self) -> Iterable[Edit]:
        return (_with_modseq, _with_lower_inbox)


class NetEasePeer(ProviderPeer):
    """No mailbox can be selected before ID was sent, and names of header fields come back in quotes."""

    key = "netease"
    shown = "NetEase"
    announced = (
        b"IMAP4rev1 SPECIAL-USE ID LITERAL+ APPENDLIMIT=71680000 UIDPLUS X-CM-EXT-1 SASL-IR AUTH=PLAIN"
    )
    hidden = (
        "NOTIFY", "CONDSTORE", "ENABLE", "ESEARCH", "MULTIAPPEND", "IDLE", "MOVE", "NAMESPACE", "UNSELECT",
        "CHILDREN", "LIST-EXTENDED",
    )  # fmt: skip

    def _refuse(self) -> None:
        unsafe = b"NO SELECT Unsafe Login. Please contact us for help"
        self.proxy.fault(rb"(SELECT|EXAMINE) ", unsafe, times=None, unless=b"ID")

    def _edits(self) -> Iterable[Edit]:
        return (_with_quoted_fields,)


PROVIDERS: Final = (GmailPeer, ExchangePeer, ICloudPeer, YahooPeer, NetEasePeer)


def _with_bracket_keyword(line: bytes) -> bytes:
    return re.sub(rb"(?<=\[PERMANENTFLAGS \()", rb"NotJunk [Gmail]/Imported ", line)


def _with_gmail_ids(line: bytes) -> bytes:
    """X-GUID stays the same in copies, as the other does."""

    def as_number(found: re.Match[bytes]) -> bytes:
        return b"X-GM-MSGID %d" % (int.from_bytes(hashlib.sha256(found[1]).digest()[:8]) >> 1)

    return re.sub(rb"X-GUID (\S+)", as_number, line)


def _without_uids(line: bytes) -> bytes | None:
    if line.startswith(b"* OK [COPYUID"):
        return None
    return re.sub(rb" \[(?:APPENDUID|COPYUID) [^\]]*\]", b"", line)


def _with_wrong_sizes(line: bytes) -> bytes:
    return _SIZE.sub(lambda found: b"%d" % (int(found[0]) * 3 // 4), line)


def _with_false_vanished(line: bytes) -> bytes:
    if (found := _SELECTED.match(line)) and int(found[1]) > 1:
        return line + b"* VANISHED (EARLIER) 1:%d\r\n" % (int(found[1]) - 1)
    return line


def _with_deleted_messages(line: bytes) -> bytes:
    return re.sub(rb'(\A\* (?:LIST \([^)]*\) "/"|STATUS)) "?Trash"?(?= |\r)', rb'\1 "Deleted Messages"', line)


def _with_modseq(line: bytes) -> bytes:
    return line + b"* OK [HIGHESTMODSEQ 4711] Highest\r\n" if _SELECTED.match(line) else line


def _with_lower_inbox(line: bytes) -> bytes:
    return re.sub(rb"\A(\* LIST .* )\"?INBOX\"?(?=\r\n\Z)", rb'\1"Inbox"', line)


def _with_quoted_fields(line: bytes) -> bytes:
    return _FIELDS.sub(lambda found: b" ".join(b'"%s"' % name for name in found[0].split()), line)
