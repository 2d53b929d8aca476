"""What happens to this machine that connections do not survive: sleep, and another network.

Nothing here wakes the process without a reason: the kernel tells. Of the network, through a netlink socket
(rtnetlink(7)) that is open to everybody; of a resume, through a timer that is never due and is cancelled
when the clock is set, which is what a resume does (TFD_TIMER_CANCEL_ON_SET of timerfd_create(2)). Whether
there was a sleep is seen from the clock that goes on meanwhile.
"""

import contextlib
import ctypes
import errno
import logging
import os
import socket
import time
from collections.abc import Callable
from typing import Final, NoReturn

import trio

log = logging.getLogger(__name__)

_ADDRESSES_AND_ROUTES: Final = 0x10 | 0x40 | 0x100 | 0x400
"""RTMGRP_IPV4_IFADDR, _IPV4_ROUTE, _IPV6_IFADDR, _IPV6_ROUTE. Not links: a radio reports itself all day."""
_SETTLE: Final = 0.5
"""Seconds in which changes count as one: an address comes with several routes."""
_SLEPT: Final = 2.0
"""Seconds of sleep from which on connections are given up."""
_TFD_TIMER: Final = 1 | 2
"""TFD_TIMER_ABSTIME, TFD_TIMER_CANCEL_ON_SET."""


class _Itimerspec(ctypes.Structure):
    _fields_ = [(name, ctypes.c_long) for name in ("every_s", "every_ns", "first_s", "first_ns")]


def slept() -> float:
    """Seconds that the machine has been asleep since it was started."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) - time.clock_gettime(time.CLOCK_MONOTONIC)


async def watch(on_change: Callable[[], None], on_resume: Callable[[], None]) -> None:
    """Call ``on_change`` when addresses or routes are others, ``on_resume`` after a sleep."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_watch_addresses, on_change)
        nursery.start_soon(_watch_clock, on_resume)


async def _watch_addresses(on_change: Callable[[], None]) -> None:
    try:
        news = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.NETLINK_ROUTE)
        with news:
            news.bind((0, _ADDRESSES_AND_ROUTES))
            while True:
                await trio.lowlevel.wait_readable(news)
                await trio.sleep(_SETTLE)
                _discard(news)
                on_change()
    except OSError as error:
        log.info("changes of the network are not noticed: %s", error)


def _discard(news: socket.socket) -> None:
    """That there is something to be read says it all; ENOBUFS only says that there was much."""
    with contextlib.suppress(BlockingIOError):
        while True:
            try:
                news.recv(1 << 16)
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise


async def _watch_clock(on_resume: Callable[[], None]) -> None:
    before = slept()
    try:
        timer = _never_due()
    except OSError as error:
        log.info("a sleep of this machine is not noticed: %s", error)
        return
    try:
        await _watch_timer(timer, before, on_resume)
    finally:
        os.close(timer)


async def _watch_timer(timer: int, before: float, on_resume: Callable[[], None]) -> NoReturn:
    while True:
        await trio.lowlevel.wait_readable(timer)
        with contextlib.suppress(OSError):
            os.read(timer, 8)  # ECANCELED, upon which it counts anew
        now = slept()
        if now - before > _SLEPT:
            log.info("the machine was asleep for %.0f s", now - before)
            on_resume()
        before = now


def _never_due() -> int:
    """A timer that can be waited for. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    timer = int(libc.timerfd_create(time.CLOCK_REALTIME, os.O_NONBLOCK | os.O_CLOEXEC))
    if timer < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    due = _Itimerspec(0, 0, 1 << 62, 0)
    if libc.timerfd_settime(timer, _TFD_TIMER, ctypes.byref(due), None) < 0:
        number = ctypes.get_errno()
        os.close(timer)
        raise OSError(number, os.strerror(number))
    return timer
