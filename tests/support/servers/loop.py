"""What a server inside the test process runs on: a thread with an event loop, a port, TLS."""

import asyncio
import socket
import ssl
import threading
from collections.abc import Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from tests.support.servers.account import DEADLINE

Result = TypeVar("Result")
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]

BUFFER = 256 << 10
"""Bytes that a stream keeps before it makes the sender wait, and the most that it returns at once."""


class LoopThread:
    """An event loop that runs in a thread of its own until `close`."""

    def __init__(self, name: str) -> None:
        self.loop = asyncio.new_event_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._errors: list[BaseException] = []
        self._thread = threading.Thread(target=self.loop.run_forever, name=name, daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, Result]) -> Result:
        """Run ``coroutine`` in the loop and return what it returns; called from any other thread."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(DEADLINE)

    def spawn(
        self, coroutine: Coroutine[Any, Any, None], owned: socket.socket | None = None
    ) -> asyncio.Task[None]:
        """Start ``coroutine`` as a task that ends with the loop; called in the loop.

        ``owned`` is closed with it, for one that is cancelled before it begins closes nothing by itself.
        """
        task = self.loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        if owned is not None:
            task.add_done_callback(lambda _: owned.close())
        return task

    def close(self) -> None:
        """End the tasks, the loop and its thread. Raises the first error that a task ended with."""
        self.run(self._end_tasks())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(DEADLINE)
        self.loop.close()
        if self._errors:
            raise self._errors[0]

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            self._errors.append(error)

    async def _end_tasks(self) -> None:
        while self._tasks:
            tasks = list(self._tasks)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        await self.loop.shutdown_default_executor()


class Port:
    """A port on 127.0.0.1 that stays ours while nobody listens on it: connections are refused then."""

    def __init__(self) -> None:
        # Bound but not listening, so that the kernel gives the port to nobody else.
        self._holder = _reusable_socket()
        self._holder.bind(("127.0.0.1", 0))
        self.number: int = self._holder.getsockname()[1]

    def listen(self) -> socket.socket:
        """Return a new non-blocking socket that listens on the port."""
        listener = _reusable_socket()
        listener.bind(("127.0.0.1", self.number))
        listener.listen(128)
        listener.setblocking(False)
        return listener

    def close(self) -> None:
        """Give the port back."""
        self._holder.close()


def server_context(certificate: tuple[Path, Path]) -> ssl.SSLContext:
    """Return the context of a server with this certificate and key."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    return context


async def accept(listener: socket.socket) -> socket.socket:
    """Return the next connection, non-blocking.

    Unlike `sock_accept` of asyncio, which loses one that comes as it is cancelled, never takes one in vain.
    """
    loop = asyncio.get_running_loop()
    while True:
        ready = asyncio.Event()
        loop.add_reader(listener, ready.set)
        try:
            await ready.wait()
        finally:
            loop.remove_reader(listener)
        with suppress(BlockingIOError):
            connection, _ = listener.accept()
            connection.setblocking(False)
            return connection


async def accept_tls(connection: socket.socket, context: ssl.SSLContext) -> Streams:
    """Do the server's part of the TLS handshake. Raises OSError, of which ssl.SSLError is one."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(BUFFER, loop)
    protocol = asyncio.StreamReaderProtocol(reader, loop=loop)
    handshake = asyncio.ensure_future(loop.connect_accepted_socket(lambda: protocol, connection, ssl=context))
    try:
        transport, _ = await asyncio.shield(handshake)
    except asyncio.CancelledError:
        # Cancelled itself, it would leave its transport behind, for a number that is another socket's soon.
        with suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)
        with suppress(OSError):
            (await handshake)[0].abort()
        raise
    tell_when_sent(transport)
    return reader, asyncio.StreamWriter(transport, protocol, reader, loop)


def tell_when_sent(transport: asyncio.WriteTransport) -> None:
    """Make drain() return when all was handed to the kernel; with a limit of 0 it never would."""
    transport.set_write_buffer_limits(1, 0)


async def abort(writer: asyncio.StreamWriter) -> None:
    """End the connection without an end of TLS, which the other side would have to agree to."""
    writer.transport.abort()
    # A writer that is not closed closes itself when it is collected, and the loop may be gone by then.
    writer.close()
    with suppress(OSError):
        await writer.wait_closed()


def _reusable_socket() -> socket.socket:
    made = socket.socket()
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    return made
