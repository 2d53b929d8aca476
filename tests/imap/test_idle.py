"""IDLE and NOTIFY on one connection, as servers speak them and as they should not."""

import threading
from collections.abc import Callable, Iterable, Iterator

import pytest

from imapfs.errors import ConnectionLost, ImapfsError, MailboxGone, NotSupported, Throttled, TimedOut
from imapfs.imap import idle
from imapfs.imap.idle import (
    AllMailboxes,
    CountChanged,
    FlagsChanged,
    MailboxChanged,
    MailboxOpened,
    MessageExpunged,
    MessagesVanished,
    StatusChanged,
    Watch,
    WatchBegan,
    WatchEvent,
)
from tests.support.accounts import session
from tests.support.mail import plain
from tests.support.servers.dovecot import Account
from tests.support.servers.scripted import DEADLINE, Scripted
from tests.support.servers.tls import CertificateAuthority

CAPABLE = b"IMAP4rev1 AUTH=PLAIN IDLE NOTIFY CONDSTORE"


class Listener:
    """Takes what a watch hears, and waits for it."""

    def __init__(self) -> None:
        self.events: list[WatchEvent] = []
        self._heard = threading.Condition()

    def __call__(self, events: list[WatchEvent]) -> None:
        with self._heard:
            self.events += events
            self._heard.notify_all()

    def wait_for(self, *events: WatchEvent) -> None:
        """Wait until these were heard, in this order, with others between them."""

        def came() -> bool:
            left = iter(self.events)
            return all(any(heard == event for heard in left) for event in events)

        with self._heard:
            assert self._heard.wait_for(came, DEADLINE), self.events


class Watching:
    """A watch of INBOX in a thread while the ``with`` block lasts; `error` is what it ended with."""

    def __init__(
        self, server: Scripted | Account, *, timeout: float = 20.0, everywhere: bool = False
    ) -> None:
        self.listener = Listener()
        self.watch = Watch(b"INBOX", self.listener, lambda deliver: deliver(), everywhere=everywhere)
        self.error: ImapfsError | None = None
        self.abort: Callable[[], None]
        self.usable = False
        """Whether the connection could be used afterwards."""
        self._thread = threading.Thread(target=self._run, args=(server, timeout))

    def _run(self, server: Scripted | Account, timeout: float) -> None:
        with session(server, timeout) as made:
            self.abort = made.abort
            try:
                self.watch.run(made)
                self.usable = bool(made.list_mailboxes())
            except ImapfsError as error:
                self.error = error

    def __enter__(self) -> "Watching":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.watch.stop()
        self.wait()
        self.watch.close()

    def wait(self) -> None:
        """Wait for its end."""
        self._thread.join(DEADLINE)
        assert not self._thread.is_alive()


def idling(*said: bytes, before: bytes = b"") -> Callable[[bytes, bytes], Iterable[bytes] | None]:
    """A script: ``before`` precedes the continuation request, ``said`` follows piece by piece."""
    tags: list[bytes] = []

    def script(tag: bytes, command: bytes) -> Iterable[bytes] | None:
        if command == b"IDLE":
            tags.append(tag)
            return [before + b"+ idling\r\n", *said]
        if tag == b"DONE":
            return [tags[-1] + b" OK done\r\n"]
        return None

    return script


def test_what_is_said_before_the_continuation_request_is_heard(ca: CertificateAuthority) -> None:
    with Scripted(ca, script=idling(before=b"* 4 EXISTS\r\n")) as server, Watching(server) as watching:
        watching.listener.wait_for(WatchBegan(), CountChanged(4))
    assert watching.usable


def test_data_in_pieces_is_put_together(ca: CertificateAuthority) -> None:
    pieces = [
        b"* 2 EXI",
        b"STS\r\n* 1 FETCH (UI",
        b"D 7 MODSEQ (9) FLAGS (\\Se",
        b"en))\r",
        b"\n* VANI",
        b"SHED 3:5,8\r\n",
    ]
    with Scripted(ca, script=idling(*pieces)) as server, Watching(server) as watching:
        watching.listener.wait_for(CountChanged(2), FlagsChanged(7, 9), MessagesVanished([(3, 5), (8, 8)]))
    assert watching.usable


def test_what_comes_in_one_record_is_all_heard_at_once(ca: CertificateAuthority) -> None:
    said = b"".join(b"* %d EXPUNGE\r\n" % n for n in range(500, 0, -1)) + b"* 9 EXISTS\r\n"
    with Scripted(ca, script=idling(said)) as server, Watching(server) as watching:
        watching.listener.wait_for(*[MessageExpunged()] * 500, CountChanged(9))


def test_what_means_nothing_is_no_event(ca: CertificateAuthority) -> None:
    said = b"* OK Still here\r\n* 0 RECENT\r\n* FLAGS (\\Seen)\r\n* OK [HIGHESTMODSEQ 5] x\r\n* 1 EXISTS\r\n"
    with Scripted(ca, script=idling(said)) as server, Watching(server) as watching:
        watching.listener.wait_for(CountChanged(1))
    assert [type(event) for event in watching.listener.events] == [MailboxOpened, WatchBegan, CountChanged]


def test_idle_is_renewed(ca: CertificateAuthority, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(idle, "RENEWAL", 0.05)
    with Scripted(ca, script=idling(b"* 1 EXISTS\r\n")) as server, Watching(server) as watching:
        watching.listener.wait_for(*[CountChanged(1)] * 3)
    assert server.commands.count(b'EXAMINE "INBOX"') == 1
    assert watching.usable


def test_server_that_ends_idle_is_not_asked_again(ca: CertificateAuthority) -> None:
    def script(tag: bytes, command: bytes) -> Iterable[bytes] | None:
        return [b"+ idling\r\n", tag + b" OK enough\r\n"] if command == b"IDLE" else None

    with Scripted(ca, script=script) as server, Watching(server) as watching:
        watching.wait()
    assert watching.usable
    assert server.commands.count(b"IDLE") == 1


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (b"NO not now", NotSupported),
        (b"BAD not now", NotSupported),
        (b"NO [NONEXISTENT] deleted", MailboxGone),
        (b"NO [UNAVAILABLE] server busy", Throttled),
    ],
)
def test_refused_idle(ca: CertificateAuthority, answer: bytes, error: type[ImapfsError]) -> None:
    def script(tag: bytes, command: bytes) -> Iterable[bytes] | None:
        return [tag + b" " + answer + b"\r\n"] if command == b"IDLE" else None

    with Scripted(ca, script=script) as server, Watching(server) as watching:
        watching.wait()
    assert type(watching.error) is error


def test_done_that_is_not_answered_ends_the_connection(ca: CertificateAuthority) -> None:
    with Scripted(ca) as server:
        script = idling()
        server.script = lambda tag, command: server.hang() if tag == b"DONE" else script(tag, command)
        with Watching(server, timeout=0.2) as watching:
            watching.listener.wait_for(WatchBegan())
    assert isinstance(watching.error, TimedOut)


def test_half_a_line_has_to_go_on(ca: CertificateAuthority) -> None:
    script = idling(b"* 1 EXISTS\r\n", b"* 2 EXI")
    with Scripted(ca, script=script) as server, Watching(server, timeout=0.2) as watching:
        watching.wait()
    assert isinstance(watching.error, TimedOut)
    assert CountChanged(1) in watching.listener.events


def test_silence_is_no_failure(ca: CertificateAuthority, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(idle, "RENEWAL", 0.6)
    script = idling(before=b"* 1 EXISTS\r\n")
    with Scripted(ca, script=script) as server, Watching(server, timeout=0.3) as watching:
        watching.listener.wait_for(CountChanged(1), CountChanged(1))
    assert watching.usable


def test_connection_that_ends_in_idle_is_lost(ca: CertificateAuthority) -> None:
    with Scripted(ca) as server:

        def script(tag: bytes, command: bytes) -> Iterator[bytes] | None:
            return server.then_hang_up(b"+ idling\r\n* BYE going down\r\n") if command == b"IDLE" else None

        server.script = script
        with Watching(server) as watching:
            watching.wait()
    assert isinstance(watching.error, ConnectionLost)
    assert "going down" in str(watching.error)


def test_connection_ended_from_another_thread_wakes_the_watch(ca: CertificateAuthority) -> None:
    with Scripted(ca, script=idling()) as server, Watching(server) as watching:
        watching.listener.wait_for(WatchBegan())
        watching.abort()
        watching.wait()
    assert isinstance(watching.error, ConnectionLost)


def test_notify_tells_of_all_mailboxes(ca: CertificateAuthority) -> None:
    def script(tag: bytes, command: bytes) -> Iterable[bytes] | None:
        if command.startswith(b"NOTIFY SET STATUS"):
            return [b"* STATUS a (MESSAGES 3)\r\n", tag + b" OK done\r\n"]
        if command.startswith(b"NOTIFY"):
            return [tag + b" OK done\r\n"]
        return news(tag, command)

    news = idling(b'* STATUS a (UIDNEXT 4)\r\n* LIST (\\NonExistent) "/" b\r\n* 1 EXISTS\r\n')
    with (
        Scripted(ca, script=script, capabilities=CAPABLE) as server,
        Watching(server, everywhere=True) as watching,
    ):
        heard = watching.listener
        heard.wait_for(
            StatusChanged(b"a", {"MESSAGES": 3}),
            WatchBegan(),
            StatusChanged(b"a", {"UIDNEXT": 4}),
            CountChanged(1),
        )
    assert [e.entry.name for e in heard.events if isinstance(e, MailboxChanged)] == [b"b"]
    assert [[one.name for one in e.entries] for e in heard.events if isinstance(e, AllMailboxes)] == [
        [b"INBOX"]
    ]
    assert server.commands[-3].startswith(b"NOTIFY SET (selected-delayed")
    assert watching.usable


def test_refused_notify_is_not_supported(ca: CertificateAuthority) -> None:
    def script(tag: bytes, command: bytes) -> Iterable[bytes] | None:
        return [tag + b" NO [BADEVENT (FlagChange)] no\r\n"] if command.startswith(b"NOTIFY") else None

    with (
        Scripted(ca, script=script, capabilities=CAPABLE) as server,
        Watching(server, everywhere=True) as watching,
    ):
        watching.wait()
    assert isinstance(watching.error, NotSupported)


def test_overflow_ends_the_watch(ca: CertificateAuthority) -> None:
    news = idling(b"* OK [NOTIFICATIONOVERFLOW] too much\r\n")

    def script(tag: bytes, command: bytes) -> Iterable[bytes] | None:
        return [tag + b" OK done\r\n"] if command.startswith(b"NOTIFY") else news(tag, command)

    with (
        Scripted(ca, script=script, capabilities=CAPABLE) as server,
        Watching(server, everywhere=True) as watching,
    ):
        watching.wait()
        assert not watching.watch.stopped
    assert watching.usable


def test_real_server_tells_of_a_change_right_after_the_beginning(user: Account) -> None:
    user.append("INBOX", plain(1), 1_700_000_000)
    with Watching(user, everywhere=True) as watching:
        watching.listener.wait_for(WatchBegan())
        user.append("INBOX", plain(2), 1_700_000_000)
        user.append("Sent", plain(3), 1_700_000_000)
        watching.listener.wait_for(CountChanged(2))
        with watching.listener._heard:
            assert watching.listener._heard.wait_for(
                lambda: any(
                    isinstance(event, StatusChanged)
                    and event.mailbox == b"Sent"
                    and event.numbers.get("MESSAGES") == 1
                    for event in watching.listener.events
                ),
                DEADLINE,
            )
    assert watching.usable
