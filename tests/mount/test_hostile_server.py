"""A server that sends what no mailbox holds costs the mount neither its memory nor its answers."""

import contextlib
import itertools
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

from tests.support.mail import plain
from tests.support.mounting import RobustMount, wait_until
from tests.support.servers.scripted import Scripted
from tests.support.servers.tls import CertificateAuthority

MAX_RSS = 200 << 10
"""KiB."""

Answer = Callable[[bytes], Iterable[bytes]]


def _peak(pid: int) -> int:
    """Return the most memory that a process has had, in KiB."""
    status = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:"))


def _literals(tag: bytes) -> Iterator[bytes]:
    block = bytes(1 << 20)
    yield b"* 1 FETCH (UID 1"
    for number in itertools.count():
        yield b" BODY[%d] {%d}\r\n" % (number, 16 << 20)
        for _ in range(16):
            yield block


def _small_literals(tag: bytes) -> Iterator[bytes]:
    while True:
        yield b"* 1 FETCH (UID 1 BODY[HEADER] {1000000}\r\n" + bytes(1_000_000) + b")\r\n"


def _quoted_body(tag: bytes) -> Iterator[bytes]:
    yield b'* 1 FETCH (UID 1 BODY[] "' + b'\\"' * (7 << 19) + b'")\r\n' + tag + b" OK done\r\n"


def _parentheses(tag: bytes) -> Iterator[bytes]:
    yield b"* LIST " + b"(" * (8 << 20) + b"\r\n"
    yield b'* LIST () "/" INBOX\r\n' + tag + b" OK done\r\n"


def _fetch_parentheses(tag: bytes) -> Iterator[bytes]:
    yield b"* 1 FETCH (X " + b"(" * ((8 << 20) - 100) + b"\r\n" + tag + b" OK done\r\n"


def _quoted_name(tag: bytes) -> Iterator[bytes]:
    yield b'* LIST () "/" "' + b"\\\\/" * ((8 << 20) // 3 - 100) + b'"\r\n'
    yield b'* LIST () "/" INBOX\r\n' + tag + b" OK done\r\n"


def _deep_mailboxes(tag: bytes) -> Iterator[bytes]:
    for number in range(12_000):
        yield b'* LIST () "/" %x/%s\r\n' % (number, b"/".join([b"a"] * 99))
    yield b'* LIST () "/" INBOX\r\n' + tag + b" OK done\r\n"


def _endless(line: bytes) -> Answer:
    return lambda tag: itertools.repeat(line * 1000)


@pytest.mark.parametrize(
    ("verb", "answer", "logged"),
    [
        (b"UID FETCH", _literals, "8 MiB are the maximum"),
        (b"UID FETCH", _small_literals, "more than 96 MiB|did not answer"),
        (b"UID FETCH", _quoted_body, ""),
        (b"UID FETCH", _fetch_parentheses, ""),
        (b"UID FETCH", _endless(b"* 1 FETCH (UID 1 FLAGS ())\r\n"), "did not answer"),
        (b"LIST", _parentheses, "a mailbox is not shown: malformed"),
        (b"LIST", _quoted_name, "a mailbox is not shown: malformed"),
        (b"LIST", _deep_mailboxes, "mailboxes are not shown that are beyond the number .*: 11"),
        (b"EXAMINE", _endless(b"* VANISHED (EARLIER) " + b"1," * 1000 + b"1\r\n"), "vanished UIDs"),
    ],
    ids=[
        "endless literals", "endless headers", "quoted body", "parentheses in FETCH", "endless flags",
        "parentheses in LIST", "quoted name", "deep mailboxes", "endless vanished",
    ],
)  # fmt: skip
def test_memory_is_bounded_whatever_a_server_sends(
    ca: CertificateAuthority, tmp_path: Path, verb: bytes, answer: Answer, logged: str
) -> None:
    """At stake: the memory of the whole machine."""
    hostile = True

    def script(tag: bytes, command: bytes) -> Iterable[bytes] | None:
        return answer(tag) if hostile and command.startswith(verb) else None

    with (
        Scripted(ca, [plain(1), plain(2)], script=script) as server,
        RobustMount(server, tmp_path, "--timeout", "8") as mounted,
    ):
        with contextlib.suppress(OSError):
            os.listdir(mounted.path / "INBOX")
        if logged:
            wait_until(lambda: re.search(logged, mounted.log_text()), logged)
        peak = _peak(mounted.pid)
        hostile = False
        # What was endless ends with the timeout, and the account is tried again.
        wait_until(lambda: _count(mounted.path / "INBOX") == 2, "the messages are listed")
        mounted.unmount()
    assert peak < MAX_RSS


def _count(directory: Path) -> int:
    try:
        return len(os.listdir(directory))
    except OSError:
        return 0


def test_bodies_that_nobody_asked_for_cost_neither_disk_nor_descriptors(
    ca: CertificateAuthority, tmp_path: Path
) -> None:
    """At stake: the disk, and every other file that the daemon opens."""
    large = bytes(300_000)

    def script(tag: bytes, command: bytes) -> Iterable[bytes] | None:
        if b"BODY.PEEK[]" not in command:
            return None
        others = (b"* %d FETCH (UID %d BODY[] {%d}\r\n%s" % (n, n, len(large), large) for n in range(2, 400))
        twice = b" BODY[] {%d}\r\n%s)\r\n" % (len(large), large)
        return itertools.chain(
            *((other, twice) for other in others), [server.fetch(1, b"BODY.PEEK[]"), tag + b" OK done\r\n"]
        )

    with (
        Scripted(ca, [plain(1), plain(2)], script=script) as server,
        RobustMount(server, tmp_path, "--fetch-ahead", "0") as mounted,
    ):
        first = next(path for path in (mounted.path / "INBOX").iterdir() if path.name.endswith(".1.eml"))
        before = len(os.listdir(f"/proc/{mounted.pid}/fd"))
        assert first.read_bytes() == plain(1)
        assert len(os.listdir(f"/proc/{mounted.pid}/fd")) <= before + 5
        assert not list(mounted.cache.glob("*/bodies/tmp/*"))
        mounted.unmount()
