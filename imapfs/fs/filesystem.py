"""What a mail account looks like as files: this module, and no other, decides it.

The tree. Every mailbox is a directory; every message in it a regular file with exactly the bytes of BODY[];
beside them drafts, files that are not (yet) on the server. Attributes: INTERNALDATE is mtime and ctime until
the user changes something; flags and header fields are extended attributes, as backup programs compare ctime
and flags are no content.

Freshness. Opening a directory asks the server what changed, unless that was asked a moment ago or the server
tells of changes by itself; so does looking up a name that is not known. Whatever is known is served if the
server does not answer soon.

Changes. What each operation does is one method here (`rename` is what ``mv`` does). A message changes on the
server first and in the cache then; a draft changes in the spool and is submitted when it is complete: when
the last writer closes it, it is renamed to a message's name, or fsync is called.

All methods run on the trio thread. Inode 1 is the mountpoint, which is the root of the account or of the
subtree that is mounted. Failures are `imapfs.errors`; nothing here knows the kernel's interface.
"""

import contextlib
import errno
import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Final, NamedTuple

import trio

from imapfs.errors import (
    ConnectionLost,
    Exists,
    ImapfsError,
    Invalid,
    IsADirectory,
    MessageGone,
    NotADirectory,
    NotEmpty,
    NotFound,
    NotPermitted,
    Refused,
    Throttled,
    TlsError,
    UsageError,
)
from imapfs.fs.events import Event, Kind, Place
from imapfs.fs.files import Files, Opening
from imapfs.imap.backoff import State
from imapfs.imap.pool import SessionPool
from imapfs.imap.session import Quota, Session
from imapfs.log import report
from imapfs.model import ROOT, Ino, MountConfig
from imapfs.names import is_inbox, renamed, server_component
from imapfs.store.bodies import BodyStore
from imapfs.store.cache import Cache, Node
from imapfs.store.spool import Base, Draft, Spool
from imapfs.sync.changes import ChangeHub, Changes, Renamed
from imapfs.sync.download import Downloader
from imapfs.sync.operations import Journal, Operations
from imapfs.sync.prefetch import FetchAhead
from imapfs.sync.synchroniser import Refresh, Synchroniser
from imapfs.sync.upload import Uploader
from imapfs.sync.watching import Push

log = logging.getLogger(__name__)

MAX_AGE: Final = 5.0
"""Seconds for which a listing is served without asking the server again."""
_PATIENCE: Final = 3.0
"""Seconds that a known listing waits for news from the server before it is served as it is."""
_PATIENCE_AT_START: Final = 10.0
"""Seconds that the mount of an account that is cached waits for the server: long enough for any login, so
that a wrong password is reported, but nobody should have to wait for a network that is not there."""
_QUOTA_AGE: Final = 60.0
_PAGE: Final = 500
_EDITORS_PAUSE: Final = 10.0
"""Seconds between an editor's renaming of a file to its backup and its writing of the new one."""
_SUFFIX: Final = b".eml"


class Attributes(NamedTuple):
    """What stat shows."""

    ino: Ino
    is_dir: bool
    size: int
    """Bytes."""
    mtime: int
    """Nanoseconds since the epoch."""
    ctime: int
    """Nanoseconds since the epoch."""
    mode: int | None
    """Permission bits that the user has set."""

    @classmethod
    def of(cls, node: Node) -> "Attributes":
        return cls(node.ino, node.is_dir, node.size, node.mtime, node.ctime, node.mode)


class Space(NamedTuple):
    """What statfs shows, in bytes."""

    total: int
    free: int


def is_message_name(name: bytes) -> bool:
    """Whether a new file of this name is meant to be a message; others, such as editors' own, stay here."""
    return name.lower().endswith(_SUFFIX) and not name.startswith(b".")


class Filesystem:
    """One mounted account. Background work runs in ``nursery``, whose end is the end of the mount.

    Called on the trio thread: ``on_changes`` when the server, or an upload, changed a directory;
    ``on_resize`` when a file turned out to have another size than was shown; ``on_rewrite`` when the bytes of
    a file are others now.
    """

    def __init__(
        self,
        config: MountConfig,
        pool: SessionPool,
        cache: Cache,
        nursery: trio.Nursery,
        *,
        on_changes: Callable[[Changes], None],
        on_resize: Callable[[Ino], None],
        on_rewrite: Callable[[Ino], None],
    ) -> None:
        self.config = config
        self.pool = pool
        self.cache = cache
        self._nursery = nursery
        self._on_changes = on_changes
        self._on_resize = on_resize
        self._on_rewrite = on_rewrite
        self._bodies = BodyStore(cache, config.cache_size)
        self.spool = Spool(cache.directory / "spool")
        self._hub = ChangeHub()
        self.sync = Synchroniser(pool, cache, self.spool, nursery, self._hub)
        downloads = Downloader(pool, cache, self._bodies, self.sync, nursery, self._hub)
        ahead = FetchAhead(cache, downloads.start_ahead, config.fetch_ahead)
        self.files = Files(cache, self._bodies, downloads, ahead, self.spool, self._draft_of)
        self.push = Push(pool, cache, self.sync, nursery, config.poll)
        journal = Journal(cache.directory / "journal.json")
        self.operations = Operations(pool, cache, self.sync, journal, config.delete, self._hub)
        self.uploader = Uploader(
            pool, cache, self._bodies, self.spool, self.sync, self.operations, downloads, nursery, self._hub
        )
        self._hub.subscribe(self._changed)
        # Last: the others may want to keep a body that goes.
        self._hub.subscribe(lambda changes: self._bodies.drop(changes.gone))
        self._root = ROOT
        self._patience = min(_PATIENCE, config.timeout / 2)
        self._quota: Quota | None = None
        self._quota_at = -math.inf
        self._renamed: dict[tuple[Ino, bytes], tuple[Ino, float]] = {}
        """Name that a message had before it was renamed to no message's name -> the message, and when.

        Editors do that just before they write the file anew: what comes under the old name is a new version.
        """

    async def start(self) -> None:
        """Find the root of the mount. Raises whatever makes a mount impossible.

        An account that is cached can be mounted without its server.
        """
        known = bool(self.cache.children(ROOT, 0, 1))
        refresh = self.sync.refresh_tree(0)
        if refresh is not None:
            # The server may ask to wait for longer than whoever mounts would.
            with trio.move_on_after(_PATIENCE_AT_START if known else 3 * self.config.timeout):
                await refresh.finished()
            if not refresh.done and not known:
                raise ConnectionLost(
                    self.pool.reason or f"{self.config.account.host} does not answer in time"
                )
            if not refresh.done:
                log.warning("mounted from the cache: no answer from the server so far")
            elif refresh.error is not None:
                transient = isinstance(refresh.error, ConnectionLost | Throttled)
                transient = transient and not isinstance(refresh.error, TlsError)
                if not transient or not known:
                    raise refresh.error
                log.warning("mounted from the cache: %s", refresh.error)
        if self.config.account.mailbox is not None:
            self._root = self._find_root(self.config.account.mailbox)
        self._place_drafts()
        self._show_strays()
        if not self.config.read_only:
            self._nursery.start_soon(self.operations.recover_forever)
            self.uploader.resume()
            self._nursery.start_soon(self._resend_forever)
        self._nursery.start_soon(self._bodies.sweep)
        self.push.start(self._root)

    async def _resend_forever(self) -> None:
        """Send what waits for the server as soon as it is there again."""
        while True:
            await self.pool.came_online()
            self.uploader.hurry()

    def _find_root(self, path: str) -> Ino:
        ino = ROOT
        for name in path.strip("/").encode().split(b"/"):
            node = self.cache.child(ino, name)
            if node is None or not node.is_dir:
                shown = [(n.name or b"").decode() for n in self.cache.directories(ino)]
                raise UsageError(
                    f"{self.config.account.host} has no mailbox {path}; at that place there are: "
                    + (", ".join(shown) or "none")
                )
            ino = node.ino
        return ino

    def _place_drafts(self) -> None:
        """Find the directories of the drafts of an earlier mount, whose inodes may be others now."""
        # After a power cut the database may have forgotten that it gave out their inodes.
        self.cache.reserve_inos(max((draft.ino for draft in (*self.spool, *self.spool.sent)), default=0))
        for draft in self.spool:
            ino = ROOT
            for name in draft.path:
                node = self.cache.child(ino, name)
                if node is None or not node.is_dir:
                    self._rescue(draft)
                    ino = draft.parent
                    break
                ino = node.ino
            if ino != draft.parent:
                self.spool.rename(draft, ino, draft.name, self.cache.path(ino))

    def _rescue(self, draft: Draft) -> None:
        """Show a file whose mailbox was deleted or renamed by others where it can be found."""
        log.warning("%s has lost its mailbox: it is at the top of the mount now", draft.shown)
        name = self.spool.free_name(self._root, draft.name)
        self.spool.rename(draft, self._root, name, self.cache.path(self._root))
        self._hub.publish(Changes(self._root, added=[(draft.ino, name)]))

    def _show_strays(self) -> None:
        """Show messages that an earlier process hid, as they were to be removed, and did not remove."""
        bases = [draft.base for draft in (*self.spool, *self.spool.sent) if draft.base is not None]
        due = {(base.mailbox, base.uidvalidity, base.uid) for base in bases}
        for ino, mailbox, uidvalidity, uid, flags in self.cache.hidden():
            if (mailbox, uidvalidity, uid) not in due and "\\deleted" not in flags.lower():
                self.cache.show(ino)

    async def end(self) -> None:
        """Send what can be sent, then release everything."""
        if not self.config.read_only:
            with trio.move_on_after(self.config.timeout):
                await self.uploader.drain()
        waiting = self.uploader.pending()
        if waiting:
            log.warning("%d files are not on the server yet: the next mount sends them", len(waiting))
        self.files.close()
        self._bodies.close()

    def _changed(self, changes: Changes) -> None:
        for gone in changes.gone:
            self.files.removed(gone)
            for draft in self.spool.within(gone.ino):
                self._rescue(draft)
        for moved in changes.moved:
            if moved.mailbox is not None:
                self._follow_mailbox(moved.mailbox)
        if changes.directory == self._root:
            changes = replace(changes, directory=ROOT)
        if any(moved.parent == self._root for moved in changes.moved):
            here = [m._replace(parent=ROOT if m.parent == self._root else m.parent) for m in changes.moved]
            changes = replace(changes, moved=here)
        for ino in changes.uploaded:
            self.files.replaced(ino)
        for ino in changes.rewritten:
            self._on_rewrite(ino)
        for ino in changes.resized:
            self._on_resize(ino)
        self._on_changes(changes)

    def events(self, changes: Changes) -> Iterator[Event]:
        """What changes look like to whoever watches; nothing of what is not below the mountpoint.

        That a mailbox was deleted says all about what was in it.
        """
        directory = changes.directory
        for moved in changes.moved:
            before, after = self._place(moved.parent, moved.name), self._place(directory, moved.new_name)
            if before is not None and after is not None:
                yield self._event("renamed" if moved.mailbox else "moved", after, moved.ino, before)
            elif after is not None:
                yield self._event("created" if moved.mailbox else "arrived", after, moved.ino)
            elif before is not None:
                node = self.cache.node(moved.ino)
                gone = node and node.without_body()
                yield Event("deleted" if moved.mailbox else "expunged", before, moved.ino, gone=gone)
        for gone in changes.gone:
            if gone.name is not None and gone.name not in changes.replaced:
                before = self._place(directory, gone.name)
                if before is not None:
                    kind: Kind = "deleted" if gone.is_dir else "expunged"
                    yield Event(kind, before, gone.ino, gone.uid, gone=gone)
        for ino, name in () if changes.first_look else changes.added:
            after, shown = self._place(directory, name), self.known(directory, name)
            if after is not None and shown is not None and shown.ino == ino:
                yield self._event("created" if shown.is_dir else "arrived", after, ino)
        for ino in changes.flagged:
            node = self.cache.node(ino)
            after = self._place(directory, node.name) if node is not None and node.name is not None else None
            if after is not None:
                yield self._event("flags", after, ino)

    def _event(self, kind: Kind, place: Place, ino: Ino, source: Place | None = None) -> Event:
        """An event about something that is there."""
        details = self.cache.details(ino)
        if details is None:
            return Event(kind, place, ino, source=source)
        return Event(kind, place, ino, details.uid, details.flags, source)

    def _place(self, directory: Ino, name: bytes) -> Place | None:
        path = self.path(directory)
        return None if path is None else Place(directory, path, name)

    def path(self, ino: Ino) -> tuple[bytes, ...] | None:
        """Names from the mountpoint down to a directory; None if it is not there, or not below it."""
        ino = self._root if ino == ROOT else ino
        top, path = self.cache.path(self._root), self.cache.path(ino)
        if path[: len(top)] != top or (ino != ROOT and self.cache.node(ino) is None):
            return None
        return path[len(top) :]

    def shown(self, draft: Draft) -> str:
        """Where a draft is below the mountpoint, for people and programs."""
        path = (*draft.path, draft.name)[len(self.cache.path(self._root)) :]
        return b"/".join(path).decode("utf-8", "replace")

    @property
    def late_errno(self) -> int:
        """What a request that has taken too long fails with."""
        return errno.EBUSY if self.pool.state is State.THROTTLED else errno.ETIMEDOUT

    # -- names and attributes ------------------------------------------------------------------------------

    def node(self, ino: Ino) -> Node:
        """The directory or message that an inode is. Raises MessageGone."""
        node = self.cache.node(self._root if ino == ROOT else ino)
        if node is None:
            raise MessageGone("it was removed on the server")
        return node

    def _directory(self, ino: Ino) -> Node:
        node = self.node(ino)
        if not node.is_dir:
            raise NotADirectory("a message is no directory")
        return node

    def _attributes(self, node: Node) -> Attributes:
        draft = self.spool.get(node.ino)
        if draft is not None:
            return _draft_attributes(draft)
        ino = ROOT if node.ino == self._root else node.ino
        return Attributes(ino, node.is_dir, node.size, node.mtime, node.ctime, node.mode)

    def getattr(self, ino: Ino) -> Attributes:
        draft = self.spool.get(ino)
        if draft is not None:
            return _draft_attributes(draft)
        orphan = self.files.orphan(ino)
        if orphan is not None:
            return _draft_attributes(*orphan)
        file = self.files.get(ino)
        if file is not None and file.gone is not None:
            return Attributes.of(file.gone)
        return self._attributes(self.node(ino))

    def _child(self, directory: Ino, name: bytes) -> Draft | Node | None:
        """What is in a directory by that name, as far as is known."""
        draft = self.spool.child(directory, name)
        if draft is not None:
            return draft
        node = self.cache.child(directory, name)
        if node is not None and not node.is_dir and self._is_twin(node, self._uncertain(directory)):
            return None
        return node

    def known(self, parent: Ino, name: bytes) -> Attributes | None:
        """What is in a directory by that name, as far as is known: at once, and without any question."""
        found = self._child(self._root if parent == ROOT else parent, name)
        if found is None:
            return None
        return _draft_attributes(found) if isinstance(found, Draft) else self._attributes(found)

    def _uncertain(self, directory: Ino) -> list[Draft]:
        """Drafts of which it is not known whether they were sent to the mailbox of a directory."""
        found = [d for d in self.spool if d.attempt is not None and not self.uploader.is_being_sent(d)]
        if found:
            mailbox = self.cache.mailbox(directory)
            place = mailbox and (mailbox.server_name, mailbox.uidvalidity)
            found = [d for d in found if d.attempt and (d.attempt.mailbox, d.attempt.uidvalidity) == place]
        return found

    def _is_twin(self, node: Node, uncertain: list[Draft]) -> bool:
        """Whether a message is what a draft has become, most likely.

        It is not shown beside the draft: moved or deleted, it could not be found, and would be sent again.
        """
        return any(
            node.ino != draft.ino
            and draft.attempt is not None
            and (node.uid or 0) >= draft.attempt.uidnext
            and 0 <= node.size - draft.attempt.size <= 2
            and not self.cache.is_named(node.parent, node.uid or 0)
            for draft in uncertain
        )

    async def lookup(self, parent: Ino, name: bytes) -> Attributes:
        directory = self._directory(parent).ino
        found = self._child(directory, name)
        if found is None and not _is_noise(name):
            refresh, known = self._news_of(directory, names_message=name.lower().endswith(_SUFFIX))
            if refresh is not None and not (known and self.pool.is_away):
                with trio.move_on_at(refresh.started + self._patience if known else math.inf):
                    while not refresh.done and found is None:
                        await refresh.progress()
                        found = self._child(directory, name)
            found = found or self._child(directory, name)
            if found is None and not known and refresh is not None and refresh.error is not None:
                raise refresh.error.with_traceback(None)
        if found is None:
            raise NotFound("no such file")
        return _draft_attributes(found) if isinstance(found, Draft) else self._attributes(found)

    def _news_of(self, ino: Ino, *, names_message: bool) -> tuple[Refresh | None, bool]:
        """Whatever can say if a name has come into being, and whether the directory is known otherwise."""
        if not names_message:
            return self.sync.refresh_tree(MAX_AGE), True
        mailbox = self.cache.mailbox(ino)
        if mailbox is None or not mailbox.selectable:
            return None, True
        self.push.used(ino)
        if mailbox.complete and not self.sync.is_at_rest(ino):
            return None, True
        return self.sync.refresh_mailbox(ino, MAX_AGE), bool(mailbox.complete)

    async def wait_for_news(self, refresh: Refresh | None) -> None:
        """Wait for a synchronisation, but not long, and whatever comes of it.

        Not at all where it would be in vain. What others have waited for in vain is not waited for again.
        """
        if refresh is not None and not self.pool.is_away:
            with trio.move_on_at(refresh.started + self._patience):
                await refresh.finished()

    # -- directories ---------------------------------------------------------------------------------------

    async def opendir(self, ino: Ino) -> None:
        """Bring the directory up to date, so that reading it shows what the server has now."""
        node = self._directory(ino)
        await self._refresh_directory(node)
        self.push.opened(node.ino)

    async def _refresh_directory(self, node: Node) -> None:
        mailbox = self.cache.mailbox(node.ino)
        tree = self.sync.refresh_tree(MAX_AGE)
        if mailbox is not None and mailbox.selectable:
            messages = self.sync.refresh_mailbox(node.ino, MAX_AGE)
            if mailbox.complete:
                await self.wait_for_news(messages)
            if self.sync.freshness.is_watched(node.ino):
                return  # what the list of mailboxes has in store is seen when it comes
        await self.wait_for_news(tree)

    def closedir(self, ino: Ino) -> None:
        """End one use of a directory."""
        self.push.closed(self._root if ino == ROOT else ino)

    async def readdir(self, ino: Ino, after: int) -> list[tuple[bytes, Attributes]]:
        """Entries with inode numbers above ``after``, by inode number; none means that there are no more.

        In a mailbox that is being listed for the first time the entries come as they arrive.
        """
        directory = self._directory(ino).ino
        while True:
            page = self._page(directory, after)
            if page:
                return page
            mailbox = self.cache.mailbox(directory)
            if mailbox is None or mailbox.complete or not mailbox.selectable:
                return []
            refresh = self.sync.refresh_mailbox(directory, MAX_AGE)
            if refresh is None:
                return []
            await refresh.progress()
            if refresh.error is not None:
                raise refresh.error.with_traceback(None)

    def _page(self, directory: Ino, after: int) -> list[tuple[bytes, Attributes]]:
        nodes = self.cache.children(directory, after, _PAGE)
        uncertain = self._uncertain(directory)
        page = [
            (node.name or b"", self._attributes(node))
            for node in nodes
            if node.is_dir or not self._is_twin(node, uncertain)
        ]
        end = nodes[-1].ino if len(nodes) == _PAGE else math.inf
        drafts = [d for d in self.spool.within(directory) if after < d.ino <= end]
        if drafts:
            # A new version of a message has its inode, and stands in the page with its own attributes.
            there = {attributes.ino for _, attributes in page}
            names = {draft.name for draft in drafts}
            page = [(n, a) for n, a in page if n not in names or self.spool.get(a.ino) is not None]
            page += [(d.name, _draft_attributes(d)) for d in drafts if d.ino not in there]
            page.sort(key=lambda entry: entry[1].ino)
        if not page and len(nodes) == _PAGE:
            return self._page(directory, nodes[-1].ino)
        return page

    # -- reading and writing -------------------------------------------------------------------------------

    def open(self, ino: Ino, *, writing: bool, wanted: bool) -> Opening:
        """Begin to use a file; its exact size is known when this returns, or what it returns was awaited.

        ``wanted``: all the bytes are of use to the caller, and are returned if they are few.
        """
        draft = self.spool.get(ino)
        if draft is not None:
            self.files.open_draft(draft, writing=writing)
            return None
        node = self.node(ino)
        if node.is_dir:
            raise IsADirectory("it is a directory")
        self.push.used(node.parent)
        return self.files.open(node, writing=writing, wanted=wanted)

    async def create(self, parent: Ino, name: bytes, mode: int) -> Attributes:
        """A new, empty file, open for writing."""
        directory = self._directory(parent).ino
        if self._child(directory, name) is not None:
            raise Exists("there is a file of that name")
        if is_message_name(name):
            self.operations.mailbox(directory)
        draft = self.spool.create(self.cache.new_ino(), directory, name, self.cache.path(directory), mode)
        draft.state = "open" if is_message_name(name) else "local"
        previous = self._just_renamed(directory, name)
        if previous is not None:
            self._replace(draft, previous)
        draft.save()
        self._touched(directory)
        self.files.open_draft(draft, writing=True)
        return _draft_attributes(draft)

    def _just_renamed(self, directory: Ino, name: bytes) -> Node | None:
        """The message that had this name until a moment ago; see `_renamed`."""
        ino, at = self._renamed.pop((directory, name), (None, -math.inf))
        if ino is None or time.monotonic() - at > _EDITORS_PAUSE:
            return None
        return self.cache.node(ino)

    def _draft_of(self, node: Node) -> Draft:
        """Begin a new version of a message under the same name and inode."""
        path = self.cache.path(node.parent)
        base, flags = self._base(node) or (None, "")
        draft = self.spool.create(node.ino, node.parent, node.name or b"", path, node.mode or 0o600, base)
        draft.flags = flags
        if not is_message_name(draft.name):
            # Whatever its name: the file is a message on the server, and stays one.
            log.debug("%s is a message by another name", draft.shown)
        draft.save()
        return draft

    def _replace(self, draft: Draft, old: Node) -> None:
        """Let a draft be a new version of a message: with its flags, unless it has some of its own."""
        if (found := self._base(old)) is not None:
            draft.base, flags = found
            draft.flags = draft.flags or flags

    def _base(self, node: Node) -> tuple[Base, str] | None:
        """A message as one to be replaced, and its flags."""
        details = self.cache.details(node.ino)
        mailbox = self.cache.mailbox(node.parent)
        if details is None or mailbox is None or mailbox.server_name is None:
            return None
        name, uidvalidity = mailbox.server_name, mailbox.uidvalidity
        return Base(name, uidvalidity, details.uid, details.date, details.zone), details.flags

    def release(self, ino: Ino, *, writing: bool) -> None:
        """End one use of a file; when the last writer is done, what was written is complete."""
        last = self.files.release(ino, writing=writing)
        draft = self.spool.get(ino)
        if last and draft is not None:
            self._complete(draft)

    def release_truncated(self, ino: Ino) -> None:
        """A file was truncated by name: if nobody has it open for writing, it is complete."""
        draft = self.spool.get(ino)
        file = self.files.get(ino)
        if draft is not None and (file is None or not file.writers):
            self._complete(draft)

    def _complete(self, draft: Draft, *, now: bool = False) -> bool:
        """Submit a draft if it is one that has something to send; true if it did."""
        if draft.state in {"local", "unsent"} or (draft.state == "open" and not draft.dirty):
            return False
        if draft.dirty and draft.size == 0:
            return False  # an empty file is never a message; more will come
        draft.dirty = False
        self.uploader.submit(draft, now=now)
        return True

    async def fsync(self, ino: Ino) -> None:
        """Return when a file is safe: a message on the server, anything else on this disk."""
        draft = self.spool.get(ino)
        if draft is None:
            return
        await draft.secure()
        if self._complete(draft, now=True):
            await self.uploader.deliver(draft)

    async def fsync_directory(self) -> None:
        """Return when everything that can be sent is on the server."""
        await self.uploader.drain()

    def retry(self, ino: Ino) -> None:
        """Send again what was refused."""
        draft = self.spool.get(ino)
        if draft is None or draft.state != "unsent":
            raise Invalid("it is not unsent")
        draft.dirty = False
        self.uploader.submit(draft, now=True)

    def _touched(self, directory: Ino) -> None:
        self.cache.touch_directory(directory)

    def set_attributes(
        self, ino: Ino, *, mode: int | None, mtime: int | None, owner: int | None, group: int | None
    ) -> None:
        """chmod, utimens, chown: kept here, as a server has no place for them. mtime in nanoseconds."""
        if (owner is not None and owner != os.getuid()) or (
            group is not None and group not in {os.getgid(), *os.getgroups()}
        ):
            raise NotPermitted("files belong to the user who mounted them")
        draft = self.spool.get(ino)
        if draft is None:
            self.cache.set_local(self.node(ino).ino, mode=mode, mtime=mtime)
            return
        if mode is not None:
            draft.mode = mode
        if mtime is not None:
            draft.mtime, draft.timed = mtime, True
        draft.ctime = time.time_ns()
        draft.save()

    # -- names ---------------------------------------------------------------------------------------------

    async def rename(
        self, parent: Ino, name: bytes, new_parent: Ino, new_name: bytes, *, keep_existing: bool
    ) -> None:
        """What ``mv`` does.

        A directory: RENAME. A message: within its mailbox a new name kept here, else MOVE. A draft: a new
        place; a message's name makes it complete, and the server is waited for. Whatever had the new name is
        replaced: a message goes the way of rm, after everything else has worked.
        """
        here, there = self._directory(parent).ino, self._directory(new_parent).ino
        source, target = self._child(here, name), self._child(there, new_name)
        if source is None:
            raise NotFound("no such file")
        if target is not None and keep_existing:
            raise Exists("there is a file of that name")
        if target is not None and target.ino == source.ino:
            return
        if isinstance(source, Node) and source.is_dir:
            await self._rename_directory(source, target, there, new_name)
            return
        if isinstance(target, Node) and target.is_dir:
            raise IsADirectory("there is a directory of that name")
        if isinstance(source, Draft):
            if is_message_name(new_name):
                self.operations.mailbox(there)
            if self.cache.node(source.ino) is not None and here != there:
                # A message with changes on their way cannot move before they have arrived.
                await self._settle(source)
            elif await self.uploader.withdraw(source):
                base = source.base
                try:
                    with await self._replacing(there, new_name) as replaced:
                        await self._rename_draft(source, replaced, there, new_name)
                except BaseException:
                    self._resubmit(source)
                    raise
                if base is not None and base != source.base:
                    # It replaced that one before, and replaces another one now, or none.
                    await self.uploader.discard(base)
                return
            # It was sent meanwhile, and is a message now.
            source = self.node(source.ino)
        with await self._replacing(there, new_name) as replaced:
            target = replaced.node
            if target is not None and target.ino == source.ino:
                target = None  # an editor's backup is put back in place of what was not sent yet
            if here != there:
                await self.operations.move(source.ino, there, new_name)
            else:
                if target is not None:
                    self.cache.hide(target.ino)
                self.cache.rename(source.ino, new_name)
                if is_message_name(name) and not is_message_name(new_name):
                    self._renamed[here, name] = source.ino, time.monotonic()
        self._renamed.pop((there, new_name), None)
        if target is not None:
            await self._remove_replaced(target)

    async def _replacing(self, directory: Ino, name: bytes) -> "_Replacing":
        """Prepare to replace what has that name."""
        target = self._child(directory, name)
        if not isinstance(target, Draft):
            return _Replacing(self, None, target)
        if not await self.uploader.withdraw(target):
            node = self._child(directory, name)
            return _Replacing(self, None, node if isinstance(node, Node) else None)
        return _Replacing(self, target, self._version_of(target))

    def _version_of(self, draft: Draft) -> Node | None:
        """The message that a draft is a new version of, if there is one."""
        node = self.cache.node(draft.ino)
        if node is None and draft.base is not None:
            node = self.operations.find(draft.base)
        return node

    def _resubmit(self, draft: Draft) -> None:
        """Undo that a draft was withdrawn, after something has failed."""
        if self.spool.get(draft.ino) is draft and draft.state == "sending":
            self.uploader.submit(draft)

    async def _rename_draft(self, draft: Draft, replaced: "_Replacing", there: Ino, new_name: bytes) -> None:
        """Give a draft that was withdrawn another place; see `rename`."""
        message = is_message_name(new_name)
        target = replaced.node
        if replaced.draft is not None and replaced.draft.base is not None and target is None:
            # A new version of a message is replaced by another new version of it.
            draft.base = replaced.draft.base
        before = draft.parent, draft.name, draft.path, draft.state, draft.base
        is_version = self.cache.node(draft.ino) is not None
        renamed = self._just_renamed(there, new_name)
        if target is not None and message and not is_version:
            self._replace(draft, target)
        elif message and draft.base is None and renamed is not None:
            self._replace(draft, renamed)
        if not message and not is_version:
            draft.state, draft.base = "local", None
        elif draft.state == "local" or (draft.state == "unsent" and draft.parent != there):
            draft.state, draft.dirty = "open", True
        self.spool.rename(draft, there, new_name, self.cache.path(there))
        self._touched(before[0])
        self._touched(there)
        if draft.state == "local":
            if target is not None:
                await self.operations.remove(target.ino)
            return
        if target is not None:
            # Only now that the draft says what it replaces: hidden, it would not be seen again after a kill.
            self.cache.hide(target.ino)
        if is_version:
            self.cache.rename(draft.ino, new_name)
            if target is not None:
                await self._remove_replaced(target)
                target = None
        if not self._complete(draft, now=True):
            draft.save()
            return
        try:
            await self._wait_for_server(draft)
        except ImapfsError:
            # It goes back to where it was, as rename either happens or does not.
            draft.state = "unsent" if before[3] == "sending" else before[3]
            draft.base = before[4]
            self.spool.rename(draft, *before[:3])
            if target is not None and self.cache.node(target.ino) is not None:
                self.cache.rename(target.ino, new_name)
            raise

    async def _wait_for_server(self, draft: Draft) -> None:
        """Wait until a draft is sent or refused; a server that is away or slow is not waited for."""
        # Well before whoever waits for the answer is told that there was none.
        with trio.move_on_at(trio.current_effective_deadline() - self.config.timeout * 0.2):
            try:
                await self.uploader.deliver(draft)
                return
            except (ConnectionLost, Throttled) as error:
                log.info("%s is sent later: %s", draft.shown, error)
        if self.spool.get(draft.ino) is draft:
            await draft.secure()

    async def _settle(self, draft: Draft) -> None:
        """Have a new version of a message on the server."""
        if self._complete(draft, now=True):
            await self.uploader.deliver(draft)
        elif draft.state == "open":
            self.spool.forget(draft)
        else:
            raise Refused(f"its changes are not on the server: {draft.error}", "INUSE")

    async def _remove_replaced(self, target: Node) -> None:
        """Delete a message, now or as soon as that is possible: what takes its place is there already."""
        base = self._base(target)
        if base is not None:
            self.cache.hide(target.ino)
            await self.uploader.discard(base[0])

    async def unlink(self, parent: Ino, name: bytes) -> None:
        """What ``rm`` does: a message goes to Trash or for good, a draft with all that it replaced."""
        directory = self._directory(parent).ino
        found = self._child(directory, name)
        if found is None:
            raise NotFound("no such file")
        if isinstance(found, Draft):
            with await self._replacing(directory, name) as replaced:
                node = replaced.node
                # An editor's backup has another name, and stays.
                if node is not None and node.name in {None, name}:
                    with contextlib.suppress(MessageGone):
                        await self.operations.remove(node.ino)
            self._touched(directory)
            return
        if found.is_dir:
            raise IsADirectory("it is a directory")
        await self.operations.remove(found.ino)

    # -- mailboxes -----------------------------------------------------------------------------------------

    async def mkdir(self, parent: Ino, name: bytes) -> Attributes:
        """CREATE a mailbox."""
        directory = self._directory(parent).ino
        if self._child(directory, name) is not None:
            raise Exists("there is a file of that name")
        await self.operations.create_mailbox(self._server_name(directory, name))
        made = self.cache.child(directory, name)
        if made is None:
            raise Refused("the server took the name of the mailbox for another one")
        return self._attributes(made)

    def _server_name(self, parent: Ino, name: bytes) -> bytes:
        """What a mailbox in ``parent`` is called on the server. Raises NotPermitted, Invalid."""
        if name.startswith(b"."):
            # Among them .Trash-1000: file managers then offer to delete for good, which is an unlink.
            raise NotPermitted("a mailbox cannot begin with a dot")
        component = server_component(name)
        delimiter = self.sync.delimiter
        if component is None or (delimiter and delimiter in component):
            raise Invalid("the server cannot have a mailbox of that name")
        if parent == ROOT:
            return self.sync.prefix + component
        mailbox = self.cache.mailbox(parent)
        if mailbox is None or mailbox.server_name is None or not mailbox.delimiter:
            raise NotPermitted("there can be no mailbox in this directory")
        if mailbox.server_name + mailbox.delimiter == self.sync.prefix:
            raise NotPermitted("what is in this mailbox is shown beside it: make it there")
        return mailbox.server_name + mailbox.delimiter + component

    async def rmdir(self, parent: Ino, name: bytes) -> None:
        """DELETE a mailbox, if there is nothing in it on the server or here."""
        node = self._child(self._directory(parent).ino, name)
        if node is None:
            raise NotFound("no such directory")
        if isinstance(node, Draft) or not node.is_dir:
            raise NotADirectory("it is a file")
        mailbox = self.cache.mailbox(node.ino)
        if mailbox is None or mailbox.server_name is None or is_inbox(mailbox.server_name):
            raise NotPermitted("it cannot be deleted")
        refresh = self.sync.refresh_tree(0)
        if refresh is not None:
            await refresh.finished()
        if self.cache.directories(node.ino) or self.spool.within(node.ino):
            raise NotEmpty("the directory is not empty")
        if not await self.operations.delete_mailbox(node.ino):
            raise NotEmpty("the mailbox is not empty")

    async def _rename_directory(
        self, source: Node, target: Draft | Node | None, parent: Ino, name: bytes
    ) -> None:
        mailbox = self.cache.mailbox(source.ino)
        if target is not None:
            raise NotEmpty("there is a file or mailbox of that name")
        if mailbox is None or mailbox.server_name is None or is_inbox(mailbox.server_name):
            # RENAME INBOX moves its messages and leaves it there (RFC 9051 section 6.3.6), and some servers
            # lose them.
            raise NotPermitted("this mailbox cannot be renamed")
        old, new = mailbox.server_name, self._server_name(parent, name)
        if not await self.operations.recover():
            raise Refused("a move is not finished yet: try again", "UNAVAILABLE")
        await self.operations.rename_mailbox(source.ino, old, new, parent, name)
        self._follow_mailbox(Renamed(old, new, mailbox.delimiter))

    def _follow_mailbox(self, change: Renamed) -> None:
        """A mailbox has another name on the server: so has what drafts belong to, and where they are."""
        for draft in (*self.spool, *self.spool.sent):
            for place in (draft.base, draft.attempt):
                now = place and renamed(place.mailbox, change.old, change.new, change.delimiter)
                if place is not None and now is not None:
                    place.mailbox = now
                    draft.save()
        for draft in self.spool:
            path = self.cache.path(draft.parent)
            if path != draft.path:
                self.spool.rename(draft, draft.parent, draft.name, path)

    # -- the whole -----------------------------------------------------------------------------------------

    async def statfs(self) -> Space:
        """The account's STORAGE quota; where it has none, the disk that holds the cache."""
        if time.monotonic() - self._quota_at > _QUOTA_AGE:
            self._quota_at = time.monotonic()
            asked = trio.Event()
            self._nursery.start_soon(self._ask_quota, asked)
            with trio.move_on_after(0 if self.pool.is_away else self._patience):
                await asked.wait()
        if self._quota is not None:
            return Space(self._quota.limit, max(0, self._quota.limit - self._quota.used))
        disk = os.statvfs(self.cache.directory)
        return Space(disk.f_blocks * disk.f_frsize, disk.f_bavail * disk.f_frsize)

    async def _ask_quota(self, asked: trio.Event) -> None:
        try:
            self._quota = await self.pool.run(partial(Session.quota, mailbox=b"INBOX"))
        except Exception as error:
            report(error, "the quota is not known")
        finally:
            asked.set()


class _Replacing:
    """What is being replaced or deleted. A draft among it is kept aside until that has worked."""

    def __init__(self, fs: Filesystem, draft: Draft | None, node: Node | None) -> None:
        self._fs = fs
        self.draft = draft
        self.node = node
        """The message, or the one that the draft is a new version of."""

    def __enter__(self) -> "_Replacing":
        if self.draft is not None:
            self._fs.spool.set_aside(self.draft)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self.draft is None:
            return
        if kind is None:
            self._fs.files.deleted(self.draft)
            self._fs.spool.forget(self.draft)
        else:
            self._fs.spool.put_back(self.draft)
            self._fs._resubmit(self.draft)


def _draft_attributes(draft: Draft, size: int | None = None) -> Attributes:
    """What stat shows of a draft; its size must be given once its file is deleted."""
    size = draft.size if size is None else size
    return Attributes(draft.ino, False, size, draft.mtime, draft.ctime, draft.mode)


def _is_noise(name: bytes) -> bool:
    """Names that programs look for everywhere and no mailbox is likely to have: not worth a question."""
    return name.startswith(b".") or name in {
        b"RCS",
        b"CVS",
        b"SCCS",
        b"BitKeeper",
        b"autorun.inf",
        b"desktop.ini",
    }
