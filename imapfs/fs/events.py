"""What changed in a mount without a program having done it through the mount: for those who watch.

A change that a program makes through the mount is told to watchers by the kernel. Everything else (what other
clients did, and what the daemon does by itself later) is an `Event`, and each is told once.
"""

import contextlib
import os
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

from imapfs.model import Ino, Uid

if TYPE_CHECKING:
    # Which the process of `imapfs watch` has no use for.
    from imapfs.store.rows import Node

SOCKET: Final = "events"
"""Name of the Unix socket in an account's cache directory at which the daemon sends events as lines."""

Kind = Literal["arrived", "expunged", "moved", "flags", "created", "deleted", "renamed"]
"""The first four are of messages, the others of mailboxes."""
_OF_MAILBOXES: Final = {"created", "deleted", "renamed"}


class Place(NamedTuple):
    """A directory entry."""

    directory: Ino
    path: tuple[bytes, ...]
    """Of the directory, from the mountpoint."""
    name: bytes

    def __str__(self) -> str:
        return b"/".join((*self.path, self.name)).decode("utf-8", "replace")


@dataclass(frozen=True, slots=True)
class Event:
    """One change; ``place`` is where it is now, or was last."""

    kind: Kind
    place: Place
    ino: Ino
    uid: Uid | None = None
    flags: str | None = None
    """All flags, separated by spaces, where they are news."""
    source: Place | None = None
    """Where it was before, of what was moved or renamed."""
    gone: "Node | None" = None
    """What it was, of what is not there any more."""

    @property
    def of_mailbox(self) -> bool:
        return self.kind in _OF_MAILBOXES

    def as_json(self) -> dict[str, Any]:
        """The keys that `imapfs watch --json` promises, but for the time."""
        found: dict[str, Any] = {"event": self.kind, "path": str(self.place), "inode": self.ino}
        if self.source is not None:
            found["from"] = str(self.source)
        if not self.of_mailbox:
            found["uid"] = self.uid
        if self.flags is not None:
            found["flags"] = self.flags.split()
        return found


class Stream:
    """Where events come together and go to all who listen. Used on the trio thread."""

    def __init__(self) -> None:
        self._listeners: list[Callable[[Event], None]] = []
        self._under_way: dict[Hashable, list[Event]] = {}

    def subscribe(self, listener: Callable[[Event], None]) -> None:
        """Have ``listener`` called with each event; it must not raise, nor wait for anything."""
        self._listeners.append(listener)

    def publish(self, event: Event) -> None:
        """Tell of an event, unless a request that is under way may be what made it."""
        held = self._under_way.get(_key(event))
        if held is None:
            self._tell(event)
        else:
            held.append(event)

    def _tell(self, event: Event) -> None:
        for listener in self._listeners:
            listener(event)

    @contextlib.contextmanager
    def request(self, *about: Hashable) -> Iterator[None]:
        """A request is under way that changes these entries (directory, name) or flags (inode).

        If it succeeds, the kernel tells of the change; if it fails, another client was quicker. The kernel
        never has two requests under way that change the same entry, or the same inode's attributes.
        """
        held: list[Event] = []
        for key in about:
            self._under_way[key] = held
        try:
            yield
        except BaseException:
            for event in held:
                self._tell(event)
            raise
        finally:
            for key in about:
                del self._under_way[key]


@contextlib.contextmanager
def address(directory: Path) -> Iterator[str]:
    """Of the socket: a short one, as it may have 107 bytes only (unix(7)). Raises OSError."""
    fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{fd}/{SOCKET}"
    finally:
        os.close(fd)


def _key(event: Event) -> Hashable:
    return event.ino if event.kind == "flags" else (event.place.directory, event.place.name)
