"""Those who watch a mount: a real inotifywait, and `imapfs watch`."""

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.mounting import ROOT, Mount, wait_until


class Watcher:
    """A program that prints a line for each event."""

    def __init__(self, command: Sequence[str | Path], ready: str) -> None:
        self.lines: list[str] = []
        self.errors: list[str] = []
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        self._threads = [
            threading.Thread(target=self._collect, args=pair)
            for pair in ((self.process.stdout, self.lines), (self.process.stderr, self.errors))
        ]
        for thread in self._threads:
            thread.start()
        wait_until(lambda: any(ready in line for line in self.errors), f"{command[0]} watches")

    @staticmethod
    def _collect(stream, lines):
        for line in stream:
            lines.append(line.rstrip("\n"))

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for thread in self._threads:
            thread.join()


@contextlib.contextmanager
def inotifywait(directory: Path) -> Iterator[Watcher]:
    watcher = Watcher(
        ["inotifywait", "-m", "-e", "create,delete,move,attrib,delete_self", "--format", "%e %f", directory],
        "Watches established",
    )
    try:
        yield watcher
    finally:
        watcher.close()


@contextlib.contextmanager
def imapfs_watch(mount: Mount, *arguments: str) -> Iterator[Watcher]:
    watcher = Watcher([sys.executable, "-m", "imapfs", "watch", mount.path, *arguments], "watching")
    try:
        yield watcher
    finally:
        watcher.close()


def look(directory: Path) -> None:
    """Open a directory, which has the daemon ask the server, and read nothing of it."""
    os.close(os.open(directory, os.O_RDONLY | os.O_DIRECTORY))
