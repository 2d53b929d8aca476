"""Typed IMAP commands over one connection. Blocking: runs in a thread, one thread at a time.

Decisions that protect mail are made here and nowhere else. For reading, mailboxes are opened with EXAMINE and
bodies are asked for with BODY.PEEK, so that no flag can be set (RFC 9051 sections 6.3.3 and 6.4.5). Data is
taken by UID only, and FETCH data that names no UID is dropped. Messages are expunged with UID EXPUNGE (RFC
4315) and never with EXPUNGE or CLOSE, which would take along what other clients have marked as deleted.
"""

import contextlib
import io
import logging
import re
import ssl
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from imapfs import __version__
from imapfs.errors import ConnectionLost, MailboxGone, ProtocolError, Refused
from imapfs.imap.grammar import (
    FetchData,
    ListEntry,
    flag_list,
    format_date,
    parse_fetch,
    parse_list,
    parse_sequence_set,
    parse_status,
    sequence_sets,
    values,
)
from imapfs.imap.wire import Buffer, Command, Completion, Literal, Response, Sink, Wire, astring
from imapfs.model import Account, ModSeq, Secret, UidValidity

log = logging.getLogger(__name__)

_METADATA: Final = (
    b"UID FLAGS INTERNALDATE RFC822.SIZE%s BODY.PEEK[HEADER.FIELDS (FROM SUBJECT DATE MESSAGE-ID)]"
)


_EXISTS: Final = re.compile(rb"\* (\d{1,10}) EXISTS\r?\n", re.I)


@dataclass(slots=True)
class MailboxState:
    """What SELECT or EXAMINE said (RFC 9051 section 6.3.2); 0 for what the server left out."""

    uidvalidity: UidValidity = field(default=UidValidity(0))
    uidnext: int = 0
    exists: int = 0
    highestmodseq: ModSeq = field(default=ModSeq(0))
    permanent_flags: frozenset[str] | None = None
    """Lower case; what the server keeps. None where it does not say, which means everything."""
    read_only: bool = False
    vanished: list[tuple[int, int]] = field(default_factory=list)
    """UID ranges that QRESYNC reports as expunged (RFC 7162 section 3.2.10)."""

    def take_any(self, response: Response) -> None:
        """`take` for a response of any kind."""
        if b" FETCH " not in response[0][:24]:
            self.take(response)

    def take(self, response: Response) -> None:
        """Note what one untagged response says about the mailbox."""
        text = response[0]
        if m := _EXISTS.match(text):
            self.exists = int(m[1])
        elif text[:19].upper() == b"* VANISHED (EARLIER":
            self.vanished += parse_sequence_set(text.split()[-1])
        elif text[:6].upper() == b"* OK [":
            completion = Completion.parse(text[2:])
            if completion is None:
                return
            if completion.code == "PERMANENTFLAGS":
                self.permanent_flags = frozenset(flag_list(completion.argument.strip(b"()")).lower().split())
            if not completion.argument.isdigit():
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


@dataclass(frozen=True, slots=True)
class Upload:
    """A message for APPEND (RFC 9051 section 6.3.12)."""

    data: Buffer
    """With CRLF line ends."""
    flags: str
    """Space-separated."""
    date: int
    """INTERNALDATE, seconds since the epoch."""
    zone: int
    """Minutes east of UTC."""


class Session:
    """A connection with at most one mailbox selected."""

    def __init__(self, wire: Wire, capabilities: frozenset[str]) -> None:
        self._wire = wire
        self.capabilities = capabilities
        self.selected: bytes | None = None
        self.state = MailboxState()
        self._writable = False

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
        self.selected, self.state, self._writable = mailbox, state, False
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

    def fetch_body(self, mailbox: bytes, uidvalidity: int, uid: int) -> bytes | None:
        """One body in memory; None if the message is gone."""
        spool = io.BytesIO()
        body: bytes | None = None

        def take(_: int, data: bytes | None) -> None:
            nonlocal body
            body = None if data is None else spool.getvalue() or data

        self.fetch_bodies(mailbox, UidValidity(uidvalidity), [uid], lambda *_: spool, take)
        return body

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

    # -- changes -------------------------------------------------------------------------------------------

    def select(self, mailbox: bytes, uidvalidity: UidValidity, *, afresh: bool = False) -> MailboxState:
        """Have ``mailbox`` selected for changes; with ``afresh`` also learn what it holds now.

        Raises MailboxGone also where its UIDVALIDITY is another, Refused where it is read-only.
        """
        if afresh or self.selected != mailbox or not self._writable:
            state = MailboxState()
            self.selected = None
            try:
                completion = self._wire.execute(b"SELECT ", astring(mailbox), on_response=state.take_any)
            except Refused as error:
                raise _mailbox_error(error) from None
            state.read_only = completion.code == "READ-ONLY"
            self.selected, self.state, self._writable = mailbox, state, True
        if self.state.uidvalidity != uidvalidity:
            raise MailboxGone("the mailbox was made anew on the server: list it again")
        if self.state.read_only:
            raise Refused("the server lets this account only read this mailbox", "NOPERM")
        return self.state

    def store(self, uid: int, sign: str, flags: Iterable[str], unchanged_since: int) -> FetchData | None:
        """Add ("+") or remove ("-") flags of a message in the selected mailbox: its flags as they are then.

        With ``unchanged_since`` (not 0; needs CONDSTORE) nothing happens, and None is returned, if the
        message was changed after that MODSEQ (RFC 7162 section 3.1.3). Also None if it is gone.
        """
        found: FetchData | None = None

        def take(response: Response) -> None:
            nonlocal found
            data = parse_fetch(response)
            if data is not None and data.uid == uid and data.flags is not None:
                found = data

        modifier = b" (UNCHANGEDSINCE %d)" % unchanged_since if unchanged_since else b""
        names = " ".join(flags).encode()
        completions = self._wire.execute_all(
            [
                (b"UID STORE %d%s %sFLAGS (%s)" % (uid, modifier, sign.encode(), names),),
                # Servers differ in what they say unasked.
                (b"UID FETCH %d (UID FLAGS%s)" % (uid, b" MODSEQ" if self.has("CONDSTORE") else b""),),
            ],
            on_response=take,
        )
        if completions[0].code == "MODIFIED":
            return None
        self._wire.check((b"UID STORE",), completions[0])
        return found

    def move(self, uid: int, target: bytes) -> int | None:
        """UID MOVE (RFC 6851) out of the selected mailbox: the new UID, or None where none is named."""
        return self._transfer(b"UID MOVE", uid, target)

    def copy(self, uid: int, target: bytes) -> int | None:
        """UID COPY out of the selected mailbox: the new UID, or None where none is named."""
        return self._transfer(b"UID COPY", uid, target)

    def _transfer(self, verb: bytes, uid: int, target: bytes) -> int | None:
        named: Completion | None = None

        def take(response: Response) -> None:
            nonlocal named
            if response[0][:5].upper() == b"* OK ":
                completion = Completion.parse(response[0][2:])
                if completion is not None and completion.code == "COPYUID":
                    named = completion

        tagged = self._wire.execute(b"%s %d " % (verb, uid), astring(target), on_response=take)
        if tagged.code == "COPYUID":
            named = tagged
        return _copied_uid(named, uid) if named is not None else None

    def expunge(self, uid: int) -> bool:
        """Delete one message of the selected mailbox; false if it stays, marked as deleted.

        Without UIDPLUS there is no way to expunge it alone, so that this is left to the server or to a
        client that means all of them.
        """
        self._wire.execute(b"UID STORE %d +FLAGS.SILENT (\\Deleted)" % uid)
        if not self.has("UIDPLUS"):
            return False
        self._wire.execute(b"UID EXPUNGE %d" % uid)
        return True

    def append(
        self, mailbox: bytes, uploads: Sequence[Upload], uidnext: int, on_message: OnMessage
    ) -> tuple[list[int | Refused | None], MailboxState]:
        """APPEND messages, then look at what the mailbox holds from ``uidnext`` on: all in one flight.

        For each upload the UID where the server names it (APPENDUID), None where it does not, or the
        refusal. ``on_message`` gets metadata of every message from ``uidnext`` on.
        """
        state = MailboxState()

        def take(response: Response) -> None:
            data = parse_fetch(response)
            if data is None:
                state.take_any(response)
            elif data.uid is not None and data.uid >= uidnext and data.date is not None:
                on_message(data)

        commands: list[Command] = [
            (
                b"APPEND ",
                astring(mailbox),
                b' (%s) "%s" ' % (u.flags.encode(), format_date(u.date, u.zone)),
                Literal(u.data),
            )
            for u in uploads
        ]
        looking: list[Command] = [
            (b"EXAMINE ", astring(mailbox)),
            (b"UID FETCH %d:* %s" % (max(uidnext, 1), self._metadata()),),
        ]
        self.selected = None
        completions = self._wire.execute_all([*commands, *looking], on_response=take)
        if completions[len(commands)].status == "OK":
            self.selected, self.state, self._writable = mailbox, state, False
        outcomes: list[int | Refused | None] = []
        for command, completion in zip(commands, completions, strict=False):
            try:
                self._wire.check(command, completion)
            except Refused as error:
                outcomes.append(error)
                continue
            uid: int | None = None
            if completion.code == "APPENDUID":
                validity, _, number = completion.argument.partition(b" ")
                # Some gateways send UIDVALIDITY 0 or the wrong one: such a UID says nothing.
                if number.isdigit() and validity == b"%d" % state.uidvalidity:
                    uid = int(number)
            outcomes.append(uid)
        return outcomes, state

    def _unselect(self) -> None:
        """Have no mailbox selected: a server closes the connection when the selected one is deleted."""
        if self.selected is not None:
            self.selected = None
            # What is no mailbox cannot be selected, and then none is (RFC 9051 section 6.3.2).
            with contextlib.suppress(Refused):
                self._wire.execute(b"UNSELECT" if self.has("UNSELECT") else b'EXAMINE ""')

    def create_mailbox(self, mailbox: bytes) -> None:
        """CREATE, and SUBSCRIBE so that other programs show it too."""
        self._wire.execute(b"CREATE ", astring(mailbox))
        with contextlib.suppress(Refused):
            self._wire.execute(b"SUBSCRIBE ", astring(mailbox))

    def delete_mailbox(self, mailbox: bytes) -> bool:
        """DELETE a mailbox that is empty at this moment; false, and nothing happens, if it is not.

        DELETE takes the messages along (RFC 9051 section 6.3.5), so the look is as late as can be.
        """
        if self.status(mailbox).get("MESSAGES", 1):
            return False
        self._unselect()
        self._wire.execute(b"DELETE ", astring(mailbox))
        with contextlib.suppress(Refused):
            self._wire.execute(b"UNSUBSCRIBE ", astring(mailbox))
        return True

    def rename_mailbox(self, mailbox: bytes, target: bytes) -> None:
        """RENAME a mailbox with all below it."""
        self._unselect()
        self._wire.execute(b"RENAME ", astring(mailbox), b" ", astring(target))
        for verb, name in ((b"SUBSCRIBE ", target), (b"UNSUBSCRIBE ", mailbox)):
            with contextlib.suppress(Refused):
                self._wire.execute(verb, astring(name))


def _copied_uid(completion: Completion, uid: int) -> int | None:
    """The UID that the copy of ``uid`` has, by COPYUID (RFC 4315 section 3)."""
    with contextlib.suppress(ProtocolError, ValueError):
        _, old, new = completion.argument.split(b" ")
        pairs = zip(_each(parse_sequence_set(old)), _each(parse_sequence_set(new)), strict=False)
        return dict(pairs).get(uid)
    return None


def _each(ranges: list[tuple[int, int]]) -> Iterator[int]:
    for low, high in ranges:
        yield from range(low, high + 1)


def _mailbox_error(error: Refused) -> Exception:
    """What NO to EXAMINE or STATUS means: unless the server says otherwise, there is no such mailbox."""
    if error.code in {"NOPERM", "LIMIT", "UNAVAILABLE", "INUSE", "SERVERBUG", "CONTACTADMIN"}:
        return error
    return MailboxGone(str(error))
