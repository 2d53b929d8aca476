"""Notices events that connections do not survive: a change of the network, and sleep.

The kernel reports both, so the process is never woken without need. Changes of the network come through a
netlink socket (rtnetlink(7)), which needs no privileges. A resume sets the clock, which cancels a timer that
never expires (TFD_TIMER_CANCEL_ON_SET of timerfd_create(2)). Whether the machine was asleep follows from
CLOCK_BOOTTIME, which runs on during sleep, while CLOCK_MONOTONIC stands still.
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
"""RTMGRP_IPV4_IFADDR, _IPV4_ROUTE, _IPV6_IFADDR, _IPV6_ROUTE. No links: wireless ones report all the time."""
_SETTLE: Final = 0.5
"""Seconds during which changes count as one: a new address comes with several routes."""
_MIN_SLEEP: Final = 2.0
"""Seconds of sleep after which connections are given up."""
_TFD_TIMER: Final = 1 | 2
"""TFD_TIMER_ABSTIME, TFD_TIMER_CANCEL_ON_SET."""


class _Itimerspec(ctypes.Structure):
    _fields_ = [(name, ctypes.c_long) for name in ("every_s", "every_ns", "first_s", "first_ns")]


def slept() -> float:
    """Return for how many seconds the machine has been asleep since it was started."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) - time.clock_gettime(time.CLOCK_MONOTONIC)


async def watch(on_change: Callable[[], None], on_resume: Callable[[], None]) -> None:
    """Call ``on_change`` when addresses or routes have changed, and ``on_resume`` after a sleep."""
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
        log.info("cannot detect changes of the network: %s", error)


def _discard(news: socket.socket) -> None:
    """Discard all messages: their arrival is all that matters. ENOBUFS means that some were lost."""
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
        log.info("cannot detect that this machine was asleep: %s", error)
        return
    try:
        await _watch_timer(timer, before, on_resume)
    finally:
        os.close(timer)


async def _watch_timer(timer: int, before: float, on_resume: Callable[[], None]) -> NoReturn:
    while True:
        await trio.lowlevel.wait_readable(timer)
        with contextlib.suppress(OSError):
            os.read(timer, 8)  # ECANCELED; the next change is reported again
        now = slept()
        if now - before > _MIN_SLEEP:
            log.info("the machine was asleep for %.0f s", now - before)
            on_resume()
        before = now


def _never_due() -> int:
    """Return the descriptor of a timer that never expires. Raises OSError."""
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
