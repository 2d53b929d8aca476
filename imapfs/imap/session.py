"""Typed IMAP commands on one connection. Blocking: used in a thread, by one thread at a time.

The decisions that protect mail are made here and nowhere else. To read, mailboxes are opened with EXAMINE and
bodies are fetched with BODY.PEEK, so that no flag is set (RFC 9051 sections 6.3.3 and 6.4.5). Messages are
addressed by UID only, and FETCH data without a UID is dropped. Messages are expunged with UID EXPUNGE (RFC
4315), never with EXPUNGE or CLOSE, which would also remove what other clients have marked as deleted.

The module is long because it is a list: one method for each command that imapfs sends, in the order of the
RFC. All of them share the selected mailbox, so that a split would have to pass that around.
"""

import contextlib
import io
import logging
import ssl
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

from imapfs import __version__
from imapfs.encoding import format_internaldate
from imapfs.errors import (
    AuthenticationFailed,
    ConnectionLost,
    ImapfsError,
    MailboxGone,
    Malformed,
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
    number,
    parse_fetch,
    parse_list,
    parse_search,
    parse_sequence_set,
    parse_status,
    range_sets,
    sequence_sets,
)
from imapfs.imap.login import log_in
from imapfs.imap.responses import (
    MailboxState,
    OnMessage,
    Quota,
    SelectResponses,
    copied_message,
    parse_prefix,
    parse_quota,
)
from imapfs.imap.stream import Buffer
from imapfs.imap.wire import Command, Literal, OnResponse, Sink, Wire, astring
from imapfs.model import Account, CredentialProvider, MessageRef, ModSeq, Secret, UidValidity

log = logging.getLogger(__name__)

_HEADERS: Final = b" BODY.PEEK[HEADER.FIELDS (FROM TO SUBJECT DATE MESSAGE-ID)]"

OnStatus = Callable[[bytes, dict[str, int]], None]
"""Given the name of a mailbox and the items of its STATUS response."""

Check = Callable[[MailboxState, FetchData | None], None]
"""Given the state of a mailbox, and date and size of a message, or None if it is gone."""

_MAX_STATUS: Final = 20
"""Maximum number of STATUS commands in one round trip, so that a slow server answers within the timeout."""
_MAX_SEARCHED: Final = 100_000
"""Messages whose UIDs are asked for in one SEARCH, as its answer is one line."""
_MAX_LOGGED: Final = 5
"""Maximum number of malformed mailboxes that are named in the log, for one list."""
_EVENTS: Final = b"(MessageNew MessageExpunge FlagChange)"


def _ignore(_: FetchData) -> None:
    """Drop data that was not asked for."""


BodySink = Callable[[int | None, int], Sink]
"""Given the UID, if the server has sent it already, and the exact size in bytes: where to write the body."""


@dataclass(frozen=True, slots=True)
class Upload:
    """A message for APPEND (RFC 9051 section 6.3.12)."""

    data: Buffer
    """With CRLF line ends."""
    flags: str
    """Separated by spaces."""
    date: int
    """INTERNALDATE in seconds since the epoch."""
    zone: int
    """Minutes east of UTC."""


def _append_command(mailbox: bytes, uploads: Sequence[Upload]) -> Command:
    """Return an APPEND of one message, or of several (RFC 3502)."""
    parts: list[bytes | Literal] = [b"APPEND ", astring(mailbox)]
    for upload in uploads:
        date = format_internaldate(upload.date, upload.zone)
        parts += [b' (%s) "%s" ' % (upload.flags.encode(), date), Literal(upload.data)]
    return tuple(parts)


def _appended(completion: Completion, uidvalidity: int, count: int) -> list[int] | None:
    """Return the UIDs in an APPENDUID (RFC 9051 section 7.1), if it names one for each message."""
    validity, _, uids = completion.argument.partition(b" ")
    # Some gateways send UIDVALIDITY 0 or a wrong one: such UIDs are useless.
    if completion.code != "APPENDUID" or validity != b"%d" % uidvalidity:
        return None
    with contextlib.suppress(ProtocolError):
        ranges = parse_sequence_set(uids)
        named = [uid for low, high in ranges for uid in range(low, min(high, low + count) + 1)]
        # UIDs are assigned in ascending order: what is in another is not of these messages.
        if len(named) == count and named == sorted(set(named)):
            return named
    return None


class FlagChange(NamedTuple):
    """A STORE of one message (RFC 9051 section 6.4.6)."""

    uid: int
    sign: str
    """"+" adds, "-" removes."""
    flags: Sequence[str]
    unchanged_since: int
    """The MODSEQ after which nothing is done; 0 for none. Needs CONDSTORE."""


def _as_lost(error: Exception, account: Account) -> ConnectionLost:
    """Wrap an unexpected failure to connect, without its text, which may contain a secret."""
    if isinstance(error, ImapfsError):
        return ConnectionLost(error.problem, remedy=error.remedy)
    place = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{type(error).__name__} at {Path(place.filename).name}:{place.lineno}"
    return ConnectionLost(f"no connection to {account.host}: internal error, {where}: please report it")


class Session:
    """A connection with at most one mailbox selected."""

    def __init__(self, wire: Wire, capabilities: frozenset[str]) -> None:
        self._wire = wire
        # RFC 7162 section 3.2.3
        self.capabilities = capabilities | ({"CONDSTORE"} if "QRESYNC" in capabilities else set())
        self.personal_prefix = b""
        """Prefix of the personal namespace, such as ``INBOX.`` (RFC 2342)."""
        self.selected: bytes | None = None
        """The selected mailbox."""
        self.state = MailboxState()
        self._writable = False
        self._open_command = b"EXAMINE "
        """The command that opens a mailbox for reading."""

    @classmethod
    def connect(
        cls, account: Account, credentials: CredentialProvider, context: ssl.SSLContext, timeout: float
    ) -> "Session":
        """Connect, log in, and enable the extensions that make synchronisation cheap.

        If the server refuses an access token, which may end before its time, and ``credentials`` has a newer
        one, log in once more. Raises TlsError, AuthenticationFailed, ConnectionLost.
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
            # The caller backs off only after the errors that it knows.
            raise _as_lost(error, account) from None

    @classmethod
    def _log_in(
        cls, account: Account, secret: Secret | None, context: ssl.SSLContext, timeout: float
    ) -> "Session":
        wire = Wire.open(account, context, timeout)
        try:
            log_in(wire, account, secret)
            session = cls(wire, wire.capabilities)
            session._set_up()
        except BaseException:
            wire.close()
            raise
        return session

    def _set_up(self) -> None:
        """Send ENABLE, ID and NAMESPACE in one round trip."""
        commands: dict[str, Command] = {}
        # QRESYNC implies CONDSTORE (RFC 7162 section 3.2.3), and makes Dovecot include the UID in unsolicited
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
        if (prefix := parse_prefix(response)) is not None:
            self.personal_prefix = prefix

    @property
    def alive(self) -> bool:
        """Whether the connection can be used."""
        return self._wire.alive

    def has_hung_up(self) -> bool:
        """Return whether the server has ended the connection, or it broke. Only between commands."""
        return self._wire.has_hung_up()

    def is_stranded(self) -> bool:
        """Return whether this machine has lost the address that the connection uses."""
        return self._wire.is_stranded()

    def abort(self) -> None:
        """End the connection at once, from any thread."""
        self._wire.abort()

    def close(self) -> None:
        """Send LOGOUT and close. Never raises."""
        if self._wire.alive:
            with contextlib.suppress(ConnectionLost, Refused):
                self._wire.execute(b"LOGOUT")
        self._wire.close()

    def has(self, capability: str) -> bool:
        """Return whether the server announced ``capability``, in upper case, and imapfs uses it."""
        return capability in self.capabilities

    # -- mailboxes -----------------------------------------------------------------------------------------

    def list_mailboxes(self, on_response: OnResponse = lambda _: None) -> list[ListEntry]:
        """Return all mailboxes, but log and leave out those with a malformed LIST response.

        ``on_response`` gets every response, of any kind.
        """
        return self._list(b"", on_response)

    def list_with_status(self, mailboxes: Sequence[bytes], on_status: OnStatus) -> list[ListEntry]:
        """Return all mailboxes, and report the status of at least ``mailboxes``, if possible in one round
        trip.

        ``on_status`` is not called for a mailbox that can no longer be selected.
        """

        def take(response: Response) -> None:
            parsed = parse_status(response)
            if parsed is not None:
                on_status(*parsed)

        items = b"(MESSAGES UIDNEXT UIDVALIDITY UNSEEN%s)" % (
            b" HIGHESTMODSEQ" if self.has("CONDSTORE") else b""
        )
        # STATUS of the selected mailbox may be out of date (RFC 9051 section 6.3.11); in Dovecot it is.
        before: list[Command] = [(self._unselect_command(),)] if self.selected is not None else []
        self.selected = None
        if len(mailboxes) > _MAX_STATUS and self.has("LIST-STATUS"):
            # RFC 5819. Not for a few out of many mailboxes, because the server opens all of them.
            return self._list(b"STATUS " + items, take, before=before)
        commands: list[Command] = [(b"STATUS ", astring(mailbox), b" " + items) for mailbox in mailboxes]
        entries = self._list(b"", take, before=before, after=commands[:_MAX_STATUS])
        for start in range(_MAX_STATUS, len(commands), _MAX_STATUS):
            self._wire.execute_all(commands[start : start + _MAX_STATUS], on_response=take)
        return entries

    def _list(
        self,
        option: bytes,
        on_response: OnResponse,
        *,
        before: Sequence[Command] = (),
        after: Sequence[Command] = (),
    ) -> list[ListEntry]:
        """Run LIST with a return option (RFC 5258), in one round trip with other commands, which may fail."""
        found: list[ListEntry] = []
        malformed: list[Malformed] = []

        def take(response: Response) -> None:
            on_response(response)
            try:
                entry = parse_list(response)
            except Malformed as error:
                malformed.append(error)
                return
            if entry:
                found.append(entry)

        special_use = b"SPECIAL-USE" if self.has("LIST-EXTENDED") and self.has("SPECIAL-USE") else b""
        options = b" ".join(one for one in (special_use, option) if one)
        command = (b'LIST "" "*"' + (b" RETURN (%s)" % options if options else b""),)
        completions = self._wire.execute_all([*before, command, *after], on_response=take)
        self._wire.check(command, completions[len(before)])
        for error in malformed[:_MAX_LOGGED]:
            log.warning("a mailbox is not shown: %s", error)
        return found

    def status(self, mailbox: bytes) -> dict[str, int]:
        """Return MESSAGES, UIDNEXT, UIDVALIDITY and UNSEEN of a mailbox without selecting it."""
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
        """Select ``mailbox`` read-only, even if it is selected already. Raises MailboxGone."""
        return self._examine(mailbox, b"", [], lambda _: None)

    def examine_messages(
        self, mailbox: bytes, uids: Iterable[int], check: Callable[[MailboxState, dict[int, FetchData]], None]
    ) -> None:
        """Select ``mailbox`` read-only, and fetch date and size of messages in the same round trip.

        ``check`` gets both, the messages by UID. If it raises, the mailbox has to be selected again before it
        is used. Raises MailboxGone.
        """
        found: dict[int, FetchData] = {}

        def take(data: FetchData) -> None:
            if data.uid is not None and data.is_metadata:
                found[data.uid] = data

        commands = [
            b"UID FETCH %s (UID INTERNALDATE RFC822.SIZE)" % uid_set for uid_set in sequence_sets(uids)
        ]
        state = self._examine(mailbox, b"", commands, take)
        try:
            check(state, found)
        except ImapfsError:
            self.state = MailboxState()
            raise

    def sample(self, mailbox: bytes, maximum: int) -> dict[int, int]:
        """Return RFC822.SIZE by UID for about the newest ``maximum`` messages; ``mailbox`` is then selected.

        Unlike `examine` this always uses EXAMINE, so that the server changes nothing; do not keep the UIDs.
        Raises MailboxGone.
        """
        found: dict[int, int] = {}

        def take(data: FetchData) -> None:
            if data.uid is not None and data.is_metadata:
                found[data.uid] = data.size or 0

        selecting = self._begin_select()
        try:
            self._wire.execute(b"EXAMINE ", astring(mailbox), on_response=selecting.take)
        except Refused as error:
            raise _mailbox_error(error) from None
        state = self._end_select(mailbox, selecting, writable=False)
        if state.exists:
            first = max(1, self.next_uid() - maximum)
            # As a listing does, so that what a listing needs is known to work.
            self._fetch_metadata(b"%d:*" % first, take, _ignore)
        return found

    def noop(self) -> None:
        """Run NOOP: one round trip."""
        self._wire.execute(b"NOOP")

    def _examine(
        self, mailbox: bytes, parameters: bytes, then: Sequence[bytes], on_message: OnMessage
    ) -> MailboxState:
        """Run EXAMINE and, in the same round trip, the commands ``then``, which ask for MODSEQ.

        If EXAMINE fails, no mailbox is selected (RFC 9051 section 6.3.3), and the other commands only fail.
        """
        if not parameters and self.has("CONDSTORE") and not self.has("ENABLE"):
            parameters = b" (CONDSTORE)"
        commands: list[Command] = [(self._open_command, astring(mailbox), parameters), *((c,) for c in then)]
        selecting = self._begin_select(on_message)
        examined, *others = self._wire.execute_all(commands, on_response=selecting.take, fetches=bool(then))
        try:
            self._wire.check(commands[0], examined)
        except Refused as error:
            raise _mailbox_error(error) from None
        state = self._end_select(mailbox, selecting, writable=False)
        if state.exists and state.highestmodseq:
            # Some servers refuse any FETCH in an empty mailbox, and without modification sequences a server
            # must refuse MODSEQ (RFC 7162 section 3.1.2.2).
            for command, completion in zip(commands[1:], others, strict=True):
                self._wire.check(command, completion)
        if state.exists and not state.uidnext and not then and self._open_command == b"EXAMINE ":
            # Courier: after EXAMINE it may later assign the same UIDs to other messages, with the same
            # UIDVALIDITY, so that a deletion would remove the wrong one. SELECT makes it store the UIDs.
            self._open_command = b"SELECT "
            return self._examine(mailbox, parameters, then, on_message)
        return state

    def _begin_select(self, on_message: OnMessage = _ignore) -> SelectResponses:
        """Prepare to open a mailbox: from now on none is selected."""
        selecting = SelectResponses(
            on_message, was_selected=self.selected is not None, modseqs=self.has("CONDSTORE")
        )
        self.selected = None
        return selecting

    def _end_select(self, mailbox: bytes, selecting: SelectResponses, *, writable: bool) -> MailboxState:
        """Record that a mailbox is selected. Raises ProtocolError if the server sent no number of
        messages."""
        state = selecting.state
        if state.exists < 0:
            # Taking the mailbox for empty would remove all its messages from the cache.
            self.abort()
            raise ProtocolError("the server opened a mailbox without saying how many messages it has")
        self.selected, self.state, self._writable = mailbox, state, writable
        return state

    # -- watching ------------------------------------------------------------------------------------------

    def idle(self, on_response: OnResponse, wake: int, seconds: float) -> bool:
        """Run IDLE (RFC 2177) for ``seconds``, or until the descriptor ``wake`` is readable.

        Return false if the server ended IDLE before. Raises Refused.
        """
        return self._wire.idle(on_response, wake, seconds)

    def notify(self, on_response: OnResponse) -> None:
        """Run NOTIFY SET (RFC 5465): during IDLE the server reports changes of all the user's mailboxes.

        It begins with a STATUS response for each mailbox except the selected one. Raises Refused.
        """
        events = _EVENTS[:-1] + b" MailboxName)"
        self._wire.execute(
            b"NOTIFY SET STATUS (selected %s) (personal %s)" % (_EVENTS, events), on_response=on_response
        )

    def end_notify(self) -> None:
        """Make the server report changes only in response to commands, as without NOTIFY."""
        # Not NOTIFY NONE, after which it would not even report those to the selected mailbox.
        self._wire.execute(b"NOTIFY SET (selected-delayed %s)" % _EVENTS)

    # -- metadata ------------------------------------------------------------------------------------------

    # A server may add changes by other clients to any response, as FETCH data with flags but without metadata
    # (QRESYNC makes Dovecot include their UIDs). `_fetch_metadata` separates the two.

    def list_all(
        self,
        mailbox: bytes,
        on_message: OnMessage,
        on_state: Callable[[MailboxState], None],
        on_flags: OnMessage = _ignore,
    ) -> None:
        """Fetch the metadata of every message, streamed in the server's order.

        ``on_message`` and ``on_flags`` are to pass the data on, as there may be any amount.
        """
        on_state(self.examine(mailbox))
        if self.state.exists:
            self._fetch_metadata(b"1:*", on_message, on_flags, held=False)

    def list_flags(self, mailbox: bytes, on_message: OnMessage) -> MailboxState:
        """Fetch UID and FLAGS of every message, to compare them where the server keeps no MODSEQ.

        ``on_message`` is to keep no more of them than it needs, as there may be any amount.
        """
        state = self.examine(mailbox)
        if state.exists:
            self._fetch(b"1:*", b"(UID FLAGS)", on_message, held=False)
        return state

    def list_changes(
        self, mailbox: bytes, uidvalidity: UidValidity, modseq: ModSeq, last_uid: int, on_message: OnMessage
    ) -> MailboxState:
        """Fetch flags changed since ``modseq``, expunged UIDs, and metadata from ``last_uid`` on, in one
        round trip.

        Needs QRESYNC. The caller knows message ``last_uid``; it is fetched again to verify that it is still
        the same (if it is gone, the message before it, as ``n:*`` always includes the last message). If
        UIDVALIDITY has changed, the server ignores the parameters and the result is useless. The same is true
        if the mailbox has lost its modification sequences (``highestmodseq`` is 0).

        ``on_message`` gets both kinds of data; only metadata has a size.
        """
        return self._examine(
            mailbox,
            b" (QRESYNC (%d %d))" % (uidvalidity, modseq),
            [b"UID FETCH %d:* %s" % (max(last_uid, 1), self._items(modseq=True))],
            on_message,
        )

    def fetch_changed_flags(self, modseq: ModSeq, on_message: OnMessage) -> None:
        """Fetch UID and FLAGS of messages changed since ``modseq`` in the selected mailbox. Needs
        CONDSTORE."""
        self._fetch(b"1:*", b"(UID FLAGS) (CHANGEDSINCE %d)" % modseq, on_message)

    def fetch_metadata_from(self, uid: int, on_message: OnMessage, on_flags: OnMessage = _ignore) -> None:
        """Fetch metadata from ``uid`` on, and always of the last message, in the selected mailbox."""
        self._fetch_metadata(b"%d:*" % max(uid, 1), on_message, on_flags)

    def fetch_metadata(
        self,
        uids: Iterable[int],
        on_message: OnMessage,
        on_flags: OnMessage = _ignore,
        *,
        headers: bool = True,
        held: bool = True,
    ) -> None:
        """Fetch metadata of ``uids`` in the selected mailbox, except of those that are gone.

        Without ``headers``, only what a server knows about a message that it cannot read. Not ``held``:
        ``on_message`` and ``on_flags`` pass the data on.
        """
        for uid_set in sequence_sets(uids):
            self._fetch_metadata(uid_set, on_message, on_flags, headers=headers, held=held)

    def _fetch_metadata(
        self,
        uid_set: bytes,
        on_message: OnMessage,
        on_flags: OnMessage,
        *,
        headers: bool = True,
        held: bool = True,
    ) -> None:
        def take(data: FetchData) -> None:
            if data.is_metadata:
                on_message(data)
            elif data.flags is not None:
                on_flags(data)

        items = self._items(modseq=bool(self.state.highestmodseq), headers=headers)
        self._fetch(uid_set, items, take, held=held)

    def _items(self, *, modseq: bool, headers: bool = True) -> bytes:
        """Return the FETCH items that are the metadata of a message."""
        extra = b" MODSEQ" if modseq else b""
        if self.has("OBJECTID"):
            extra += b" EMAILID"
        elif self.has("X-GM-EXT-1"):
            extra += b" X-GM-MSGID"
        return b"(UID FLAGS INTERNALDATE RFC822.SIZE%s%s)" % (extra, _HEADERS if headers else b"")

    def _fetch(self, uid_set: bytes, items: bytes, on_message: OnMessage, *, held: bool = True) -> None:
        def take(response: Response) -> None:
            data = parse_fetch(response)
            # Without a UID it is an unsolicited change to a message known by position only. The next
            # synchronisation finds it by UID.
            if data is not None and data.uid is not None:
                on_message(data)

        self._wire.execute(b"UID FETCH %s %s" % (uid_set, items), on_response=take, fetches=True, held=held)

    def identities(self) -> dict[int, FetchData]:
        """Return date and size of all messages of the selected mailbox, by UID."""
        found: dict[int, FetchData] = {}

        def take(data: FetchData) -> None:
            if data.uid is not None and data.is_metadata:
                found[data.uid] = data

        if self.state.exists:
            self._fetch(b"1:*", b"(UID INTERNALDATE RFC822.SIZE)", take)
        return found

    def present(self, ranges: Iterable[tuple[int, int]] | None = None) -> set[int]:
        """Return the UIDs of the messages in the selected mailbox: of all, or of those in ``ranges``.

        UID SEARCH (RFC 9051 section 6.4.4) does not read the messages. So it also names those that a server
        leaves out when it is asked for their data.
        """
        if ranges is not None:
            keys = [b"UID " + one for one in range_sets(ranges)]
        else:
            first = range(1, self.state.exists + 1, _MAX_SEARCHED)
            keys = [b"%d:%d" % (low, low + _MAX_SEARCHED - 1) for low in first[:-1]]
            keys += [b"%d:*" % low for low in first[-1:]]
        found: set[int] = set()

        def take(response: Response) -> None:
            found.update(parse_search(response) or ())

        for key in keys:
            self._wire.execute(b"UID SEARCH " + key, on_response=take)
        return found

    def next_uid(self) -> int:
        """Return UIDNEXT of the selected mailbox; from its last message if the server sends none
        (Courier)."""
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
        """Fetch BODY.PEEK[] of ``uids``. Literals are streamed to ``open_sink``.

        ``on_body`` is called at the end of each message: with b"" after a streamed body, with the bytes if
        the server sent a string, with None if the message is gone (``BODY[] NIL``, which Dovecot sends for a
        message that is expunged during the FETCH). It is not called for UIDs that the server leaves out.

        Raises MailboxGone also if UIDVALIDITY is no longer ``uidvalidity``: the UIDs then mean other
        messages.
        """
        if self.selected != mailbox or self.state.uidvalidity != uidvalidity:
            # A mailbox that was recreated while selected keeps its old state until it is selected again.
            self.examine(mailbox)
        if self.state.uidvalidity != uidvalidity:
            raise MailboxGone("the mailbox was recreated on the server: list it again")
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
                b"UID FETCH %s (UID BODY.PEEK[])" % uid_set,
                on_response=take,
                sink_for=sink_for,
                fetches=True,
            )

    def fetch_body(self, mailbox: bytes, uidvalidity: int, uid: int) -> bytes | None:
        """Return one body; None if the message is gone."""
        spool = io.BytesIO()
        body: bytes | None = None

        def take(_: int, data: bytes | None) -> None:
            nonlocal body
            body = None if data is None else spool.getvalue() or data

        self.fetch_bodies(mailbox, UidValidity(uidvalidity), [uid], lambda *_: spool, take)
        return body

    def quota(self, mailbox: bytes) -> Quota | None:
        """Return the STORAGE quota of the root that ``mailbox`` counts against; None if there is no quota."""
        found: Quota | None = None

        def take(response: Response) -> None:
            nonlocal found
            found = parse_quota(response) or found

        if self.has("QUOTA"):
            with contextlib.suppress(Refused):
                self._wire.execute(b"GETQUOTAROOT ", astring(mailbox), on_response=take)
        return found

    # -- changes -------------------------------------------------------------------------------------------

    def select(
        self,
        mailbox: bytes,
        uidvalidity: UidValidity,
        uid: int = 0,
        check: Check = lambda _, __: None,
        *,
        afresh: bool = False,
    ) -> MailboxState:
        """Select ``mailbox`` read-write unless it is already; with ``afresh`` in any case, for its present
        state.

        ``check`` is called with that state, and with date and size of message ``uid``, which are fetched in
        the same round trip. If it raises, the next call selects the mailbox again. It is not called if the
        mailbox is selected already.

        Raises MailboxGone also if its UIDVALIDITY has changed, Refused if it is read-only.
        """
        known = self.selected == mailbox and self._writable and self.state.uidvalidity == uidvalidity
        if afresh or not known:
            found: list[FetchData] = []
            selecting = self._begin_select(found.append)
            commands: list[Command] = [(b"SELECT ", astring(mailbox))]
            if uid:
                commands.append((b"UID FETCH %d (UID INTERNALDATE RFC822.SIZE)" % uid,))
            selected, *others = self._wire.execute_all(commands, on_response=selecting.take)
            try:
                self._wire.check(commands[0], selected)
            except Refused as error:
                raise _mailbox_error(error) from None
            state = self._end_select(mailbox, selecting, writable=False)
            state.read_only = selected.code == "READ-ONLY"
            if state.exists:
                for command, completion in zip(commands[1:], others, strict=True):
                    self._wire.check(command, completion)
            if state.uidvalidity == uidvalidity:
                check(state, next((one for one in found if one.uid == uid and one.is_metadata), None))
            self._writable = True
        if self.state.uidvalidity != uidvalidity:
            raise MailboxGone("the mailbox was recreated on the server: list it again")
        if self.state.read_only:
            raise Refused("the server lets this account only read this mailbox", "NOPERM")
        return self.state

    def store(self, changes: Sequence[FlagChange]) -> list[FetchData | Refused | None]:
        """Change flags of messages in the selected mailbox, one change of each, in one round trip.

        Return for each message its flags after that, or why the server refuses the change. None if nothing
        was done because it was changed after ``unchanged_since`` (RFC 7162 section 3.1.3), and if it is gone.
        """
        found: dict[int, FetchData] = {}

        def take(response: Response) -> None:
            data = parse_fetch(response)
            if data is not None and data.uid is not None and data.flags is not None:
                found[data.uid] = data

        commands: list[Command] = [
            (
                b"UID STORE %d%s %sFLAGS (%s)"
                % (
                    change.uid,
                    b" (UNCHANGEDSINCE %d)" % change.unchanged_since if change.unchanged_since else b"",
                    change.sign.encode(),
                    " ".join(change.flags).encode(),
                ),
            )
            for change in changes
        ]
        # Servers differ in what they report without being asked.
        items = b"(UID FLAGS%s)" % (b" MODSEQ" if self.state.highestmodseq else b"")
        uids = sequence_sets(sorted(change.uid for change in changes))
        look_up: list[Command] = [(b"UID FETCH %s %s" % (uid_set, items),) for uid_set in uids]
        completions = self._wire.execute_all([*commands, *look_up], on_response=take)
        outcomes: list[FetchData | Refused | None] = []
        for change, command, completion in zip(changes, commands, completions, strict=False):
            if completion.code == "MODIFIED":
                outcomes.append(None)
                continue
            try:
                self._wire.check(command, completion)
                outcomes.append(found.get(change.uid))
            except Refused as error:
                outcomes.append(error)
        return outcomes

    def move(self, uid: int, target: bytes) -> MessageRef | None:
        """Run UID MOVE (RFC 6851) from the selected mailbox. Return the message in the target, or None if the
        server does not name it (COPYUID)."""
        return self._transfer(b"UID MOVE", uid, target)

    def copy(self, uid: int, target: bytes) -> MessageRef | None:
        """Run UID COPY from the selected mailbox. Return the copy, or None if the server does not name it
        (COPYUID)."""
        return self._transfer(b"UID COPY", uid, target)

    def _transfer(self, verb: bytes, uid: int, target: bytes) -> MessageRef | None:
        copied: Completion | None = None

        def take(response: Response) -> None:
            nonlocal copied
            if response[0][:5].upper() == b"* OK ":
                completion = Completion.parse(response[0][2:])
                if completion is not None and completion.code == "COPYUID":
                    copied = completion

        tagged = self._wire.execute(b"%s %d " % (verb, uid), astring(target), on_response=take)
        if tagged.code == "COPYUID":
            copied = tagged
        return copied_message(copied, uid, target) if copied is not None else None

    def expunge(self, uid: int) -> bool:
        """Delete a message of the selected mailbox. Return false if it remains there, marked as deleted.

        Without UIDPLUS a message cannot be expunged alone. Then this is left to the server, or to a client
        that expunges the whole mailbox; also if the server refuses to expunge it. Raises Refused if it is not
        even marked.
        """
        self._wire.execute(b"UID STORE %d +FLAGS.SILENT (\\Deleted)" % uid)
        if not self.has("UIDPLUS"):
            return False
        try:
            self._wire.execute(b"UID EXPUNGE %d" % uid)
        except Throttled:
            raise
        except Refused as error:
            log.warning("message %d is marked as deleted, but the server does not expunge it: %s", uid, error)
            return False
        return True

    def append(
        self, mailbox: bytes, uploads: Sequence[Upload], uidnext: int, on_message: OnMessage
    ) -> tuple[list[int | Refused | None], MailboxState]:
        """APPEND messages, then fetch the metadata of all messages from ``uidnext`` on, in one round trip.

        For each upload, return its UID if the server sends one (APPENDUID), None if it does not, or the
        refusal. ``on_message`` gets the metadata.

        Several are one command where the server can do that (MULTIAPPEND, RFC 3502): it takes all or none. If
        it refuses them, each is sent again by itself, as perhaps only one of them is refused.
        """
        if len(uploads) > 1 and self.has("MULTIAPPEND"):
            (outcome,), state = self._append(mailbox, [uploads], uidnext, on_message)
            if isinstance(outcome, Throttled) or (
                isinstance(outcome, Refused) and outcome.code in {"TRYCREATE", "NONEXISTENT"}
            ):
                return [outcome for _ in uploads], state
            if not isinstance(outcome, Refused):
                # In the order of the messages (RFC 4315 section 3).
                return [None if outcome is None else outcome[i] for i in range(len(uploads))], state
        each, state = self._append(mailbox, [[upload] for upload in uploads], uidnext, on_message)
        return [outcome[0] if isinstance(outcome, list) else outcome for outcome in each], state

    def _append(
        self, mailbox: bytes, groups: Sequence[Sequence[Upload]], uidnext: int, on_message: OnMessage
    ) -> tuple[list[list[int] | Refused | None], MailboxState]:
        """Do as `append` with a command for each group. For each, return the UIDs of all its messages."""

        def take(data: FetchData) -> None:
            if data.uid is not None and data.uid >= uidnext and data.is_metadata:
                on_message(data)

        # Unknown for a mailbox that is not open yet, where asking for a missing MODSEQ would fail the whole
        # FETCH.
        modseq = self.selected == mailbox and bool(self.state.highestmodseq)
        commands: list[Command] = [_append_command(mailbox, group) for group in groups]
        look_up: list[Command] = [
            (self._open_command, astring(mailbox)),
            (b"UID FETCH %d:* %s" % (max(uidnext, 1), self._items(modseq=modseq)),),
        ]
        # Courier refuses APPEND to a mailbox that is selected read-only.
        before: list[Command] = [(self._unselect_command(),)] if self.selected == mailbox else []
        selecting = self._begin_select(take)
        completions = self._wire.execute_all([*before, *commands, *look_up], on_response=selecting.take)
        del completions[: len(before)]
        if completions[len(commands)].status == "OK":
            self._end_select(mailbox, selecting, writable=False)
        state = selecting.state
        outcomes: list[list[int] | Refused | None] = []
        for group, command, completion in zip(groups, commands, completions, strict=False):
            try:
                self._wire.check(command, completion)
                outcomes.append(_appended(completion, state.uidvalidity, len(group)))
            except Refused as error:
                outcomes.append(error)
        return outcomes, state

    def _unselect_command(self) -> bytes:
        # After a failed EXAMINE no mailbox is selected (RFC 9051 section 6.3.2).
        return b"UNSELECT" if self.has("UNSELECT") else b'EXAMINE ""'

    def _unselect(self) -> None:
        """Unselect the mailbox, because a server closes the connection when the selected one is deleted."""
        if self.selected is not None:
            self.selected = None
            with contextlib.suppress(Refused):
                self._wire.execute(self._unselect_command())

    def create_mailbox(self, mailbox: bytes) -> None:
        """Run CREATE, and SUBSCRIBE so that other programs show the mailbox too."""
        self._wire.execute(b"CREATE ", astring(mailbox))
        with contextlib.suppress(Refused):
            self._wire.execute(b"SUBSCRIBE ", astring(mailbox))

    def delete_mailbox(self, mailbox: bytes) -> bool:
        """Run DELETE if the mailbox is empty. Return false, and change nothing, if it is not.

        DELETE also deletes all messages (RFC 9051 section 6.3.5), so the check comes as late as possible.
        """
        # Not by STATUS, which may be out of date for a selected mailbox (RFC 9051 section 6.3.11).
        if self.examine(mailbox).exists:
            return False
        self._unselect()
        self._wire.execute(b"DELETE ", astring(mailbox))
        with contextlib.suppress(Refused):
            self._wire.execute(b"UNSUBSCRIBE ", astring(mailbox))
        return True

    def rename_mailbox(self, mailbox: bytes, target: bytes) -> None:
        """Run RENAME, which also renames all mailboxes below ``mailbox``."""
        self._unselect()
        self._wire.execute(b"RENAME ", astring(mailbox), b" ", astring(target))
        for verb, name in ((b"SUBSCRIBE ", target), (b"UNSUBSCRIBE ", mailbox)):
            with contextlib.suppress(Refused):
                self._wire.execute(verb, astring(name))


def _mailbox_error(error: Refused) -> Exception:
    """Return the error for NO to EXAMINE or STATUS: unless the code says otherwise, the mailbox is gone."""
    if isinstance(error, Throttled):
        return error
    if error.code in {"NOPERM", "LIMIT", "INUSE", "SERVERBUG", "CONTACTADMIN"}:
        return error
    return MailboxGone(str(error))
