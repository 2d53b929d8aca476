"""A socket as a stream of lines and literals, in which every wait and every line is bounded."""

import math
import mmap
import select
import socket
import ssl
import time
from collections.abc import Callable
from typing import Final

from imapfs.errors import ProtocolError
from imapfs.imap.budget import MAX_BEFORE_LOGIN, MAX_RESPONSE

MIN_RATE: Final = 4 << 10
"""Bytes per second below which a literal, or FETCH data that was asked for, is too slow to be waited for."""
_PIECE: Final = 16 << 10
"""Bytes that are sent at a time."""
_RECV: Final = 256 << 10

Buffer = bytes | mmap.mmap


class StreamEnded(Exception):
    """The stream is at its end: ``error`` is the socket's exception, or EOFError for the end of the
    connection.

    A class of its own, because an OSError may also come from a sink, whose disk may be full.
    """

    def __init__(self, error: OSError | EOFError) -> None:
        super().__init__(str(error))
        self.error = error


class SocketStream:
    """A socket with a read buffer, and one deadline over many reads.

    Every method may raise StreamEnded; those that read may also raise ProtocolError. The deadline is total,
    except that bytes of a transfer move it on, so that one may go on as long as it is not slower than
    `MIN_RATE`. Until `lift_limit` is called, the amount of input is limited and nothing that comes in moves
    the deadline, because the peer is not yet known.
    """

    def __init__(self, sock: socket.socket, timeout: float) -> None:
        self.sock = sock
        self.timeout = timeout
        self._buffer = b""
        self._at = 0
        self._deadline = 0.0
        self._allowed: int | None = MAX_BEFORE_LOGIN
        """How many more bytes may come in; None for any number."""
        self.renew_deadline()

    def lift_limit(self) -> None:
        """Accept any amount of input from now on: the peer is the server, and has accepted the login."""
        self._allowed = None

    def note_progress(self, size: int) -> None:
        """Move the deadline on by what ``size`` bytes of a transfer may take, up to a whole timeout from
        now."""
        if self._allowed is None:
            self._deadline = min(time.monotonic() + self.timeout, self._deadline + size / MIN_RATE)

    def renew_deadline(self) -> None:
        """Allow another ``timeout`` seconds from now."""
        self._deadline = time.monotonic() + self.timeout

    def _receive(self) -> bytes:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise StreamEnded(TimeoutError())
        try:
            self.sock.settimeout(left)
            data = self.sock.recv(_RECV)
        except OSError as error:
            raise StreamEnded(error) from None
        if not data:
            raise StreamEnded(EOFError())
        if self._allowed is not None:
            self._allowed -= len(data)
            if self._allowed < 0:
                raise ProtocolError("the server sends data without an end before the login")
        return data

    def has_pending_input(self) -> bool:
        """Return whether unread data has arrived, as far as this can be known without waiting."""
        if self._at < len(self._buffer):
            return True
        self.sock.settimeout(0)
        try:
            return bool(self.sock.recv(1, socket.MSG_PEEK))
        except OSError:
            return False

    def wait(self, wake: int, seconds: float) -> bool:
        """Wait for input. Return false after ``seconds``, or once the descriptor ``wake`` is readable.

        Not a read with a deadline: TLS sends records without data (RFC 8446 section 4.6), after which such a
        read would mistake the server's silence for a failure.
        """
        until = time.monotonic() + seconds
        poll = select.poll()
        poll.register(self.sock, select.POLLIN)
        poll.register(wake, select.POLLIN)
        while (left := until - time.monotonic()) > 0:
            if self._at < len(self._buffer):
                left = 0.0
            elif isinstance(self.sock, ssl.SSLSocket) and self.sock.pending():
                left = 0.0  # TLS holds decrypted data, which the kernel does not know about
            ready = {fd for fd, _ in poll.poll(math.ceil(left * 1000))}
            if wake in ready:
                return False
            if self._at < len(self._buffer):
                return True
            if not left or ready:
                self.sock.settimeout(0)
                try:
                    data = self.sock.recv(_RECV)
                except (ssl.SSLWantReadError, BlockingIOError):
                    continue
                except OSError as error:
                    raise StreamEnded(error) from None
                if not data:
                    raise StreamEnded(EOFError())
                self._buffer, self._at = data, 0
                return True
        return False

    def readline(self, limit: int = MAX_RESPONSE) -> bytes:
        """Return one line with its line end, of at most ``limit`` bytes or so."""
        end = self._buffer.find(b"\n", self._at)
        if end < 0:
            pieces = [self._buffer[self._at :]]
            held = len(pieces[0])
            while True:
                data = self._receive()
                cut = data.find(b"\n")
                if cut >= 0:
                    break
                pieces.append(data)
                held += len(data)
                if held > limit:
                    raise ProtocolError("the server sent a line without an end")
            pieces.append(data[: cut + 1])
            self._buffer, self._at = data, cut + 1
            return b"".join(pieces)
        line = self._buffer[self._at : end + 1]
        self._at = end + 1
        return line

    def unread(self, line: bytes) -> None:
        """Give back what `readline` has returned last."""
        self._buffer, self._at = line + self._buffer[self._at :], 0

    def read(self, size: int, *, transfer: bool) -> bytes:
        """Return exactly ``size`` bytes. Those of a ``transfer`` move the deadline on."""
        end = self._at + size
        if end <= len(self._buffer):
            data = self._buffer[self._at : end]
            self._at = end
            return data
        pieces: list[bytes] = []
        self.copy_to(pieces.append, size, transfer=transfer)
        return b"".join(pieces)

    def copy_to(self, write: Callable[[bytes], object], size: int, *, transfer: bool) -> None:
        """Pass the next ``size`` bytes to ``write`` as they arrive. Those of a ``transfer`` move the deadline
        on."""
        while size:
            if self._at == len(self._buffer):
                self._buffer, self._at = self._receive(), 0
            data = self._buffer[self._at : self._at + size]
            self._at += len(data)
            size -= len(data)
            write(data)
            if transfer:
                self.note_progress(len(data))

    def write(self, data: Buffer) -> None:
        """Send all of ``data``, which moves the deadline on."""
        view = memoryview(data)
        try:
            for start in range(0, len(view), _PIECE):
                left = self._deadline - time.monotonic()
                if left <= 0:
                    raise TimeoutError
                piece = view[start : start + _PIECE]
                self.sock.settimeout(left)
                self.sock.sendall(piece)
                self.note_progress(len(piece))
        except OSError as error:
            raise StreamEnded(error) from None
