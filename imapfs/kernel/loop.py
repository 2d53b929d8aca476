"""How requests are waited for: a stand-in for `trio` in pyfuse3 that does not wait where it need not.

pyfuse3 takes its event loop from its module attribute ``trio``; its asyncio mode replaces it in the same way.
For each request it takes a lock and waits until the descriptor is readable. With trio itself that is a turn
of the scheduler for each of the two, and the system calls of epoll. Where requests are answered from memory,
and come one after another, this is most of what a request costs. The stand-in is trio in everything but two
things:

- `Lock` does not yield if it is free. Who releases it wakes one task that waits, but does not hand it over:
  if the next request comes first, it is taken without any change of tasks.
- `Requests.wait_readable` asks ``poll`` before it waits.

So that all other tasks have their turn, each `MAX_IN_A_ROW`-th request in a row begins with a checkpoint. A
task that is ready to run waits for at most twice as many requests, as trio runs what is ready in any order.

*Spinning.* If the process sleeps between two requests, then the kernel has to wake it, often on another
processor, and that takes longer than many an answer. So the process asks ``poll`` again for up to `MAX_SPIN`
before it sleeps, but only if the request before also came within that time; otherwise it would be a waste. A
first request that comes late ends this. Hence a process that is idle sleeps, and is not woken. On one
processor the program that asks could not run meanwhile: there is no spinning.
"""

import contextlib
import logging
import os
import select
import time
from collections import OrderedDict
from collections.abc import Iterator
from types import ModuleType, TracebackType
from typing import Any, Final

import trio

log = logging.getLogger(__name__)

MAX_IN_A_ROW: Final = 64
"""Requests that are taken without a checkpoint."""
MAX_SPIN: Final = 60e-6
"""Seconds in which ``poll`` is asked again before the process sleeps."""
_MAX_WAKING: Final = 60e-6
"""Seconds that waking the process may add to the time in which a request came."""
_ATTRIBUTE: Final = "trio"


class Lock:
    """A lock for tasks that yields only if it is taken. Those who wait take turns, but can be overtaken."""

    def __init__(self) -> None:
        self._taken = False
        self._waiting: OrderedDict[trio.lowlevel.Task, None] = OrderedDict()
        self._woken: trio.lowlevel.Task | None = None
        """The task that was woken and has not run yet. While there is one, no other is woken."""

    async def __aenter__(self) -> None:
        if self._taken:
            await self._wait()
        self._taken = True

    async def _wait(self) -> None:
        task = trio.lowlevel.current_task()

        def abort(_: object) -> trio.lowlevel.Abort:
            del self._waiting[task]
            return trio.lowlevel.Abort.SUCCEEDED

        while self._taken:
            self._waiting[task] = None
            if self._woken is task:
                # It was overtaken, and is still the first.
                self._woken = None
                self._waiting.move_to_end(task, last=False)
            await trio.lowlevel.wait_task_rescheduled(abort)
        self._woken = None

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._taken = False
        if self._waiting and self._woken is None:
            self._woken, _ = self._waiting.popitem(last=False)
            trio.lowlevel.reschedule(self._woken)


class Requests:
    """Waits for the requests of one descriptor after another; ``spin``: see the description of the module."""

    def __init__(self, *, spin: bool) -> None:
        self._may_spin = spin
        self._poll = select.poll()
        self._fd = -1
        self._in_a_row = 0
        self._close_together = False

    async def wait_readable(self, fd: int) -> None:
        """Return when a descriptor is readable, or has an error that reading it will tell."""
        if fd != self._fd:
            self._poll, self._fd = select.poll(), fd
            self._poll.register(fd, select.POLLIN)
        self._in_a_row += 1
        if self._in_a_row >= MAX_IN_A_ROW:
            self._in_a_row = 0
            await trio.lowlevel.checkpoint()
        poll = self._poll.poll
        if poll(0):
            return
        started = time.perf_counter()
        if self._close_together:
            end = started + MAX_SPIN
            while time.perf_counter() < end:
                if poll(0):
                    return
        self._in_a_row = 0
        await trio.lowlevel.wait_readable(fd)
        took = time.perf_counter() - started
        self._close_together = self._may_spin and took < MAX_SPIN + _MAX_WAKING


class _StandIn:
    """A module in which some names are replaced."""

    def __init__(self, module: ModuleType, **replaced: Any) -> None:
        self._module = module
        self.__dict__.update(replaced)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


@contextlib.contextmanager
def quick_requests(library: ModuleType) -> Iterator[None]:
    """Let ``library``, which is pyfuse3, take requests as this module describes, while the block lasts.

    If it does not have its event loop in the known place, the library stays as it is, and the log says so.
    """
    if getattr(library, _ATTRIBUTE, None) is not trio:
        log.info("this version of pyfuse3 is not known to have its event loop replaced: requests take longer")
        yield
        return
    requests = Requests(spin=len(os.sched_getaffinity(0)) > 1)
    lowlevel = _StandIn(trio.lowlevel, wait_readable=requests.wait_readable)
    setattr(library, _ATTRIBUTE, _StandIn(trio, lowlevel=lowlevel, Lock=Lock))
    try:
        yield
    finally:
        setattr(library, _ATTRIBUTE, trio)
