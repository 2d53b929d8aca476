"""The tree: what each directory entry is, and where each file is shown.

A mailbox is a directory. A message in it is a regular file with exactly the bytes of BODY[]. Beside messages
there are drafts: files that are not on the server, or not yet. A draft that is a new version of a message has
the inode and the name of that message, and hides it. This module merges the two once, as `Entry`; what an
operation does with an entry is decided in `imapfs.fs.filesystem`.

`Tree` is what a further view of the same messages has to offer. The inode of a message is the same in each
tree, so that the operations on it are the same. The inode of a directory is in one tree only: the kernel
would take a second place for a rename.

All methods run on the trio thread and answer from what is known, without a question to the server. Inode 1 is
the mountpoint: the root of the account, or of the subtree that is mounted. Only the methods of a tree
translate between it and the inode in the cache.
"""

import math
from collections.abc import Sequence
from typing import Final, NamedTuple, Protocol

from imapfs.errors import MessageGone, NotADirectory
from imapfs.fs.events import Place
from imapfs.model import ROOT, Ino, MessageRef
from imapfs.store.cache import Cache
from imapfs.store.rows import Node
from imapfs.store.spool import Base, Draft, Spool
from imapfs.sync.identify import may_be_upload
from imapfs.sync.upload import Uploader

MESSAGE_SUFFIX: Final = b".eml"
_MAX_PAGE: Final = 500
"""Nodes in one page of a directory."""


def is_message_name(name: bytes) -> bool:
    """Return whether a new file of this name is to become a message. Other files stay local."""
    return name.lower().endswith(MESSAGE_SUFFIX) and not name.startswith(b".")


class Entry(NamedTuple):
    """A directory entry and what stat shows of it."""

    ino: Ino
    """As the kernel knows it: `ROOT` for the mountpoint."""
    name: bytes
    is_dir: bool
    size: int
    """Bytes."""
    mtime: int
    """Nanoseconds since the epoch."""
    ctime: int
    """Nanoseconds since the epoch."""
    mode: int | None
    """Permission bits that the user has set."""
    draft: Draft | None = None
    node: Node | None = None
    """The directory, or the message; beside a draft, the message that it is a new version of in place."""

    @classmethod
    def of_node(cls, node: Node) -> "Entry":
        """A directory or a message."""
        shown = node.size, node.mtime, node.ctime, node.mode
        return cls(node.ino, node.name or b"", node.is_dir, *shown, None, node)

    @classmethod
    def of_draft(cls, draft: Draft, node: Node | None = None, size: int | None = None) -> "Entry":
        """A draft. ``size`` is needed once its file is deleted."""
        size = draft.size if size is None else size
        return cls(draft.ino, draft.name, False, size, draft.mtime, draft.ctime, draft.mode, draft, node)


class Tree(Protocol):
    """A view of the account's messages as directories and files."""

    def entry(self, ino: Ino) -> Entry:
        """Return what an inode is. Raises MessageGone."""

    def child(self, parent: Ino, name: bytes) -> Entry | None:
        """Return what a directory has under a name."""

    def page(self, directory: Ino, after: int) -> list[Entry]:
        """Return entries with inodes above ``after``, in the order of inodes; none at the end."""

    def places(self, node: Node) -> list[tuple[Ino, bytes]]:
        """Return the directory and the name of each place that shows a node, or did until it was removed."""


class MailTree:
    """The tree of mailboxes: each message is shown in its mailbox, under its name."""

    def __init__(self, cache: Cache, spool: Spool, uploader: Uploader) -> None:
        self._cache = cache
        self._spool = spool
        self._uploader = uploader
        self._root = ROOT

    # -- where things are ----------------------------------------------------------------------------------

    @property
    def root(self) -> Ino:
        """The inode in the cache of the directory that is mounted."""
        return self._root

    def mount_below(self, directory: Ino) -> None:
        """Have ``directory`` as the root. Called before anything is shown."""
        self._root = directory

    def inside(self, ino: Ino) -> Ino:
        """Return the inode in the cache for an inode of the kernel's."""
        return self._root if ino == ROOT else ino

    def outside(self, ino: Ino) -> Ino:
        """Return the kernel's inode for an inode in the cache."""
        return ROOT if ino == self._root else ino

    def path(self, directory: Ino) -> tuple[bytes, ...] | None:
        """Return the names from the mountpoint down to a directory of the kernel's; None if it is gone."""
        return self._path(self.inside(directory))

    def _path(self, ino: Ino) -> tuple[bytes, ...] | None:
        top, path = self._cache.path(self._root), self._cache.path(ino)
        if path[: len(top)] != top or (ino != ROOT and self._cache.node(ino) is None):
            return None
        return path[len(top) :]

    def place(self, directory: Ino, name: bytes) -> Place | None:
        """Return the place of an entry of a directory in the cache; None if it is not in the mount."""
        path = self._path(directory)
        return None if path is None else Place(self.outside(directory), path, name)

    def places(self, node: Node) -> list[tuple[Ino, bytes]]:
        """See `Tree`."""
        is_above = node.parent == ROOT != self._root
        return [] if node.name is None or is_above else [(self.outside(node.parent), node.name)]

    def path_of(self, draft: Draft) -> str:
        """Return the path of a draft below the mountpoint, for people and programs."""
        path = (*draft.path, draft.name)[len(self._cache.path(self._root)) :]
        return b"/".join(path).decode("utf-8", "replace")

    # -- entries -------------------------------------------------------------------------------------------

    def node(self, ino: Ino) -> Node:
        """Return the directory or message that an inode is in the cache. Raises MessageGone."""
        node = self._cache.node(self.inside(ino))
        if node is None:
            raise MessageGone("it was removed on the server")
        return node

    def directory(self, ino: Ino) -> Node:
        """Return a directory. Raises MessageGone, NotADirectory."""
        node = self.node(ino)
        if not node.is_dir:
            raise NotADirectory("a message is no directory")
        return node

    def entry(self, ino: Ino) -> Entry:
        """See `Tree`."""
        draft = self._spool.get(ino)
        if draft is not None:
            return Entry.of_draft(draft)
        return self._shown(self.node(ino))

    def _shown(self, node: Node) -> Entry:
        entry = Entry.of_node(node)
        return entry if node.ino != self._root else entry._replace(ino=ROOT)

    def child(self, parent: Ino, name: bytes) -> Entry | None:
        """See `Tree`."""
        directory = self.inside(parent)
        draft = self._spool.child(directory, name)
        if draft is not None:
            return Entry.of_draft(draft, self._cache.node(draft.ino))
        node = self._cache.child(directory, name)
        if node is None or (not node.is_dir and self._is_twin(node, self._uncertain(directory))):
            return None
        return Entry.of_node(node)

    def page(self, directory: Ino, after: int) -> list[Entry]:
        """See `Tree`."""
        inside = self.inside(directory)
        nodes = self._cache.children(inside, after, _MAX_PAGE)
        is_last = len(nodes) < _MAX_PAGE
        end = math.inf if is_last else nodes[-1].ino
        drafts = {d.ino: d for d in self._spool.within(inside) if after < d.ino <= end}
        names = {draft.name for draft in drafts.values()}
        uncertain = self._uncertain(inside)
        page = [
            Entry.of_node(node)
            for node in nodes
            if node.ino not in drafts
            and node.name not in names
            and (node.is_dir or not uncertain or not self._is_twin(node, uncertain))
        ]
        if drafts:
            page += [Entry.of_draft(draft) for draft in drafts.values()]
            page.sort(key=lambda entry: entry.ino)
        if not page and not is_last:
            return self.page(directory, nodes[-1].ino)
        return page

    # -- drafts and messages -------------------------------------------------------------------------------

    def reference(self, node: Node) -> tuple[Base, str] | None:
        """Return a message as the one that a draft replaces, and its flags; None if it is not a message."""
        details = self._cache.details(node.ino)
        mailbox = self._cache.mailbox(node.parent)
        if details is None or mailbox is None or mailbox.server_name is None:
            return None
        ref = MessageRef(mailbox.server_name, mailbox.uidvalidity, details.uid)
        return Base(ref, details.date, details.zone), details.flags

    def new_version(self, node: Node) -> Draft:
        """Begin a new, empty version of a message, with its name and inode. Raises CacheError."""
        path = self._cache.path(node.parent)
        base, flags = self.reference(node) or (None, "")
        draft = self._spool.create(node.ino, node.parent, node.name or b"", path, node.mode or 0o600, base)
        draft.flags = flags
        draft.save()
        return draft

    def _uncertain(self, directory: Ino) -> Sequence[Draft]:
        """Drafts whose upload to the mailbox of a directory has an unknown outcome."""
        found = [d for d in self._spool if d.attempt is not None and not self._uploader.is_uploading(d)]
        if found:
            mailbox = self._cache.mailbox(directory)
            place = mailbox and (mailbox.server_name, mailbox.uidvalidity)
            found = [d for d in found if d.attempt and (d.attempt.mailbox, d.attempt.uidvalidity) == place]
        return found

    def _is_twin(self, node: Node, uncertain: Sequence[Draft]) -> bool:
        """Return whether a message is probably what one of these drafts has become.

        It is not shown beside the draft: if it were moved or deleted, the upload could not be found, and
        would be repeated.
        """
        return any(
            node.ino != draft.ino
            and draft.attempt is not None
            and may_be_upload(draft.attempt, node.uid or 0, node.size)
            and not self._cache.is_named(node.parent, node.uid or 0)
            for draft in uncertain
        )
