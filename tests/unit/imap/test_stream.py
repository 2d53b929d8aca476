"""How long a transfer may take: any time as long as it is fast enough, and otherwise the timeout."""

import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest

from imapfs.errors import ProtocolError
from imapfs.imap import stream as streams
from imapfs.imap.stream import MIN_RATE, SocketStream, StreamEnded

TIMEOUT = 10.0


class Link:
    """A socket over which ``rate`` bytes pass per second, ``piece`` at a time, on a clock of its own."""

    def __init__(self, rate: float, piece: int, content: bytes = b"x") -> None:
        self.now = 0.0
        self._rate = rate
        self._piece = piece
        self._content = itertools.cycle([content * (piece // len(content))])
        self._timeout = 0.0
        self.sent = 0

    def settimeout(self, seconds: float) -> None:
        self._timeout = seconds

    def recv(self, size: int) -> bytes:
        self._pass(self._piece)
        return next(self._content)

    def sendall(self, data: memoryview) -> None:
        self._pass(len(data))
        self.sent += len(data)

    def _pass(self, size: int) -> None:
        self.now += min(size / self._rate, self._timeout)
        if size / self._rate > self._timeout:
            raise TimeoutError


Connect = Callable[[Link], SocketStream]


@pytest.fixture
def connect(monkeypatch: pytest.MonkeyPatch) -> Connect:
    def connected(link: Link) -> SocketStream:
        monkeypatch.setattr(streams, "time", SimpleNamespace(monotonic=lambda: link.now))
        made = SocketStream(cast(Any, link), TIMEOUT)
        made.lift_limit()
        return made

    return connected


@pytest.mark.parametrize("piece", [1, 100, 4000])
def test_literal_may_take_any_time_at_the_minimum_rate(connect: Connect, piece: int) -> None:
    link = Link(MIN_RATE * 1.01, piece)
    size = int(MIN_RATE * TIMEOUT * 3)
    assert len(connect(link).read(size, transfer=True)) == size
    assert link.now > TIMEOUT * 2


@pytest.mark.parametrize("piece", [1, 100, 4000])
def test_literal_that_is_slower_ends(connect: Connect, piece: int) -> None:
    link = Link(MIN_RATE * 0.5, piece)
    with pytest.raises(StreamEnded) as caught:
        connect(link).copy_to(lambda data: None, 1 << 40, transfer=True)
    assert isinstance(caught.value.error, TimeoutError)
    assert link.now <= TIMEOUT * 2.1


def test_what_is_no_transfer_ends_at_any_rate(connect: Connect) -> None:
    link = Link(MIN_RATE * 1000, 4000)
    with pytest.raises(StreamEnded):
        connect(link).copy_to(lambda data: None, 1 << 40, transfer=False)
    assert link.now == pytest.approx(TIMEOUT)


def test_lines_do_not_keep_a_command_alive(connect: Connect) -> None:
    link = Link(MIN_RATE * 1000, 5000, b"* 1 EXISTS\r\n")
    stream = connect(link)
    with pytest.raises(StreamEnded):
        while stream.readline():
            pass
    assert link.now == pytest.approx(TIMEOUT)


def test_nothing_that_comes_in_moves_the_deadline_before_the_login(
    connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = Link(MIN_RATE * 2, 100)
    monkeypatch.setattr(streams, "time", SimpleNamespace(monotonic=lambda: link.now))
    stream = SocketStream(cast(Any, link), TIMEOUT)
    with pytest.raises((StreamEnded, ProtocolError)):
        stream.read(1 << 40, transfer=True)
    assert link.now == pytest.approx(TIMEOUT)


def test_upload_may_take_any_time_at_the_minimum_rate(connect: Connect) -> None:
    link = Link(MIN_RATE * 1.01, 1)
    connect(link).write(bytes(int(MIN_RATE * TIMEOUT * 5)))
    assert link.now > TIMEOUT * 4
    slow = Link(MIN_RATE * 0.5, 1)
    with pytest.raises(StreamEnded):
        connect(slow).write(bytes(int(MIN_RATE * TIMEOUT * 5)))
    assert slow.now <= TIMEOUT * 2.1


def test_line_that_is_given_back_is_read_again(connect: Connect) -> None:
    stream = connect(Link(1e9, 10, b"ab\ncdef\ng\n"))
    first, second = stream.readline(), stream.readline()
    stream.unread(second)
    assert (first, stream.readline(), stream.readline()) == (b"ab\n", b"cdef\n", b"g\n")
