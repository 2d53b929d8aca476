"""Those who watch a mount: a real inotifywait, and `imapfs watch`."""

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO

from tests.support.mounting import ROOT, Mount, wait_until


class Watcher:
    """A program that prints a line for each event; it has begun to watch once this is made."""

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
            threading.Thread(target=_collect, args=(self.process.stdout, self.lines)),
            threading.Thread(target=_collect, args=(self.process.stderr, self.errors)),
        ]
        for thread in self._threads:
            thread.start()
        wait_until(lambda: any(ready in line for line in self.errors), f"{command[0]} watches")

    def wait(self) -> int:
        """Wait for its end, and return its exit code; all lines are there then."""
        wait_until(lambda: self.process.poll() is not None, "the end of a watcher")
        for thread in self._threads:
            thread.join()
        return self.process.returncode

    def close(self) -> None:
        self.process.kill()
        self.wait()


def _collect(stream: IO[str], lines: list[str]) -> None:
    with stream:
        lines.extend(line.rstrip("\n") for line in stream)


@contextlib.contextmanager
def inotifywait(*directories: Path) -> Iterator[Watcher]:
    """Watch directories; a line has the events, the directory's name, and the entry's."""
    events = "create,delete,move,attrib"
    watcher = Watcher(
        ["inotifywait", "-m", "-e", events, "--format", "%e %w%f", *directories], "Watches established"
    )
    try:
        yield watcher
    finally:
        watcher.close()


@contextlib.contextmanager
def imapfs_watch(mount: Mount, *arguments: str) -> Iterator[Watcher]:
    """Run `imapfs watch`."""
    watcher = Watcher([sys.executable, "-m", "imapfs", "watch", mount.path, *arguments], "watching")
    try:
        yield watcher
    finally:
        watcher.close()


def look(*directories: Path) -> None:
    """Open directories, which has the daemon ask the server, and read nothing of them."""
    for directory in directories:
        os.close(os.open(directory, os.O_RDONLY | os.O_DIRECTORY))


def wait_looking(condition: Callable[[], object], what: str, *directories: Path) -> None:
    """Wait for ``condition``, which needs the news of ``directories``."""

    def looked() -> object:
        look(*directories)
        return condition()

    wait_until(looked, what)
