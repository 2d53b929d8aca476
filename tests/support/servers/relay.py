"""A TCP relay before a server: its port stays while the server starts again, and it may speak TLS for it."""

import asyncio
import contextlib
import socket
from collections.abc import Callable

from tests.support.servers.intermediary import Intermediary
from tests.support.servers.loop import BUFFER, Streams, abort, accept_tls, server_context
from tests.support.servers.tls import CertificateAuthority


class Relay(Intermediary):
    """Passes connections on to the port of 127.0.0.1 that ``target`` returns.

    With ``tls`` it does the TLS of a server that has none; without, bytes are passed on as they are. `refuse`
    also ends the connections that there are.
    """

    thread_name = "relay"

    def __init__(self, authority: CertificateAuthority, target: Callable[[], int], *, tls: bool) -> None:
        super().__init__(authority)
        self._target = target
        self._tls = server_context(authority.issue()) if tls else None
        self._serving: set[asyncio.Task[None]] = set()

    async def _refuse(self) -> None:
        await super()._refuse()
        for task in self._serving:
            task.cancel()
        await asyncio.gather(*self._serving, return_exceptions=True)

    def _serve(self, accepted: socket.socket) -> None:
        task = self._thread.spawn(self._pass_on(accepted), owned=accepted)
        self._serving.add(task)
        task.add_done_callback(self._serving.discard)

    async def _pass_on(self, connection: socket.socket) -> None:
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


async def _join(one: Streams, other: Streams) -> None:
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
