"""Makes inotify report what other clients did to a mailbox.

FUSE has no notification for this: the kernel makes an inotify event only for a system call. So a helper
process of the daemon makes the matching system call in the mount (`mknod` for an arrival, `unlink` for an
expunge, ...). The daemon recognises the request as its own and changes nothing: the request only announces
what has already happened.

NEVER A CHANGE. A request is an announcement because of its process id, which the kernel supplies. That id is
proven once to be the helper's, and no other process can have it until the helper is reaped. Of the helper's
requests only the one announcement that is expected at that moment is answered; all others are refused. When
it comes, the cache must still agree: what has arrived exists, and what was removed does not.

NEVER A DEADLOCK. The helper holds the kernel's lock on the directory while it waits, so it is answered at
once and from memory. It is a process and not a thread for the reason given in `caller`. In the daemon only
the task of `Announcer.run` waits for it. A user's request in the same directory may delay the helper; up to
`_MAX_WAITING` events are queued meanwhile.
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

from imapfs import mountinfo
from imapfs.errors import NotFound, NotPermitted
from imapfs.fs.events import Event, EventKind, Place
from imapfs.fs.filesystem import Filesystem
from imapfs.fs.tree import Entry, MailTree
from imapfs.kernel import caller
from imapfs.kernel.invalidation import KernelCache
from imapfs.model import Ino
from imapfs.waiting import Flag

log = logging.getLogger(__name__)

_MAX_WAITING: Final = 10_000
"""Events in the queue. The kernel's queue for one inotify instance has 16,384 (max_queued_events)."""
_MAX_FAILURES: Final = 3
"""Consecutive failures of the helper process after which announcements end."""
_MAX_END_PATIENCE: Final = 5.0
"""Seconds to wait for the helper process to end once the mount has ended."""
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
    """The announcement that is being made."""

    event: Event
    requested: bool = False
    """Whether its request has come, however it was answered."""


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
        self._requested = False
        """Whether the request for the current event has come, so that the event is not announced again."""
        self._expected: _Expected | None = None
        # In a read-only mount the kernel refuses the calls before they reach the daemon.
        self._active = not read_only

    def offer(self, event: Event) -> None:
        """Queue an event for announcement if its directory can have watchers."""
        source = event.source or event.place
        # The kernel keeps the inode of a watched directory in its cache.
        is_held = any(self._kernel.holds(place.directory) for place in (event.place, source))
        if not self._active or not is_held:
            return
        if len(self._waiting) >= _MAX_WAITING:
            if not self._overflow:
                log.info("more than %d changes at once: inotify does not report all of them", _MAX_WAITING)
            self._overflow = True
            return
        self._overflow = False
        self._waiting.append(event)
        self._news.set()

    # -- making the calls ----------------------------------------------------------------------------------

    async def run(self) -> None:
        """Announce events until cancelled. Raises nothing: the mount works without announcements."""
        try:
            while self._failures < _MAX_FAILURES:
                try:
                    await self._run()
                except (OSError, ValueError, trio.BrokenResourceError) as error:
                    if not self._is_mounted():
                        # Programs that have a file open keep a detached mount alive.
                        log.info("inotify reports nothing in a mount that is detached")
                        return
                    self._failures += 1
                    log.info("inotify did not report a change: %s", error)
                    await self._end_process()
            log.warning("inotify no longer reports changes by other clients")
        except Exception:
            log.exception("internal error: inotify no longer reports changes by other clients")
        finally:
            self._active = False
            self._waiting.clear()
            if self._process is not None:
                self._process.kill()

    def _is_mounted(self) -> bool:
        mount = mountinfo.mount_at(self._mountpoint)
        return mount is not None and mount.fstype == mountinfo.FSTYPE

    async def end(self) -> None:
        """End the helper process. Call this once the mount has ended: before, it may wait for an answer."""
        with trio.move_on_after(_MAX_END_PATIENCE):
            await self._end_process()

    async def _run(self) -> None:
        while True:
            while self._waiting:
                event = self._waiting.popleft()
                try:
                    await self._announce(event)
                except BaseException:
                    if not self._requested:
                        self._waiting.appendleft(event)
                    raise
                self._failures = 0
            await self._news.wait()

    async def _announce(self, event: Event) -> None:
        """Announce one event. Raises OSError, ValueError, BrokenResourceError if the helper process fails."""
        self._requested = False
        if self._process is None:
            await self._start_process()
        arguments = self._arguments(event)
        if arguments is None or not self._is_current(event):
            return  # undone before it was announced
        # The kernel may have the new name in its cache, but looks it up again before it creates an entry.
        expected = self._expected = _Expected(event)
        try:
            code = await self._call(_CALLS[event.kind], *arguments)
        finally:
            self._expected, self._requested = None, expected.requested
        if code:
            log.debug("%s %s was not announced: %s", event.kind, event.place, os.strerror(code))

    def _arguments(self, event: Event) -> list[str | int] | None:
        """Return where to make the call; None if a directory no longer exists."""
        found: list[str | int] = []
        for place in (event.source, event.place):
            if place is not None:
                path = self._tree.path(place.directory)
                if path is None:
                    return None
                directory = b"/".join(path or (b".",))
                found += [directory.decode("latin-1"), place.directory, place.name.decode("latin-1")]
        return found

    def _is_current(self, event: Event) -> bool:
        """Return whether the names in the cache are still those that the event led to."""
        found = self._find(event.place)
        if event.kind in {"expunged", "deleted"}:
            return found is None
        has_left = event.source is None or self._find(event.source) is None
        return found is not None and found.ino == event.ino and has_left

    def _find(self, place: Place) -> Entry | None:
        return self._fs.known(place.directory, place.name)

    async def _start_process(self) -> None:
        self._process = await trio.lowlevel.open_process(
            # With -I and -S it starts in a few milliseconds; it needs only the standard library.
            [sys.executable, "-I", "-S", caller.__file__, os.fsencode(self._mountpoint)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd="/",
            # Ctrl-C in the terminal is for the daemon, which then ends this process.
            start_new_session=True,
        )
        code = await self._call("prove")
        if code:
            raise OSError(code, f"the mount does not recognise its helper process: {os.strerror(code)}")

    async def _call(self, what: str, *arguments: str | int) -> int:
        """Have the helper make a system call, and return its errno; 0 for success."""
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        await process.stdin.send_all(json.dumps([what, *arguments]).encode() + b"\n")
        answer = b""
        while not answer.endswith(b"\n"):
            more = await process.stdout.receive_some()
            if not more:
                raise BrokenPipeError(errno.EPIPE, "the helper process has ended")
            answer += more
        return int(answer)

    async def _end_process(self) -> None:
        """Kill and reap the helper. From then on another process can have its id."""
        process = self._process
        if process is not None:
            process.kill()
            await process.wait()
            self._process = None
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    await stream.aclose()

    # -- answering its requests ----------------------------------------------------------------------------

    def is_own(self, pid: int) -> bool:
        """Return whether a request comes from the helper process, so that only this class may answer it."""
        return self._process is not None and self._process.pid == pid

    def lookup(self, parent: Ino, name: bytes) -> Entry:
        """Return what a directory had under a name just before the event. Raises NotFound."""
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
                    raise NotFound("not announced yet")
        found = self._fs.known(parent, name)
        if found is None:
            raise NotFound("no such file")
        return found

    def make(self, parent: Ino, name: bytes, *, directory: bool) -> Entry:
        """Answer mknod or mkdir of what has arrived.

        This and the following methods raise NotPermitted unless their announcement is expected.
        """
        event = self._claim({"created"} if directory else {"arrived"}, (parent, name))
        return self._fs.getattr(event.ino)

    def remove(self, parent: Ino, name: bytes, *, directory: bool) -> None:
        """Answer unlink or rmdir of what was removed."""
        self._claim({"deleted"} if directory else {"expunged"}, (parent, name))

    def rename(self, parent: Ino, name: bytes, new_parent: Ino, new_name: bytes) -> None:
        """Answer rename of what has already moved."""
        self._claim({"moved", "renamed"}, (parent, name), (new_parent, new_name))

    def touch(self, ino: Ino) -> Entry:
        """Answer utimensat of a message whose flags changed."""
        expected = self._expected
        if expected is None or expected.event.kind != "flags" or expected.event.ino != ino:
            raise NotPermitted("no such announcement is expected")
        expected.requested = True
        return self._fs.getattr(ino)

    def _claim(self, kinds: set[EventKind], *entries: tuple[Ino, bytes]) -> Event:
        """Return the event that a request announces, if it is the expected one and still current."""
        expected = self._expected
        if expected is None or expected.event.kind not in kinds:
            raise NotPermitted("no such announcement is expected")
        event = expected.event
        places = [event.place] if event.source is None else [event.source, event.place]
        if [(place.directory, place.name) for place in places] != list(entries):
            raise NotPermitted("another announcement is expected")
        expected.requested = True
        if not self._is_current(event):
            raise NotPermitted("it has changed since")
        return event
