"""The contract of imapfs.imap.session, and of the pool above it, on a real server."""

import threading
from collections.abc import Callable, Iterable, Iterator

import pytest
import trio

from imapfs.errors import AuthenticationFailed, ConnectionLost, MailboxGone, ProtocolError, TimedOut, TlsError
from imapfs.imap.grammar import FetchData
from imapfs.imap.responses import MailboxState
from imapfs.imap.session import Session
from imapfs.model import ModSeq, Uid, UidValidity
from tests.support.accounts import hide, pool, session, until
from tests.support.compare import flags, served
from tests.support.mail import plain, wild
from tests.support.mounting import DEADLINE, wait_until
from tests.support.servers.dovecot import Account, Dovecot
from tests.support.servers.scripted import Scripted
from tests.support.servers.tls import CertificateAuthority

DATE = 1_700_000_000
INBOX = b"INBOX"


class Bodies:
    """Collects what fetch_bodies delivers."""

    def __init__(self) -> None:
        self.found: dict[int, bytes | None] = {}
        self.announced: list[tuple[int | None, int]] = []
        self._streamed = bytearray()

    def open(self, uid: int | None, size: int) -> "Bodies":
        self.announced.append((uid, size))
        self._streamed = bytearray()
        return self

    def write(self, data: bytes) -> None:
        self._streamed += data

    def close(self, uid: int, data: bytes | None) -> None:
        self.found[uid] = bytes(self._streamed) if data == b"" else data
        self._streamed = bytearray()


def fetch(open_session: Session, mailbox: bytes, uids: list[int]) -> Bodies:
    bodies = Bodies()
    state = open_session.examine(mailbox)
    open_session.fetch_bodies(mailbox, state.uidvalidity, uids, bodies.open, bodies.close)
    return bodies


def listing(open_session: Session, mailbox: bytes = INBOX) -> list[FetchData]:
    found: list[FetchData] = []
    open_session.list_all(mailbox, found.append, lambda _: None)
    return found


# -- mailboxes


def test_mailboxes_are_listed_as_the_server_spells_them(user: Account) -> None:
    for name in ("a b", "Zürich", "R&D", 'quo"ted', "back\\slash", "100%", "x/y/z"):
        user.deliver(name, [])
    with session(user) as connected:
        entries = {entry.name: entry for entry in connected.list_mailboxes()}
        assert connected.personal_prefix == b""
    assert {
        b"INBOX", b"a b", b"Z&APw-rich", b"R&-D", b'quo"ted', b"back\\slash", b"100%", b"x/y/z",
    } <= set(entries)  # fmt: skip
    assert {entry.delimiter for entry in entries.values()} == {b"/"}
    assert {entry.special_use for entry in entries.values()} == {
        "",
        "\\Drafts",
        "\\Sent",
        "\\Trash",
        "\\Junk",
    }
    assert [entries[name].selectable for name in (b"x", b"x/y", b"x/y/z")] == [False, False, True]


def test_prefix_of_the_personal_namespace(ca: CertificateAuthority) -> None:
    with Dovecot(ca, separator=".", prefix="INBOX.") as server:
        user = server.account("alice")
        user.deliver("x/y", [(plain(1), DATE, "")])
        with session(user) as connected:
            assert connected.personal_prefix == b"INBOX."
            assert {b"INBOX", b"INBOX.x.y"} <= {entry.name for entry in connected.list_mailboxes()}
            assert connected.examine(b"INBOX.x.y").exists == 1


def test_state_of_a_mailbox(user: Account) -> None:
    user.deliver("a b", ((plain(n), DATE, "S" * (n % 2)) for n in range(5)))
    with session(user) as connected:
        state = connected.examine(b"a b")
        assert (state.exists, state.uidnext) == (5, 6)
        assert state.uidvalidity > 0
        assert state.highestmodseq > 0
        assert connected.status(b"a b") == {
            "MESSAGES": 5,
            "UIDNEXT": 6,
            "UIDVALIDITY": state.uidvalidity,
            "UNSEEN": 3,
        }
        assert connected.selected == b"a b"


@pytest.mark.parametrize(
    "name", [b"nothing", b'no"thing', b"no\\thing", b"\xff\xfe", b"a\r\nb", b"../../etc", b""]
)
def test_mailbox_that_is_not_there_is_gone_and_the_connection_lives(user: Account, name: bytes) -> None:
    with session(user) as connected:
        for ask in (connected.examine, connected.status):
            with pytest.raises(MailboxGone):
                ask(name)
        assert connected.alive
        assert connected.examine(INBOX).exists == 0


def test_quota(ca: CertificateAuthority) -> None:
    with Dovecot(ca, quota="10M") as server:
        user = server.account("alice")
        user.deliver("INBOX", [(plain(1, 100_000), DATE, "")])
        with session(user) as connected:
            quota = connected.quota(INBOX)
    assert quota is not None
    assert quota.limit == 10 * 2**20
    assert 90_000 < quota.used < 200_000


def test_quota_where_there_is_none(user: Account) -> None:
    with session(user) as connected:
        assert connected.quota(INBOX) is None


# -- metadata


def test_listing_has_the_metadata_of_every_message(user: Account) -> None:
    messages = list(wild().values())
    user.deliver("INBOX", ((content, DATE + n, "FS"[: n % 3]) for n, content in enumerate(messages)))
    with session(user) as connected:
        found = listing(connected)
    there = served(user)
    assert [data.uid for data in found] == list(there)
    assert {data.uid: data.size for data in found} == {uid: len(content) for uid, content in there.items()}
    assert {data.uid: set((data.flags or "").split()) for data in found} == {
        uid: words - {"\\Recent"} for uid, words in flags(user).items()
    }
    assert all(data.date and data.modseq and data.body is not None for data in found)
    assert found[0].date == b"14-Nov-2023 22:13:20 +0000"


def test_listing_of_an_empty_mailbox_is_empty(user: Account) -> None:
    with session(user) as connected:
        assert listing(connected) == []
        assert connected.list_flags(INBOX, lambda _: pytest.fail("a message")).exists == 0


def test_listing_leaves_seen_and_recent_alone(user: Account) -> None:
    user.deliver("INBOX", ((plain(n), DATE, "") for n in range(3)))
    with session(user) as connected:
        assert len(listing(connected)) == 3
        assert len(fetch(connected, INBOX, [1, 2, 3]).found) == 3
    assert flags(user) == {uid: {"\\Recent"} for uid in (1, 2, 3)}


def test_changes_are_flags_expunges_and_new_messages(user: Account) -> None:
    user.deliver("INBOX", ((plain(n), DATE, "") for n in range(5)))
    with session(user) as connected:
        state = connected.examine(INBOX)
        with user.client() as client:
            client.select()
            client.uid("STORE", "2", "+FLAGS", "(\\Flagged)")
            client.uid("STORE", "3:4", "+FLAGS", "(\\Deleted)")
            client.expunge()
        user.append("INBOX", plain(6), DATE)
        found: list[FetchData] = []
        now = connected.list_changes(INBOX, state.uidvalidity, state.highestmodseq, 5, found.append)
        assert [uid for low, high in now.vanished for uid in range(low, high + 1)] == [3, 4]
        assert {data.uid: data.flags for data in found if data.date is None}[Uid(2)] == "\\Flagged"
        assert {data.uid for data in found if data.date is not None} == {5, 6}
        assert (now.exists, now.uidnext) == (4, 7)
        assert now.highestmodseq > state.highestmodseq
        changed: list[FetchData] = []
        connected.fetch_changed_flags(state.highestmodseq, changed.append)
        assert {data.uid for data in changed} == {2, 6}
        connected.fetch_changed_flags(now.highestmodseq, lambda _: pytest.fail("nothing changed"))


def test_metadata_of_messages_that_are_gone_is_silence(user: Account) -> None:
    user.deliver("INBOX", ((plain(n), DATE, "") for n in range(3)))
    with session(user) as connected:
        connected.examine(INBOX)
        found: list[FetchData] = []
        connected.fetch_metadata([2, 7, 1_000_000], found.append)
        assert [data.uid for data in found] == [2]
        connected.fetch_metadata_from(2, found.append)
        assert [data.uid for data in found] == [2, 2, 3]


def test_many_scattered_uids_are_asked_for_in_pieces(user: Account) -> None:
    user.deliver("INBOX", ((plain(n, 600), DATE, "") for n in range(2000)))
    user.start_trace()
    with session(user) as connected:
        connected.examine(INBOX)
        found: list[FetchData] = []
        connected.fetch_metadata([*range(1, 2001, 2), *range(10_000, 60_000, 3)], found.append)
    assert [data.uid for data in found] == list(range(1, 2001, 2))
    assert max(map(len, user.protocol_trace())) < 8000


def test_change_by_another_client_is_told_by_uid(user: Account) -> None:
    user.deliver("INBOX", ((plain(n), DATE, "") for n in range(3)))
    with session(user) as connected:
        connected.examine(INBOX)
        with user.client() as client:
            client.select()
            client.uid("STORE", "1", "+FLAGS", "(\\Deleted)")
            client.expunge()
            client.uid("STORE", "3", "+FLAGS", "(\\Flagged)")
        found: list[FetchData] = []
        # The unsolicited "* 2 FETCH" of UID 3 comes along with this answer.
        connected.fetch_metadata([2], found.append)
        assert {data.uid: data.flags for data in found}.get(Uid(3), "\\Flagged") == "\\Flagged"
        assert [data.flags for data in found if data.uid == 2] == [""]


# -- bodies


def test_bodies_are_streamed_byte_for_byte(user: Account) -> None:
    messages = list(wild().values())
    user.deliver("INBOX", ((content, DATE, "") for content in messages))
    there = served(user)
    with session(user) as connected:
        bodies = fetch(connected, INBOX, list(there))
    assert bodies.found == there
    assert {uid for uid, _ in bodies.announced if uid is not None} <= set(there)
    assert sorted(size for _, size in bodies.announced) == sorted(map(len, there.values()))


def test_body_of_a_message_that_never_was_is_silence(user: Account) -> None:
    user.deliver("INBOX", [(plain(1), DATE, "")])
    with session(user) as connected:
        assert fetch(connected, INBOX, [7]).found == {}
        assert fetch(connected, INBOX, [1, 7]).found == {1: plain(1)}


def test_bodies_of_another_uidvalidity_are_not_given_out(user: Account) -> None:
    user.deliver("INBOX", [(plain(1), DATE, "")])
    with session(user) as connected:
        state = connected.examine(INBOX)
        bodies = Bodies()
        with pytest.raises(MailboxGone):
            connected.fetch_bodies(INBOX, UidValidity(state.uidvalidity + 1), [1], bodies.open, bodies.close)
        assert bodies.found == {}


def test_fetch_from_a_mailbox_deleted_by_another_client(user: Account) -> None:
    user.deliver("x", [(plain(1), DATE, "")])
    with session(user) as connected:
        state = connected.examine(b"x")
        with user.client() as client:
            assert client.delete("x")[0] == "OK"
        bodies = Bodies()
        with pytest.raises((MailboxGone, ConnectionLost)):
            connected.examine(b"x")
            connected.fetch_bodies(b"x", state.uidvalidity, [1], bodies.open, bodies.close)
        assert bodies.found == {}


# -- how connections end


def test_wrong_password_is_an_authentication_failure(user: Account) -> None:
    user.password = "wrong"
    with (
        pytest.raises(AuthenticationFailed, match=f"localhost refused the password of {user.name}"),
        session(user),
    ):
        pass


@pytest.mark.parametrize("password", ["pä ss", '"\\', "p" * 500, ""])
def test_any_password_logs_in(ca: CertificateAuthority, password: str) -> None:
    with Dovecot(ca, password=password) as server, session(server.account("alice")) as connected:
        assert connected.alive


@pytest.mark.parametrize(
    ("names", "expired", "reason"),
    [(["localhost"], True, "expired"), (["x.example.org"], False, "localhost")],
)
def test_certificate_that_is_not_good(
    ca: CertificateAuthority, names: list[str], expired: bool, reason: str
) -> None:
    server = Dovecot(ca, certificate=ca.issue(names, expired=expired))
    with server, pytest.raises(TlsError, match=reason), session(server.account("alice")):
        pass


def test_abort_wakes_the_thread_that_waits(ca: CertificateAuthority) -> None:
    def script(tag: bytes, command: bytes) -> Iterator[bytes] | None:
        return server.hang() if command.startswith(b"EXAMINE") else None

    with Scripted(ca, script=script) as server, session(server) as connected:
        caught: list[BaseException] = []

        def wait() -> None:
            try:
                connected.examine(INBOX)
            except ConnectionLost as error:
                caught.append(error)

        thread = threading.Thread(target=wait)
        thread.start()
        wait_until(lambda: any(c.startswith(b"EXAMINE") for c in server.commands), "it has asked")
        connected.abort()
        thread.join(DEADLINE)
        assert len(caught) == 1
        assert not connected.alive


def test_command_that_is_not_answered_times_out(ca: CertificateAuthority) -> None:
    def script(tag: bytes, command: bytes) -> Iterator[bytes] | None:
        return server.hang() if command.startswith(b"EXAMINE") else None

    with Scripted(ca, script=script) as server, session(server, timeout=0.3) as connected:
        with pytest.raises(TimedOut, match=r"localhost did not answer within 0\.3 s"):
            connected.examine(INBOX)
        assert not connected.alive


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (b"* BYE too many errors\r\n", ConnectionLost),
        (b"", ConnectionLost),
        (b"garbage\r\n", ProtocolError),
        (b"* LIST () NIL {2000000000}\r\nabc", ProtocolError),
        (b"* 1 FETCH (UID 1 BODY[] {99999999999999999999}\r\nabc", ProtocolError),
        (b"\0", ConnectionLost),
    ],
)
def test_answer_that_breaks_the_connection(
    ca: CertificateAuthority, answer: bytes, error: type[ConnectionLost]
) -> None:
    def script(tag: bytes, command: bytes) -> Iterable[bytes] | None:
        if not command.startswith(b"EXAMINE"):
            return None
        server.script = lambda tag, command: server.hang()
        return [answer] if error is ProtocolError else server.then_hang_up(answer)

    with Scripted(ca, script=script) as server, session(server) as connected:
        with pytest.raises(error):
            connected.examine(INBOX)
        assert not connected.alive


def test_response_for_a_message_without_uid_is_not_taken(ca: CertificateAuthority) -> None:
    def script(tag: bytes, command: bytes) -> list[bytes] | None:
        if not command.startswith(b"UID FETCH"):
            return None
        return [b"* 1 FETCH (FLAGS (\\Deleted))\r\n", *server.answer(tag, command)]

    with Scripted(ca, [plain(1)], script=script) as server, session(server) as connected:
        assert [(data.uid, data.flags) for data in listing(connected)] == [(1, "")]


# -- the pool


@pytest.mark.trio
async def test_pool_keeps_to_its_limit(user: Account) -> None:
    user.deliver("INBOX", [(plain(1), DATE, "")])
    working = 0
    most = 0
    lock = threading.Lock()

    def work(connected: Session) -> int:
        nonlocal working, most
        with lock:
            working += 1
            most = max(most, working)
        exists = connected.examine(INBOX).exists
        with lock:
            working -= 1
        return exists

    async with pool(user, 3) as made:
        results: list[int] = []

        async def one() -> None:
            results.append(await made.run(work))

        with trio.fail_after(DEADLINE):
            async with trio.open_nursery() as nursery:
                for _ in range(20):
                    nursery.start_soon(one)
        assert results == [1] * 20
        assert most <= 3
        assert made.open <= 3


@pytest.mark.trio
async def test_pool_prefers_the_session_that_has_the_mailbox(user: Account) -> None:
    user.deliver("x", [(plain(1), DATE, "")])
    async with pool(user, 4) as made:
        await made.run(lambda connected: connected.examine(b"x"), b"x")
        assert await made.run(lambda connected: connected.selected, b"x") == b"x"
        assert made.open == 1


@pytest.mark.trio
async def test_pool_repeats_what_a_dead_connection_did_not_do(user: Account) -> None:
    async with pool(user) as made:
        assert (await made.run(_examine)).exists == 0
        user.deliver("INBOX", [(plain(1), DATE, "")])
        await trio.to_thread.run_sync(user.server.doveadm, "kick", user.name)
        assert (await made.run(_examine)).exists == 1
        assert made.reason is None


@pytest.mark.trio
async def test_pool_lives_with_fewer_connections_than_it_may_have(ca: CertificateAuthority) -> None:
    with Dovecot(ca, max_userip_connections=1) as server:
        async with pool(server.account("alice"), 4) as made:
            await made.run(_examine)
            results: list[int] = []

            async def one() -> None:
                results.append((await made.run(_examine)).exists)

            with trio.fail_after(DEADLINE):
                async with trio.open_nursery() as nursery:
                    for _ in range(12):
                        nursery.start_soon(one)
            assert results == [0] * 12
            assert made.reason is None


@pytest.mark.trio
async def test_pool_says_why_it_is_offline_and_comes_back(
    ca: CertificateAuthority, expected_log: Callable[[str], None]
) -> None:
    expected_log("offline: .* closed the connection|offline: .*not greet")
    greeting = b"* BYE busy"
    with Scripted(ca, greeting=greeting) as server:
        async with pool(server) as made:
            with pytest.raises(ConnectionLost, match="busy"):
                await made.run(_examine)
            assert made.reason is not None
            assert "busy" in made.reason
            with pytest.raises(ConnectionLost, match=r"offline: .*busy"):
                await made.run(_examine)
            server.greeting = b"* OK [CAPABILITY IMAP4rev1 AUTH=PLAIN] ready"
            with trio.fail_after(DEADLINE):
                while True:
                    try:
                        assert (await made.run(_examine)).exists == 0
                        break
                    except ConnectionLost:
                        await trio.sleep(0.01)
            assert made.reason is None


@pytest.mark.trio
async def test_pool_tries_a_wrong_password_once(user: Account, expected_log: Callable[[str], None]) -> None:
    expected_log("offline: .*refused the password")
    user.password = "wrong"
    async with pool(user) as made:
        for _ in range(3):
            with pytest.raises(AuthenticationFailed):
                await made.run(_examine)
    attempts = [line for line in user.server.log_lines() if user.name in line and "auth failed" in line]
    assert len(attempts) <= 1


@pytest.mark.trio
async def test_pool_ends_what_is_under_way_when_it_is_closed(ca: CertificateAuthority) -> None:
    def script(tag: bytes, command: bytes) -> Iterator[bytes] | None:
        return server.hang() if command.startswith(b"EXAMINE") else None

    with Scripted(ca, script=script) as server:
        async with pool(server) as made, trio.open_nursery() as nursery:

            async def one() -> None:
                with pytest.raises(ConnectionLost):
                    await made.run(_examine)

            nursery.start_soon(one)
            with trio.fail_after(DEADLINE):
                await until(lambda: any(command.startswith(b"EXAMINE") for command in server.commands))
                await made.close()


def _examine(connected: Session) -> MailboxState:
    return connected.examine(INBOX)


def test_capabilities_can_be_hidden(user: Account, monkeypatch: pytest.MonkeyPatch) -> None:
    with session(user) as connected:
        assert connected.has("QRESYNC")
    hide(monkeypatch, "QRESYNC")
    user.start_trace()
    with session(user) as connected:
        assert connected.has("CONDSTORE")
        assert not connected.has("QRESYNC")
        assert connected.examine(INBOX).highestmodseq > ModSeq(0)
    assert any(b"ENABLE CONDSTORE" in line for line in user.protocol_trace())
