"""A door before a server: its port stays while the server starts again, and it may speak TLS for it."""

import asyncio
import contextlib
import socket
from collections.abc import Callable
from types import TracebackType

from tests.support.servers.account import Dependents
from tests.support.servers.loop import BUFFER, LoopThread, Port, abort, accept, accept_tls, server_context
from tests.support.servers.tls import CertificateAuthority


class Front:
    """Passes connections on to the port of 127.0.0.1 that ``target`` returns, while the ``with`` block lasts.

    With ``tls`` it does the TLS of a server that has none; without, bytes are passed on as they are.
    """

    host = "localhost"

    def __init__(self, authority: CertificateAuthority, target: Callable[[], int], *, tls: bool) -> None:
        self.authority = authority
        self.dependents = Dependents()
        self.port = 0
        self._target = target
        self._tls = server_context(authority.issue()) if tls else None
        self._accepting: asyncio.Task[None] | None = None
        self._serving: set[asyncio.Task[None]] = set()

    def __enter__(self) -> "Front":
        self._port = Port()
        self.port = self._port.number
        self._thread = LoopThread("front")
        self.accept()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        try:
            self.dependents.__exit__(kind, error, where)
        finally:
            try:
                self.refuse()
                self._thread.close()
            finally:
                self._port.close()

    def refuse(self) -> None:
        """End every connection and refuse new ones, as a server that is not running does."""
        self._thread.run(self._refuse())

    def accept(self) -> None:
        """Accept connections again after `refuse`."""
        self._thread.run(self._accept())

    async def _accept(self) -> None:
        if self._accepting is None:
            self._accepting = self._thread.spawn(self._accept_from(self._port.listen()))

    async def _refuse(self) -> None:
        tasks = [*self._serving, *([self._accepting] if self._accepting else [])]
        self._accepting = None
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _accept_from(self, listener: socket.socket) -> None:
        with listener:
            while True:
                connection = await accept(listener)
                task = self._thread.spawn(self._serve(connection), owned=connection)
                self._serving.add(task)
                task.add_done_callback(self._serving.discard)

    async def _serve(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # Either side may end whenever it likes.
        with contextlib.suppress(OSError), connection:
            behind = await asyncio.open_connection("127.0.0.1", self._target(), limit=BUFFER)
            try:
                if self._tls is None:
                    before = await asyncio.open_connection(sock=connection, limit=BUFFER)
                else:
                    before = await accept_tls(connection, self._tls)
                try:
                    await _join(before, behind)
                finally:
                    await abort(before[1])
            finally:
                await abort(behind[1])


async def _join(
    one: tuple[asyncio.StreamReader, asyncio.StreamWriter],
    other: tuple[asyncio.StreamReader, asyncio.StreamWriter],
) -> None:
    """Pass on in both directions until either side ends."""
    pumps = [asyncio.create_task(_pump(one[0], other[1])), asyncio.create_task(_pump(other[0], one[1]))]
    try:
        await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for pump in pumps:
            pump.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(BUFFER):
            writer.write(data)
            await writer.drain()
