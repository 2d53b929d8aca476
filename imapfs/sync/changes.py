"""What changed in the account's directories, and how everybody who caches or watches them learns of it.

A change that a program makes through the mount is known to the kernel. Every other change (by other clients,
or by an upload that ends later) is published here once, by whoever made the transaction, in the same step of
the trio thread. Listeners are called in the order of their subscription.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from imapfs.model import Ino
from imapfs.store.rows import Node


class Renamed(NamedTuple):
    """A mailbox that was renamed on the server."""

    old: bytes
    new: bytes
    delimiter: bytes


class Moved(NamedTuple):
    """A directory entry that is in another place now, with the same inode."""

    ino: Ino
    parent: Ino
    """The directory that it was in."""
    name: bytes
    new_name: bytes
    mailbox: Renamed | None = None
    """The mailbox's names on the server, if the entry is a directory."""


@dataclass(frozen=True, slots=True)
class Changes:
    """The effect of one transaction on a directory."""

    directory: Ino
    added: Sequence[tuple[Ino, bytes]] = ()
    gone: Sequence[Node] = ()
    flagged: Sequence[Ino] = ()
    """Messages whose flags changed."""
    moved: Sequence[Moved] = ()
    """Entries that another client moved or renamed into this directory."""
    replaced: Sequence[bytes] = ()
    """Names that stand for another file than before."""
    resized: Sequence[Ino] = ()
    """Files whose size is not the one that was shown."""
    rewritten: Sequence[Ino] = ()
    """Files whose bytes are not the ones that were shown."""
    uploaded: Sequence[Ino] = ()
    """Drafts that became messages: their bytes come from another place now."""
    first_look: bool = False
    """Whether the mailbox was not known before, so that what was added is old mail."""

    def __bool__(self) -> bool:
        return bool(
            self.added
            or self.gone
            or self.flagged
            or self.moved
            or self.replaced
            or self.resized
            or self.rewritten
            or self.uploaded
        )


class ChangeHub:
    """Passes changes from those who make them to those who listen. Used on the trio thread."""

    def __init__(self) -> None:
        self._listeners: list[Callable[[Changes], None]] = []

    def subscribe(self, listener: Callable[[Changes], None]) -> None:
        """Have ``listener`` called with all changes from now on. It must neither raise nor wait."""
        self._listeners.append(listener)

    def publish(self, changes: Changes) -> None:
        """Pass on the changes of a transaction that has been committed."""
        if changes:
            for listener in self._listeners:
                listener(changes)
