"""Events: changes that no program has made through the mount, for programs that watch it.

The kernel reports what a program does through the mount. Every other change (by another client, or by the
daemon at a later time) is an `Event`, and is reported once.
"""

import contextlib
import os
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

from imapfs.log import shown_path
from imapfs.model import Ino, Uid

if TYPE_CHECKING:
    # Not at run time: `imapfs watch` does not need it.
    from imapfs.store.rows import Node

SOCKET: Final = "events"
"""Name of the Unix socket in an account's cache directory through which the daemon sends events."""

EventKind = Literal["arrived", "expunged", "moved", "flags", "created", "deleted", "renamed"]
"""The first four are about messages, the others about mailboxes."""
_OF_MAILBOXES: Final = {"created", "deleted", "renamed"}


class Place(NamedTuple):
    """A directory entry."""

    directory: Ino
    path: tuple[bytes, ...]
    """Names from the mountpoint down to the directory."""
    name: bytes

    def __str__(self) -> str:
        return shown_path((*self.path, self.name))


@dataclass(frozen=True, slots=True)
class Event:
    """One change. ``place`` is where the entry is now, or where it was before it was removed."""

    kind: EventKind
    place: Place
    ino: Ino
    uid: Uid | None = None
    flags: str | None = None
    """All flags of a message, separated by spaces; None if the event says nothing about them."""
    source: Place | None = None
    """The previous place, if the entry was moved or renamed."""
    gone: "Node | None" = None
    """The entry as it was, if it is no longer in the mount."""

    @property
    def of_mailbox(self) -> bool:
        """Return whether the event is about a mailbox and not about a message."""
        return self.kind in _OF_MAILBOXES

    def as_json(self) -> dict[str, Any]:
        """Return what `imapfs watch --json` documents, except for the time."""
        found: dict[str, Any] = {"event": self.kind, "path": str(self.place), "inode": self.ino}
        if self.source is not None:
            found["from"] = str(self.source)
        if not self.of_mailbox:
            found["uid"] = self.uid
        if self.flags is not None:
            found["flags"] = self.flags.split()
        return found


class EventStream:
    """Passes events from the model to all listeners. Used on the trio thread."""

    def __init__(self) -> None:
        self._listeners: list[Callable[[Event], None]] = []
        self._in_progress: dict[Hashable, list[Event]] = {}

    def subscribe(self, listener: Callable[[Event], None]) -> None:
        """Have ``listener`` called with each event from now on. It must neither raise nor wait."""
        self._listeners.append(listener)

    def publish(self, event: Event) -> None:
        """Pass an event on, or hold it back while a request is in progress that may have caused it."""
        held = self._in_progress.get(_key(event))
        if held is None:
            self._pass_on(event)
        else:
            held.append(event)

    def _pass_on(self, event: Event) -> None:
        for listener in self._listeners:
            listener(event)

    @contextlib.contextmanager
    def request(self, *about: Hashable) -> Iterator[None]:
        """Hold back events about these entries (directory, name) or flags (inode) during a request.

        If the request succeeds, the kernel reports the change, and the events are dropped. If it fails,
        another client was faster, and they are passed on. The kernel never sends two requests at once that
        change the same entry, or the attributes of the same inode.
        """
        held: list[Event] = []
        for key in about:
            self._in_progress[key] = held
        try:
            yield
        except BaseException:
            for event in held:
                self._pass_on(event)
            raise
        finally:
            for key in about:
                del self._in_progress[key]


@contextlib.contextmanager
def address(directory: Path, name: str = SOCKET) -> Iterator[str]:
    """Yield a short address for a Unix socket in a directory: at most 107 bytes are allowed (unix(7)).

    Raises OSError.
    """
    fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{fd}/{name}"
    finally:
        os.close(fd)


def _key(event: Event) -> Hashable:
    return event.ino if event.kind == "flags" else (event.place.directory, event.place.name)
