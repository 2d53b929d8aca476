"""What has changed in the account's directories, for all that cache or watch them.

The kernel knows the changes that programs make through the mount. Every other change (by another client, or
by an upload that ends later) is published here once, by the code that commits the transaction, in the same
step of the trio thread. Listeners are called in the order of their subscription.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from imapfs.log import report
from imapfs.model import Ino
from imapfs.store.rows import Node


class Renamed(NamedTuple):
    """A mailbox that was renamed on the server."""

    old: bytes
    new: bytes
    delimiter: bytes


class Moved(NamedTuple):
    """A directory entry that has another place now, and the same inode number."""

    ino: Ino
    parent: Ino
    """The directory that it was in before."""
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
    """Names that belong to another file than before."""
    resized: Sequence[Ino] = ()
    """Files with another size than was shown before."""
    rewritten: Sequence[Ino] = ()
    """Files with other bytes than were shown before."""
    outdated: Sequence[Node] = ()
    """Messages of ``rewritten`` as they were: their cached bodies are of no use any more."""
    uploaded: Sequence[Ino] = ()
    """Drafts that are messages now: their bytes are in another place."""
    first_look: bool = False
    """Whether this is the first listing of the mailbox, so that what was added is old mail."""

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
    """Passes changes on to listeners. Used on the trio thread."""

    def __init__(self) -> None:
        self._listeners: list[Callable[[Changes], None]] = []

    def subscribe(self, listener: Callable[[Changes], None]) -> None:
        """Call ``listener`` with all changes from now on. It must not wait."""
        self._listeners.append(listener)

    def publish(self, changes: Changes) -> None:
        """Pass on the changes of a committed transaction.

        The transaction cannot be undone. So a listener that fails, perhaps on a full disk, does not keep the
        others from learning of it.
        """
        for listener in self._listeners if changes else ():
            try:
                listener(changes)
            except Exception as error:
                report(error, "a change was not followed everywhere")
