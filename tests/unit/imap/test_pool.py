"""How many connections there are, and what becomes of requests when there could be more."""

import errno
import math
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from imapfs.errors import (
    AuthenticationFailed,
    ConnectionLost,
    CredentialError,
    CredentialUnavailable,
    Offline,
    Throttled,
    TimedOut,
)
from imapfs.imap import backoff
from imapfs.imap import pool as pool_module
from imapfs.imap.pool import SessionPool
from imapfs.imap.session import Session
from imapfs.model import Secret
from tests.support.accounts import address, pool, until
from tests.support.servers.scripted import DEADLINE, Scripted
from tests.support.servers.tls import CertificateAuthority

TOO_MANY = b" NO [ALERT] Too many simultaneous connections. (Failure)\r\n"
WRONG = b" NO [AUTHENTICATIONFAILED] wrong\r\n"
ExpectedLog = Callable[[str], None]


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the pool wait less between attempts."""
    for name in ("_FIRST_RETRY", "_MAX_RETRY", "_MAX_RETRY_WANTED", "_FIRST_PAUSE"):
        monkeypatch.setattr(backoff, name, 0.01)
    monkeypatch.setattr(backoff, "_REFUSED", (0.01, 0.01, 0.01, 3600.0))


class Logins:
    """A script that refuses logins while told to."""

    def __init__(self) -> None:
        self.refusal: bytes | None = None
        self.after: int | None = None
        """How many are let in before the refusals begin."""
        self.seen = 0

    def __call__(self, tag: bytes, command: bytes) -> Iterable[bytes] | None:
        if not command.startswith(b"AUTHENTICATE"):
            return None
        self.seen += 1
        if self.refusal is None or (self.after is not None and self.seen <= self.after):
            return None
        return [tag + self.refusal]


@asynccontextmanager
async def scripted_pool(server: Scripted, limit: int = 4) -> AsyncIterator[SessionPool]:
    with server, trio.fail_after(DEADLINE):
        async with pool(server, limit) as made:
            yield made


async def until_it_works(made: SessionPool) -> int:
    """Ask again and again; how many requests failed."""
    failed = 0
    while True:
        try:
            await made.run(_nothing)
            return failed
        except ConnectionLost:
            failed += 1
            await trio.sleep(0.001)


def _nothing(session: Session) -> None:
    """Use a session for nothing."""


@pytest.mark.parametrize("refusal", [TOO_MANY, b" NO [LIMIT] too many\r\n", b" BAD busy\r\n"])
@pytest.mark.trio
async def test_requests_wait_at_the_limit_of_the_server(ca: CertificateAuthority, refusal: bytes) -> None:
    logins = Logins()
    logins.refusal, logins.after = refusal, 2
    release = threading.Event()
    done: list[int] = []
    async with scripted_pool(Scripted(ca, script=logins)) as made, trio.open_nursery() as nursery:
        await made.run(_nothing)

        async def request(number: int) -> None:
            await made.run(lambda _: release.wait(DEADLINE))
            done.append(number)

        for number in range(5):
            nursery.start_soon(request, number)
        await until(lambda: logins.seen >= 3)
        nursery.start_soon(request, 5)
        await trio.testing.wait_all_tasks_blocked()
        assert made.reason is None
        release.set()
        await until(lambda: len(done) == 6)
        assert made.open == 2
        assert made.reason is None


@pytest.mark.trio
async def test_idle_session_serves_another_mailbox_rather_than_a_new_one(ca: CertificateAuthority) -> None:
    logins = Logins()
    async with scripted_pool(Scripted(ca, script=logins)) as made:
        await made.run(lambda session: session.examine(b"INBOX"), b"INBOX")
        assert await made.run(lambda session: session.selected, b"other") == b"INBOX"
        assert logins.seen == 1


@pytest.mark.trio
async def test_password_that_was_never_good_is_tried_once(
    ca: CertificateAuthority, impatient: None, expected_log: ExpectedLog
) -> None:
    expected_log("offline: localhost refused the password")
    logins = Logins()
    logins.refusal = WRONG
    failed = 0
    async with scripted_pool(Scripted(ca, script=logins)) as made, trio.open_nursery() as nursery:

        async def request() -> None:
            nonlocal failed
            with pytest.raises(AuthenticationFailed):
                await made.run(_nothing)
            failed += 1

        for _ in range(5):
            nursery.start_soon(request)
        await until(lambda: failed == 5)
        await request()
    assert logins.seen == 1


@pytest.mark.trio
async def test_refusal_beside_connections_that_work_does_not_last(ca: CertificateAuthority) -> None:
    logins = Logins()
    logins.refusal, logins.after = TOO_MANY, 1
    release = threading.Event()
    async with scripted_pool(Scripted(ca, script=logins)) as made:
        async with trio.open_nursery() as nursery:
            await made.run(_nothing)
            nursery.start_soon(made.run, lambda _: release.wait(DEADLINE))
            nursery.start_soon(made.run, _nothing)
            await until(lambda: logins.seen == 2)
            release.set()
        logins.refusal = None
        # The only connection ends: the next is made at once, as it is not one too many.
        await made.run(lambda session: session.abort())
        await made.run(_nothing)
        assert logins.seen == 3


@pytest.mark.trio
async def test_each_change_of_state_is_reported(
    ca: CertificateAuthority, impatient: None, expected_log: ExpectedLog
) -> None:
    expected_log("offline: localhost:[0-9]+ closed the connection: full")
    server = Scripted(ca)
    async with scripted_pool(server) as made, trio.open_nursery() as nursery:
        reported: list[str] = []

        async def report() -> None:
            while True:
                await made.state_changed.wait()
                reported.append(made.state)

        nursery.start_soon(report)
        await made.run(lambda session: session.abort())
        server.greeting = b"* BYE full"
        made.check_idle()
        await until(lambda: "offline" in reported)
        server.greeting = None
        await until(lambda: reported[-1] == "online")
        nursery.cancel_scope.cancel()


@pytest.mark.trio
async def test_password_that_was_good_is_tried_again_at_long_intervals_only(
    ca: CertificateAuthority, impatient: None, expected_log: ExpectedLog
) -> None:
    expected_log("offline: localhost refused the password")
    logins = Logins()
    async with scripted_pool(Scripted(ca, script=logins)) as made:
        await made.run(lambda session: session.abort())
        reported: list[bool] = []

        async def report() -> None:
            while True:
                await made.state_changed.wait()
                reported.append(made.needs_person)

        logins.refusal = WRONG
        async with trio.open_nursery() as nursery:
            nursery.start_soon(report)
            made.check_idle()
            await until(lambda: made.needs_person)
            await until(lambda: logins.seen == 5 and (made.retry_in or 0.0) > 3500)
            nursery.cancel_scope.cancel()
        for _ in range(300):
            with pytest.raises(AuthenticationFailed):
                await made.run(_nothing)
        assert logins.seen == 5
        assert made.state == "offline"
        assert made.retry_in is not None
        assert 3500 < made.retry_in <= 3600
        assert (reported[0], reported[-1]) == (False, True)


@pytest.mark.trio
async def test_handshake_that_was_cut_off_is_tried_again(
    ca: CertificateAuthority, impatient: None, expected_log: ExpectedLog
) -> None:
    expected_log("offline: localhost:[0-9]+ hung up")

    def cut(connection: socket.socket, number: int) -> None:
        if number <= 2:
            connection.recv(9999)
            connection.close()

    server = Scripted(ca, before_tls=cut)
    async with scripted_pool(server) as made:
        assert await until_it_works(made) >= 2
        assert made.reason is None


class _Broken:
    """Credentials with a mistake in them."""

    def __init__(self) -> None:
        self.asked = 0

    def get(self, refused: Secret | None = None) -> Secret:
        self.asked += 1
        raise LookupError("s3cret")


@pytest.mark.trio
async def test_error_that_nobody_foresaw_is_a_failed_attempt(
    ca: CertificateAuthority, expected_log: ExpectedLog, caplog: pytest.LogCaptureFixture
) -> None:
    expected_log("offline: no connection to localhost: internal error, LookupError at test_pool.py:[0-9]+")
    broken = _Broken()
    with Scripted(ca) as server:
        made = SessionPool(address(server), broken, 2, 5.0)
        for _ in range(20):
            with pytest.raises(ConnectionLost):
                await made.run(_nothing)
        await made.close()
    assert broken.asked == 1
    assert "s3cret" not in caplog.text
    assert len(caplog.records) == 1


@pytest.mark.trio
async def test_pool_comes_back_after_any_number_of_failures(
    ca: CertificateAuthority, impatient: None, expected_log: ExpectedLog
) -> None:
    expected_log("offline: localhost:[0-9]+ refuses connections")
    server = Scripted(ca)
    with server:
        pass
    made = SessionPool(address(server), Secret("secret"), 2, 5.0)
    vars(vars(made)["_backoff"])["_failures"] = 5000
    with pytest.raises(ConnectionLost, match="refuses connections"):
        await made.run(_nothing)
    assert made.reason is not None
    await made.close()


@pytest.mark.trio
async def test_error_that_is_raised_again_does_not_grow(
    ca: CertificateAuthority, expected_log: ExpectedLog
) -> None:
    expected_log("offline: localhost refused the password")
    logins = Logins()
    logins.refusal = WRONG
    depths = set()
    async with scripted_pool(Scripted(ca, script=logins)) as made:
        for attempt in range(10):
            with pytest.raises(AuthenticationFailed) as caught:
                await made.run(_nothing)
            if attempt:
                depths.add(len(caught.traceback))
    assert len(depths) == 1


@pytest.mark.trio
async def test_a_caller_that_gives_up_ends_the_command(ca: CertificateAuthority) -> None:
    """Else its thread, and with it the caller, would wait for as long as the connection does."""

    def script(tag: bytes, command: bytes) -> Iterable[bytes] | None:
        return server.hang() if command.startswith(b"EXAMINE") and server.accepted == 1 else None

    server = Scripted(ca, script=script)
    with server, trio.fail_after(DEADLINE):
        async with pool(server, 1, timeout=2 * DEADLINE) as made:
            with trio.move_on_after(0.05) as scope:
                await made.run(lambda session: session.examine(b"INBOX"))
            assert scope.cancelled_caught
            await made.run(lambda session: session.examine(b"INBOX"))
            assert (made.open, made.state) == (1, "online")
            assert server.accepted == 2


@pytest.mark.trio
async def test_after_a_silence_requests_do_not_try_by_themselves(
    ca: CertificateAuthority, monkeypatch: pytest.MonkeyPatch, expected_log: ExpectedLog
) -> None:
    expected_log("offline: localhost")
    silent = False

    def script(tag: bytes, command: bytes) -> Iterable[bytes] | None:
        return server.hang() if silent else None

    monkeypatch.setattr(pool_module, "_SILENCE_GRACE", 0.01)
    server = Scripted(ca, script=script)
    with server, trio.fail_after(DEADLINE):
        async with pool(server, 4, timeout=0.5) as made:
            await made.run(_nothing)
            silent = True
            with pytest.raises(TimedOut):
                await made.run(lambda session: session.examine(b"INBOX"))
            for _ in range(20):
                with pytest.raises(Offline):
                    await made.run(_nothing)
            await until(lambda: made.state == "offline")
            assert server.accepted == 2


# -- watchers


class Patient:
    """Uses a session until it is told to stop."""

    def __init__(self, *rank: bool | float) -> None:
        self.rank = (False, False, float(sum(rank)))
        self.running = False
        self._over = threading.Event()

    def run(self, session: Session) -> None:
        self.running = True
        self._over.wait(DEADLINE)
        self.running = False

    @property
    def told(self) -> bool:
        """Whether it was told to stop."""
        return self._over.is_set()

    def stop(self) -> None:
        self._over.set()


@pytest.mark.parametrize("limit", [2, 4])
@pytest.mark.trio
async def test_a_watcher_leaves_the_last_idle_connection_to_the_next_request(
    ca: CertificateAuthority, limit: int
) -> None:
    logins, watcher = Logins(), Patient()
    async with scripted_pool(Scripted(ca, script=logins), limit) as made, trio.open_nursery() as nursery:
        await made.run(_nothing)
        nursery.start_soon(made.watch, watcher, None)
        await until(lambda: watcher.running)
        before = logins.seen
        await made.run(_nothing)
        assert logins.seen == before
        assert not watcher.told
        watcher.stop()


@pytest.mark.trio
async def test_the_least_watcher_yields_to_a_request(ca: CertificateAuthority) -> None:
    more, less = Patient(2), Patient(1)
    release = threading.Event()
    async with scripted_pool(Scripted(ca)) as made, trio.open_nursery() as nursery:
        nursery.start_soon(made.watch, more, None)
        nursery.start_soon(made.watch, less, None)
        await until(lambda: more.running and less.running)
        for _ in range(2):
            nursery.start_soon(made.run, lambda _: release.wait(DEADLINE))
        await made.run(_nothing)
        await until(lambda: not less.running)
        assert more.running
        assert made.open == 4
        more.stop()
        release.set()


@pytest.mark.trio
async def test_watchers_wait_until_nobody_else_needs_a_session(
    ca: CertificateAuthority, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_module, "_COOLDOWN", 0.05)
    release = threading.Event()
    done: list[str] = []

    async def watch(made: SessionPool, watcher: Patient) -> None:
        await made.watch(watcher, None)
        done.append("watcher")

    async def use(made: SessionPool) -> None:
        await made.run(lambda _: release.wait(DEADLINE))
        done.append("request")

    async with scripted_pool(Scripted(ca), limit=1) as made, trio.open_nursery() as nursery:
        first, second = Patient(), Patient()
        nursery.start_soon(watch, made, first)
        await until(lambda: first.running)
        for _ in range(3):
            nursery.start_soon(use, made)
        await until(lambda: done == ["watcher"])
        nursery.start_soon(watch, made, second)
        await trio.testing.wait_all_tasks_blocked()
        release.set()
        await until(lambda: second.running)
        assert done == ["watcher", *["request"] * 3]
        second.stop()


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let watchers have sessions without waiting for calm."""
    monkeypatch.setattr(pool_module, "_COOLDOWN", 0.0)


class Listening(Patient):
    """Uses a session as IDLE does: until told to stop, or until its connection ends."""

    def run(self, session: Session) -> None:
        self.running = True
        while not self._over.wait(0.005):
            if not session.alive:
                raise ConnectionLost("ended")
        session.examine(b"INBOX")


class Deaf(Patient):
    """Uses a session until it is `free`, whatever it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.free = threading.Event()

    def run(self, session: Session) -> None:
        self.running = True
        self.free.wait(DEADLINE)


async def watch(made: SessionPool, watcher: Patient, ended: list[Exception | None]) -> None:
    try:
        await made.watch(watcher, None)
    except (ConnectionLost, Throttled) as error:
        ended.append(error)
    else:
        ended.append(None)


@pytest.mark.trio
async def test_a_watcher_waits_for_the_server_and_hurries_nobody(
    ca: CertificateAuthority, expected_log: ExpectedLog
) -> None:
    expected_log("offline: ")
    away = False

    def hang_up(connection: socket.socket, number: int) -> None:
        if away:
            connection.close()

    server = Scripted(ca, before_tls=hang_up)
    async with scripted_pool(server) as made, trio.open_nursery() as nursery:
        away = True
        with pytest.raises(ConnectionLost):
            await made.run(_nothing)
        tried = server.accepted
        watcher, ended = Patient(), list[Exception | None]()
        # An attempt is due within a second, and would be at once if somebody had asked for it.
        vars(vars(made)["_backoff"])["_retry_at"] = math.inf
        nursery.start_soon(watch, made, watcher, ended)
        await trio.testing.wait_all_tasks_blocked()
        assert (made.retry_in, server.accepted, ended) == (math.inf, tried, [])
        away = False
        await until_it_works(made)
        await until(lambda: watcher.running)
        watcher.stop()


@pytest.mark.trio
async def test_the_end_of_a_watchers_connection_is_noticed(ca: CertificateAuthority, at_once: None) -> None:
    async with scripted_pool(Scripted(ca)) as made, trio.open_nursery() as nursery:
        ended: list[Exception | None] = []
        watcher = Listening()
        nursery.start_soon(watch, made, watcher, ended)
        await until(lambda: watcher.running)
        (session,) = vars(made)["_lent"]
        session.abort()
        await until(lambda: ended)
        assert isinstance(ended[0], ConnectionLost)
        assert not watcher.told
        await until(lambda: (made.open, made.state) == (1, "online"))


@pytest.mark.trio
async def test_after_a_sleep_watchers_lose_their_connections_too(
    ca: CertificateAuthority, at_once: None
) -> None:
    server = Scripted(ca)
    async with scripted_pool(server) as made, trio.open_nursery() as nursery:
        ended: list[Exception | None] = []
        watchers = [Listening(), Listening()]
        for watcher in watchers:
            nursery.start_soon(watch, made, watcher, ended)
        await until(lambda: all(watcher.running for watcher in watchers))
        made.resumed()
        assert made.state == "connecting"
        await until(lambda: [type(error) for error in ended] == [ConnectionLost] * 2)
        await until(lambda: (made.open, made.state) == (1, "online"))
        assert server.accepted == 3


@pytest.mark.trio
async def test_where_there_have_to_be_fewer_watchers_go_first(
    ca: CertificateAuthority, at_once: None, expected_log: ExpectedLog
) -> None:
    expected_log("slowing down for 60 s, to 2 connections: slower")
    release = threading.Event()
    async with scripted_pool(Scripted(ca)) as made, trio.open_nursery() as nursery:
        ended: list[Exception | None] = []
        more, less = Listening(2), Listening(1)
        for watcher in (more, less):
            nursery.start_soon(watch, made, watcher, ended)
        await until(lambda: more.running and less.running)
        for _ in range(2):
            nursery.start_soon(made.run, lambda _: release.wait(DEADLINE))
        await until(lambda: len(vars(made)["_lent"]) == 4)
        made.throttle(Throttled("slower", "", 60.0))
        await until(lambda: ended == [None, None])
        assert (made.open, made.current_limit) == (2, 2)
        release.set()


@pytest.mark.trio
async def test_a_watcher_that_is_throttled_slows_all_down(
    ca: CertificateAuthority, expected_log: ExpectedLog
) -> None:
    expected_log("slowing down for 60 s, to 1 connections: slower")

    class Throttling(Patient):
        def run(self, session: Session) -> None:
            raise Throttled("slower", "", 60.0)

    async with scripted_pool(Scripted(ca)) as made:
        with pytest.raises(Throttled):
            await made.watch(Throttling(), None)
        assert (made.state, made.open) == ("throttled", 1)


@pytest.mark.trio
async def test_a_watcher_is_no_proof_that_the_server_is_there(
    ca: CertificateAuthority, at_once: None
) -> None:
    online: list[None] = []
    async with scripted_pool(Scripted(ca)) as made, trio.open_nursery() as nursery:

        async def wait() -> None:
            await made.wait_for_reconnect()
            online.append(None)

        watcher = Deaf()
        nursery.start_soon(made.watch, watcher, None)
        await until(lambda: watcher.running)
        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()

        def lose(session: Session) -> None:
            session.abort()
            raise ConnectionLost("ended")

        with pytest.raises(ConnectionLost):
            await made.run(lose, repeat=False)
        await until(lambda: online)
        assert watcher.told
        watcher.free.set()


@pytest.mark.trio
async def test_a_watcher_does_not_hide_that_the_network_is_silent(
    ca: CertificateAuthority, at_once: None, expected_log: ExpectedLog
) -> None:
    expected_log("offline: ")
    server = Scripted(ca, before_tls=lambda _, number: number > 1 and server.closing.wait())
    with server, trio.fail_after(DEADLINE):
        async with pool(server, timeout=0.5) as made, trio.open_nursery() as nursery:
            watcher = Deaf()
            nursery.start_soon(made.watch, watcher, None)
            await until(lambda: watcher.running)
            with pytest.raises(ConnectionLost, match="did not answer within"):
                await made.run(_nothing)
            assert (made.state, watcher.told) == ("offline", True)
            watcher.free.set()


@pytest.mark.trio
async def test_watchers_leave_sessions_for_others(ca: CertificateAuthority, at_once: None) -> None:
    first, second = Patient(), Patient()
    async with scripted_pool(Scripted(ca), limit=3) as made, trio.open_nursery() as nursery:
        nursery.start_soon(made.watch, first, None)
        await until(lambda: first.running)
        nursery.start_soon(made.watch, second, None)
        await trio.testing.wait_all_tasks_blocked()
        assert made.open == 1
        first.stop()
        await until(lambda: second.running)
        second.stop()


# -- what nobody foresaw, and what is not there


class Broken:
    """Credentials that cannot be had."""

    def __init__(self, error: Exception) -> None:
        self.error = error
        self.asked = 0

    def get(self, refused: Secret | None = None) -> Secret:
        self.asked += 1
        raise self.error


@pytest.mark.parametrize(
    ("error", "logged", "number"),
    [
        (
            RuntimeError("a mistake"),
            "offline: no connection to localhost: internal error",
            errno.EHOSTUNREACH,
        ),
        (CredentialUnavailable("no token"), "offline: no token", errno.EACCES),
        (CredentialError("no password"), "offline: no password", errno.EHOSTUNREACH),
    ],
    ids=["mistake", "token", "password"],
)
@pytest.mark.trio
async def test_without_credentials_it_is_tried_later(
    ca: CertificateAuthority,
    impatient: None,
    expected_log: ExpectedLog,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
    logged: str,
    number: int,
) -> None:
    expected_log(logged)
    expected_log("offline: ")
    with Scripted(ca) as server, trio.fail_after(DEADLINE):
        credentials = Broken(error)
        made = SessionPool(address(server), credentials, 2, 5.0)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(made.keep_connected)
            with pytest.raises(ConnectionLost):
                await made.run(_nothing)
            assert made.state == "offline"
            with pytest.raises(Offline) as caught:
                await made.run(_nothing)
            assert caught.value.errno == number
            await until(lambda: credentials.asked >= 3)
            await made.close()
            nursery.cancel_scope.cancel()
    assert sum(logged in record.getMessage() for record in caplog.records) == 1
