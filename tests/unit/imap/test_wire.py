"""What imapfs makes of servers that are busy, broken or odd: one connection, below the pool."""

import base64
import errno
import re
import socket
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from imapfs.errors import (
    AuthenticationFailed,
    CacheError,
    ConnectionLost,
    ImapfsError,
    MailboxGone,
    MessageGone,
    OtherMailbox,
    OtherMessage,
    ProtocolError,
    TimedOut,
)
from imapfs.imap import budget
from imapfs.imap.grammar import FetchData, number, parse_fetch, parse_sequence_set
from imapfs.model import MessageRef, ModSeq, Uid, UidValidity
from imapfs.store.cache import Cache
from imapfs.store.rows import Directory, NewMessage
from imapfs.sync.identify import select_known
from tests.support.accounts import session
from tests.support.mail import plain
from tests.support.servers.scripted import Scripted
from tests.support.servers.tls import CertificateAuthority

INBOX = b"INBOX"
PASSWORD = 'opensesame\\"1'
Answers = dict[bytes, bytes | Callable[[], bytes]]


def answering(answers: Answers) -> Callable[[bytes, bytes], Iterable[bytes] | None]:
    """Answer commands by how they begin; ``TAG`` stands for the command's tag, ``ECHO`` for the command."""

    def script(tag: bytes, command: bytes) -> Iterable[bytes] | None:
        for verb, answer in answers.items():
            if command.upper().startswith(verb):
                text = answer() if callable(answer) else answer
                return [text.replace(b"TAG", tag).replace(b"ECHO", command)]
        return None

    return script


def login_error(server: Scripted) -> ImapfsError:
    server.password = PASSWORD
    with server, pytest.raises(ImapfsError) as caught, session(server):
        pass
    return caught.value


# -- logging in


@pytest.mark.parametrize(
    "answer",
    [
        b"TAG BAD internal error\r\n",
        b"TAG NO [UNAVAILABLE] try later\r\n",
        b"TAG NO [LIMIT] too many connections\r\n",
        b"* BYE restarting\r\n",
        b"* CAPABILITY\r\ngarbage\r\n",
    ],
)
def test_login_that_was_not_judged_is_no_wrong_password(ca: CertificateAuthority, answer: bytes) -> None:
    server = Scripted(ca)

    def script(tag: bytes, command: bytes) -> Iterable[bytes] | None:
        if not command.startswith(b"AUTHENTICATE"):
            return None
        return server.then_hang_up(answer.replace(b"TAG", tag))

    server.script = script
    assert isinstance(login_error(server), ConnectionLost)


def test_refused_password_is_one(ca: CertificateAuthority) -> None:
    script = answering({b"AUTHENTICATE": b"TAG NO [AUTHENTICATIONFAILED] wrong\r\n"})
    error = login_error(Scripted(ca, script=script))
    assert isinstance(error, AuthenticationFailed)
    assert error.problem == "localhost refused the password of alice: [AUTHENTICATIONFAILED] wrong"
    assert str(error).startswith(f"{error.problem}: check the password")


@pytest.mark.parametrize("status", [b"NO", b"BAD"])
@pytest.mark.parametrize("mechanism", [b"LOGIN", b"AUTHENTICATE"])
def test_password_that_the_server_repeats_is_not_shown(
    ca: CertificateAuthority, mechanism: bytes, status: bytes
) -> None:
    echo = answering({b"LOGIN": b"TAG " + status + b" cannot parse ECHO\r\n"})
    if mechanism == b"AUTHENTICATE":
        sent = base64.b64encode(b"\0alice\0" + PASSWORD.encode())
        echo = answering({b"AUTHENTICATE": b"TAG " + status + b" cannot parse " + sent + b"\r\n"})
    greeting = b"* OK [CAPABILITY IMAP4rev1] ready"
    server = Scripted(ca, script=echo)
    if mechanism == b"LOGIN":
        server = Scripted(ca, script=_no_plain(echo), greeting=greeting)
    message = str(login_error(server))
    assert "opensesame" not in message
    assert "cannot parse" not in message
    assert "not shown" in message


def _no_plain(
    script: Callable[[bytes, bytes], Iterable[bytes] | None],
) -> Callable[[bytes, bytes], Iterable[bytes] | None]:
    def without(tag: bytes, command: bytes) -> Iterable[bytes] | None:
        if command.startswith(b"CAPABILITY"):
            return [b"* CAPABILITY IMAP4rev1\r\n" + tag + b" OK done\r\n"]
        return script(tag, command)

    return without


def test_login_without_sasl_quotes_what_must_be_quoted(ca: CertificateAuthority) -> None:
    script = _no_plain(lambda tag, command: None)
    with Scripted(ca, script=script, greeting=b"* OK [CAPABILITY IMAP4rev1] ready") as server:
        server.name, server.password = "john doe", PASSWORD
        with session(server):
            pass
    assert b'LOGIN "john doe" "opensesame\\\\\\"1"' in server.commands


def test_handshake_that_is_cut_off_says_nothing_of_the_certificate(ca: CertificateAuthority) -> None:
    def hang_up(connection: socket.socket, number: int) -> None:
        connection.recv(9999)
        connection.close()

    assert type(login_error(Scripted(ca, before_tls=hang_up))) is ConnectionLost


def test_extension_that_cannot_be_enabled_is_done_without(ca: CertificateAuthority) -> None:
    script = answering({b"ENABLE": b"TAG NO not now\r\n"})
    with (
        Scripted(ca, script=script, capabilities=b"IMAP4rev1 ENABLE CONDSTORE QRESYNC") as server,
        session(server) as connected,
    ):
        assert not connected.has("QRESYNC")
        assert not connected.has("CONDSTORE")
        assert connected.examine(INBOX).exists == 0


# -- opening a mailbox


@pytest.mark.parametrize(
    ("untagged", "exists"),
    [
        (b"* OK [UIDVALIDITY 7] see template {5}\r\n* 3 EXISTS\r\n* OK [UIDNEXT 9] x\r\n", 3),
        (b"* OK [UIDVALIDITY 7] Folder EXISTS\r\n* 3 EXISTS \r\n* OK [UIDNEXT 9] x\r\n", 3),
        (b"* 0 EXISTS\r\n* OK [UIDVALIDITY 7] valid\r\n", 0),
    ],
)
def test_number_of_messages_is_read(ca: CertificateAuthority, untagged: bytes, exists: int) -> None:
    with (
        Scripted(ca, script=answering({b"EXAMINE": untagged + b"TAG OK done\r\n"})) as server,
        session(server) as connected,
    ):
        assert connected.examine(INBOX).exists == exists


@pytest.mark.parametrize("untagged", [b"", b"* OK [UIDVALIDITY 7] x EXISTS\r\n", b"* many EXISTS\r\n"])
@pytest.mark.parametrize("verb", [b"EXAMINE", b"SELECT"])
def test_mailbox_without_number_of_messages_is_never_taken_for_empty(
    ca: CertificateAuthority, verb: bytes, untagged: bytes
) -> None:
    with (
        Scripted(ca, script=answering({verb: untagged + b"TAG OK done\r\n"})) as server,
        session(server) as connected,
    ):
        with pytest.raises(ProtocolError):
            connected.examine(INBOX) if verb == b"EXAMINE" else connected.select(INBOX, UidValidity(7))
        assert not connected.alive


def test_data_of_the_mailbox_before_is_not_taken_for_the_new_one(ca: CertificateAuthority) -> None:
    old = b"* 9 EXISTS\r\n* 9 FETCH (UID 7 FLAGS (\\Deleted))\r\n* VANISHED (EARLIER) 1:3\r\n"
    new = b"* 2 EXISTS\r\n* OK [UIDVALIDITY 8] valid\r\n* OK [HIGHESTMODSEQ 60] x\r\n"
    later = b"* VANISHED (EARLIER) 5\r\n* 1 FETCH (UID 1 FLAGS (\\Seen))\r\nTAG OK done\r\n"
    for border in (b"* OK [CLOSED] done\r\n", b""):
        script = answering({b'EXAMINE "NEW"': old + border + new + later, b"UID FETCH": b"TAG OK done\r\n"})
        with (
            Scripted(ca, script=script, capabilities=b"IMAP4rev1 ENABLE QRESYNC CONDSTORE") as server,
            session(server) as connected,
        ):
            connected.examine(INBOX)
            found: list[FetchData] = []
            state = connected.list_changes(b"new", UidValidity(8), ModSeq(5), 1, found.append)
        assert [(data.uid, data.flags) for data in found] == [(1, "\\Seen")]
        assert (state.exists, state.vanished) == (2, [(5, 5)])


def test_modseq_is_not_asked_of_a_mailbox_that_has_none(ca: CertificateAuthority) -> None:
    opened = b"* 1 EXISTS\r\n* OK [UIDVALIDITY 7] x\r\n* OK [NOMODSEQ] x\r\nTAG OK done\r\n"
    script = answering({b"EXAMINE": opened})
    capabilities = b"IMAP4rev1 ENABLE CONDSTORE"
    with (
        Scripted(ca, [plain(1)], script=script, capabilities=capabilities) as server,
        session(server) as connected,
    ):
        found: list[FetchData] = []
        connected.list_all(INBOX, found.append, lambda _: None)
        assert [data.uid for data in found] == [1]
        assert not [command for command in server.commands if b"MODSEQ" in command]


def test_mailbox_made_anew_under_a_kept_selection_is_opened_again(ca: CertificateAuthority) -> None:
    valid = 7

    def opened() -> bytes:
        return b"* 1 EXISTS\r\n* OK [UIDVALIDITY %d] x\r\nTAG OK done\r\n" % valid

    with (
        Scripted(ca, [plain(1)], script=answering({b"EXAMINE": opened, b"SELECT": opened})) as server,
        session(server) as connected,
    ):
        connected.examine(INBOX)
        valid = 8
        assert connected.fetch_body(INBOX, 8, 1) == plain(1)
        connected.select(INBOX, UidValidity(8))
        valid = 9
        connected.select(INBOX, UidValidity(9))
        with pytest.raises(MailboxGone):
            connected.fetch_body(INBOX, 8, 1)


# -- fetching


def test_changes_of_flags_are_not_taken_for_metadata(ca: CertificateAuthority) -> None:
    server = Scripted(ca, [plain(1), plain(2)])

    def script(tag: bytes, command: bytes) -> Iterable[bytes] | None:
        if not command.startswith(b"UID FETCH"):
            return None
        extra = b"* 1 FETCH (UID 1 FLAGS (\\Seen))\r\n* 2 FETCH (UID 2 MODSEQ (12))\r\n"
        return [extra, *server.answer(tag, command)]

    server.script = script
    with server, session(server) as connected:
        found: list[FetchData] = []
        flags: list[FetchData] = []
        connected.list_all(INBOX, found.append, lambda _: None, flags.append)
        connected.fetch_metadata([2], found.append)
    assert [data.uid for data in found] == [1, 2, 2]
    assert [(data.uid, data.flags) for data in flags] == [(1, "\\Seen")]


def test_answer_that_never_ends_does(ca: CertificateAuthority) -> None:
    server = Scripted(ca, [plain(1)])

    def script(tag: bytes, command: bytes) -> Iterable[bytes] | None:
        if not command.startswith(b"UID FETCH"):
            return None
        return iter(lambda: b"* 1 FETCH (UID 1 FLAGS ())\r\n" * 100, b"")

    server.script = script
    with server, session(server, timeout=0.5) as connected:
        connected.examine(INBOX)
        with pytest.raises(TimedOut):
            connected.fetch_metadata([1], lambda _: None)


@pytest.mark.parametrize("verb", [b"UID FETCH", b"NOOP"])
@pytest.mark.parametrize(
    "line",
    [
        b"* 1 EXISTS\r\n",
        b"* 9 EXISTS\r\n* 1 FETCH (UID 1 FLAGS ())\r\n",
        b"* 1 FETCH (UID 1 BODY[HEADER] {3}\r\nabc)\r\n",
        b"\r\n",
    ],
)
def test_no_command_is_kept_alive_for_ever(ca: CertificateAuthority, verb: bytes, line: bytes) -> None:
    server = Scripted(ca, [plain(1)])

    def script(tag: bytes, command: bytes) -> Iterable[bytes] | None:
        return iter(lambda: line * 100, b"") if command.startswith(verb) else None

    server.script = script
    with server, session(server, timeout=0.5) as connected:
        connected.examine(INBOX)
        with pytest.raises(TimedOut):
            connected.noop() if verb == b"NOOP" else connected.fetch_metadata([1], lambda _: None)


def test_what_is_kept_of_the_answer_to_one_command_is_bounded(
    ca: CertificateAuthority, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budget, "MAX_HELD", 1 << 20)
    server = Scripted(ca, [plain(1)])

    def script(tag: bytes, command: bytes) -> Iterable[bytes] | None:
        if command.startswith(b"LIST"):
            return iter(lambda: b'* LIST () "/" x\r\n' * 100, b"")
        if command.startswith(b"UID FETCH"):
            return [b"* 1 FETCH (UID 1 FLAGS ())\r\n" * 10_000, tag + b" OK done\r\n"]
        return None

    server.script = script
    with server:
        with session(server) as connected, pytest.raises(ProtocolError, match="more than 1 MiB in answer"):
            connected.list_mailboxes()
        with session(server) as connected:
            # It passes through: a listing may be of any size.
            assert connected.list_flags(INBOX, lambda _: None).exists == 1
            with pytest.raises(ProtocolError, match="more than 1 MiB in answer"):
                connected.fetch_metadata([1], lambda _: None)


@pytest.mark.parametrize("where", ["inside", "twice", "between"])
def test_blank_line_after_a_literal_is_passed_over(ca: CertificateAuthority, where: str) -> None:
    server = Scripted(ca, [plain(1), plain(2)])

    def script(tag: bytes, command: bytes) -> Iterable[bytes] | None:
        if command.startswith(b"LIST"):
            return [b'* LIST () "/" {5}\r\nINBOX\r\n\r\n' + tag + b" OK done\r\n"]
        if not command.startswith(b"UID FETCH"):
            return None
        answer = b"".join(server.answer(tag, command))
        blank = {"inside": (b"\r\n)\r\n", b"\r\n\r\n)\r\n"), "twice": (b"\r\n)\r\n", b"\r\n\r\n\n)\r\n")}
        return [answer.replace(*blank.get(where, (b"\r\n)\r\n", b"\r\n)\r\n\r\n")))]

    server.script = script
    with server, session(server) as connected:
        assert [entry.name for entry in connected.list_mailboxes()] == [INBOX]
        found: list[FetchData] = []
        connected.list_all(INBOX, found.append, lambda _: None)
        assert [data.uid for data in found] == [1, 2]
        assert connected.fetch_body(INBOX, 7, 2) == plain(2)


def test_response_that_is_cut_off_after_a_literal_costs_no_other(ca: CertificateAuthority) -> None:
    cut = b"* 1 FETCH (UID 1 FLAGS () RFC822.SIZE 5 BODY[HEADER] {3}\r\nabc\r\n"
    whole = b"* 2 FETCH (UID 2 FLAGS () RFC822.SIZE 5)\r\nTAG OK done\r\n"
    script = answering({b"UID FETCH": cut + whole})
    with Scripted(ca, [plain(1)], script=script) as server, session(server) as connected:
        found: list[FetchData] = []
        connected.list_all(INBOX, found.append, lambda _: None)
        assert [data.uid for data in found] == [1, 2]


@pytest.mark.parametrize(
    "line",
    [
        b"* STATUS INBOX (MESSAGES\r\n",
        b"* STATUS\r\n",
        b"* STATUS (INBOX) (MESSAGES 1)\r\n",
        b'* STATUS "INBOX (MESSAGES 1)\r\n',
        b"* STATUS x (MESSAGES 99999999999999999999)\r\n",
        b"* QUOTA (\r\n",
        b"* 1 FETCH (UID\r\n",
        b"* VANISHED (EARLIER) 1:*\r\n",
        b"* OK [UIDNEXT 99999999999999999999999999] x\r\n",
    ],
)
def test_malformed_line_costs_what_it_is_about(ca: CertificateAuthority, line: bytes) -> None:
    """At stake: one malformed STATUS line ended polling and relisting for ever."""
    server = Scripted(ca, [plain(1)], capabilities=b"IMAP4rev1 AUTH=PLAIN QUOTA")

    def script(tag: bytes, command: bytes) -> Iterable[bytes] | None:
        if command.startswith(b"GETQUOTAROOT"):
            return [line, b'* QUOTA "" (STORAGE 1 5)\r\n', tag + b" OK done\r\n"]
        return (
            [line, *server.answer(tag, command)] if command.startswith((b"STATUS", b"LIST", b"EX")) else None
        )

    server.script = script
    with server, session(server) as connected:
        found: dict[bytes, dict[str, int]] = {}
        assert len(connected.list_with_status([INBOX], found.__setitem__)) == 1
        assert found[INBOX]["MESSAGES"] == 1
        assert connected.status(INBOX)["MESSAGES"] == 1
        assert connected.examine(INBOX).exists == 1
        quota = connected.quota(INBOX)
        assert quota is not None
        assert quota.used == 1024
        assert connected.alive


def test_message_whose_size_is_missing_is_listed(ca: CertificateAuthority) -> None:
    server = Scripted(ca, [plain(1), plain(2), plain(3)])

    def script(tag: bytes, command: bytes) -> Iterable[bytes] | None:
        if not command.startswith(b"UID FETCH"):
            return None
        size = b" RFC822.SIZE %d" % len(plain(2))
        one, two, three, *rest = server.answer(tag, command)
        return [one, two.replace(size, b""), re.sub(rb"RFC822.SIZE \d+", b"RFC822.SIZE NIL", three), *rest]

    server.script = script
    with server, session(server) as connected:
        found: list[FetchData] = []
        connected.list_all(INBOX, found.append, lambda _: None, lambda _: pytest.fail("flags"))
        assert [(data.uid, data.size) for data in found] == [(1, len(plain(1))), (2, None), (3, None)]


def test_modseq_is_not_asked_of_a_server_that_does_not_announce_it(ca: CertificateAuthority) -> None:
    """Yahoo: HIGHESTMODSEQ without CONDSTORE, and BAD to a FETCH of MODSEQ."""
    server = Scripted(ca, [plain(1)])

    def script(tag: bytes, command: bytes) -> Iterable[bytes] | None:
        if command.startswith(b"EXAMINE"):
            return [b"* OK [HIGHESTMODSEQ 60] x\r\n", *server.answer(tag, command)]
        return [tag + b" BAD unknown item\r\n"] if b"MODSEQ" in command else None

    server.script = script
    with server, session(server) as connected:
        found: list[FetchData] = []
        connected.list_all(INBOX, found.append, lambda _: None)
        assert [data.uid for data in found] == [1]
        assert connected.state.highestmodseq == 0
        assert connected.sample(INBOX, 5) == {1: len(plain(1))}


def test_full_disk_is_not_taken_for_a_lost_connection(ca: CertificateAuthority) -> None:
    def full(uid: int | None, size: int) -> None:
        raise CacheError.from_os_error(OSError(errno.ENOSPC, "full"), "cannot write")

    def broken(uid: int | None, size: int) -> None:
        raise OSError(errno.EMFILE, "too many open files")

    with Scripted(ca, [plain(1)]) as server:
        for sink, error in ((full, CacheError), (broken, OSError)):
            with session(server) as connected:
                with pytest.raises(error):
                    connected.fetch_bodies(INBOX, UidValidity(7), [1], sink, lambda *_: None)  # type: ignore[arg-type]
                assert not connected.alive


@pytest.mark.parametrize(
    "quota", [b"(STORAGE many 5)", b"(STORAGE 1 99999999999999999999)", b"(STORAGE NIL 1)"]
)
def test_odd_quota_is_none(ca: CertificateAuthority, quota: bytes) -> None:
    script = answering({b"GETQUOTAROOT": b'* QUOTA "" ' + quota + b"\r\nTAG OK done\r\n"})
    with Scripted(ca, script=script, capabilities=b"IMAP4rev1 QUOTA") as server, session(server) as connected:
        assert connected.quota(INBOX) is None
        assert connected.alive


@pytest.mark.parametrize("digits", [b"9" * 5000, b"9223372036854775808", b"", b"-1", "²".encode()])
def test_number_that_is_none_is_refused(digits: bytes) -> None:
    with pytest.raises(ProtocolError):
        number(digits)
    with pytest.raises(ProtocolError):
        parse_sequence_set(b"1:" + digits + b",2" if digits else b"x")
    if digits.isdigit():
        data = parse_fetch([b"* 1 FETCH (UID " + digits + b" FLAGS (a))\r\n"])
        assert data == FetchData(flags="a")
    assert number(b"9223372036854775807") == 2**63 - 1


@pytest.mark.parametrize(
    ("code", "uid"),
    [
        (b"COPYUID 7 5 9", 9),
        (b"COPYUID 7 3,5:6 11:13", 12),
        (b"COPYUID 7 1:4,5 20,30:33", 33),
        (b"COPYUID 7 1:9223372036854775807 1:9223372036854775807", 5),
        (b"COPYUID 7 6 9", None),
        (b"COPYUID 7 1:5 9", None),
        (b"COPYUID 7 5", None),
    ],
)
def test_uid_of_a_copy_is_found(ca: CertificateAuthority, code: bytes, uid: int | None) -> None:
    script = answering({b"UID COPY": b"TAG OK [" + code + b"] done\r\n"})
    with Scripted(ca, [plain(1)], script=script) as server, session(server) as connected:
        connected.select(INBOX, UidValidity(7))
        copy = None if uid is None else MessageRef(b"x", UidValidity(7), Uid(uid))
        assert connected.copy(5, b"x") == copy


@pytest.mark.parametrize(
    ("capabilities", "message", "mailbox"),
    [
        (b"IMAP4rev1 SASL-IR AUTH=PLAIN OBJECTID X-GM-EXT-1", "M1", "F7"),
        (b"IMAP4rev1 SASL-IR AUTH=PLAIN X-GM-EXT-1", "1278455344230334865", None),
        (b"IMAP4rev1 SASL-IR AUTH=PLAIN", None, None),
    ],
)
def test_the_identities_that_a_server_gives_are_asked_for(
    ca: CertificateAuthority, capabilities: bytes, message: str | None, mailbox: str | None
) -> None:
    """EMAILID, MAILBOXID and X-GM-MSGID: without them what moved elsewhere is fetched again."""
    found: list[FetchData] = []
    with Scripted(ca, [plain(1)], capabilities=capabilities) as server, session(server) as connected:
        connected.list_all(INBOX, found.append, lambda _: None)
        assert [data.object_id for data in found] == [message]
        assert connected.state.object_id == mailbox
        assert found[0].body is not None


@pytest.mark.parametrize(
    ("date", "size", "uidnext", "error"),
    [
        (0, 0, 0, None),
        (1795168800, len(plain(1)), 2, None),
        (1795168801, len(plain(1)), 2, OtherMessage),
        (1795168800, len(plain(1)) + 1, 2, OtherMessage),
        (1795168800, len(plain(1)), 3, OtherMailbox),
    ],
)
def test_what_is_known_of_a_message_is_asked_with_each_new_select_and_only_then(
    ca: CertificateAuthority, date: int, size: int, uidnext: int, error: type[ImapfsError] | None
) -> None:
    """At stake: a command removes another message that has the UID; and one more round trip for each `rm`."""
    known = MessageRef(INBOX, UidValidity(7), Uid(1), date or None, size or None)
    with Scripted(ca, [plain(1)]) as server, session(server) as connected:
        for _ in range(2):
            if error is None:
                select_known(connected, known, uidnext)
            else:
                # The second time as well: what failed once has not become true.
                with pytest.raises(error):
                    select_known(connected, known, uidnext)
        asked = [line for line in server.commands if line.startswith((b"SELECT", b"UID FETCH"))]
        assert asked == [b'SELECT "INBOX"', b"UID FETCH 1 (UID INTERNALDATE RFC822.SIZE)"] * (
            2 if error else 1
        )
        with pytest.raises(MessageGone):
            select_known(connected, MessageRef(INBOX, UidValidity(7), Uid(9)), afresh=True)


# -- the cache takes what servers say


def _message(uid: int, flags: str = "") -> NewMessage:
    return NewMessage(Uid(uid), 10, 1, 0, flags, ModSeq(1), "subject", "sender", "from", "id")


def test_message_that_is_listed_twice_is_there_once(tmp_path: Path) -> None:
    cache = Cache.open(tmp_path, "subject")
    added, _ = cache.set_tree([Directory((b"INBOX",), b"INBOX", b"/", True, "")])
    box = added[0].ino
    assert len(cache.add_messages(box, [_message(1), _message(2), _message(1, "\\Seen")])) == 2
    assert cache.flags(box) == {1: "\\Seen", 2: ""}
    cache.close()


def test_mailbox_that_holds_no_messages_any_more_loses_them(tmp_path: Path) -> None:
    cache = Cache.open(tmp_path, "subject")
    tree = [Directory((b"A",), b"A", b"/", True, ""), Directory((b"A", b"B"), b"A/B", b"/", True, "")]
    added, _ = cache.set_tree(tree)
    outer, inner = (node.ino for node in added)
    for box in (outer, inner):
        cache.set_state(box, UidValidity(7), 2, ModSeq(3), complete=True)
    lost = cache.add_messages(outer, [_message(1)])
    cache.add_messages(inner, [_message(1)])
    _, gone = cache.set_tree([Directory((b"A",), b"A", b"/", False, ""), tree[1]])
    assert [(g.parent, g.ino) for g in gone] == [(outer, lost[0][0])]
    assert cache.counts(outer) == (0, 0)
    assert cache.counts(inner) == (1, 1)
    state = cache.mailbox(outer)
    assert state is not None
    assert (state.uidvalidity, state.modseq, state.complete) == (0, 0, 0)
    cache.close()


def test_removal_is_done_in_pieces(tmp_path: Path) -> None:
    cache = Cache.open(tmp_path, "subject")
    added, _ = cache.set_tree([Directory((b"INBOX",), b"INBOX", b"/", True, "")])
    box = added[0].ino
    cache.add_messages(box, [_message(uid) for uid in range(1, 11)])
    assert [len(cache.remove(box, [(2, 3), (5, 99)], 3)) for _ in range(4)] == [3, 3, 2, 0]
    assert sorted(cache.flags(box)) == [1, 4]
    cache.close()
