"""Gives the whole status of a mount to the user's processes, through an abstract Unix socket (unix(7)).

The extended attribute of the mountpoint holds at most 4 KiB, and says how the socket is called. The status
may be much longer: it lists each file that is not on the server. An abstract socket needs no directory, and
so works although the cache was deleted.
"""

import contextlib
import json
import logging
import os
import secrets
import socket
import struct
from collections.abc import Callable
from typing import Any, Final

import trio

log = logging.getLogger(__name__)

_CREDENTIALS: Final = struct.Struct("iII")
"""struct ucred (unix(7)): process, user, group."""
_MAX_SIZE: Final = 64 << 20
"""Bytes of a status that are read."""


class StatusPort:
    """Answers each connection with ``status()``. Any number of processes of the user may ask.

    From the constructor on, who connects is answered as soon as `serve` runs.
    """

    def __init__(self, status: Callable[[], bytes]) -> None:
        """Raises nothing: the mount works without it."""
        self._status = status
        self.name = f"imapfs-{os.getpid()}-{secrets.token_hex(8)}"
        self._listener: socket.socket | None = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._listener.bind("\0" + self.name)
            self._listener.listen()
        except OSError as error:
            log.warning("'imapfs status' shows no files of this mount: %s", error)
            self._listener.close()
            self._listener, self.name = None, ""

    async def serve(self) -> None:
        """Answer until cancelled."""
        if self._listener is not None:
            with trio.socket.from_stdlib_socket(self._listener) as listener:
                await trio.serve_listeners(self._answer, [trio.SocketListener(listener)])

    async def _answer(self, stream: trio.SocketStream) -> None:
        with contextlib.suppress(trio.BrokenResourceError):
            async with stream:
                if belongs_to_us(stream.socket):
                    await stream.send_all(self._status())


def belongs_to_us(connection: Any) -> bool:
    """Return whether the other end of a Unix socket is a process of the same user."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    _, user, _ = _CREDENTIALS.unpack(credentials)
    return bool(user == os.getuid())


def read(name: str, timeout: float) -> dict[str, Any] | None:
    """Return the status that the socket ``name`` gives within ``timeout`` seconds.

    None if there is no such socket here (a container may have a network of its own), or if it is not the
    user's own: its name came from the file system. Raises OSError and ValueError if it gives no status.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(timeout)
        try:
            connection.connect("\0" + name)
        except ConnectionRefusedError:
            return None
        if not belongs_to_us(connection):
            return None
        data = bytearray()
        while len(data) < _MAX_SIZE and (more := connection.recv(1 << 16)):
            data += more
    found = json.loads(data)
    if not isinstance(found, dict):
        raise ValueError("no JSON object")
    return found
