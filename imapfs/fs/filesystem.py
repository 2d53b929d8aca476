"""What each operation on the mount does: `rename` is ``mv``, `unlink` is ``rm``.

A message changes on the server first and then in the cache. A draft changes in the spool, and is uploaded
when it is complete: when its last writer closes it, or when it gets the name of a message and has no writer.

The operations work on entries of the tree (`imapfs.fs.tree`), whichever directory shows them. All methods run
on the trio thread and raise `imapfs.errors`. This module does not know the kernel's interface.
"""

import contextlib
import errno
import logging
import os
import time
from dataclasses import dataclass
from typing import Final

from imapfs.errors import (
    CacheError,
    CrossDevice,
    Exists,
    ImapfsError,
    Invalid,
    IsADirectory,
    MessageGone,
    NameTooLong,
    NotADirectory,
    NotEmpty,
    NotFound,
    NotPermitted,
    Refused,
)
from imapfs.fs.drafts import Drafts
from imapfs.fs.files import Files, Opening
from imapfs.fs.refresh import DirectoryRefresher
from imapfs.fs.replace import Replacement, Replacer
from imapfs.fs.scratch import ScratchDirectories
from imapfs.fs.space import Space, SpaceReporter
from imapfs.fs.tree import Entry, MailTree
from imapfs.imap.backoff import Connectivity
from imapfs.imap.pool import SessionPool
from imapfs.log import report
from imapfs.model import ROOT, Ino
from imapfs.names import MAX_NAME, MESSAGE_SUFFIX, is_inbox, is_message_name, server_component
from imapfs.store.cache import Cache
from imapfs.store.rows import Mailbox, Node
from imapfs.store.spool import Base, Draft, DraftState, Spool
from imapfs.sync.append import check_is_message, head_of
from imapfs.sync.changes import Renamed
from imapfs.sync.folders import Folders
from imapfs.sync.locate import Locator
from imapfs.sync.move import Mover
from imapfs.sync.replaced import ReplacedMessages
from imapfs.sync.synchroniser import Synchroniser
from imapfs.sync.upload import Uploader

log = logging.getLogger(__name__)

_NOISE: Final = {b"RCS", b"CVS", b"SCCS", b"BitKeeper", b"autorun.inf", b"desktop.ini"}
"""Names that programs look up in every directory, and that no mailbox is likely to have."""


@dataclass(frozen=True, slots=True)
class _Before:
    """A draft as it was before a rename."""

    parent: Ino
    name: bytes
    path: tuple[bytes, ...]
    state: DraftState
    base: Base | None


class Filesystem:
    """The operations on one mounted account."""

    def __init__(
        self,
        tree: MailTree,
        refresher: DirectoryRefresher,
        files: Files,
        drafts: Drafts,
        scratch: ScratchDirectories,
        replacer: Replacer,
        reporter: SpaceReporter,
        cache: Cache,
        spool: Spool,
        pool: SessionPool,
        sync: Synchroniser,
        locator: Locator,
        mover: Mover,
        folders: Folders,
        uploader: Uploader,
        replaced: ReplacedMessages,
    ) -> None:
        self._tree = tree
        self._refresher = refresher
        self._files = files
        self._drafts = drafts
        self._scratch = scratch
        self._replacer = replacer
        self._reporter = reporter
        self._cache = cache
        self._spool = spool
        self._pool = pool
        self._sync = sync
        self._locator = locator
        self._mover = mover
        self._folders = folders
        self._uploader = uploader
        self._replaced = replaced

    @property
    def late_errno(self) -> int:
        """Return the errno for a request that has taken too long."""
        return errno.EBUSY if self._pool.state is Connectivity.THROTTLED else errno.ETIMEDOUT

    # -- looking -------------------------------------------------------------------------------------------

    def getattr(self, ino: Ino) -> Entry:
        """Return the entry of a file or directory, also of a deleted file that is still open."""
        return self._files.deleted_entry(ino) or self._tree.entry(ino)

    def _directory(self, parent: Ino, name: bytes) -> Ino:
        """Return the inode in the cache of a directory that an operation on ``name`` is about.

        Raises NameTooLong, MessageGone, NotADirectory.
        """
        if len(name) > MAX_NAME:
            raise NameTooLong("the name is too long")
        return self._tree.directory(parent).ino

    def _is_mail(self, directory: Ino, name: bytes) -> bool:
        """Return whether a new file becomes a message. What is in a scratch directory never does."""
        return is_message_name(name) and not self._tree.is_scratch(directory)

    def known(self, parent: Ino, name: bytes) -> Entry | None:
        """Return the entry that a directory has under a name, without asking the server."""
        return self._tree.child(parent, name)

    async def lookup(self, parent: Ino, name: bytes) -> Entry:
        """Return the entry that a directory has under a name; ask the server if the name is not known."""
        directory = self._directory(parent, name)
        found = self._tree.child(directory, name)
        ask = not name.startswith(b".") and name not in _NOISE and not self._tree.is_scratch(directory)
        if found is None and ask:
            is_message = name.lower().endswith(MESSAGE_SUFFIX)
            found = await self._refresher.appears(directory, name, is_message=is_message)
        if found is None:
            raise NotFound("no such file")
        return found

    async def opendir(self, ino: Ino) -> None:
        """Bring a directory up to date, so that reading it shows what the server has now."""
        await self._refresher.opened(self._tree.directory(ino))

    def closedir(self, ino: Ino) -> None:
        """Close a directory once."""
        self._refresher.closed(self._tree.inside(ino))

    async def readdir(self, ino: Ino, after: int) -> list[Entry]:
        """Return entries with inodes above ``after``, ordered by inode; an empty list at the end.

        While a mailbox is listed for the first time, entries are returned as they arrive.
        """
        directory = self._tree.directory(ino).ino
        while not (page := self._tree.page(directory, after)):
            if not await self._refresher.more(directory):
                return []
        return page

    async def statfs(self) -> Space:
        """Return the size and the free space of the account."""
        return await self._reporter.space()

    # -- reading and writing -------------------------------------------------------------------------------

    def open(self, ino: Ino, *, writing: bool, wanted: bool) -> Opening:
        """Open a file. Its exact size is known on return, or once the returned awaitable has finished.

        ``wanted``: return all bytes of a small message.
        """
        draft = self._spool.get(ino)
        if draft is not None:
            self._files.open_draft(draft, writing=writing)
            return None
        node = self._tree.node(ino)
        if node.is_dir:
            raise IsADirectory("it is a directory")
        self._refresher.used(node.parent)
        return self._files.open(node, writing=writing, wanted=wanted)

    async def create(self, parent: Ino, name: bytes, mode: int) -> Entry:
        """Create an empty file, open for writing."""
        directory = self._directory(parent, name)
        is_mail = self._is_mail(directory, name)
        if is_mail:
            await self._make_selectable(directory)
            await self._uploader.check_takes(directory)
        if self._tree.child(directory, name) is not None:
            raise Exists("a file with this name exists")
        path = self._cache.path(directory)
        state: DraftState = "open" if is_mail else "local"
        draft = self._spool.create(self._cache.new_ino(), directory, name, path, mode, state=state)
        previous = self._replacer.just_renamed(directory, name)
        if previous is not None:
            self._replacer.make_version(draft, previous)
        else:
            self._replacer.continue_version(draft)
        draft.save()
        self._cache.touch_directory(directory)
        self._files.open_draft(draft, writing=True)
        return Entry.of_draft(draft)

    async def _make_selectable(self, directory: Ino) -> None:
        """Have a directory take messages: CREATE a mailbox that is only the parent of others (\\Noselect).

        Raises NotPermitted if it takes none.
        """
        mailbox = self._cache.mailbox(directory)
        if mailbox is not None and mailbox.selectable_name is not None:
            return
        if directory == ROOT or mailbox is None:
            raise NotPermitted("a message has to be in a mailbox: put it into one of the directories")
        node = self._tree.node(directory)
        try:
            name = mailbox.server_name or self._server_name(node.parent, node.name or b"")
            await self._folders.create(name)
        except (Refused, Invalid) as error:
            raise NotPermitted(f"the server lets this directory hold no messages: {error}") from None
        mailbox = self._cache.mailbox(directory)
        if mailbox is None or mailbox.selectable_name is None:
            raise NotPermitted("the server lets this directory hold no messages")

    def release(self, ino: Ino, *, writing: bool) -> None:
        """Close a file once. When the last writer closes it, it is complete."""
        last = self._files.release(ino, writing=writing)
        draft = self._spool.get(ino)
        if last and draft is not None:
            self._complete(draft)

    async def truncate(self, ino: Ino, size: int, *, is_open: bool) -> None:
        """Set the size of a file. If not ``is_open`` (by a descriptor), this may make it complete."""
        try:
            await self._files.truncate(ino, size)
        finally:
            draft = self._spool.get(ino)
            if not is_open and draft is not None and not self._files.is_written(ino):
                self._complete(draft)

    def complete_closed(self) -> None:
        """Submit what programs have closed, but the kernel has not released before the mount ended.

        The attributes of temporary files are saved, too.
        """
        for draft in self._spool:
            if draft.is_temporary:
                self._spool.try_save(draft)
            if draft.closed and draft.state == "open":
                try:
                    self._complete(draft)
                except CacheError as error:
                    report(error, f"{draft.shown} has no new description")

    def _complete(self, draft: Draft, *, now: bool = False) -> bool:
        """Submit a draft for upload, unless there is nothing to upload. Return whether it was submitted."""
        if draft.state in {"local", "unsent"} or (draft.state == "open" and not draft.dirty):
            return False
        if draft.dirty and draft.size == 0:
            return False  # an empty file is not a message: the program will write to it later
        draft.dirty = draft.closed = False
        self._uploader.submit(draft, now=now)
        return True

    async def fsync(self, ino: Ino, *, writing: bool) -> None:
        """Wait until a file is safe: on this disk if a program writes to it, otherwise on the server.

        ``writing``: the descriptor is open for writing. Such a file is not complete, and is not uploaded.
        Raises why the server refuses it.
        """
        draft = self._spool.get(ino)
        if draft is None:
            return
        await draft.secure()
        if writing or self._files.is_written(ino):
            return
        if self._complete(draft, now=True):
            await self._uploader.deliver(draft)
        elif draft.state == "unsent":
            raise self._uploader.refusal(draft)

    async def fsync_directory(self) -> None:
        """Wait until everything that can be done on the server is done."""
        await self._uploader.drain()
        await self._replaced.remove_all()
        await self._mover.recover()

    def set_attributes(
        self, ino: Ino, *, mode: int | None, mtime: int | None, owner: int | None, group: int | None
    ) -> None:
        """Do what chmod, utimens (mtime in nanoseconds) and chown ask for.

        Mode and mtime are kept here, because a server cannot store them. Those of a temporary file are saved
        when it is renamed, at fsync and at the end of the mount: rsync sets them for each file.
        Raises NotPermitted for an owner or a group that is not the user's own.
        """
        if (owner is not None and owner != os.getuid()) or (
            group is not None and group not in {os.getgid(), *os.getgroups()}
        ):
            raise NotPermitted("files belong to the user who mounted them")
        draft = self._spool.get(ino)
        if draft is None:
            self._cache.set_local(self._tree.node(ino).ino, mode=mode, mtime=mtime)
            return
        if mode is not None:
            draft.mode = mode
        if mtime is not None:
            draft.mtime, draft.timed = mtime, True
        draft.ctime = time.time_ns()
        if not draft.is_temporary:
            draft.save()

    # -- mv ------------------------------------------------------------------------------------------------

    async def rename(
        self, parent: Ino, name: bytes, new_parent: Ino, new_name: bytes, *, keep_existing: bool
    ) -> None:
        """Do what ``mv`` asks for.

        A directory: RENAME. A message: MOVE to another mailbox; within its mailbox only its name changes,
        which is kept here. A draft: its place changes; if its new name is that of a message, it is complete,
        and is uploaded once it is safe on this disk. The file that had the new name before is replaced: if it
        is a message, it is removed as by ``rm``, after everything else has succeeded.
        """
        here, there = self._directory(parent, name), self._directory(new_parent, new_name)
        source, target = self._tree.child(here, name), self._tree.child(there, new_name)
        if source is None:
            raise NotFound("no such file")
        if target is not None and keep_existing:
            raise Exists("a file with this name exists")
        if target is not None and target.ino == source.ino:
            return
        if source.is_dir:
            if target is not None:
                raise NotEmpty("a file or mailbox with this name exists")
            if self._tree.is_scratch(source.ino):
                self._scratch.rename(source.ino, there, new_name)
                return
            await self._rename_directory(self._tree.node(source.ino), there, new_name)
            return
        if target is not None and target.is_dir:
            raise IsADirectory("a directory with this name exists")
        if self._cache.node(source.ino) is not None and self._tree.is_scratch(there):
            # The server has it: a program then copies it, and deletes the message.
            raise CrossDevice("a message cannot be moved out of the account")
        if source.draft is not None and await self._rename_draft(source.draft, there, new_name):
            return
        # A message, or a draft that was uploaded before it could be renamed.
        await self._make_selectable(there)
        await self._rename_message(self._tree.node(source.ino), name, there, new_name)

    async def _rename_message(self, message: Node, name: bytes, there: Ino, new_name: bytes) -> None:
        with await self._replacer.prepare(there, new_name) as replaced:
            target = replaced.message
            if target is not None and target.ino == message.ino:
                target = None  # an editor restores its backup in place of what is not uploaded yet
            if message.parent != there:
                await self._mover.move(message.ino, there, new_name)
            else:
                if target is not None:
                    self._cache.hide(target.ino)
                self._cache.rename(message.ino, new_name)
                self._replacer.note_renamed(there, name, new_name, message.ino)
        self._replacer.forget_renamed(there, new_name)
        if target is not None:
            await self._replacer.remove(target)

    async def _rename_draft(self, draft: Draft, there: Ino, new_name: bytes) -> bool:
        """Rename a draft. Return False if it has become a message, which the caller has to rename."""
        if self._is_mail(there, new_name):
            await self._make_selectable(there)
            await self._check_takes(draft, there)
            if self._spool.get(draft.ino) is not draft:
                return False
        if self._cache.node(draft.ino) is not None and draft.parent != there:
            # A message with changes that are not on the server yet cannot move before they are.
            await self._settle(draft)
            return False
        if not await self._uploader.withdraw(draft):
            return False
        base, here, name = draft.base, draft.parent, draft.name
        try:
            with await self._replacer.prepare(there, new_name) as replaced:
                await self._place_draft(draft, replaced, there, new_name)
        except BaseException:
            self._replacer.resubmit(draft)
            raise
        if base is not None and base != draft.base:
            # The draft was to replace that message. Now it replaces another one, or none.
            if here == there:
                self._replacer.note_renamed_version(here, name, new_name, base, draft.flags)
            await self._replaced.discard(base.ref)
        return True

    async def _check_takes(self, draft: Draft, there: Ino) -> None:
        """Raise Invalid if a draft is no mail message, or why the server is known to take none there."""
        if draft.state == "unsent" and draft.parent == there:
            return  # only its name changes
        if draft.size and not self._files.is_written(draft.ino):
            check_is_message(head_of(draft))
        if draft.state == "local" or draft.parent != there:
            await self._uploader.check_takes(there)

    async def _place_draft(self, draft: Draft, replaced: Replacement, there: Ino, new_name: bytes) -> None:
        """Give a withdrawn draft another place, and upload it if that makes it complete."""
        becomes_message = self._is_mail(there, new_name)
        target = replaced.message
        if replaced.draft is not None and replaced.draft.base is not None and target is None:
            # A new version of a message is replaced by another new version of it.
            draft.base = replaced.draft.base
        before = _Before(draft.parent, draft.name, draft.path, draft.state, draft.base)
        is_version = self._cache.node(draft.ino) is not None
        renamed = self._replacer.just_renamed(there, new_name)
        if target is not None and becomes_message and not is_version:
            self._replacer.make_version(draft, target)
        elif becomes_message and draft.base is None and renamed is not None:
            self._replacer.make_version(draft, renamed)
        if not becomes_message and not is_version:
            draft.state, draft.base = "local", None
        elif draft.state == "local" or (draft.state == "unsent" and (draft.rescued or draft.parent != there)):
            draft.state, draft.dirty = "open", True
            # So that a kill before it is submitted leaves a complete file.
            draft.closed = draft.size > 0 and not self._files.is_written(draft.ino)
        self._spool.rename(draft, there, new_name, self._cache.path(there))
        self._cache.touch_directory(before.parent)
        self._cache.touch_directory(there)
        if draft.state == "local":
            if target is not None:
                await self._mover.remove(target.ino)
            return
        if target is not None:
            # Only after the draft has noted what it replaces: after a kill, a hidden message that no draft
            # replaces is shown again.
            self._cache.hide(target.ino)
        if is_version:
            self._cache.rename(draft.ino, new_name)
        try:
            # Before it is uploaded: from then on it can be a message at any moment.
            await draft.secure()
        except ImapfsError:
            # The draft goes back to where it was: a rename either succeeds or changes nothing.
            draft.state = before.state
            draft.closed = False
            draft.base = before.base
            self._spool.rename(draft, before.parent, before.name, before.path)
            if is_version:
                self._cache.rename(draft.ino, before.name)
            if target is not None and self._cache.node(target.ino) is not None:
                self._cache.rename(target.ino, new_name)
            raise
        if is_version and target is not None:
            # The upload itself removes only the old version of the renamed message.
            await self._replacer.remove(target)
        if self._spool.get(draft.ino) is draft and not self._files.is_written(draft.ino):
            self._complete(draft, now=True)

    async def _settle(self, draft: Draft) -> None:
        """Upload a new version of a message, or drop it if nothing was written. Raises Refused."""
        if self._files.is_written(draft.ino) and draft.dirty:
            raise Refused("a program is writing to it", "INUSE")
        if self._complete(draft, now=True):
            await self._uploader.deliver(draft)
        elif draft.state == "open":
            self._spool.forget(draft)
        else:
            raise Refused(f"its changes are not on the server: {draft.error}", "INUSE")

    # -- rm ------------------------------------------------------------------------------------------------

    async def unlink(self, parent: Ino, name: bytes) -> None:
        """Do what ``rm`` asks for.

        A message goes to Trash or is expunged, as the account is configured. A draft is deleted together with
        the message that it replaces.
        """
        directory = self._directory(parent, name)
        found = self._tree.child(directory, name)
        if found is None:
            raise NotFound("no such file")
        if found.is_dir:
            raise IsADirectory("it is a directory")
        if found.draft is None:
            await self._mover.remove(found.ino)
            return
        with await self._replacer.prepare(directory, name) as deleted:
            message = deleted.message
            # An editor's backup has another name, and is kept.
            if message is not None and message.name in {None, name}:
                with contextlib.suppress(MessageGone):
                    await self._mover.remove(message.ino)
        self._cache.touch_directory(directory)

    # -- mailboxes -----------------------------------------------------------------------------------------

    async def mkdir(self, parent: Ino, name: bytes) -> Entry:
        """CREATE a mailbox, or make a scratch directory if the name begins with a dot."""
        directory = self._directory(parent, name)
        if self._tree.child(directory, name) is not None:
            raise Exists("a file with this name exists")
        if name.startswith(b".") or self._tree.is_scratch(directory):
            return Entry.of_node(self._scratch.make(directory, name))
        await self._folders.create(self._server_name(directory, name))
        made = self._cache.child(directory, name)
        if made is None:
            raise Refused("the server created the mailbox under another name")
        return Entry.of_node(made)

    def _server_name(self, parent: Ino, name: bytes) -> bytes:
        """Return the server's name for a mailbox in ``parent``. Raises NotPermitted, Invalid."""
        if name.startswith(b"."):
            raise NotPermitted("the name of a mailbox cannot begin with a dot")
        component = server_component(name)
        delimiter = self._sync.delimiter
        if component is None or (delimiter and delimiter in component):
            raise Invalid("the server cannot have a mailbox with this name")
        if parent == ROOT:
            return self._sync.prefix + component
        mailbox = self._cache.mailbox(parent)
        if mailbox is None or mailbox.server_name is None or not mailbox.delimiter:
            raise NotPermitted("this directory cannot contain mailboxes")
        if mailbox.server_name + mailbox.delimiter == self._sync.prefix:
            raise NotPermitted("mailboxes below this one are shown beside it: create it there")
        return mailbox.server_name + mailbox.delimiter + component

    def _changeable(self, directory: Ino, what: str) -> Mailbox:
        """Return the mailbox of a directory. Raises NotPermitted for INBOX and for a mere parent."""
        mailbox = self._cache.mailbox(directory)
        if mailbox is None or mailbox.server_name is None or is_inbox(mailbox.server_name):
            # RENAME INBOX moves its messages and keeps the mailbox (RFC 9051 section 6.3.6). Some servers
            # lose the messages.
            raise NotPermitted(f"this mailbox cannot be {what}")
        return mailbox

    async def rmdir(self, parent: Ino, name: bytes) -> None:
        """DELETE a mailbox if it is empty, on the server and here. Raises NotEmpty."""
        found = self._tree.child(self._directory(parent, name), name)
        if found is None:
            raise NotFound("no such directory")
        if not found.is_dir:
            raise NotADirectory("it is a file")
        if self._tree.is_scratch(found.ino):
            if self._cache.directories(found.ino) or self._spool.within(found.ino):
                raise NotEmpty("the directory is not empty")
            self._scratch.remove(found.ino)
            return
        self._changeable(found.ino, "deleted")
        refresh = self._sync.refresh_tree(0)
        if refresh is not None:
            await refresh.finished()
        if self._cache.directories(found.ino) or self._spool.within(found.ino):
            raise NotEmpty("the directory is not empty")
        if not await self._folders.delete(found.ino):
            raise NotEmpty("the mailbox is not empty")

    async def _rename_directory(self, source: Node, parent: Ino, name: bytes) -> None:
        mailbox = self._changeable(source.ino, "renamed")
        old, new = mailbox.server_name, self._server_name(parent, name)
        assert old is not None
        if not await self._mover.recover():
            raise Refused("a move is not finished yet: try again", "UNAVAILABLE")
        await self._folders.rename(source.ino, old, new, parent, name)
        self._drafts.follow(Renamed(old, new, mailbox.delimiter))
