"""Tells those who watch a directory with inotify of what other clients did to it.

FUSE has no notification for that: the kernel makes an inotify event only of a system call. So a process of
the daemon's makes the system call that fits (`mknod` for an arrival, `unlink` for an expunge, ...) in the
mount, and the daemon, which sees the request, knows it for its own and changes nothing: it is an announcement
of what has happened already.

NEVER A CHANGE. A request is an announcement by where it comes from: the process id that the kernel gives with
it, which is proven once to be the one that we know, and is nobody else's until that process is reaped. What
it asks that is not the one announcement of this moment is refused; what anybody else asks is not looked at
here. And when the request comes, the tables must say that it has happened: what has come is there, what has
gone is not.

NEVER A DEADLOCK. The caller holds the lock of the directory in the kernel while it waits, hence it is
answered at once, from memory. It is a process and not a thread: see `caller`. Nothing in the daemon
but the one task here ever waits for it. A user's request in the same directory may keep it waiting: what is
to be announced waits then, up to `_MOST` events.
"""

import errno
import json
import logging
import os
import subprocess
import sys
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import trio

from imapfs.errors import NotFound, NotPermitted
from imapfs.fs.events import Event, EventKind, Place
from imapfs.fs.filesystem import Filesystem
from imapfs.fs.tree import Entry, MailTree
from imapfs.kernel import caller
from imapfs.kernel.invalidation import KernelCache
from imapfs.model import Ino
from imapfs.waiting import Flag

log = logging.getLogger(__name__)

_MOST: Final = 10_000
"""Events that wait. The kernel's own queue for one who watches has 16,384 (max_queued_events)."""
_FAILURES: Final = 3
"""How often in a row the caller may die before there are no announcements any more."""
_PATIENCE: Final = 5.0
"""Seconds to wait at the end of the mount for the caller's end."""
_CALLS: Final = {
    "arrived": "mknod",
    "expunged": "unlink",
    "moved": "rename",
    "flags": "utime",
    "created": "mkdir",
    "deleted": "rmdir",
    "renamed": "rename",
}


@dataclass(slots=True)
class _Expected:
    """The one announcement that is being made."""

    event: Event
    asked: bool = False
    """Whether its request has come, whatever the answer."""


class Announcer:
    """Announces events in the mount of ``fs`` at ``mountpoint``."""

    def __init__(
        self,
        fs: Filesystem,
        tree: MailTree,
        kernel: KernelCache,
        mountpoint: Path,
        read_only: bool,
    ) -> None:
        self._fs = fs
        self._tree = tree
        self._kernel = kernel
        self._mountpoint = mountpoint
        self._process: trio.Process | None = None
        self._waiting: deque[Event] = deque()
        self._news = Flag()
        self._overflow = False
        self._failures = 0
        self._asked = False
        """Whether the request of the event that is being announced has come: then it is not tried again."""
        self._expected: _Expected | None = None
        # On a mount that the kernel knows to be read-only the calls fail before they come here.
        self._active = not read_only

    def offer(self, event: Event) -> None:
        """Have an event announced, if anybody can be watching."""
        source = event.source or event.place
        # The kernel has each directory that is watched in its caches.
        is_held = any(self._kernel.holds(place.directory) for place in (event.place, source))
        if not self._active or not is_held:
            return
        if len(self._waiting) >= _MOST:
            if not self._overflow:
                log.info("more than %d changes at once: inotify does not tell of all", _MOST)
            self._overflow = True
            return
        self._overflow = False
        self._waiting.append(event)
        self._news.set()

    # -- making the calls ----------------------------------------------------------------------------------

    async def run(self) -> None:
        """Announce until cancelled. Raises nothing: a mount is of use without announcements too."""
        try:
            while self._failures < _FAILURES:
                try:
                    await self._run()
                except (OSError, ValueError, trio.BrokenResourceError) as error:
                    self._failures += 1
                    log.info("a change was not announced to inotify: %s", error)
                    await self._end_process()
            log.warning("changes made elsewhere are not announced to inotify any more")
        except Exception:
            log.exception("internal error: changes are not announced to inotify any more")
        finally:
            self._active = False
            self._waiting.clear()
            if self._process is not None:
                self._process.kill()

    async def end(self) -> None:
        """Wait for the caller to end. Only once the mount is gone: until then it may wait for an answer."""
        with trio.move_on_after(_PATIENCE):
            await self._end_process()

    async def _run(self) -> None:
        while True:
            while self._waiting:
                event = self._waiting.popleft()
                try:
                    await self._announce(event)
                except BaseException:
                    if not self._asked:
                        self._waiting.appendleft(event)
                    raise
                self._failures = 0
            await self._news.wait()

    async def _announce(self, event: Event) -> None:
        """Raises OSError, ValueError or BrokenResourceError if there can be no announcements."""
        self._asked = False
        if self._process is None:
            await self._start_process()
        arguments = self._arguments(event)
        if arguments is None or not self._is_so(event):
            return  # it was undone before it was told
        # The kernel may know a new name, for somebody has looked: before it makes one, it asks again.
        expected = self._expected = _Expected(event)
        try:
            code = await self._call(_CALLS[event.kind], *arguments)
        finally:
            self._expected, self._asked = None, expected.asked
        if code:
            log.debug("%s %s was not announced: %s", event.kind, event.place, os.strerror(code))

    def _arguments(self, event: Event) -> list[str | int] | None:
        """Where to make the call; None if a directory is not there any more."""
        found: list[str | int] = []
        for place in (event.source, event.place):
            if place is not None:
                path = self._tree.path(place.directory)
                if path is None:
                    return None
                directory = b"/".join(path or (b".",))
                found += [directory.decode("latin-1"), place.directory, place.name.decode("latin-1")]
        return found

    def _is_so(self, event: Event) -> bool:
        """Whether it has happened, and nothing else since, as far as names go."""
        there = self._find(event.place)
        if event.kind in {"expunged", "deleted"}:
            return there is None
        left = event.source is None or self._find(event.source) is None
        return there is not None and there.ino == event.ino and left

    def _find(self, place: Place) -> Entry | None:
        return self._fs.known(place.directory, place.name)

    async def _start_process(self) -> None:
        self._process = await trio.lowlevel.open_process(
            # -I and -S: it needs nothing but itself, and starts in a few milliseconds.
            [sys.executable, "-I", "-S", caller.__file__, os.fsencode(self._mountpoint)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd="/",
            # Ctrl-C in the terminal is for the daemon, which then ends this.
            start_new_session=True,
        )
        code = await self._call("prove")
        if code:
            raise OSError(code, f"the mount does not know its own process: {os.strerror(code)}")

    async def _call(self, what: str, *arguments: str | int) -> int:
        """The errno of a system call."""
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        await process.stdin.send_all(json.dumps([what, *arguments]).encode() + b"\n")
        answer = b""
        while not answer.endswith(b"\n"):
            more = await process.stdout.receive_some()
            if not more:
                raise BrokenPipeError(errno.EPIPE, "the process that announces has ended")
            answer += more
        return int(answer)

    async def _end_process(self) -> None:
        """The process id is known for ours until the process is reaped, and may be anybody's after that."""
        process = self._process
        if process is not None:
            process.kill()
            await process.wait()
            self._process = None
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    await stream.aclose()

    # -- answering their requests --------------------------------------------------------------------------

    def is_own(self, pid: int) -> bool:
        """Whether a request comes from the process that announces; then it is answered here, or refused."""
        return self._process is not None and self._process.pid == pid

    def lookup(self, parent: Ino, name: bytes) -> Entry:
        """What the caller is to see: everything as it was just before the event. Raises NotFound."""
        event = self._expected.event if self._expected is not None else None
        if event is not None:
            place, here = event.place, (parent, name)
            before = event.source or place
            if here == (before.directory, before.name) and event.kind in {"moved", "renamed"}:
                return self._fs.getattr(event.ino)
            if here == (place.directory, place.name):
                if event.gone is not None:
                    return Entry.of_node(event.gone)
                if event.kind != "flags":
                    raise NotFound("it is about to be announced")
        found = self._fs.known(parent, name)
        if found is None:
            raise NotFound("no such file")
        return found

    def make(self, parent: Ino, name: bytes, *, directory: bool) -> Entry:
        """mknod or mkdir of what is there already. Raises NotPermitted, as all that follow."""
        event = self._claim({"created"} if directory else {"arrived"}, (parent, name))
        return self._fs.getattr(event.ino)

    def remove(self, parent: Ino, name: bytes, *, directory: bool) -> None:
        """unlink or rmdir of what is gone."""
        self._claim({"deleted"} if directory else {"expunged"}, (parent, name))

    def rename(self, parent: Ino, name: bytes, new_parent: Ino, new_name: bytes) -> None:
        """rename of what has another name already."""
        self._claim({"moved", "renamed"}, (parent, name), (new_parent, new_name))

    def touch(self, ino: Ino) -> Entry:
        """utimensat of a message that has other flags."""
        expected = self._expected
        if expected is None or expected.event.kind != "flags" or expected.event.ino != ino:
            raise NotPermitted("nothing of the kind is to be announced")
        expected.asked = True
        return self._fs.getattr(ino)

    def _claim(self, kinds: set[EventKind], *entries: tuple[Ino, bytes]) -> Event:
        """The event that a request announces: the one that is expected, if it is still so."""
        expected = self._expected
        if expected is None or expected.event.kind not in kinds:
            raise NotPermitted("nothing of the kind is to be announced")
        event = expected.event
        places = [event.place] if event.source is None else [event.source, event.place]
        if [(place.directory, place.name) for place in places] != list(entries):
            raise NotPermitted("something else is to be announced")
        expected.asked = True
        if not self._is_so(event):
            raise NotPermitted("it is not so any more")
        return event
