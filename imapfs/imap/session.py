"""Typed IMAP commands over one connection. Blocking: runs in a thread, one thread at a time.

Decisions that protect mail are made here and nowhere else. For reading, mailboxes are opened with EXAMINE and
bodies are asked for with BODY.PEEK, so that no flag can be set (RFC 9051 sections 6.3.3 and 6.4.5). Data is
taken by UID only, and FETCH data that names no UID is dropped. Messages are expunged with UID EXPUNGE (RFC
4315) and never with EXPUNGE or CLOSE, which would take along what other clients have marked as deleted.
"""

import contextlib
import io
import logging
import ssl
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from imapfs import __version__
from imapfs.encoding import format_internaldate
from imapfs.errors import (
    AuthenticationFailed,
    ConnectionLost,
    ImapfsError,
    MailboxGone,
    NoMechanism,
    ProtocolError,
    Refused,
    Throttled,
)
from imapfs.imap.grammar import (
    Completion,
    FetchData,
    ListEntry,
    Response,
    flag_list,
    number,
    parse_exists,
    parse_fetch,
    parse_list,
    parse_sequence_set,
    parse_status,
    sequence_sets,
    values,
)
from imapfs.imap.login import log_in
from imapfs.imap.stream import Buffer
from imapfs.imap.wire import Command, Literal, OnResponse, Sink, Wire, astring
from imapfs.model import Account, CredentialProvider, ModSeq, Secret, UidValidity

log = logging.getLogger(__name__)

_HEADERS: Final = b" BODY.PEEK[HEADER.FIELDS (FROM SUBJECT DATE MESSAGE-ID)]"

OnMessage = Callable[[FetchData], None]
OnStatus = Callable[[bytes, dict[str, int]], None]
"""Given the name of a mailbox and what STATUS says of it."""

_STATUSES: Final = 20
"""STATUS commands in one flight: few enough to be answered within the timeout by a slow server."""
_EVENTS: Final = b"(MessageNew MessageExpunge FlagChange)"


def _ignore(_: FetchData) -> None:
    """For data that nobody asked for."""


@dataclass(slots=True)
class MailboxState:
    """What SELECT or EXAMINE said (RFC 9051 section 6.3.2); 0 for what the server left out."""

    uidvalidity: UidValidity = field(default=UidValidity(0))
    uidnext: int = 0
    exists: int = -1
    """Number of messages. Every server must say it, so that a state that is given out always has it."""
    highestmodseq: ModSeq = field(default=ModSeq(0))
    """0 also where this mailbox has no modification sequences (NOMODSEQ)."""
    permanent_flags: frozenset[str] | None = None
    """Lower case; what the server keeps. None where it does not say, which means everything."""
    read_only: bool = False
    vanished: list[tuple[int, int]] = field(default_factory=list)
    """UID ranges that QRESYNC reports as expunged (RFC 7162 section 3.2.10)."""

    def take(self, response: Response) -> None:
        """Note what one untagged response says about the mailbox."""
        text = response[0]
        if (exists := parse_exists(text)) is not None:
            self.exists = exists
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
            match completion.code:
                case "UIDVALIDITY":
                    self.uidvalidity = UidValidity(number(completion.argument))
                case "UIDNEXT":
                    self.uidnext = number(completion.argument)
                case "HIGHESTMODSEQ":
                    self.highestmodseq = ModSeq(number(completion.argument))


class _Opening:
    """Takes the responses to SELECT or EXAMINE, and keeps out what still is about the mailbox before.

    With QRESYNC the server marks the border with CLOSED (RFC 7162 section 3.2.11). Without, the new
    mailbox's UIDVALIDITY is it: servers send FETCH and VANISHED data of the new one after that.
    """

    def __init__(self, on_message: OnMessage, *, was_selected: bool) -> None:
        self.state = MailboxState()
        self._on_message = on_message
        self._is_new = not was_selected

    def take(self, response: Response) -> None:
        text = response[0]
        if text[:13].upper() == b"* OK [CLOSED]":
            self.state = MailboxState()
            self._is_new = True
        elif (data := parse_fetch(response)) is not None:
            if self._is_new and data.uid is not None:
                self._on_message(data)
        elif self._is_new or text[:11].upper() != b"* VANISHED ":
            self.state.take(response)
            self._is_new |= bool(self.state.uidvalidity)


@dataclass(frozen=True, slots=True)
class Quota:
    """STORAGE of a quota root (RFC 9208), in bytes."""

    used: int
    limit: int


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


def _items(*, modseq: bool, headers: bool = True) -> bytes:
    """What to ask for of each message."""
    extra = (b" MODSEQ" if modseq else b"") + (_HEADERS if headers else b"")
    return b"(UID FLAGS INTERNALDATE RFC822.SIZE%s)" % extra


def _as_lost(error: Exception, account: Account) -> ConnectionLost:
    """A failure to connect that nobody has foreseen. Its own words are left out: they may hold a secret."""
    if isinstance(error, ImapfsError):
        return ConnectionLost(error.problem, remedy=error.remedy)
    place = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{type(error).__name__} at {Path(place.filename).name}:{place.lineno}"
    return ConnectionLost(f"no connection to {account.host}: internal error, {where}: please report it")


class Session:
    """A connection with at most one mailbox selected."""

    def __init__(self, wire: Wire, capabilities: frozenset[str]) -> None:
        self._wire = wire
        self.capabilities = capabilities
        self.personal_prefix = b""
        """Prefix of the personal namespace, such as ``INBOX.`` (RFC 2342)."""
        self.selected: bytes | None = None
        self.state = MailboxState()
        self._writable = False
        self._open = b"EXAMINE "
        """What mailboxes are opened with for reading."""

    @classmethod
    def connect(
        cls, account: Account, credentials: CredentialProvider, context: ssl.SSLContext, timeout: float
    ) -> "Session":
        """Connect, log in, and enable what makes synchronising cheap.

        What the server refuses is replaced by something newer once, where ``credentials`` have it: an access
        token may end before its time. Raises TlsError, AuthenticationFailed, ConnectionLost.
        """
        try:
            secret = credentials.get()
            try:
                return cls._log_in(account, secret, context, timeout)
            except NoMechanism:
                raise
            except AuthenticationFailed:
                newer = credentials.get(refused=secret) if secret is not None else None
                if newer is secret:
                    raise
            return cls._log_in(account, newer, context, timeout)
        except (AuthenticationFailed, ConnectionLost):
            raise
        except Exception as error:
            # Whoever called waits before the next attempt only for errors of a kind that it knows.
            raise _as_lost(error, account) from None

    @classmethod
    def _log_in(
        cls, account: Account, secret: Secret | None, context: ssl.SSLContext, timeout: float
    ) -> "Session":
        wire = Wire.open(account, context, timeout)
        try:
            log_in(wire, account, secret)
            session = cls(wire, wire.capabilities)
            session._introduce()
        except BaseException:
            wire.close()
            raise
        return session

    def _introduce(self) -> None:
        """Enable what makes synchronising cheap, say who we are, learn the prefix, in one round trip."""
        commands: dict[str, Command] = {}
        # QRESYNC implies CONDSTORE (RFC 7162 section 3.2.3), and makes Dovecot name the UID in unsolicited
        # FETCH responses.
        extension = next((e for e in ("QRESYNC", "CONDSTORE") if self.has(e) and self.has("ENABLE")), None)
        if extension is not None:
            commands["ENABLE"] = (b"ENABLE " + extension.encode(),)
        if self.has("ID"):
            commands["ID"] = (b'ID ("name" "imapfs" "version" "%s")' % __version__.encode(),)
        if self.has("NAMESPACE"):
            commands["NAMESPACE"] = (b"NAMESPACE",)
        completions = self._wire.execute_all([*commands.values()], on_response=self._take_namespace)
        for (name, command), completion in zip(commands.items(), completions, strict=True):
            try:
                self._wire.check(command, completion)
            except Refused as error:
                if name == "ENABLE":
                    log.info("synchronising by comparison only: %s", error)
                    self.capabilities -= {"QRESYNC", "CONDSTORE"}

    def _take_namespace(self, response: Response) -> None:
        if response[0][:12].upper() == b"* NAMESPACE ":
            match values(response, 12):
                case [[[bytes(first), *_], *_], *_]:
                    self.personal_prefix = first

    @property
    def alive(self) -> bool:
        return self._wire.alive

    def has_hung_up(self) -> bool:
        """Whether the server has ended the connection, or it broke; only while no command is under way."""
        return self._wire.has_hung_up()

    def is_stranded(self) -> bool:
        """Whether this machine has lost the address that the connection is from."""
        return self._wire.is_stranded()

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

    def list_mailboxes(self, on_response: OnResponse = lambda _: None) -> list[ListEntry]:
        """All mailboxes. One that the server describes in malformed words is left out, with a log line.

        ``on_response`` gets every response, also those about something else.
        """
        return self._list(b"", on_response)

    def list_with_status(self, mailboxes: Sequence[bytes], on_status: OnStatus) -> list[ListEntry]:
        """All mailboxes, and STATUS at least of ``mailboxes``, if possible in one round trip.

        Nothing is said of those that cannot be selected any more.
        """

        def take(response: Response) -> None:
            parsed = parse_status(response)
            if parsed is not None:
                on_status(*parsed)

        items = b"(MESSAGES UIDNEXT UIDVALIDITY UNSEEN%s)" % (
            b" HIGHESTMODSEQ" if self.has("CONDSTORE") else b""
        )
        # Of the selected mailbox STATUS may tell of the past (RFC 9051 section 6.3.11), and in Dovecot does.
        before: list[Command] = [(self._unselecting(),)] if self.selected is not None else []
        self.selected = None
        if len(mailboxes) > _STATUSES and self.has("LIST-STATUS"):
            # RFC 5819. Not for a few of many mailboxes, as the server looks into all of them.
            return self._list(b"STATUS " + items, take, before=before)
        commands: list[Command] = [(b"STATUS ", astring(mailbox), b" " + items) for mailbox in mailboxes]
        entries = self._list(b"", take, before=before, after=commands[:_STATUSES])
        for start in range(_STATUSES, len(commands), _STATUSES):
            self._wire.execute_all(commands[start : start + _STATUSES], on_response=take)
        return entries

    def _list(
        self,
        option: bytes,
        on_response: OnResponse,
        *,
        before: Sequence[Command] = (),
        after: Sequence[Command] = (),
    ) -> list[ListEntry]:
        """LIST with a further return option (RFC 5258); in one flight with other commands, whatever comes of
        those."""
        found: list[ListEntry] = []

        def take(response: Response) -> None:
            on_response(response)
            try:
                entry = parse_list(response)
            except ProtocolError as error:
                log.warning("a mailbox is not shown: %s", error)
                return
            if entry:
                found.append(entry)

        special_use = b"SPECIAL-USE" if self.has("LIST-EXTENDED") and self.has("SPECIAL-USE") else b""
        options = b" ".join(one for one in (special_use, option) if one)
        command = (b'LIST "" "*"' + (b" RETURN (%s)" % options if options else b""),)
        completions = self._wire.execute_all([*before, command, *after], on_response=take)
        self._wire.check(command, completions[len(before)])
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

    def sample(self, mailbox: bytes, most: int) -> dict[int, int]:
        """RFC822.SIZE by UID of about the newest ``most`` messages; ``mailbox`` is open with EXAMINE then.

        Unlike `examine` it never makes a server write anything down, so its UIDs are of no use later.
        Raises MailboxGone.
        """
        found: dict[int, int] = {}

        def take(data: FetchData) -> None:
            if data.uid is not None and data.size is not None:
                found[data.uid] = data.size

        opening = self._leave()
        try:
            self._wire.execute(b"EXAMINE ", astring(mailbox), on_response=opening.take)
        except Refused as error:
            raise _mailbox_error(error) from None
        state = self._enter(mailbox, opening, writable=False)
        if state.exists:
            first = max(1, self.next_uid() - most)
            self._fetch(b"%d:*" % first, b"(UID RFC822.SIZE)", take)
        return found

    def noop(self) -> None:
        """NOOP: a round trip, and nothing else."""
        self._wire.execute(b"NOOP")

    def _examine(
        self, mailbox: bytes, parameters: bytes, then: Sequence[bytes], on_message: OnMessage
    ) -> MailboxState:
        """EXAMINE and, in the same round trip, the commands ``then``, which ask for MODSEQ.

        If EXAMINE fails no mailbox is selected (RFC 9051 section 6.3.3), so that what follows can only fail.
        """
        if not parameters and self.has("CONDSTORE") and not self.has("ENABLE"):
            parameters = b" (CONDSTORE)"
        commands: list[Command] = [(self._open, astring(mailbox), parameters), *((c,) for c in then)]
        opening = self._leave(on_message)
        examined, *others = self._wire.execute_all(commands, on_response=opening.take)
        try:
            self._wire.check(commands[0], examined)
        except Refused as error:
            raise _mailbox_error(error) from None
        state = self._enter(mailbox, opening, writable=False)
        if state.exists and state.highestmodseq:
            # In an empty mailbox some servers refuse every FETCH, and without modification sequences they
            # must refuse MODSEQ (RFC 7162 section 3.1.2.2).
            for command, completion in zip(commands[1:], others, strict=True):
                self._wire.check(command, completion)
        if state.exists and not state.uidnext and not then and self._open == b"EXAMINE ":
            # Courier. The UIDs that it gives in an EXAMINE it may give to other messages later, with the same
            # UIDVALIDITY, so that a deletion would take the wrong one. SELECT makes it write them down.
            self._open = b"SELECT "
            return self._examine(mailbox, parameters, then, on_message)
        return state

    def _leave(self, on_message: OnMessage = _ignore) -> _Opening:
        """Begin to open a mailbox: from now on none is selected."""
        opening = _Opening(on_message, was_selected=self.selected is not None)
        self.selected = None
        return opening

    def _enter(self, mailbox: bytes, opening: _Opening, *, writable: bool) -> MailboxState:
        """Note that a mailbox was opened. Raises ProtocolError if the server did not say what it holds."""
        state = opening.state
        if state.exists < 0:
            # To take it for empty would remove every message from the cache.
            self.abort()
            raise ProtocolError("the server opened a mailbox without saying how many messages it has")
        self.selected, self.state, self._writable = mailbox, state, writable
        return state

    # -- push ----------------------------------------------------------------------------------------------

    def idle(self, on_response: OnResponse, wake: int, seconds: float) -> bool:
        """IDLE (RFC 2177) in the selected mailbox, for ``seconds`` or until descriptor ``wake`` is readable.

        False if the server has ended it before. Raises Refused.
        """
        return self._wire.idle(on_response, wake, seconds)

    def notify(self, on_response: OnResponse) -> None:
        """NOTIFY SET (RFC 5465): in IDLE the server tells of changes of all mailboxes of the user.

        It begins with a STATUS response for each mailbox but the selected one. Raises Refused.
        """
        events = _EVENTS[:-1] + b" MailboxName)"
        self._wire.execute(
            b"NOTIFY SET STATUS (selected %s) (personal %s)" % (_EVENTS, events), on_response=on_response
        )

    def end_notify(self) -> None:
        """Have the server tell of changes only when it is asked something, as without NOTIFY."""
        # Not NOTIFY NONE, after which it would not even tell of those to the selected mailbox.
        self._wire.execute(b"NOTIFY SET (selected-delayed %s)" % _EVENTS)

    # -- metadata ------------------------------------------------------------------------------------------

    # A server may add changes of other clients to any answer, as FETCH data with flags but without metadata
    # (QRESYNC makes Dovecot name their UIDs). `_fetch_metadata` is where the two are told apart.

    def list_all(
        self,
        mailbox: bytes,
        on_message: OnMessage,
        on_state: Callable[[MailboxState], None],
        on_flags: OnMessage = _ignore,
    ) -> None:
        """Metadata of every message, streamed in the server's order."""
        on_state(self.examine(mailbox))
        if self.state.exists:
            self._fetch_metadata(b"1:*", on_message, on_flags)

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
        last message). With another UIDVALIDITY the server ignores the parameter and the result is useless;
        so it is if the mailbox has lost its modification sequences (``highestmodseq`` is 0).

        ``on_message`` gets both kinds of data: only metadata has a size.
        """
        return self._examine(
            mailbox,
            b" (QRESYNC (%d %d))" % (uidvalidity, modseq),
            [b"UID FETCH %d:* %s" % (max(last_uid, 1), _items(modseq=True))],
            on_message,
        )

    def fetch_changed_flags(self, modseq: ModSeq, on_message: OnMessage) -> None:
        """UID and FLAGS of messages changed since ``modseq`` in the selected mailbox. Needs CONDSTORE."""
        self._fetch(b"1:*", b"(UID FLAGS) (CHANGEDSINCE %d)" % modseq, on_message)

    def fetch_metadata_from(self, uid: int, on_message: OnMessage, on_flags: OnMessage = _ignore) -> None:
        """Metadata of the messages from ``uid`` on, at least of the last one, in the selected mailbox."""
        self._fetch_metadata(b"%d:*" % max(uid, 1), on_message, on_flags)

    def fetch_metadata(
        self,
        uids: Iterable[int],
        on_message: OnMessage,
        on_flags: OnMessage = _ignore,
        *,
        headers: bool = True,
    ) -> None:
        """Metadata of ``uids`` in the selected mailbox; silent about those that are gone.

        Without ``headers`` only what a server knows of a message that it cannot read.
        """
        for uid_set in sequence_sets(uids):
            self._fetch_metadata(uid_set, on_message, on_flags, headers=headers)

    def _fetch_metadata(
        self, uid_set: bytes, on_message: OnMessage, on_flags: OnMessage, *, headers: bool = True
    ) -> None:
        def take(data: FetchData) -> None:
            if data.size is not None:
                on_message(data)
            elif data.flags is not None:
                on_flags(data)

        self._fetch(uid_set, _items(modseq=bool(self.state.highestmodseq), headers=headers), take)

    def _fetch(self, uid_set: bytes, items: bytes, on_message: OnMessage) -> None:
        def take(response: Response) -> None:
            data = parse_fetch(response)
            # Without a UID it is an unsolicited change, about a message known by position only: the next
            # synchronisation learns it by UID.
            if data is not None and data.uid is not None:
                on_message(data)

        self._wire.execute(b"UID FETCH %s %s" % (uid_set, items), on_response=take)

    def next_uid(self) -> int:
        """UIDNEXT of the selected mailbox, from its last message where the server does not say (Courier)."""
        if self.state.uidnext:
            return self.state.uidnext
        last: list[FetchData] = []
        if self.state.exists:
            self.fetch_metadata_from(0xFFFFFFFF, last.append)
        return max((data.uid or 0 for data in last), default=0) + 1

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
        if self.selected != mailbox or self.state.uidvalidity != uidvalidity:
            # A selection from before the mailbox was made anew lasts, and would say so for ever.
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
            return open_sink(number(digits) if digits.isdigit() else None, size)

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
                    for triple in zip(items[::3], items[1::3], items[2::3], strict=False):
                        match triple:
                            case (bytes(name), bytes(used), bytes(limit)) if name.upper() == b"STORAGE":
                                # RFC 9208 section 5.1: units of 1024 octets. Servers without a real
                                # limit send odd ones, which is no reason to end the connection.
                                with contextlib.suppress(ProtocolError):
                                    found = Quota(number(used) * 1024, number(limit) * 1024)

        if self.has("QUOTA"):
            with contextlib.suppress(Refused):
                self._wire.execute(b"GETQUOTAROOT ", astring(mailbox), on_response=take)
        return found

    # -- changes -------------------------------------------------------------------------------------------

    def select(self, mailbox: bytes, uidvalidity: UidValidity, *, afresh: bool = False) -> MailboxState:
        """Have ``mailbox`` selected for changes; with ``afresh`` also learn what it holds now.

        Raises MailboxGone also where its UIDVALIDITY is another, Refused where it is read-only.
        """
        known = self.selected == mailbox and self._writable and self.state.uidvalidity == uidvalidity
        if afresh or not known:
            opening = self._leave()
            try:
                completion = self._wire.execute(b"SELECT ", astring(mailbox), on_response=opening.take)
            except Refused as error:
                raise _mailbox_error(error) from None
            self._enter(mailbox, opening, writable=True).read_only = completion.code == "READ-ONLY"
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
                (b"UID FETCH %d (UID FLAGS%s)" % (uid, b" MODSEQ" if self.state.highestmodseq else b""),),
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

        def take(data: FetchData) -> None:
            if data.uid is not None and data.uid >= uidnext and data.size is not None:
                on_message(data)

        # Not known of a mailbox that is yet to be opened, where to ask in vain would cost the whole answer.
        modseq = self.selected == mailbox and bool(self.state.highestmodseq)
        commands: list[Command] = [
            (
                b"APPEND ",
                astring(mailbox),
                b' (%s) "%s" ' % (u.flags.encode(), format_internaldate(u.date, u.zone)),
                Literal(u.data),
            )
            for u in uploads
        ]
        looking: list[Command] = [
            (self._open, astring(mailbox)),
            (b"UID FETCH %d:* %s" % (max(uidnext, 1), _items(modseq=modseq)),),
        ]
        # Courier appends nothing to a mailbox that is selected read-only.
        before: list[Command] = [(self._unselecting(),)] if self.selected == mailbox else []
        opening = self._leave(take)
        completions = self._wire.execute_all([*before, *commands, *looking], on_response=opening.take)
        del completions[: len(before)]
        if completions[len(commands)].status == "OK":
            self._enter(mailbox, opening, writable=False)
        state = opening.state
        outcomes: list[int | Refused | None] = []
        for command, completion in zip(commands, completions, strict=False):
            try:
                self._wire.check(command, completion)
            except Refused as error:
                outcomes.append(error)
                continue
            uid: int | None = None
            if completion.code == "APPENDUID":
                validity, _, named = completion.argument.partition(b" ")
                # Some gateways send UIDVALIDITY 0 or the wrong one: such a UID says nothing.
                if validity == b"%d" % state.uidvalidity:
                    with contextlib.suppress(ProtocolError):
                        uid = number(named)
            outcomes.append(uid)
        return outcomes, state

    def _unselecting(self) -> bytes:
        # What is no mailbox cannot be selected, and then none is (RFC 9051 section 6.3.2).
        return b"UNSELECT" if self.has("UNSELECT") else b'EXAMINE ""'

    def _unselect(self) -> None:
        """Have no mailbox selected: a server closes the connection when the selected one is deleted."""
        if self.selected is not None:
            self.selected = None
            with contextlib.suppress(Refused):
                self._wire.execute(self._unselecting())

    def create_mailbox(self, mailbox: bytes) -> None:
        """CREATE, and SUBSCRIBE so that other programs show it too."""
        self._wire.execute(b"CREATE ", astring(mailbox))
        with contextlib.suppress(Refused):
            self._wire.execute(b"SUBSCRIBE ", astring(mailbox))

    def delete_mailbox(self, mailbox: bytes) -> bool:
        """DELETE a mailbox that is empty at this moment; false, and nothing happens, if it is not.

        DELETE takes the messages along (RFC 9051 section 6.3.5), so the look is as late as can be.
        """
        # Not by STATUS: where the mailbox is selected that may tell of the past (RFC 9051 section 6.3.11).
        if self.examine(mailbox).exists:
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
        position = 0
        for low, high in parse_sequence_set(old):
            if low <= uid <= high:
                position += uid - low
                break
            position += high - low + 1
        else:
            return None
        for low, high in parse_sequence_set(new):
            if position <= high - low:
                return low + position
            position -= high - low + 1
    return None


def _mailbox_error(error: Refused) -> Exception:
    """What NO to EXAMINE or STATUS means: unless the server says otherwise, there is no such mailbox."""
    if isinstance(error, Throttled):
        return error
    if error.code in {"NOPERM", "LIMIT", "INUSE", "SERVERBUG", "CONTACTADMIN"}:
        return error
    return MailboxGone(str(error))
