"""Typed IMAP commands over one connection. Blocking: runs in a thread, one thread at a time.

Decisions that protect mail are made here and nowhere else: mailboxes are opened with EXAMINE, bodies are
asked for with BODY.PEEK, so that reading can set no flag (RFC 9051 sections 6.3.3 and 6.4.5); data is taken
by UID only, and FETCH data that names no UID is dropped.
"""

import contextlib
import logging
import ssl
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

from imapfs import __version__
from imapfs.errors import ConnectionLost, MailboxGone, ProtocolError, Refused
from imapfs.imap.grammar import (
    FetchData,
    ListEntry,
    parse_fetch,
    parse_list,
    parse_sequence_set,
    parse_status,
    sequence_sets,
    values,
)
from imapfs.imap.wire import Command, Completion, Response, Sink, Wire, astring
from imapfs.model import Account, ModSeq, Secret, UidValidity

log = logging.getLogger(__name__)

_METADATA: Final = (
    b"UID FLAGS INTERNALDATE RFC822.SIZE%s BODY.PEEK[HEADER.FIELDS (FROM SUBJECT DATE MESSAGE-ID)]"
)


@dataclass(slots=True)
class MailboxState:
    """What SELECT or EXAMINE said (RFC 9051 section 6.3.2); 0 for what the server left out."""

    uidvalidity: UidValidity = field(default=UidValidity(0))
    uidnext: int = 0
    exists: int = 0
    highestmodseq: ModSeq = field(default=ModSeq(0))
    vanished: list[tuple[int, int]] = field(default_factory=list)
    """UID ranges that QRESYNC reports as expunged (RFC 7162 section 3.2.10)."""

    def take(self, response: Response) -> None:
        """Note what one untagged response says about the mailbox."""
        text = response[0]
        if text.endswith(b" EXISTS\r\n"):
            self.exists = int(text.split()[1])
        elif text[:19].upper() == b"* VANISHED (EARLIER":
            self.vanished += parse_sequence_set(text.split()[-1])
        elif text[:6].upper() == b"* OK [":
            completion = Completion.parse(text[2:])
            if completion is None or not completion.argument.isdigit():
                return
            number = int(completion.argument)
            match completion.code:
                case "UIDVALIDITY":
                    self.uidvalidity = UidValidity(number)
                case "UIDNEXT":
                    self.uidnext = number
                case "HIGHESTMODSEQ":
                    self.highestmodseq = ModSeq(number)


@dataclass(frozen=True, slots=True)
class Quota:
    """STORAGE of a quota root (RFC 9208), in bytes."""

    used: int
    limit: int


OnMessage = Callable[[FetchData], None]
BodySink = Callable[[int | None, int], Sink]
"""Given the UID, where the server has named it already, and the exact size in bytes: where the body goes."""


class Session:
    """A connection with at most one mailbox selected, always read-only."""

    def __init__(self, wire: Wire, capabilities: frozenset[str]) -> None:
        self._wire = wire
        self.capabilities = capabilities
        self.selected: bytes | None = None
        self.state = MailboxState()

    @classmethod
    def connect(
        cls, account: Account, password: Secret, context: ssl.SSLContext, timeout: float
    ) -> "Session":
        """Connect, log in, and enable what makes synchronising cheap.

        Raises TlsError, AuthenticationFailed, ConnectionLost.
        """
        wire = Wire.connect(account, password, context, timeout)
        capabilities = wire.greeting_capabilities
        session = cls(wire, capabilities)
        try:
            if "ENABLE" in capabilities:
                # QRESYNC implies CONDSTORE (RFC 7162 section 3.2.3), and makes Dovecot name the UID in
                # unsolicited FETCH responses.
                for extension in ("QRESYNC", "CONDSTORE"):
                    if extension in capabilities:
                        wire.execute(b"ENABLE " + extension.encode())
                        break
            if "ID" in capabilities:
                with contextlib.suppress(Refused):
                    wire.execute(b'ID ("name" "imapfs" "version" "%s")' % __version__.encode())
        except BaseException:
            wire.close()
            raise
        return session

    @property
    def alive(self) -> bool:
        return self._wire.alive

    def abort(self) -> None:
        """From any thread: end the connection at once."""
        self._wire.abort()

    def close(self) -> None:
        """Say LOGOUT and close; never raises."""
        if self._wire.alive:
            with contextlib.suppress(ConnectionLost, Refused):
                self._wire.execute(b"LOGOUT")
        self._wire.close()

    def has(self, capability: str) -> bool:
        return capability in self.capabilities

    # -- mailboxes -----------------------------------------------------------------------------------------

    def personal_prefix(self) -> bytes:
        """Prefix of the personal namespace, such as ``INBOX.``, or b"" (RFC 2342)."""
        prefix = b""

        def take(response: Response) -> None:
            nonlocal prefix
            if response[0][:12].upper() == b"* NAMESPACE ":
                match values(response, 12):
                    case [[[bytes(first), *_], *_], *_]:
                        prefix = first

        if self.has("NAMESPACE"):
            self._wire.execute(b"NAMESPACE", on_response=take)
        return prefix

    def list_mailboxes(self) -> list[ListEntry]:
        """All mailboxes. One that the server describes in malformed words is left out, with a log line."""
        found: list[ListEntry] = []

        def take(response: Response) -> None:
            try:
                entry = parse_list(response)
            except ProtocolError as error:
                log.warning("a mailbox is not shown: %s", error)
                return
            if entry:
                found.append(entry)

        command = b'LIST "" "*"'
        if self.has("LIST-EXTENDED") and self.has("SPECIAL-USE"):
            command += b" RETURN (SPECIAL-USE)"
        self._wire.execute(command, on_response=take)
        return found

    def status(self, mailbox: bytes) -> dict[str, int]:
        """MESSAGES, UIDNEXT, UIDVALIDITY and UNSEEN of a mailbox without selecting it."""
        numbers: dict[str, int] = {}

        def take(response: Response) -> None:
            parsed = parse_status(response)
            if parsed:
                numbers.update(parsed[1])

        try:
            self._wire.execute(
                b"STATUS ",
                astring(mailbox),
                b" (MESSAGES UIDNEXT UIDVALIDITY UNSEEN)",
                on_response=take,
            )
        except Refused as error:
            raise _mailbox_error(error) from None
        return numbers

    def examine(self, mailbox: bytes) -> MailboxState:
        """Select ``mailbox`` read-only, afresh. Raises MailboxGone."""
        return self._examine(mailbox, b"", [], lambda _: None)

    def _examine(
        self, mailbox: bytes, parameters: bytes, then: Sequence[bytes], on_message: OnMessage
    ) -> MailboxState:
        """EXAMINE and, in the same round trip, the commands ``then``.

        If EXAMINE fails no mailbox is selected (RFC 9051 section 6.3.3), so that what follows can only fail.
        """
        state = MailboxState()

        def take(response: Response) -> None:
            data = parse_fetch(response)
            if data is None:
                state.take(response)
            elif data.uid is not None:
                on_message(data)

        if not parameters and self.has("CONDSTORE") and not self.has("ENABLE"):
            parameters = b" (CONDSTORE)"
        self.selected = None
        commands: list[Command] = [(b"EXAMINE ", astring(mailbox), parameters), *((c,) for c in then)]
        examined, *others = self._wire.execute_all(commands, on_response=take)
        try:
            self._wire.check(commands[0], examined)
        except Refused as error:
            raise _mailbox_error(error) from None
        if state.exists:
            # In an empty mailbox some servers refuse every FETCH.
            for command, completion in zip(commands[1:], others, strict=True):
                self._wire.check(command, completion)
        self.selected, self.state = mailbox, state
        return state

    # -- metadata ------------------------------------------------------------------------------------------

    def list_all(
        self, mailbox: bytes, on_message: OnMessage, on_state: Callable[[MailboxState], None]
    ) -> None:
        """Metadata of every message, streamed in the server's order."""
        on_state(self.examine(mailbox))
        if self.state.exists:
            self._fetch(b"1:*", self._metadata(), on_message)

    def list_flags(self, mailbox: bytes, on_message: OnMessage) -> MailboxState:
        """UID and FLAGS of every message: what there is to compare where the server keeps no MODSEQ."""
        state = self.examine(mailbox)
        if state.exists:
            self._fetch(b"1:*", b"(UID FLAGS)", on_message)
        return state

    def list_changes(
        self, mailbox: bytes, uidvalidity: UidValidity, modseq: ModSeq, last_uid: int, on_message: OnMessage
    ) -> MailboxState:
        """Flags changed since ``modseq``, expunged UIDs, metadata from ``last_uid`` on: one round trip.

        Needs QRESYNC. The message ``last_uid`` itself is known: it comes again so that the caller can see
        that it is still the same message (or, being gone, the one before it, as ``n:*`` always includes the
        last message). With another UIDVALIDITY the server ignores the parameter and the result is useless.
        """
        return self._examine(
            mailbox,
            b" (QRESYNC (%d %d))" % (uidvalidity, modseq),
            [b"UID FETCH %d:* %s" % (max(last_uid, 1), self._metadata())],
            on_message,
        )

    def fetch_changed_flags(self, modseq: ModSeq, on_message: OnMessage) -> None:
        """UID and FLAGS of messages changed since ``modseq`` in the selected mailbox. Needs CONDSTORE."""
        self._fetch(b"1:*", b"(UID FLAGS) (CHANGEDSINCE %d)" % modseq, on_message)

    def fetch_metadata_from(self, uid: int, on_message: OnMessage) -> None:
        """Metadata of the messages from ``uid`` on, at least of the last one, in the selected mailbox."""
        self._fetch(b"%d:*" % max(uid, 1), self._metadata(), on_message)

    def fetch_metadata(self, uids: Iterable[int], on_message: OnMessage) -> None:
        """Metadata of ``uids`` in the selected mailbox; silent about those that are gone."""
        for uid_set in sequence_sets(uids):
            self._fetch(uid_set, self._metadata(), on_message)

    def _metadata(self) -> bytes:
        modseq = b" MODSEQ" if self.has("CONDSTORE") else b""
        return b"(" + _METADATA % modseq + b")"

    def _fetch(self, uid_set: bytes, items: bytes, on_message: OnMessage) -> None:
        def take(response: Response) -> None:
            data = parse_fetch(response)
            # Without a UID it is an unsolicited change, about a message known by position only: the next
            # synchronisation learns it by UID.
            if data is not None and data.uid is not None:
                on_message(data)

        self._wire.execute(b"UID FETCH %s %s" % (uid_set, items), on_response=take)

    # -- bodies --------------------------------------------------------------------------------------------

    def fetch_bodies(
        self, mailbox: bytes, uidvalidity: UidValidity, uids: Sequence[int], open_sink: BodySink,
        on_body: Callable[[int, bytes | None], None],
    ) -> None:  # fmt: skip
        """BODY.PEEK[] of ``uids``. Literals are streamed to ``open_sink``; ``on_body`` closes each message:
        with b"" after a streamed body, with the bytes where the server sent a string, with None for one
        that is gone (``BODY[] NIL``, which Dovecot answers for a message expunged in mid-fetch).

        UIDs of which the server says nothing are not reported. Raises MailboxGone also where UIDVALIDITY is
        no longer ``uidvalidity``: the same UIDs then name other messages.
        """
        if self.selected != mailbox:
            self.examine(mailbox)
        if self.state.uidvalidity != uidvalidity:
            raise MailboxGone("the mailbox was made anew on the server: list it again")
        streamed = False

        def sink_for(response: Response, size: int) -> Sink | None:
            nonlocal streamed
            text = response[-1]
            if not text.upper().endswith(b"BODY[] "):
                return None
            streamed = True
            at = text.upper().rfind(b"UID ")
            digits = text[at + 4 :].split(b" ", 1)[0] if at >= 0 else b""
            return open_sink(int(digits) if digits.isdigit() else None, size)

        def take(response: Response) -> None:
            nonlocal streamed
            data = parse_fetch(response)
            if data is None:
                return
            was_streamed, streamed = streamed, False
            if data.section == b"" and data.uid is not None:
                on_body(data.uid, data.body)
            elif was_streamed:
                raise ProtocolError("the server sent a message without its UID")

        for uid_set in sequence_sets(uids):
            self._wire.execute(
                b"UID FETCH %s (UID BODY.PEEK[])" % uid_set, on_response=take, sink_for=sink_for
            )

    def quota(self, mailbox: bytes) -> Quota | None:
        """STORAGE quota of the root that ``mailbox`` counts against; None where there is none."""
        found: Quota | None = None

        def take(response: Response) -> None:
            nonlocal found
            if response[0][:8].upper() != b"* QUOTA ":
                return
            match values(response, 8):
                case [_, [*items]]:
                    for name, used, limit in zip(items[::3], items[1::3], items[2::3], strict=False):
                        if isinstance(name, bytes) and name.upper() == b"STORAGE" and used and limit:
                            # RFC 9208 section 5.1: units of 1024 octets.
                            found = Quota(int(bytes(used)) * 1024, int(bytes(limit)) * 1024)  # type: ignore[arg-type]

        if self.has("QUOTA"):
            with contextlib.suppress(Refused):
                self._wire.execute(b"GETQUOTAROOT ", astring(mailbox), on_response=take)
        return found


def _mailbox_error(error: Refused) -> Exception:
    """What NO to EXAMINE or STATUS means: unless the server says otherwise, there is no such mailbox."""
    if error.code in {"NOPERM", "LIMIT", "UNAVAILABLE", "INUSE", "SERVERBUG", "CONTACTADMIN"}:
        return error
    return MailboxGone(str(error))
