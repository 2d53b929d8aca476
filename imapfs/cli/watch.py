"""``imapfs watch``: print the events of a mount, which its daemon sends through a Unix socket."""

import json
import os
import select
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import click

from imapfs import mountinfo
from imapfs.cli.parameters import LIVE_MOUNT
from imapfs.errors import ImapfsError
from imapfs.log import one_line

_UNMOUNT_TIMEOUT: Final = 3.0
"""Seconds that a mount may take to disappear after its daemon has closed the connection."""


@click.command()
@click.argument("mountpoint", type=LIVE_MOUNT)
@click.option("--json", "as_json", is_flag=True, help="Print JSON: one object per line.")
def watch(mountpoint: Path, as_json: bool) -> None:
    """Print what other clients change in a mount, as it happens.

    Ends when MOUNTPOINT is unmounted, or with Ctrl-C.
    """
    try:
        for event in _events(mountpoint, sys.stdout.fileno()):
            if event["event"] == "watching":
                click.echo(one_line(f"watching {mountpoint}: Ctrl-C ends it"), err=True)
            else:
                click.echo(json.dumps(event) if as_json else one_line(_as_text(event)))
    except (_OutputClosed, BrokenPipeError):
        # Python would try to write the rest of the buffer at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return
    click.echo(one_line(f"{mountpoint} was unmounted"), err=True)


class _OutputClosed(Exception):
    """The program that read the output has ended."""


def _events(mountpoint: Path, output: int) -> Iterator[dict[str, Any]]:
    """Yield the events of a mount until it is unmounted. The first says that no later event will be missed.

    Raises _OutputClosed as soon as ``output``, a file descriptor, is a pipe without a reader. Raises
    ImapfsError if the mount does not exist or its daemon does not answer or dies.
    """
    from imapfs.daemon import control
    from imapfs.fs.events import address

    status = control.read_status(mountpoint)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        try:
            with address(Path(status["cache"]["path"])) as short:
                connection.connect(short)
        except (OSError, KeyError) as error:
            raise ImapfsError(
                f"{mountpoint}: the daemon does not offer events ({error}): unmount it and mount it again"
            ) from None
        for line in _lines(connection, output):
            yield json.loads(line)
    _check_end(mountpoint)


def _lines(connection: socket.socket, output: int) -> Iterator[bytes]:
    poll = select.poll()
    poll.register(connection, select.POLLIN)
    # With no events requested, poll() still reports POLLERR when the last reader of a pipe is gone.
    poll.register(output, 0)
    data = b""
    while True:
        for fd, _ in poll.poll():
            if fd == output:
                raise _OutputClosed
        more = _receive(connection)
        if not more:
            return
        *lines, data = (data + more).split(b"\n")
        yield from lines


def _receive(connection: socket.socket) -> bytes:
    try:
        return connection.recv(1 << 16)
    except ConnectionError:
        return b""  # The daemon was killed.


def _check_end(mountpoint: Path) -> None:
    """Wait until the mount has ended too. Raises ImapfsError if only its daemon has."""
    from imapfs.daemon import control

    deadline = time.monotonic() + _UNMOUNT_TIMEOUT
    while mountinfo.mount_at(mountpoint) is not None:
        if time.monotonic() > deadline:
            control.read_status(mountpoint)
            raise ImapfsError(f"{mountpoint}: the daemon closed the connection: run it again")
        time.sleep(0.05)


def _as_text(event: dict[str, Any]) -> str:
    """Return an event as a line for people."""
    directory = "/" if event["event"] in {"created", "deleted", "renamed"} else ""
    if event["event"] == "lost":
        what = f"{event['count']} events: this reader is too slow"
    elif "from" in event:
        what = f"{event['from']}{directory} -> {event['path']}{directory}"
    else:
        what = f"{event['path']}{directory}"
    flags = " ".join(event["flags"]) if event["event"] == "flags" else ""
    return f"{event['time']} {event['event']} {what} {flags}".rstrip()
