"""The directory tree: what each entry is, and where each file is shown.

A mailbox is a directory. A message in it is a regular file with exactly the bytes of BODY[]. Beside messages
there are drafts: files that are not on the server, or not yet. A draft that is a new version of a message
has the inode and the name of that message, and hides it. This module merges drafts and messages, in one
place, into `Entry`. `imapfs.fs.filesystem` decides what an operation does with an entry.

`Tree` is the interface of a view of the messages; further views can be added. A message has the same inode in
every tree, so that the same operations apply to it. A directory's inode is in one tree only: if it appeared
at a second place, the kernel would move it there.

All methods run on the trio thread and answer from the cache and the spool, without asking the server. Inode 1
is the mountpoint: the root of the account, or of the mounted subtree. Only the methods of a tree translate
between it and the inode in the cache.
"""

import math
from typing import Final, NamedTuple, Protocol

from imapfs.errors import MessageGone, NotADirectory
from imapfs.fs.events import Place
from imapfs.log import shown_path
from imapfs.model import ROOT, Ino, MessageRef
from imapfs.store.cache import Cache
from imapfs.store.rows import Node
from imapfs.store.spool import Base, Draft, Spool

_MAX_PAGE: Final = 500
"""Nodes in one page of a directory."""


class Entry(NamedTuple):
    """A directory entry and what stat shows of it."""

    ino: Ino
    """Inode for the kernel: `ROOT` for the mountpoint."""
    name: bytes
    is_dir: bool
    size: int
    """Bytes."""
    mtime: int
    """Nanoseconds since the epoch."""
    ctime: int
    """Nanoseconds since the epoch."""
    mode: int | None
    """Permission bits, if the user has set them."""
    draft: Draft | None = None
    node: Node | None = None
    """The directory or the message; None for a draft."""

    @classmethod
    def of_node(cls, node: Node) -> "Entry":
        """Return the entry of a directory or a message."""
        shown = node.size, node.mtime, node.ctime, node.mode
        return cls(node.ino, node.name or b"", node.is_dir, *shown, None, node)

    @classmethod
    def of_draft(cls, draft: Draft, size: int | None = None) -> "Entry":
        """Return the entry of a draft. ``size`` in bytes is needed once its file is deleted."""
        size = draft.size if size is None else size
        return cls(draft.ino, draft.name, False, size, draft.mtime, draft.ctime, draft.mode, draft)


class Tree(Protocol):
    """A view of the account's messages as directories and files."""

    def entry(self, ino: Ino) -> Entry:
        """Return the entry of an inode. Raises MessageGone."""

    def child(self, parent: Ino, name: bytes) -> Entry | None:
        """Return the entry that a directory has under a name."""

    def page(self, directory: Ino, after: int) -> list[Entry]:
        """Return entries with inodes above ``after``, ordered by inode; an empty list at the end."""

    def places(self, node: Node) -> list[tuple[Ino, bytes]]:
        """Return directory and name of each place that shows a node, or showed it until it was removed."""


class MailTree:
    """The tree of mailboxes: each message is shown in its mailbox, under its name."""

    def __init__(self, cache: Cache, spool: Spool) -> None:
        self._cache = cache
        self._spool = spool
        self._root = ROOT

    # -- where things are ----------------------------------------------------------------------------------

    @property
    def root(self) -> Ino:
        """The inode in the cache of the directory that is mounted."""
        return self._root

    def mount_below(self, directory: Ino) -> None:
        """Make ``directory`` the root. Called at most once, before the tree is used."""
        self._root = directory

    def inside(self, ino: Ino) -> Ino:
        """Return the inode in the cache for an inode of the kernel."""
        return self._root if ino == ROOT else ino

    def outside(self, ino: Ino) -> Ino | None:
        """Return the kernel's inode for an inode in the cache; None for the root above a mounted subtree."""
        if ino == self._root:
            return ROOT
        return None if ino == ROOT else ino

    def path(self, directory: Ino) -> tuple[bytes, ...] | None:
        """Return the names from the mountpoint down to a directory of the kernel; None if it is gone."""
        return self._path(self.inside(directory))

    def _path(self, ino: Ino) -> tuple[bytes, ...] | None:
        top, path = self._cache.path(self._root), self._cache.path(ino)
        if path[: len(top)] != top or (ino != ROOT and self._cache.node(ino) is None):
            return None
        return path[len(top) :]

    def place(self, directory: Ino, name: bytes) -> Place | None:
        """Return the place of an entry of a directory in the cache; None if it is outside the mount."""
        shown, path = self.outside(directory), self._path(directory)
        return None if shown is None or path is None else Place(shown, path, name)

    def places(self, node: Node) -> list[tuple[Ino, bytes]]:
        """See `Tree`."""
        directory = self.outside(node.parent)
        return [] if node.name is None or directory is None else [(directory, node.name)]

    def path_of(self, draft: Draft) -> str:
        """Return the path of a draft, relative to the mountpoint."""
        path = (*draft.path, draft.name)[len(self._cache.path(self._root)) :]
        return shown_path(path)

    # -- entries -------------------------------------------------------------------------------------------

    def node(self, ino: Ino) -> Node:
        """Return the directory or message with an inode. Raises MessageGone."""
        node = self._cache.node(self.inside(ino))
        if node is None:
            raise MessageGone("it was removed on the server")
        return node

    def directory(self, ino: Ino) -> Node:
        """Return a directory. Raises MessageGone, NotADirectory."""
        node = self.node(ino)
        if not node.is_dir:
            raise NotADirectory("it is a file")
        return node

    def is_scratch(self, directory: Ino) -> bool:
        """Return whether a directory of the cache is local: see `imapfs.fs.scratch`."""
        if directory == ROOT or self._cache.mailbox(directory) is not None:
            return False
        node = self._cache.node(directory)
        return node is not None and node.is_dir

    def entry(self, ino: Ino) -> Entry:
        """See `Tree`."""
        draft = self._spool.get(ino)
        if draft is not None:
            return Entry.of_draft(draft)
        found = Entry.of_node(self.node(ino))
        return found if found.ino != self._root else found._replace(ino=ROOT)

    def _shown(self, node: Node) -> Entry:
        """Return the entry of a directory or message, with the attributes of its inode."""
        shown = Entry.of_node(node)
        draft = self._spool.get(node.ino)
        if draft is None:
            return shown
        # The draft was begun while the message was being moved, and stayed behind. An inode has one size.
        return shown._replace(size=draft.size, mtime=draft.mtime, ctime=draft.ctime, mode=draft.mode)

    def child(self, parent: Ino, name: bytes) -> Entry | None:
        """See `Tree`."""
        directory = self.inside(parent)
        draft = self._spool.child(directory, name)
        if draft is not None:
            return Entry.of_draft(draft)
        node = self._cache.child(directory, name)
        if node is None or self._is_elsewhere(directory, node):
            return None
        return self._shown(node)

    def _is_elsewhere(self, directory: Ino, node: Node) -> bool:
        """Return whether a message in a directory has a new version there under another name."""
        draft = self._spool.get(node.ino)
        return draft is not None and self._spool.child(directory, draft.name) is draft

    def page(self, directory: Ino, after: int) -> list[Entry]:
        """See `Tree`."""
        inside = self.inside(directory)
        nodes = self._cache.children(inside, after, _MAX_PAGE)
        is_last = len(nodes) < _MAX_PAGE
        end = math.inf if is_last else nodes[-1].ino
        within = self._spool.within(inside)
        names = {draft.name for draft in within}
        drafts = {draft.ino: draft for draft in within if after < draft.ino <= end}
        if not self._spool:
            page = [Entry.of_node(node) for node in nodes]
        else:
            page = [self._shown(node) for node in nodes if node.ino not in drafts and node.name not in names]
        if drafts:
            page += [Entry.of_draft(draft) for draft in drafts.values()]
            page.sort(key=lambda entry: entry.ino)
        if not page and not is_last:
            return self.page(directory, nodes[-1].ino)
        return page

    # -- drafts and messages -------------------------------------------------------------------------------

    def reference(self, node: Node) -> tuple[Base, str] | None:
        """Return a message as the base of a draft, and its flags; None if the node is not a message."""
        details = self._cache.details(node.ino)
        mailbox = self._cache.mailbox(node.parent)
        if details is None or mailbox is None or mailbox.server_name is None:
            return None
        place = mailbox.server_name, mailbox.uidvalidity, details.uid
        ref = MessageRef(*place, details.date, details.announced)
        return Base(ref, details.date, details.zone), details.flags

    def new_version(self, node: Node) -> Draft:
        """Begin a new, empty version of a message, with its name and inode. Raises CacheError."""
        path = self._cache.path(node.parent)
        base, flags = self.reference(node) or (None, "")
        draft = self._spool.create(node.ino, node.parent, node.name or b"", path, node.mode or 0o600, base)
        draft.flags = flags
        draft.save()
        return draft
