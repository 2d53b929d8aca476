"""A network link of a given round-trip time and bandwidth, in user space: not every kernel has netem.

A TCP forwarder on the loopback interface, in a process of its own so that it takes no time from those that
are measured. Bytes pass as they are, so that TLS stays end to end. Each read is stamped with the moment at
which it may leave at the other side, and waits in a queue until then; so latency does not limit throughput.
A new connection is held back for one round trip, as the handshake of TCP would. Slow start and loss are not
modelled, which does a favour to whoever opens connections and moves little on them.

Run as ``python -m scripts.benchmark.link PORT``: it forwards to that port, prints its own, then for each line
``SECONDS BYTES`` (round-trip time, and bytes a second or 0 for no limit) on stdin changes to that and says
so. It ends with its stdin.
"""

import contextlib
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from pathlib import Path
from types import TracebackType

_CHUNK = 256 << 10
_PACKETS = 16 << 10
"""Bytes read at once where bandwidth is limited, so that the first of them are not held up by the last."""
_IN_FLIGHT = 16 << 20
"""Bytes that may be under way on one connection in one direction: 5 Gbit/s at 25 ms."""
_ROUTER = 0.05
"""Seconds of traffic that a link of limited bandwidth buffers before it pushes back."""

ROOT = Path(__file__).parents[2]


class Link:
    """A running link to ``127.0.0.1:port`` while the ``with`` block lasts, at first without any delay."""

    def __init__(self, port: int) -> None:
        self._target = port
        self.port = 0

    def __enter__(self) -> "Link":
        self._process = subprocess.Popen(
            [sys.executable, "-m", "scripts.benchmark.link", str(self._target)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            # So that Ctrl-C in the terminal does not cut off what is still being cleaned up.
            start_new_session=True,
        )
        self.port = int(self._answer())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()

    def set(self, round_trip: float, rate: float = 0) -> None:
        """From now on: a round trip in seconds; at most ``rate`` bytes a second each way (0: no limit)."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{round_trip} {rate}\n")
        self._process.stdin.flush()
        self._answer()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the process of the delayed link has ended")
        return line


class _Direction:
    """One direction of the link, shared by all connections."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free_at = 0.0
        self.latency = 0.0
        self.rate = 0.0

    @property
    def chunk(self) -> int:
        return _PACKETS if self.rate else _CHUNK

    @property
    def in_flight(self) -> int:
        return int(self.rate * (self.latency + _ROUTER)) or _IN_FLIGHT

    def due(self, size: int) -> float:
        """When ``size`` bytes that enter now come out, in the time of the monotonic clock."""
        now = time.monotonic()
        if not self.rate:
            return now + self.latency
        with self._lock:
            self._free_at = max(now, self._free_at) + size / self.rate
            return self._free_at + self.latency


class _Pipe:
    """The bytes of one connection that are under way in one direction; b"" is the end of the stream."""

    def __init__(self, direction: _Direction) -> None:
        self._direction = direction
        self._changed = threading.Condition()
        self._chunks: deque[tuple[float, bytes]] = deque()
        self._held = 0
        self._broken = False

    def fill(self, source: socket.socket) -> None:
        """Read until the stream ends."""
        data = b"?"
        while data:
            try:
                data = source.recv(self._direction.chunk)
            except OSError:
                data = b""
            due = self._direction.due(len(data))
            with self._changed:
                while self._held > self._direction.in_flight and not self._broken:
                    self._changed.wait()
                if self._broken:
                    return
                self._chunks.append((due, data))
                self._held += len(data)
                self._changed.notify_all()

    def drain(self, target: socket.socket, source: socket.socket) -> None:
        """Write each chunk when it is due; where that fails, make the reader of ``source`` end too."""
        data = b"?"
        while data:
            with self._changed:
                while not self._chunks:
                    self._changed.wait()
                due, data = self._chunks.popleft()
                self._held -= len(data)
                self._changed.notify_all()
            wait = due - time.monotonic()
            if wait > 0:
                time.sleep(wait)
            try:
                if data:
                    target.sendall(data)
                else:
                    target.shutdown(socket.SHUT_WR)
            except OSError:
                with self._changed:
                    self._broken = True
                    self._changed.notify_all()
                with contextlib.suppress(OSError):
                    source.shutdown(socket.SHUT_RD)
                return


def _connect(client: socket.socket, port: int, there: _Direction, back: _Direction) -> None:
    """Carry one connection until both of its streams have ended."""
    time.sleep(there.latency + back.latency)
    with (
        client,
        contextlib.suppress(ConnectionRefusedError),
        socket.create_connection(("127.0.0.1", port)) as server,
    ):
        for end in (client, server):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        up, down = _Pipe(there), _Pipe(back)
        threads = [
            threading.Thread(target=up.fill, args=(client,), daemon=True),
            threading.Thread(target=up.drain, args=(server, client), daemon=True),
            threading.Thread(target=down.fill, args=(server,), daemon=True),
        ]
        for thread in threads:
            thread.start()
        down.drain(client, server)
        for thread in threads:
            thread.join()


def _accept(listener: socket.socket, port: int, there: _Direction, back: _Direction) -> None:
    while True:
        client, _ = listener.accept()
        threading.Thread(target=_connect, args=(client, port, there, back), daemon=True).start()


def _main() -> None:
    there, back = _Direction(), _Direction()
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
        threading.Thread(target=_accept, args=(listener, int(sys.argv[1]), there, back), daemon=True).start()
        print(listener.getsockname()[1], flush=True)
        for line in sys.stdin:
            round_trip, rate = map(float, line.split())
            for direction in (there, back):
                direction.latency, direction.rate = round_trip / 2, rate
            print("set", flush=True)


if __name__ == "__main__":
    _main()
