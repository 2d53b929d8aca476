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
    """Answers each connection with ``status()``. Any number of processes of the user may ask."""

    def __init__(self, status: Callable[[], bytes]) -> None:
        self._status = status
        self.name = f"imapfs-{os.getpid()}-{secrets.token_hex(8)}"

    async def serve(self) -> None:
        """Answer until cancelled. Raises nothing: the mount works without it."""
        try:
            with trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
                await listener.bind("\0" + self.name)
                listener.listen()
                await trio.serve_listeners(self._answer, [trio.SocketListener(listener)])
        except OSError as error:
            log.warning("'imapfs status' shows no files of this mount: %s", error)

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
    """Return the status that the socket ``name`` gives within ``timeout`` seconds; None if it gives none.

    None as well if the socket is not the user's own: its name came from the file system.
    """
    with contextlib.suppress(OSError, ValueError, RecursionError):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(timeout)
            connection.connect("\0" + name)
            if not belongs_to_us(connection):
                return None
            data = bytearray()
            while len(data) < _MAX_SIZE and (more := connection.recv(1 << 16)):
                data += more
        found = json.loads(data)
        return found if isinstance(found, dict) else None
    return None
