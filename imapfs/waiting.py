"""Waiting for other tasks: something that happens again and again, and how long to wait between attempts."""

import trio


class Signal:
    """Wakes whoever waits at that moment, any number of times. Used on the trio thread.

    A condition is checked before each wait: ``while not condition(): await signal.wait()``.
    """

    def __init__(self) -> None:
        self._event = trio.Event()

    def send(self) -> None:
        """Wake all who wait now."""
        event, self._event = self._event, trio.Event()
        event.set()

    async def wait(self) -> None:
        """Wait for the next `send`."""
        await self._event.wait()


class Flag:
    """Stays set until the one task that waits for it has seen it: no news is lost in between.

    Used on the trio thread.
    """

    def __init__(self) -> None:
        self._event = trio.Event()

    def set(self) -> None:
        """Let the next `wait` return at once."""
        self._event.set()

    async def wait(self) -> None:
        """Wait until the flag is set, and clear it."""
        await self._event.wait()
        self._event = trio.Event()


class Delays:
    """Delays in seconds that double from ``first`` up to ``maximum``."""

    def __init__(self, first: float, maximum: float) -> None:
        self._first = first
        self._maximum = maximum
        self._next = first

    def next(self) -> float:
        """Return the delay before the next attempt."""
        delay = self._next
        self._next = min(self._maximum, delay * 2)
        return delay

    async def sleep(self) -> None:
        """Wait for the next delay."""
        await trio.sleep(self.next())

    def reset(self) -> None:
        """Begin with the first delay again, after a success."""
        self._next = self._first
