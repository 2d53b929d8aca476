"""The progress of uploads on a terminal, for the commands that wait for them."""

import sys

import click


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
