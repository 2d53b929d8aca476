"""A person at a terminal: a program in a pseudo-terminal, what it shows, and what is typed."""

import contextlib
import os
import pty
import select
import signal
import time
from collections.abc import Mapping, Sequence
from types import TracebackType

DEADLINE = 60.0
"""Seconds that the program may take for its next words before it counts as stuck."""


class Terminal:
    """``command`` running in a terminal of its own while the ``with`` block lasts."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self._command = list(command)
        self._environment = dict(environment)
        self.shown = ""
        """All that was on the screen so far, with what was typed."""
        self._read = 0
        self._code: int | None = None

    def __enter__(self) -> "Terminal":
        self._child, self._screen = pty.fork()
        if self._child == 0:
            try:
                os.execvpe(self._command[0], self._command, self._environment)
            finally:
                os._exit(127)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if self._code is None:
            os.kill(self._child, signal.SIGKILL)
            os.waitpid(self._child, 0)
        os.close(self._screen)

    def expect(self, text: str) -> str:
        """Wait until ``text`` is shown, and return what came since the last call, up to its end."""
        deadline = time.monotonic() + DEADLINE
        while text not in self.shown[self._read :]:
            assert self._more(deadline), f"ended without {text!r}:\n{self.shown}"
        end = self.shown.index(text, self._read) + len(text)
        said = self.shown[self._read : end]
        self._read = end
        return said

    def type(self, text: str) -> None:
        """Type a line."""
        os.write(self._screen, text.encode() + b"\n")

    def answer(self, question: str, text: str) -> str:
        """Wait for ``question`` and type ``text``; returns what was shown before and with it."""
        said = self.expect(question)
        self.type(text)
        return said

    def interrupt(self) -> int:
        """Press Ctrl-C until the program ends, and return its exit code.

        Once is not enough: a signal that comes just before Python begins to read a line is seen after it.
        """
        deadline = time.monotonic() + DEADLINE
        more = True
        while more:
            with contextlib.suppress(OSError):
                os.write(self._screen, b"\x03")
            with contextlib.suppress(TimeoutError):
                while more := self._more(time.monotonic() + 1.0):
                    assert time.monotonic() < deadline, self.shown
        return self.end()

    def end(self) -> int:
        """Wait for the program to end, and return its exit code."""
        deadline = time.monotonic() + DEADLINE
        while self._more(deadline):
            pass
        _, status = os.waitpid(self._child, 0)
        self._code = os.waitstatus_to_exitcode(status)
        return self._code

    def _more(self, deadline: float) -> bool:
        """Whether there was more to come."""
        ready, _, _ = select.select([self._screen], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            raise TimeoutError(f"nothing more in time:\n{self.shown}")
        # Linux reports that nobody has the other side any more as EIO.
        with contextlib.suppress(OSError):
            data = os.read(self._screen, 4096)
            self.shown += data.decode(errors="replace")
            return bool(data)
        return False
