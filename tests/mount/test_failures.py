"""What goes wrong has a defined result: one clear line, an errno, never a hang and never a wrong byte."""

import errno
import os
import re
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

from imapfs.imap.refusals import explain
from tests.support.compare import contents, served, shown
from tests.support.mail import plain
from tests.support.mounting import DEADLINE, Mounter, MountFailed, wait_until
from tests.support.servers.account import Dependents
from tests.support.servers.dovecot import Account, Dovecot
from tests.support.servers.scripted import HangUp, Scripted
from tests.support.servers.tls import CertificateAuthority

DATE = 1_700_000_000


class At:
    """An account at an address at which it cannot be reached."""

    def __init__(
        self, authority: CertificateAuthority, port: int, host: str = "localhost", password: str = "secret"
    ) -> None:
        self.authority = authority
        self.dependents = Dependents()
        self.port = port
        self.host = host
        self.name = "alice"
        self.password = password

    @property
    def server(self) -> "At":
        return self


def refusal(mount: Mounter, account: At | Scripted | Account, *arguments: str, code: int = 1) -> str:
    """Return the one line that mounting fails with; the exit code is ``code``."""
    with pytest.raises(MountFailed) as failed:
        mount(account, *arguments)
    assert failed.value.code == code
    line = failed.value.stderr
    assert re.fullmatch(r"imapfs: [^\n]+\n", line), line
    assert account.password not in line
    return line


# -- no mount


def test_wrong_password(dovecot: Dovecot, mount: Mounter) -> None:
    wrong = At(dovecot.authority, dovecot.port, password="correct-horse")
    line = refusal(mount, wrong, code=3)
    assert "refused the password of alice" in line
    assert line.rstrip().endswith(explain("localhost", "AUTHENTICATIONFAILED", "").remedy)


def test_port_at_which_nobody_listens(ca: CertificateAuthority, mount: Mounter) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    assert f"localhost:{port} refuses connections: check the port" in refusal(mount, At(ca, port))


def test_name_that_does_not_resolve(ca: CertificateAuthority, mount: Mounter) -> None:
    assert "the name mail.invalid cannot be resolved" in refusal(mount, At(ca, 993, "mail.invalid"))


def test_port_that_speaks_cleartext(ca: CertificateAuthority, mount: Mounter) -> None:
    with Dovecot(ca, plain=True) as server:
        assert server.plain_port is not None
        assert "does not speak TLS: use the server's IMAPS port" in refusal(
            mount, At(ca, server.plain_port), "--timeout", "10"
        )


def test_port_that_says_nothing(ca: CertificateAuthority, mount: Mounter) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        silent = At(ca, listener.getsockname()[1])
        # The latter where a thread of this machine is late itself.
        assert re.search(r"did not (answer|let us in) within 1 s", refusal(mount, silent, "--timeout", "1"))


def test_port_that_hangs_up(ca: CertificateAuthority, mount: Mounter) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def hang_up() -> None:
            connection, _ = listener.accept()
            connection.close()

        thread = threading.Thread(target=hang_up)
        thread.start()
        refusal(mount, At(ca, listener.getsockname()[1]))
        thread.join()


def test_certificate_of_an_unknown_issuer(
    dovecot: Dovecot, mount: Mounter, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = CertificateAuthority(tmp_path_factory.mktemp("other-ca"))
    line = refusal(mount, At(other, dovecot.port))
    assert "certificate of localhost does not verify" in line
    assert "--ca-file" in line


@pytest.mark.parametrize(
    ("names", "addresses", "expired", "reason"),
    [
        (["mail.example.org"], [], False, "localhost"),
        (["localhost"], ["127.0.0.1"], True, "expired"),
    ],
)
def test_certificate_that_is_not_good(
    ca: CertificateAuthority,
    mount: Mounter,
    names: list[str],
    addresses: list[str],
    expired: bool,
    reason: str,
) -> None:
    with Dovecot(ca, certificate=ca.issue(names, addresses, expired=expired)) as server:
        line = refusal(mount, server.account("alice"))
    assert "does not verify" in line
    assert reason in line


@pytest.mark.parametrize(
    ("greeting", "reason"),
    [
        (b"* BYE come back tomorrow", "come back tomorrow"),
        (b"220 smtp.example.org ESMTP", "did not greet as an IMAP server"),
        (b"\xff\xfe\0\0", "did not greet as an IMAP server"),
        (b"", "did not greet as an IMAP server"),
    ],
)
def test_greeting_that_is_none(
    ca: CertificateAuthority, mount: Mounter, greeting: bytes, reason: str
) -> None:
    with Scripted(ca, greeting=greeting) as server:
        assert reason in refusal(mount, server)


@pytest.mark.parametrize(
    "answer",
    [
        b"f1 BAD no such thing\r\n* LIST",
        b"\0\0\0\r\n",
        b"HTTP/1.1 400 Bad Request\r\n",
        b"* BYE the server is going down\r\n",
        b"",
    ],
)
def test_server_that_does_not_list(ca: CertificateAuthority, mount: Mounter, answer: bytes) -> None:
    def script(tag: bytes, command: bytes) -> Iterable[bytes] | None:
        return server.then_hang_up(answer) if command.startswith(b"LIST") else None

    with Scripted(ca, script=script) as server:
        refusal(mount, server, "--timeout", "10")


@pytest.mark.parametrize("hanging", [b"CAPABILITY", b"AUTHENTICATE", b"LIST"])
def test_server_that_falls_silent_while_it_is_mounted(
    ca: CertificateAuthority, mount: Mounter, hanging: bytes
) -> None:
    def script(tag: bytes, command: bytes) -> Iterable[bytes] | None:
        return server.hang() if command.startswith(hanging) else None

    greeting = b"* OK ready" if hanging == b"CAPABILITY" else b"* OK [CAPABILITY IMAP4rev1 AUTH=PLAIN] ready"
    with Scripted(ca, script=script, greeting=greeting) as server:
        assert "did not answer within 1 s" in refusal(mount, server, "--timeout", "1")


# -- the foreground


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_ends_a_mount_in_the_foreground(user: Account, mount: Mounter, number: signal.Signals) -> None:
    user.deliver("INBOX", [(plain(1), DATE, "")])
    mounted = mount.prepare(user)
    process = subprocess.Popen(
        [*mounted.command, "--foreground"], env=mounted.environment, stderr=subprocess.PIPE, text=True
    )
    try:
        wait_until(lambda: mounted.path.is_mount() or process.poll() is not None, "it is mounted")
        assert contents(mounted.path / "INBOX") == {1: plain(1)}
        process.send_signal(number)
        stderr = process.communicate(timeout=DEADLINE)[1]
        assert (process.returncode, stderr) == (0, "")
        assert not mounted.path.is_mount()
        assert " unmounted " in mounted.log_text()
    finally:
        process.kill()
        process.wait()
        subprocess.run(["fusermount3", "-uz", mounted.path], capture_output=True)


def test_signal_ends_a_mount_in_use_too(user: Account, mount: Mounter) -> None:
    user.deliver("INBOX", [(plain(1), DATE, "")])
    mounted = mount(user)
    (path,) = (mounted.path / "INBOX").iterdir()
    file = os.open(path, os.O_RDONLY)
    os.kill(mounted.pid, signal.SIGTERM)
    wait_until(lambda: not Path(f"/proc/{mounted.pid}").exists(), "the daemon has ended")
    assert not mounted.path.is_mount()
    with pytest.raises(OSError):
        os.close(file)


# -- a server that lies about sizes


@pytest.mark.parametrize(
    ("claim", "size"),
    [
        (lambda content: len(content) // 3, 3_000),
        (lambda content: len(content) // 3, 700_000),
        (lambda content: 3 * len(content), 3_000),
        (lambda content: 3 * len(content), 700_000),
        (lambda content: 0, 3_000),
    ],
    ids=["small, too little", "large, too little", "small, too much", "large, too much", "nothing"],
)
def test_wrong_size_costs_no_byte(
    ca: CertificateAuthority,
    mount: Mounter,
    tmp_path: Path,
    claim: Callable[[bytes], int],
    size: int,
) -> None:
    tools = ["cat", "cp", "rsync", "grep", "tar", "python", "dd"]
    messages = [plain(n, size) for n in range(len(tools))]
    with Scripted(ca, messages, claim=claim) as server:
        mounted = mount(server)
        files = dict(
            zip(tools, [path for _, path in sorted(shown(mounted.path / "INBOX").items())], strict=True)
        )
        # What the kernel knows until the first read.
        assert {path.stat().st_size for path in files.values()} == {claim(messages[0])}
        found = {
            "cat": output("cat", files["cat"]),
            "cp": copied(["cp", files["cp"], tmp_path / "cp"], tmp_path / "cp"),
            "rsync": copied(["rsync", "-a", files["rsync"], tmp_path / "rsync"], tmp_path / "rsync"),
            "grep": output("grep", "-a", "", files["grep"]),
            "tar": untarred(files["tar"], tmp_path),
            "python": files["python"].read_bytes(),
            "dd": output("dd", f"if={files['dd']}", "bs=4096", "status=none"),
        }
        for number, tool in enumerate(tools):
            assert found[tool] == messages[number], tool
            assert files[tool].stat().st_size == size, tool
        mounted.unmount()
        again = mount(server, cache=mounted.cache)
        assert {path.stat().st_size for path in (again.path / "INBOX").iterdir()} == {size}
        again.unmount()


def output(*command: str | Path) -> bytes:
    return subprocess.run(command, capture_output=True, check=True, timeout=DEADLINE).stdout


def copied(command: list[str | Path], target: Path) -> bytes:
    subprocess.run(command, check=True, timeout=DEADLINE)
    return target.read_bytes()


def untarred(path: Path, target: Path) -> bytes:
    # tar decides on the size before it opens the file: what it reads later it cuts off or pads, and says so.
    path.read_bytes()
    subprocess.run(["tar", "-cf", target / "tar", "-C", path.parent, path.name], check=True, timeout=DEADLINE)
    return output("tar", "-xOf", target / "tar")


@pytest.mark.parametrize(
    "sent", [b'""', b"{0}\r\n", b"{60}\r\n" + plain(2, 5_000)[:60]], ids=["string", "0", "cut"]
)
def test_a_body_that_is_less_than_announced_is_asked_for_again(
    ca: CertificateAuthority, mount: Mounter, sent: bytes
) -> None:
    """A hiccup of the server must not become the message."""
    times = 1

    def script(tag: bytes, command: bytes) -> Iterable[bytes] | None:
        nonlocal times
        if not command.startswith(b"UID FETCH 2 ") or b"BODY.PEEK[]" not in command or not times:
            return None
        times -= 1
        return [b"* 2 FETCH (UID 2 BODY[] " + sent + b")\r\n", tag + b" OK done\r\n"]

    with Scripted(ca, [plain(1), plain(2, 5_000)], script=script) as server:
        mounted = mount(server, "--fetch-ahead", "0")
        _, path = [path for _, path in sorted(shown(mounted.path / "INBOX").items())]
        assert path.read_bytes() == plain(2, 5_000)
        mounted.unmount()
        # And where it lasts, it is not kept.
        times = 2
        again = mount(
            server, "--fetch-ahead", "0", expected_log=["no byte of message 2"] if len(sent) < 9 else []
        )
        path = again.path / path.relative_to(mounted.path)
        if len(sent) < 9:
            with pytest.raises(OSError) as raised:
                path.read_bytes()
            assert raised.value.errno == errno.EIO
        else:
            assert path.read_bytes() == plain(2, 5_000)[:60]
        assert times == 0
        again.unmount()
        whole = mount(server, cache=again.cache)
        assert (whole.path / path.relative_to(again.path)).read_bytes() == plain(2, 5_000)
        whole.unmount()


@pytest.mark.parametrize(
    "said", [b"NO [UNAVAILABLE] Server error, try again later", b"NO Server error", b"BAD error"]
)
def test_a_message_that_the_server_refuses_costs_no_other(
    ca: CertificateAuthority, mount: Mounter, said: bytes
) -> None:
    asked = 0

    def script(tag: bytes, command: bytes) -> Iterable[bytes] | None:
        nonlocal asked
        match = re.match(rb"UID FETCH (\S+) .*BODY.PEEK\[\]", command)
        if match is None or 13 not in server.uids(match[1]):
            return None
        asked += 1
        return [
            *(server.fetch(uid, b"BODY.PEEK[]") for uid in server.uids(match[1]) if uid < 13),
            tag + b" " + said + b"\r\n",
        ]

    messages = [plain(number) for number in range(30)]
    with Scripted(ca, messages, script=script) as server:
        mounted = mount(server)
        files = [path for _, path in sorted(shown(mounted.path / "INBOX").items())]
        found, errors = {}, set()
        for number, path in enumerate(files):
            try:
                found[number] = path.read_bytes()
            except OSError as error:
                errors.add((number, error.errno))
        assert found == {number: message for number, message in enumerate(messages) if number != 12}
        assert errors == {(12, errno.EBUSY if b"UNAVAILABLE" in said else errno.EIO)}
        assert mounted.status()["state"] == "online"
        # Not again for nobody.
        before = asked
        assert files[5].read_bytes() == messages[5]
        assert asked == before <= 3
        mounted.unmount()


def test_stat_of_an_open_file_is_exact(ca: CertificateAuthority, mount: Mounter) -> None:
    with Scripted(ca, [plain(1, 5_000)], claim=lambda _: 99) as server:
        mounted = mount(server)
        (path,) = (mounted.path / "INBOX").iterdir()
        with path.open("rb") as file:
            assert os.fstat(file.fileno()).st_size == 5_000
        assert path.stat().st_size == 5_000
        mounted.unmount()


# -- a server that breaks while it is used


GARBAGE = {
    "BYE": b"* BYE see you\r\n",
    "nothing": b"",
    "half a response": b"* 1 FETCH (UID 1 BODY[] {2000}\r\nSubject: half",
    "no response": b"\x16\x03\x01\0\0\0\r\n",
    "no number": b"* x FETCH (UID one BODY[] {y}\r\n",
    "unbalanced": b"* 1 FETCH (UID 1 BODY[] {4}\r\nabcd\r\n",
    "a literal without end": b"* 1 FETCH (UID 1 BODY[] {99999999999999999999}\r\nabc",
    "a huge literal elsewhere": b"* LIST () NIL {99999999999}\r\nabc",
    "no UID": b"* 1 FETCH (BODY[] {4}\r\nabcd FLAGS ())\r\n",
}


@pytest.mark.parametrize("what", GARBAGE)
def test_connection_that_breaks_in_a_fetch(ca: CertificateAuthority, mount: Mounter, what: str) -> None:
    broken = threading.Event()

    def script(tag: bytes, command: bytes) -> Iterable[bytes] | None:
        if b"BODY.PEEK[]" in command and not broken.is_set():
            return server.then_hang_up(GARBAGE[what])
        return None

    with Scripted(ca, [plain(1)], script=script) as server:
        mounted = mount(server, "--timeout", "5")
        (path,) = (mounted.path / "INBOX").iterdir()
        with pytest.raises(OSError) as raised:
            path.read_bytes()
        assert raised.value.errno in {errno.EHOSTUNREACH, errno.EPROTO, errno.EIO, errno.ENOSPC}
        broken.set()
        assert path.read_bytes() == plain(1)
        mounted.unmount()


def test_server_that_goes_away_is_asked_again(user: Account, mount: Mounter) -> None:
    user.deliver("INBOX", ((plain(n), DATE, "") for n in range(2)))
    mounted = mount(user)
    first, second = [path for _, path in sorted(shown(mounted.path / "INBOX").items())]
    assert first.read_bytes() == plain(0)
    user.server.doveadm("kick", user.name)
    assert second.read_bytes() == plain(1)


def test_server_that_never_answers_costs_the_timeout_and_no_more(
    ca: CertificateAuthority, mount: Mounter
) -> None:
    hanging = threading.Event()

    def script(tag: bytes, command: bytes) -> Iterable[bytes] | None:
        return server.hang() if hanging.is_set() else None

    with Scripted(ca, [plain(1), plain(2)], script=script) as server:
        mounted = mount(server, "--timeout", "1", expected_log=["did not answer|no answer"])
        one, two = [path for _, path in sorted(shown(mounted.path / "INBOX").items())]
        assert one.read_bytes() == plain(1)
        hanging.set()
        with pytest.raises(OSError) as raised:
            two.read_bytes()
        assert raised.value.errno in {errno.ETIMEDOUT, errno.EHOSTUNREACH}
        # What is cached is served all the same.
        assert one.read_bytes() == plain(1)
        assert len(list((mounted.path / "INBOX").iterdir())) == 2
        mounted.unmount()


def test_server_that_trickles_is_not_waited_for_for_ever(ca: CertificateAuthority, mount: Mounter) -> None:
    def trickle() -> Iterator[bytes]:
        yield b"* 1 FETCH (UID 1 BODY[] {2000}\r\n"
        while not server.closing.wait(0.2):
            yield b"x"
        raise HangUp

    def script(tag: bytes, command: bytes) -> Iterable[bytes] | None:
        return trickle() if b"BODY.PEEK[]" in command else None

    with Scripted(ca, [plain(1)], script=script) as server:
        mounted = mount(server, "--timeout", "1", expected_log=["did not answer|no answer"])
        (path,) = (mounted.path / "INBOX").iterdir()
        with pytest.raises(OSError) as raised:
            path.read_bytes()
        assert raised.value.errno in {errno.ETIMEDOUT, errno.EHOSTUNREACH}
        mounted.unmount()


@pytest.mark.parametrize(
    "line",
    [
        b'* LIST () "/" a[b',
        b'* LIST () "/" "&bad"',
        b'* LIST () "/" "../../x"',
        b'* LIST () "/" "/etc"',
        b'* LIST () "/" ".."',
        b'* LIST () "/" "a//b"',
        b'* LIST () "/" ""',
        b'* LIST () "/" "\xff\xfe"',
        b"* LIST () NIL {3}\r\na/b",
        b'* LIST () "/" "' + b"x" * 3000 + b'"',
        b'* LIST () "/" "nul\0nul"',
    ],
)
def test_odd_mailbox_names_hurt_nobody(ca: CertificateAuthority, mount: Mounter, line: bytes) -> None:
    def script(tag: bytes, command: bytes) -> Iterable[bytes] | None:
        if not command.startswith(b"LIST"):
            return None
        return [line + b"\r\n", *server.answer(tag, command)]

    with Scripted(ca, [plain(1)], script=script) as server:
        mounted = mount(server)
        assert contents(mounted.path / "INBOX") == {1: plain(1)}
        names = {path.name for path in mounted.path.rglob("*") if path.is_dir()}
        assert len(names) >= 2
        assert all(len(os.fsencode(name)) <= 255 for name in names)
        mounted.unmount()


def test_malformed_mailbox_is_left_out_with_a_log_line(ca: CertificateAuthority, mount: Mounter) -> None:
    def script(tag: bytes, command: bytes) -> Iterable[bytes] | None:
        if not command.startswith(b"LIST"):
            return None
        return [b"* LIST )( nonsense\r\n", *server.answer(tag, command)]

    with Scripted(ca, [plain(1)], script=script) as server:
        mounted = mount(server, expected_log=["a mailbox is not shown: malformed"])
        assert [path.name for path in mounted.path.iterdir()] == ["INBOX"]
        mounted.unmount()


# -- what others do


def test_message_expunged_elsewhere_while_it_is_open(user: Account, mount: Mounter) -> None:
    user.deliver("INBOX", [(plain(1), DATE, ""), (plain(2), DATE, ""), (plain(3), DATE, "")])
    mounted = mount(user)
    cached, unread, kept = [path for _, path in sorted(shown(mounted.path / "INBOX").items())]
    with cached.open("rb", buffering=0) as open_cached:
        assert open_cached.read(10) == plain(1)[:10]
        with user.client() as client:
            client.select()
            client.uid("STORE", "1:2", "+FLAGS", "(\\Deleted)")
            client.expunge()
        with pytest.raises(OSError) as raised:
            unread.read_bytes()
        assert raised.value.errno in {errno.ESTALE, errno.ENOENT}
        wait_until(lambda: set(shown(mounted.path / "INBOX")) == {3}, "the listing shows one message")
        assert open_cached.read() == plain(1)[10:]
        assert os.fstat(open_cached.fileno()).st_size == len(plain(1))
    wait_until(lambda: not cached.exists(), "the name of the expunged message is gone")
    assert kept.read_bytes() == plain(3)


def test_mailbox_deleted_elsewhere(user: Account, mount: Mounter) -> None:
    user.deliver("INBOX", [(plain(1), DATE, "")])
    user.deliver("Lists/gone", [(plain(1), DATE, ""), (plain(2), DATE, "")])
    mounted = mount(user)
    gone = mounted.path / "Lists" / "gone"
    _, unread = [path for _, path in sorted(shown(gone).items())]
    with user.client() as client:
        assert client.delete("Lists/gone")[0] == "OK"
    with pytest.raises(OSError) as raised:
        unread.read_bytes()
    assert raised.value.errno in {errno.ESTALE, errno.ENOENT}
    wait_until(lambda: list(gone.parent.iterdir()) == [], "the mailbox is not listed")
    wait_until(lambda: not gone.exists(), "the kernel has dropped the name")
    assert contents(mounted.path / "INBOX") == {1: plain(1)}


def test_message_and_mailbox_that_come_appear(user: Account, mount: Mounter) -> None:
    inbox = mount(user).path / "INBOX"
    assert list(inbox.iterdir()) == []
    user.deliver("INBOX", [(plain(1), DATE, "")])
    with user.client() as client:
        assert client.create("later/on")[0] == "OK"
    user.append("later/on", plain(2), DATE)
    wait_until(lambda: len(list(inbox.iterdir())) == 1, "the message is listed")
    assert contents(inbox) == served(user) == {1: plain(1)}
    wait_until(lambda: (inbox.parent / "later" / "on").exists(), "the mailbox is listed")
    assert contents(inbox.parent / "later" / "on") == {1: plain(2)}
