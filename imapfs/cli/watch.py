"""`imapfs watch`: the events of a mount, from its daemon to whatever reads them."""

import json
import select
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from imapfs import mountinfo
from imapfs.daemon import control
from imapfs.errors import ImapfsError
from imapfs.fs.events import address

_PATIENCE: Final = 3.0
"""Seconds that a mount may take to vanish once its daemon has ended the connection."""


class Closed(Exception):
    """Whoever read the events does not any more."""


def events(mountpoint: Path, output: int) -> Iterator[dict[str, Any]]:
    """The events of a mount, as they come, until it is unmounted; the first says that nothing is missed now.

    Raises Closed as soon as ``output``, a descriptor, is a pipe that nobody reads; ImapfsError if the mount
    or its daemon is not there or dies.
    """
    status = control.read_status(mountpoint)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        try:
            with address(Path(status["cache"]["path"])) as short:
                connection.connect(short)
        except (OSError, KeyError) as error:
            raise ImapfsError(
                f"{mountpoint}: its daemon tells of no events ({error}): mount it again"
            ) from None
        for line in _lines(connection, output):
            yield json.loads(line)
    _check_end(mountpoint)


def _lines(connection: socket.socket, output: int) -> Iterator[bytes]:
    poll = select.poll()
    poll.register(connection, select.POLLIN)
    # Without any event asked for: there is POLLERR when the last reader of a pipe has gone.
    poll.register(output, 0)
    data = b""
    while True:
        for fd, _ in poll.poll():
            if fd == output:
                raise Closed
        more = _receive(connection)
        if not more:
            return
        *lines, data = (data + more).split(b"\n")
        yield from lines


def _receive(connection: socket.socket) -> bytes:
    try:
        return connection.recv(1 << 16)
    except ConnectionError:
        return b""  # the daemon was killed


def _check_end(mountpoint: Path) -> None:
    """Wait until the mount has ended too. Raises ImapfsError if only its daemon has."""
    deadline = time.monotonic() + _PATIENCE
    while mountinfo.mount_at(mountpoint) is not None:
        if time.monotonic() > deadline:
            control.read_status(mountpoint)
            raise ImapfsError(f"{mountpoint}: its daemon has ended the connection: watch it again")
        time.sleep(0.05)


def as_text(event: dict[str, Any]) -> str:
    """An event as a line for people."""
    directory = "/" if event["event"] in {"created", "deleted", "renamed"} else ""
    if event["event"] == "lost":
        what = f"{event['count']} events: this reader is too slow"
    elif "from" in event:
        what = f"{event['from']}{directory} -> {event['path']}{directory}"
    else:
        what = f"{event['path']}{directory}"
    flags = " ".join(event["flags"]) if event["event"] == "flags" else ""
    return f"{event['time']} {event['event']} {what} {flags}".rstrip()
