"""What the kernel has cached of the mount, and what it must drop.

The kernel may keep names and attributes for as long as it likes, because it is notified of each change. A
notification can wait for a request in the same directory, so it is sent from a thread and never from a
handler. This module only collects, in `Invalidation`, what the kernel has to drop; it does not know pyfuse3.
"""

from collections import Counter
from dataclasses import dataclass, field

from imapfs.fs.tree import MailTree
from imapfs.kernel.inode_table import InodeSet, InodeTable
from imapfs.model import ROOT, Ino
from imapfs.sync.changes import Changes
from imapfs.waiting import Flag


@dataclass(slots=True)
class Invalidation:
    """What the kernel has to drop. Inodes are those that the kernel knows."""

    attributes: set[Ino] = field(default_factory=set)
    contents: set[Ino] = field(default_factory=set)
    """Files whose bytes and attributes changed."""
    entries: list[tuple[Ino, bytes, Ino]] = field(default_factory=list)
    """Directory, name and inode of what was removed."""
    names: list[tuple[Ino, bytes]] = field(default_factory=list)
    """Former directory and name of what was moved."""

    def __bool__(self) -> bool:
        return bool(self.attributes or self.contents or self.entries or self.names)


class KernelCache:
    """The inodes that the kernel holds references to, and what it has cached of them."""

    def __init__(self, tree: MailTree) -> None:
        self._tree = tree
        self._lookups = InodeTable("Q")
        """Inode -> references that the kernel holds (the nlookup of FORGET)."""
        self.pushed = InodeSet()
        """Files whose bytes were given to the kernel."""
        self.resized = InodeSet()
        """Files whose size in the kernel's cache may be inexact."""
        self._invalid = Invalidation()
        self._news = Flag()
        self._listed: Counter[Ino] = Counter()
        """Directory -> number of changes of its entries."""
        self._sizes = 0
        """Number of changes of sizes of messages."""

    # -- references ----------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._lookups)

    def holds(self, ino: Ino) -> bool:
        """Return whether the kernel may have an inode in its cache."""
        return ino == ROOT or self._lookups[ino] > 0

    def remember(self, ino: Ino) -> None:
        """Note that the kernel was given one more reference."""
        self._lookups.add(ino, 1)

    def forget(self, ino: Ino, n: int) -> None:
        """Note that the kernel has dropped ``n`` references."""
        left = self._lookups[ino] = max(0, self._lookups[ino] - n)
        if not left:
            self.pushed.discard(ino)
            self.resized.discard(ino)

    # -- changes -------------------------------------------------------------------------------------------

    def listing_version(self, directory: Ino) -> tuple[int, int]:
        """Return a value that changes whenever entries of the directory, or any sizes, change."""
        return self._listed[directory], self._sizes

    def on_changes(self, changes: Changes) -> None:
        """Collect what the kernel has to drop because of a transaction."""
        # Flags are extended attributes, which the kernel does not cache.
        if changes.added or changes.gone or changes.moved or changes.replaced:
            self._drop_entries(changes)
        for ino in changes.rewritten:
            self.pushed.discard(ino)
            if self._lookups[ino]:
                self._invalid.contents.add(ino)
        if changes.resized:
            self._sizes += 1
        for ino in changes.resized:
            if self._lookups[ino]:
                self.resized.add(ino)
                self._invalid.attributes.add(ino)
        if self._invalid:
            self._news.set()

    def _drop_entries(self, changes: Changes) -> None:
        tree, invalid = self._tree, self._invalid
        changed = (tree.outside(d) for d in (changes.directory, *(moved.parent for moved in changes.moved)))
        directories = {directory for directory in changed if directory is not None}
        self._listed.update(directories)
        for node in changes.gone:
            if self._lookups[node.ino]:
                invalid.entries += [(*place, node.ino) for place in tree.places(node)]
        for moved in changes.moved:
            before = tree.outside(moved.parent)
            if self._lookups[moved.ino] and before is not None:
                invalid.names.append((before, moved.name))
        invalid.attributes |= directories

    async def next_invalid(self) -> Invalidation:
        """Wait until the kernel has to drop something, and return all of it."""
        while not self._invalid:
            await self._news.wait()
        batch, self._invalid = self._invalid, Invalidation()
        return batch
