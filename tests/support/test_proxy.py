"""The proxy of the tests does to a connection what it says, where it says, and nothing else."""

import contextlib
import imaplib
import io
import itertools
import os
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from tests.support.mail import plain, wild
from tests.support.servers.dovecot import Account, Dovecot, as_served
from tests.support.servers.hiding import Hidden
from tests.support.servers.proxy import Action, Point, Proxy


@pytest.fixture
def proxy(dovecot: Dovecot) -> Iterator[Proxy]:
    with Proxy(dovecot) as made:
        yield made


def ask(client: imaplib.IMAP4_SSL, command: str) -> tuple[str, bytes]:
    """Send one command line; return the tagged answer's word and everything that came before it and in it."""
    tag = client._new_tag()
    client.send(tag + b" " + command.encode() + b"\r\n")
    return answer(client, tag)


def answer(client: imaplib.IMAP4_SSL, tag: bytes) -> tuple[str, bytes]:
    lines = []
    while line := client.readline():
        lines.append(line)
        if line.startswith(tag + b" "):
            return line.split()[1].decode(), b"".join(lines)
    raise EOFError(b"".join(lines))


def fetch(client: imaplib.IMAP4_SSL, item: str = "BODY.PEEK[]") -> list[bytes]:
    assert client.select("INBOX")[0] == "OK"
    data = client.uid("FETCH", "1:*", f"({item})")[1]
    return [part[1] for part in data if isinstance(part, tuple)]


def read_all(client: imaplib.IMAP4_SSL) -> bytes:
    """Return what still comes until the connection ends, in whatever way."""
    assert isinstance(client.file, io.BufferedReader)
    received = b""
    with contextlib.suppress(ConnectionResetError, ssl.SSLError):
        while piece := client.file.read1():
            received += piece
    return received


def end_below_tls(client: imaplib.IMAP4_SSL) -> str:
    """Return how TCP ends. What TLS makes of it is not the same in every version of Python."""
    with socket.socket(fileno=os.dup(client.sock.fileno())) as connection:
        connection.settimeout(20)
        try:
            while connection.recv(65_536):
                pass
        except ConnectionResetError:
            return "RST"
        return "FIN"


def in_background(work: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def test_without_options_nothing_is_changed(user: Account, proxy: Proxy) -> None:
    messages = list(wild().values())
    user.deliver("INBOX", [(message, 1_700_000_000, "S") for message in messages])
    with user.client() as direct, proxy.account(user).client() as proxied:
        assert fetch(proxied) == fetch(direct) == [as_served(message) for message in messages]
        assert set(proxied.capability()[1][0].split()) == set(direct.capability()[1][0].split())
        assert proxied.append("INBOX", "", "", plain(1, 700_000))[0] == "OK"
        assert fetch(proxied)[-1] == plain(1, 700_000)


def test_commands_are_recorded_without_tags_and_literals(user: Account, proxy: Proxy) -> None:
    with proxy.account(user).client() as client:
        client.select("INBOX", readonly=True)
        client.append("Sent", "\\Seen", '"14-Nov-2023 22:13:20 +0000"', plain(1))
        proxy.forget_commands()
        client.append("Sent", "\\Seen", '"14-Nov-2023 22:13:20 +0000"', plain(2))
        tag = client._new_tag()
        client.send(tag + b" STATUS {6+}\r\nDrafts (MESSAGES)\r\n")
        assert answer(client, tag)[0] == "OK"
        client.send(b"x IDLE\r\n")
        assert client.readline().startswith(b"+")
        client.send(b"DONE\r\n")
        assert answer(client, b"x")[0] == "OK"
        client.noop()
    assert proxy.commands() == [
        b'APPEND Sent (\\Seen) "14-Nov-2023 22:13:20 +0000" {2000}',
        b"STATUS {6+} (MESSAGES)",
        b"IDLE",
        b"NOOP",
        b"LOGOUT",
    ]
    proxy.wait_for_command(b"status")
    with pytest.raises(TimeoutError, match="EXPUNGE"):
        proxy.wait_for_command(b"EXPUNGE", deadline=0)


def test_what_ten_thousand_messages_cost_is_seen_through_the_proxy(user: Account, proxy: Proxy) -> None:
    user.deliver("INBOX", ((plain(number, 600), 1_700_000_000, "S") for number in range(10_000)))
    with proxy.account(user).client() as client:
        client.select("INBOX")
        _, found = ask(client, "UID FETCH 1:* (FLAGS RFC822.SIZE INTERNALDATE)")
        assert found.count(b"RFC822.SIZE 600") == 10_000


@pytest.mark.parametrize(
    ("name", "commands"),
    [
        ("MOVE", ["UID MOVE 1 Trash", "MOVE 1 Trash"]),
        ("UIDPLUS", ["UID EXPUNGE 1"]),
        (
            "CONDSTORE",
            [
                "ENABLE CONDSTORE",
                "ENABLE QRESYNC",
                "SELECT INBOX (CONDSTORE)",
                "STATUS INBOX (HIGHESTMODSEQ)",
                "UID FETCH 1 (FLAGS MODSEQ)",
                "UID FETCH 1:* (FLAGS) (CHANGEDSINCE 1)",
                "UID STORE 1 (UNCHANGEDSINCE 9) +FLAGS (\\Seen)",
                "UID SEARCH MODSEQ 1",
            ],
        ),
        ("QRESYNC", ["ENABLE QRESYNC", "SELECT INBOX (QRESYNC (1 1))"]),
        ("ENABLE", ["ENABLE CONDSTORE"]),
        ("SPECIAL-USE", ['LIST "" * RETURN (SPECIAL-USE)', 'LIST (SPECIAL-USE) "" *']),
        ("LIST-STATUS", ['LIST "" * RETURN (STATUS (MESSAGES))']),
        ("LIST-EXTENDED", ['LIST "" * RETURN (CHILDREN)']),
        ("ESEARCH", ["UID SEARCH RETURN (COUNT) ALL"]),
        ("NAMESPACE", ["NAMESPACE"]),
        ("IDLE", ["IDLE"]),
        ("NOTIFY", ["NOTIFY SET (PERSONAL (MessageNew MessageExpunge))"]),
        ("UNSELECT", ["UNSELECT"]),
        ("ID", ['ID ("name" "x")', "ID NIL"]),
        ("SORT", ["UID SORT (DATE) UTF-8 ALL"]),
        ("THREAD", ["UID THREAD REFERENCES UTF-8 ALL"]),
        ("BINARY", ["UID FETCH 1 (BINARY.PEEK[])"]),
    ],
)
def test_hidden_extension_is_neither_announced_nor_understood(
    user: Account, name: str, commands: list[str]
) -> None:
    user.deliver("INBOX", [(plain(1), 1_700_000_000, "")])

    def announced(client: imaplib.IMAP4_SSL) -> set[str]:
        return {word.partition(b"=")[0].decode() for word in client.capability()[1][0].split()}

    with user.client() as client:
        assert name in announced(client)
    with Proxy(user.server, hide=[name]) as proxy, proxy.account(user).client() as client:
        assert name not in announced(client)
        client.select("INBOX")
        for command in commands:
            assert ask(client, command)[0] == "BAD", command
        assert [fetch(client), client.select("Trash")[1]] == [[plain(1)], [b"0"]]
        assert ask(client, "UID FETCH 1:* (FLAGS)")[0] == "OK"
        assert [line.decode() for line in proxy.commands() if line.decode() in commands] == commands


def test_capabilities_are_hidden_wherever_they_are_announced(user: Account) -> None:
    with Proxy(user.server, hide=["IDLE", "SASL-IR"]) as proxy:
        context = ssl.create_default_context(cafile=proxy.authority.certificate)
        with imaplib.IMAP4_SSL(proxy.host, proxy.port, ssl_context=context) as client:
            assert b"[CAPABILITY" in client.welcome
            login = ask(client, f"LOGIN {user.name} {user.password}")[1]
            for said in (client.welcome, login, ask(client, "CAPABILITY")[1]):
                assert b"CAPABILITY IMAP4rev1 " in said
                assert not re.search(rb"\b(IDLE|SASL-IR)\b", said)


def test_hidden_uidplus_and_condstore_say_nothing(user: Account) -> None:
    user.deliver("INBOX", [(plain(1), 1_700_000_000, "")])
    with Proxy(user.server, hide=["UIDPLUS", "CONDSTORE"]) as proxy, proxy.account(user).client() as client:
        said = [
            ask(client, "SELECT INBOX")[1],
            ask(client, "UID COPY 1 Sent")[1],
            ask(client, "UID MOVE 1 Trash")[1],
            repr(client.append("Sent", "", "", plain(2))).encode(),
        ]
        assert not [line for line in said if re.search(rb"APPENDUID|COPYUID|MODSEQ", line)]
        assert b"* 1 EXPUNGE" in said[2]
    with user.client() as client:
        assert client.status("Sent", "(MESSAGES)")[1] == [b"Sent (MESSAGES 2)"]


def test_hidden_special_use_leaves_ordinary_mailboxes(user: Account) -> None:
    with (
        Proxy(user.server, hide=["SPECIAL-USE", "CHILDREN"]) as proxy,
        proxy.account(user).client() as client,
    ):
        assert sorted(line for line in client.list()[1] if isinstance(line, bytes)) == [
            b'() "/" Drafts',
            b'() "/" INBOX',
            b'() "/" Junk',
            b'() "/" Sent',
            b'() "/" Trash',
        ]


def test_hidden_literal_plus_refuses_and_swallows_the_literal(user: Account) -> None:
    with Proxy(user.server, hide=["LITERAL+"]) as proxy, proxy.account(user).client() as client:
        client.send(b"a APPEND INBOX {12+}\r\nb LOGOUT\r\nxy\r\n")
        assert answer(client, b"a")[0] == "BAD"
        assert client.append("INBOX", "", "", plain(1))[0] == "OK"
        assert fetch(client) == [plain(1)]


def test_hidden_multiappend_appends_none_of_them(user: Account) -> None:
    two = b"a APPEND INBOX {6+}\r\nA: b\r\n {6+}\r\nC: d\r\n\r\n"
    with Proxy(user.server, hide=["MULTIAPPEND"]) as proxy, proxy.account(user).client() as client:
        client.send(two)
        assert answer(client, b"a")[0] == "BAD"
        assert client.select("INBOX")[1] == [b"0"]
    with user.client() as client:
        client.send(two)
        assert answer(client, b"a")[0] == "OK"


def test_hiding_what_is_unknown_is_an_error() -> None:
    with pytest.raises(ValueError, match="XYZZY cannot be hidden"):
        Hidden(["XYZZY"])


def test_edits_change_lines_and_leave_literals(user: Account) -> None:
    message = plain(1) + b"RFC822.SIZE 7\r\n"
    user.deliver("INBOX", [(message, 1_700_000_000, "")])

    def lie(line: bytes) -> bytes | None:
        return re.sub(rb"RFC822\.SIZE \d+", b"RFC822.SIZE 99", line)

    def silence(line: bytes) -> bytes | None:
        return None if b"[PERMANENTFLAGS" in line else line

    with Proxy(user.server, edits=[lie, silence]) as proxy, proxy.account(user).client() as client:
        selected = ask(client, "SELECT INBOX")[1]
        assert b"UIDVALIDITY" in selected
        assert b"PERMANENTFLAGS" not in selected
        assert fetch(client, "RFC822.SIZE BODY.PEEK[] UID") == [message]
        assert b"RFC822.SIZE 99" in ask(client, "FETCH 1 (RFC822.SIZE BODY.PEEK[])")[1]


def test_limit_is_said_for_the_logins_asked_for(user: Account, proxy: Proxy) -> None:
    fault = proxy.fault(b"AUTHENTICATE|LOGIN ", b"NO [LIMIT] Too many", times=2)
    for _ in range(2):
        with pytest.raises(imaplib.IMAP4.error, match="LIMIT"), proxy.account(user).client():
            pass
    with proxy.account(user).client() as client:
        assert client.noop()[0] == "OK"
    fault.wait_hit(2)


def test_cancelled_fault_never_strikes(user: Account, proxy: Proxy) -> None:
    fault = proxy.fault(b"NOOP", "cut", times=None)
    fault.cancel()
    with proxy.account(user).client() as client:
        client.noop()
    with pytest.raises(TimeoutError):
        fault.wait_hit(deadline=0)


@pytest.mark.parametrize(("at", "moved"), [("command", 0), ("answer", 1)])
@pytest.mark.parametrize("action", ["cut", "close", "half-close", "corrupt", "drop", b"NO [INUSE] Later"])
def test_fault_strikes_before_or_after_the_server_acts(
    user: Account, proxy: Proxy, action: Action, at: Point, moved: int
) -> None:
    user.deliver("INBOX", [(plain(number), 1_700_000_000, "") for number in range(3)])
    fault = proxy.fault(b"UID MOVE 2 ", action, at=at)
    with contextlib.suppress(OSError, imaplib.IMAP4.abort), proxy.account(user).client() as client:
        client.select("INBOX")
        assert ask(client, "UID MOVE 1 Trash")[0] == "OK"
        if isinstance(action, bytes):
            assert ask(client, "UID MOVE 2 Trash")[0] == "NO"
        elif action == "drop":
            client.send(b"a UID MOVE 2 Trash\r\n")
            fault.wait_hit()
            client.send(b"b NOOP\r\n")
            with contextlib.suppress(imaplib.IMAP4.error):
                assert b"a OK" not in answer(client, b"b")[1]
        else:
            client.send(b"a UID MOVE 2 Trash\r\n")
            fault.wait_hit()
            if action == "corrupt":
                with pytest.raises(ssl.SSLError):
                    answer(client, b"a")
            else:
                assert end_below_tls(client) == ("RST" if action == "cut" else "FIN")
    fault.wait_hit()
    proxy.cut_all()
    with user.client() as client:
        # One that was half-closed or garbled before it reached the server reaches it nevertheless.
        if action in ("half-close", "corrupt"):
            moved = 1
        wanted = [b"Trash (MESSAGES %d)" % (1 + moved)]
        assert any(client.status("Trash", "(MESSAGES)")[1] == wanted for _ in range(1_000))


def test_fault_strikes_at_the_nth_match_only(user: Account, proxy: Proxy) -> None:
    fault = proxy.fault(lambda command: command == b"NOOP", b"NO Third", nth=3)
    with proxy.account(user).client() as client:
        assert [client.noop()[0] for _ in range(5)] == ["OK", "OK", "NO", "OK", "OK"]
    assert fault.hits == 1


@pytest.mark.parametrize("count", [0, 1, 70_000, 299_999])
@pytest.mark.parametrize("action", ["cut", "close", "half-close"])
def test_cut_in_mid_literal_delivers_exactly_what_precedes_it(
    user: Account, proxy: Proxy, action: Action, count: int
) -> None:
    message = plain(1, 300_000)
    user.deliver("INBOX", [(message, 1_700_000_000, "")])
    fault = proxy.fault(b"UID FETCH .*BODY", action, at="literal", after=count)
    with proxy.account(user).client() as client:
        client.select("INBOX")
        client.send(b"a UID FETCH 1 (BODY.PEEK[])\r\n")
        head = client.readline()
        received = read_all(client)
    fault.wait_hit()
    assert head.endswith(b"{300000}\r\n")
    assert received == message[:count]


def test_cut_in_mid_upload_leaves_nothing_on_the_server(user: Account, proxy: Proxy) -> None:
    fault = proxy.fault(b"APPEND", "cut", at="upload", after=150_000)
    with (
        pytest.raises((imaplib.IMAP4.abort, OSError)),
        proxy.account(user).client() as client,
    ):
        client.append("INBOX", "", "", plain(1, 300_000))
    fault.wait_hit()
    with user.client() as client:
        assert client.status("INBOX", "(MESSAGES)")[1] == [b"INBOX (MESSAGES 0)"]


def test_stalled_answer_arrives_whole_after_resume(user: Account, proxy: Proxy) -> None:
    message = plain(1, 300_000)
    user.deliver("INBOX", [(message, 1_700_000_000, "")])
    fault = proxy.fault(b"UID FETCH .*BODY", "stall", at="literal", after=100_000)
    with proxy.account(user).client() as client, proxy.account(user).client() as other:
        found: list[bytes] = []
        reader = in_background(lambda: found.extend(fetch(client)))
        fault.wait_hit()
        assert other.noop()[0] == "OK"
        assert reader.is_alive()
        assert not found
        proxy.resume()
        reader.join(20)
        assert found == [message]


def test_everything_stalls_until_resume(user: Account, proxy: Proxy) -> None:
    with proxy.account(user).client() as client:
        proxy.stall()
        said: list[str] = []
        old = in_background(lambda: said.append(client.noop()[0]))

        def log_in() -> None:
            with proxy.account(user).client() as another:
                said.append(another.noop()[0])

        new = in_background(log_in)
        proxy.wait_for_connections(2)
        proxy.wait_for_command(b"NOOP")
        assert not said
        proxy.resume()
        old.join(20)
        new.join(20)
        assert said == ["OK", "OK"]


def test_cut_all_works_on_stalled_connections(user: Account, proxy: Proxy) -> None:
    with contextlib.suppress(OSError), proxy.account(user).client() as client:
        proxy.stall()
        client.send(b"a NOOP\r\n")
        proxy.cut_all()
        assert proxy.connections() == 0
        assert end_below_tls(client) == "RST"
        proxy.resume()
    with proxy.account(user).client() as client:
        assert client.noop()[0] == "OK"


def test_new_connections_are_refused_and_accepted_again(user: Account, proxy: Proxy) -> None:
    with proxy.account(user).client() as client:
        proxy.refuse()
        assert client.noop()[0] == "OK"
        with pytest.raises(ConnectionRefusedError), proxy.account(user).client():
            pass
        proxy.accept()
        with proxy.account(user).client() as another:
            assert another.noop()[0] == "OK"


@pytest.mark.parametrize(
    ("at", "action", "error"),
    [
        ("connect", "cut", ConnectionResetError),
        ("connect", "close", (ssl.SSLEOFError, ConnectionResetError)),
        ("connect", "corrupt", ssl.SSLError),
        ("connect", b"\x15\x03\x01\x00\x02\x02\x50", ssl.SSLError),
        ("greeting", "cut", (ConnectionResetError, imaplib.IMAP4.abort)),
        ("greeting", "close", imaplib.IMAP4.abort),
        ("greeting", "corrupt", ssl.SSLError),
        ("greeting", b"* BYE Too busy", imaplib.IMAP4.error),
    ],
)
def test_fault_before_the_login(
    user: Account,
    proxy: Proxy,
    at: Point,
    action: Action,
    error: type[Exception] | tuple[type[Exception], ...],
) -> None:
    fault = proxy.fault(b"", action, at=at, nth=2)
    with proxy.account(user).client():
        pass
    with pytest.raises(error), proxy.account(user).client():
        pass
    fault.wait_hit()
    with proxy.account(user).client() as client:
        assert client.noop()[0] == "OK"


@pytest.mark.parametrize("at", ["connect", "greeting"])
def test_connection_stalled_before_the_login_goes_on_after_resume(
    user: Account, proxy: Proxy, at: Point
) -> None:
    fault = proxy.fault(b"", "stall", at=at)
    said: list[str] = []

    def log_in() -> None:
        with proxy.account(user).client() as client:
            said.append(client.noop()[0])

    thread = in_background(log_in)
    fault.wait_hit()
    assert thread.is_alive()
    proxy.resume()
    thread.join(20)
    assert said == ["OK"]


def test_latency_and_bandwidth_slow_the_connection_down(user: Account, proxy: Proxy) -> None:
    user.deliver("INBOX", [(plain(1, 50_000), 1_700_000_000, "")])
    with proxy.account(user).client() as client:
        client.select("INBOX")
        # Lower bounds, which no slow machine can break.
        proxy.latency = 0.05
        start = time.monotonic()
        client.noop()
        assert time.monotonic() - start >= 0.1
        proxy.latency = 0
        proxy.bandwidth = 200_000
        start = time.monotonic()
        assert ask(client, "UID FETCH 1 (BODY.PEEK[])")[0] == "OK"
        assert time.monotonic() - start >= 0.2
        proxy.bandwidth = None


def test_idle_is_pushed_through(user: Account, proxy: Proxy) -> None:
    with proxy.account(user).client() as client:
        client.select("INBOX")
        client.send(b"a IDLE\r\n")
        assert client.readline().startswith(b"+")
        user.append("INBOX", plain(1), 1_700_000_000)
        assert b"1 EXISTS" in client.readline()
        client.send(b"DONE\r\n")
        assert answer(client, b"a")[0] == "OK"


def test_server_that_is_gone_resets_the_client(user: Account) -> None:
    class Nowhere:
        host = "localhost"
        authority = user.server.authority
        port = 0

    holder = socket.socket()
    holder.bind(("127.0.0.1", 0))
    Nowhere.port = holder.getsockname()[1]
    gone = pytest.raises((ConnectionResetError, imaplib.IMAP4.abort))
    with holder, Proxy(Nowhere()) as proxy, gone, user.client(via=proxy):
        pass


def test_proxy_with_open_connections_leaves_nothing_behind(user: Account) -> None:
    with contextlib.suppress(OSError, imaplib.IMAP4.abort), Proxy(user.server) as proxy:
        client = proxy.account(user).client()
        client.__enter__()
        assert any(thread.name == "proxy" for thread in threading.enumerate())
    assert not any(thread.name == "proxy" for thread in threading.enumerate())
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", proxy.port), 10)
    with contextlib.suppress(OSError, imaplib.IMAP4.abort):
        client.__exit__(None, None, None)


def test_impossible_faults_are_refused(proxy: Proxy) -> None:
    for at, action in itertools.product(("upload", "literal"), ("drop", b"NO")):
        with pytest.raises(ValueError, match=at):
            proxy.fault(b"APPEND", action, at=at)  # type: ignore[arg-type]
