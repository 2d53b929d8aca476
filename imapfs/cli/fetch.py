"""``imapfs fetch``: read all messages below a directory of a mount, so that they are in the cache.

To the mount this is an ordinary program that reads files; it is fast because the daemon prefetches. It can be
interrupted at any time: what is cached already is read from the disk by the next run.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

import click

from imapfs.cli.parameters import DIRECTORY
from imapfs.errors import ImapfsError, UsageError
from imapfs.log import one_line
from imapfs.mountinfo import imapfs_mounts

_READERS: Final = 4
_CHUNK: Final = 1 << 20
_MAX_ERRORS: Final = 10
"""Number of errors that are printed."""


@click.command()
@click.argument("directory", type=DIRECTORY)
def fetch(directory: Path) -> None:
    """Fetch all messages below DIRECTORY into the cache.

    DIRECTORY must be inside a mount. Can be stopped at any time; run it again to continue.
    """
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.progress import TransferSpeedColumn as SpeedColumn

    console = Console(stderr=True)
    with console.status(f"looking for messages in {directory}"):
        messages = _find(directory)
    errors: list[str] = []
    columns = TextColumn("Ctrl-C stops"), BarColumn(), DownloadColumn(), SpeedColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("fetch", total=messages.size)
        for outcome in _read_all(messages.files):
            progress.advance(task, outcome.size)
            if outcome.error:
                errors.append(outcome.error)
    for line in errors[:_MAX_ERRORS]:
        click.echo(one_line(line), err=True)
    if errors:
        raise ImapfsError(f"{len(errors)} of {len(messages.files)} messages were not fetched: run it again")
    click.echo(f"{len(messages.files)} messages are in the cache")


class _Messages(NamedTuple):
    files: list[Path]
    size: int
    """Total in bytes, as far as it is known before the files are read."""


class _Outcome(NamedTuple):
    """The result of reading one message."""

    size: int
    """Bytes read."""
    error: str
    """Why it could not be read, or ""."""


def _find(directory: Path) -> _Messages:
    """Return all messages below ``directory``. Raises UsageError if it is not in a mount of imapfs."""
    root = Path(os.path.realpath(directory))
    if not any(root == m.mountpoint or m.mountpoint in root.parents for m in imapfs_mounts()):
        raise UsageError(f"{directory} is not in an imapfs mount: 'imapfs status' lists the mounts")
    files, size = [], 0
    for parent, _, names in os.walk(root, onerror=_refuse):
        # Unsorted: a directory lists messages in the order in which the server has them.
        for name in names:
            path = Path(parent, name)
            try:
                size += path.stat().st_size
            except FileNotFoundError:
                continue  # Deleted meanwhile.
            files.append(path)
    return _Messages(files, size)


def _refuse(error: OSError) -> None:
    raise ImapfsError(f"{error.filename} cannot be listed: {error.strerror}") from None


def _read_all(files: list[Path]) -> Iterator[_Outcome]:
    """Read ``files``, several at a time, and yield each outcome as soon as there is one."""
    from concurrent.futures import ThreadPoolExecutor, as_completed

    with ThreadPoolExecutor(_READERS) as readers:
        try:
            for done in as_completed([readers.submit(_read, path) for path in files]):
                yield done.result()
        finally:
            readers.shutdown(wait=False, cancel_futures=True)


def _read(path: Path) -> _Outcome:
    size = 0
    try:
        with path.open("rb", buffering=0) as file:
            while data := file.read(_CHUNK):
                size += len(data)
    except FileNotFoundError:
        return _Outcome(0, "")
    except OSError as error:
        return _Outcome(size, f"{path}: {error.strerror}")
    return _Outcome(size, "")
