"""Files that are not on the server, as commands show them to a person."""

import sys
from typing import Any

import click


def counted(number: int, what: str) -> str:
    """Return ``1 file`` or ``2 files``, for example."""
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def why_waiting(one: dict[str, Any]) -> str:
    """Return the state of a file that is to be uploaded; ``one`` is as in the status."""
    return f"{one['state']}: {one['error'] or 'not uploaded yet'}"


WHY_SCRATCH = "in a scratch directory, and so on this computer only"
"""What is said of a file that is never uploaded."""


class UploadProgress:
    """Shows on one line how many files are waiting, if stderr is a terminal."""

    def __init__(self, how_to_stop: str) -> None:
        self._how_to_stop = how_to_stop
        self._shown = False

    def show(self, count: int) -> None:
        """Show ``count``. The line appears with the first file and ends when none is left."""
        if sys.stderr.isatty() and (count or self._shown):
            self._shown = True
            click.echo(f"\r\x1b[K{count} files to upload ({self._how_to_stop})", err=True, nl=not count)

    def end(self) -> None:
        """End the line after an interruption."""
        if sys.stderr.isatty():
            click.echo(err=True)
