"""Turns changes into events for programs that watch the mount.

Changes outside the mounted subtree are not reported. The deletion of a mailbox is one event, whatever was in
it.
"""

from collections.abc import Iterator

from imapfs.fs.events import Event, EventKind, EventStream, Place
from imapfs.fs.tree import MailTree
from imapfs.model import Ino
from imapfs.store.cache import Cache
from imapfs.store.rows import Node
from imapfs.sync.changes import Changes


class EventSource:
    """Publishes an event on ``stream`` for each change that is visible below the mountpoint."""

    def __init__(self, tree: MailTree, cache: Cache, stream: EventStream) -> None:
        self._tree = tree
        self._cache = cache
        self._stream = stream

    def on_changes(self, changes: Changes) -> None:
        """Publish the events that follow from a transaction."""
        for event in self._events(changes):
            self._stream.publish(event)

    def _events(self, changes: Changes) -> Iterator[Event]:
        tree, directory = self._tree, changes.directory
        for moved in changes.moved:
            before = tree.place(moved.parent, moved.name)
            after = tree.place(directory, moved.new_name)
            if before is not None and after is not None:
                yield self._event("renamed" if moved.mailbox else "moved", after, moved.ino, before)
            elif after is not None:
                yield self._event("created" if moved.mailbox else "arrived", after, moved.ino)
            elif before is not None:
                node = self._cache.node(moved.ino)
                gone = node and node.without_body()
                yield Event("deleted" if moved.mailbox else "expunged", before, moved.ino, gone=gone)
        for node in changes.gone:
            kind: EventKind = "deleted" if node.is_dir else "expunged"
            if node.name not in changes.replaced:
                for place in self._places(node):
                    yield Event(kind, place, node.ino, node.uid, gone=node)
        for ino, name in () if changes.first_look else changes.added:
            arrived = tree.place(directory, name)
            shown = None if arrived is None else tree.child(arrived.directory, name)
            if arrived is not None and shown is not None and shown.ino == ino:
                yield self._event("created" if shown.is_dir else "arrived", arrived, ino)
        for ino in changes.flagged:
            message = self._cache.node(ino)
            for place in () if message is None else self._places(message):
                yield self._event("flags", place, ino)

    def _places(self, node: Node) -> Iterator[Place]:
        for directory, name in self._tree.places(node):
            path = self._tree.path(directory)
            if path is not None:
                yield Place(directory, path, name)

    def _event(self, kind: EventKind, place: Place, ino: Ino, source: Place | None = None) -> Event:
        """Return an event about an entry that exists."""
        details = self._cache.details(ino)
        if details is None:
            return Event(kind, place, ino, source=source)
        return Event(kind, place, ino, details.uid, details.flags, source)
