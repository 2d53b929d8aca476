"""Sends events to the processes of `imapfs watch`, through a Unix socket in the account's cache directory.

Each event is one line of JSON. The first line only says that no event is missed from now on. A reader that is
too slow loses events, and learns how many. Neither the mount nor other readers wait for it.
"""

import contextlib
import json
import logging
import socket
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import trio

from imapfs.daemon.status_port import belongs_to_us
from imapfs.fs.events import SOCKET, Event, address
from imapfs.waiting import Flag

log = logging.getLogger(__name__)

_MAX_WAITING: Final = 10_000
"""Events that wait for one reader."""
_NEW_SOCKET: Final = SOCKET + ".new"
"""Name of the socket until it accepts connections."""


class _Reader:
    """The lines that wait to be sent to one process."""

    def __init__(self) -> None:
        self._lines: list[bytes] = []
        self._lost = 0
        self._news = Flag()

    def put(self, line: bytes) -> None:
        """Queue a line, or count it as lost if too many are waiting."""
        if len(self._lines) < _MAX_WAITING:
            self._lines.append(line)
        else:
            self._lost += 1
        self._news.set()

    async def take(self) -> bytes:
        """Wait for lines, and return all that are queued."""
        while not self._lines:
            await self._news.wait()
        lines, self._lines = self._lines, []
        if self._lost:
            lines.append(_line(event="lost", count=self._lost))
            self._lost = 0
        return b"".join(lines)


class Feed:
    """Sends events to any number of processes of the user who mounted.

    ``on_reader`` is called for each of them when it begins.
    """

    def __init__(self, directory: Path, on_reader: Callable[[], None]) -> None:
        self._directory = directory
        self._on_reader = on_reader
        self._readers: set[_Reader] = set()

    def offer(self, event: Event) -> None:
        """Send an event to all readers; returns at once."""
        if self._readers:
            line = _line(**event.as_json())
            for reader in self._readers:
                reader.put(line)

    async def serve(self) -> None:
        """Accept readers until cancelled. Raises nothing: the mount works without them."""
        try:
            async with _listener(self._directory) as listener:
                await trio.serve_listeners(self._send, [trio.SocketListener(listener)])
        except OSError as error:
            log.warning("'imapfs watch' does not work on this mount: %s", error)

    async def _send(self, stream: trio.SocketStream) -> None:
        """Send events until the other end closes the connection."""
        if not belongs_to_us(stream.socket):
            await stream.aclose()
            return
        reader = _Reader()
        self._readers.add(reader)
        reader.put(_line(event="watching"))
        self._on_reader()
        try:
            async with stream, trio.open_nursery() as nursery:
                nursery.start_soon(_until_closed, stream, nursery.cancel_scope)
                while True:
                    await stream.send_all(await reader.take())
        except* trio.BrokenResourceError:
            pass
        finally:
            self._readers.remove(reader)


async def _until_closed(stream: trio.SocketStream, scope: trio.CancelScope) -> None:
    """Cancel ``scope`` when the other end closes the connection: it sends nothing."""
    with contextlib.suppress(trio.BrokenResourceError):
        await stream.receive_some()
    scope.cancel()


@contextlib.asynccontextmanager
async def _listener(directory: Path) -> AsyncIterator[trio.socket.SocketType]:
    """Yield a socket that only this user can connect to. Raises OSError."""
    path, new = directory / SOCKET, directory / _NEW_SOCKET
    new.unlink(missing_ok=True)
    with trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        try:
            with address(directory, _NEW_SOCKET) as short:
                await listener.bind(short)
            # Other users could not reach it before this: the directory is closed to them.
            new.chmod(0o600)
            listener.listen()
            # Only now, so that a reader that finds the socket can connect.
            new.rename(path)
            yield listener
        finally:
            new.unlink(missing_ok=True)
            path.unlink(missing_ok=True)


def _line(**record: Any) -> bytes:
    now = datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
    return json.dumps({"time": now, **record}, ensure_ascii=False).encode() + b"\n"
