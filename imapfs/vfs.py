"""What a mail account looks like as files: this module, and no other, decides it.

The tree. Every mailbox is a directory, every message in it a regular file with exactly the bytes of BODY[].
Attributes: INTERNALDATE is mtime, and ctime too, as backup programs compare it and flags are no content;
flags and header fields are extended attributes.

Freshness. Opening a directory asks the server what changed, unless that was asked a moment ago; looking up a
name that is not known does so too. Whatever is known is served if the server does not answer soon.

All methods run on the trio thread. Inode 1 is the mountpoint, which is the root of the account or of the
subtree that is mounted. Failures are `imapfs.errors`; nothing here knows the kernel's interface.
"""

import errno
import json
import logging
import math
import os
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Final, NamedTuple

import trio

from imapfs import __version__
from imapfs.bodies import SMALL, BodyStore
from imapfs.cache import Cache, Details, Gone, Mailbox, Node
from imapfs.errors import ConnectionLost, ImapfsError, MessageGone, TlsError, UsageError
from imapfs.fetch import Download, Fetcher
from imapfs.imap.grammar import format_iso
from imapfs.imap.pool import SessionPool
from imapfs.imap.session import Quota, Session
from imapfs.model import ROOT, Ino, MountConfig
from imapfs.sync import Changes, Refresh, Synchroniser, display_name

log = logging.getLogger(__name__)

MAX_AGE: Final = 5.0
"""Seconds for which a listing is served without asking the server again."""
_PATIENCE: Final = 3.0
"""Seconds that a known listing waits for news from the server before it is served as it is."""
_QUOTA_AGE: Final = 60.0
_PAGE: Final = 500
_MAILBOX_NUMBERS: Final = (
    b"user.imap.uidvalidity",
    b"user.imap.uidnext",
    b"user.imap.messages",
    b"user.imap.unseen",
)
_SYSTEM_FLAGS: Final = ("seen", "answered", "flagged", "deleted", "draft")


class NotFound(ImapfsError):
    """No such file, directory or attribute."""

    errno = errno.ENOENT


class NoAttribute(ImapfsError):
    errno = errno.ENODATA


class NotSupported(ImapfsError):
    errno = errno.ENOTSUP


class NotADirectory(ImapfsError):
    errno = errno.ENOTDIR


class IsADirectory(ImapfsError):
    errno = errno.EISDIR


class Attributes(NamedTuple):
    """What stat shows."""

    ino: Ino
    is_dir: bool
    size: int
    """Bytes."""
    mtime: int
    """Seconds since the epoch; ctime and atime are the same."""


class Space(NamedTuple):
    """What statfs shows, in bytes."""

    total: int
    free: int


class _OpenFile:
    """A message that some program has open: where its bytes come from, once they are wanted."""

    def __init__(self) -> None:
        self.users = 0
        self.fd = -1
        self.download: Download | None = None
        self.gone: Gone | None = None
        """What it was, once it was removed on the server."""

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
        if self.download is not None:
            self.download.release()


class Filesystem:
    """One mounted account. Background work runs in ``nursery``, whose end is the end of the mount.

    ``on_changes`` and ``on_resize`` are called on the trio thread when the server changed a directory, and
    when a message turned out to have another size than was shown.
    """

    def __init__(
        self,
        config: MountConfig,
        pool: SessionPool,
        cache: Cache,
        nursery: trio.Nursery,
        on_changes: Callable[[Changes], None],
        on_resize: Callable[[Ino], None],
    ) -> None:
        self._config = config
        self._pool = pool
        self._cache = cache
        self._on_changes = on_changes
        self._bodies = BodyStore(cache, config.cache_size)
        self._sync = Synchroniser(pool, cache, self._bodies, nursery, self._changed)
        self._fetcher = Fetcher(pool, cache, self._bodies, nursery, on_resize)
        self._open: dict[Ino, _OpenFile] = {}
        self._verified: set[Ino] = set()
        """Large messages whose cached bodies were found intact since the mount began."""
        self._root = ROOT
        self._quota: Quota | None = None
        self._quota_at = -math.inf
        self._nursery = nursery

    async def start(self) -> None:
        """Find the root of the mount. Raises whatever makes a mount impossible.

        An account that is cached can be mounted without its server.
        """
        refresh = self._sync.refresh_tree(0)
        if refresh is not None:
            await refresh.finished()
            if refresh.error is not None:
                transient = isinstance(refresh.error, ConnectionLost) and not isinstance(
                    refresh.error, TlsError
                )
                if not transient or not self._cache.children(ROOT, 0, 1):
                    raise refresh.error
                log.warning("mounted from the cache: %s", refresh.error)
        if self._config.account.mailbox is not None:
            self._root = self._find_root(self._config.account.mailbox)
        self._nursery.start_soon(self._bodies.sweep)

    def _find_root(self, path: str) -> Ino:
        ino = ROOT
        for name in path.strip("/").encode().split(b"/"):
            node = self._cache.child(ino, name)
            if node is None or not node.is_dir:
                shown = [n.name.decode() for n in self._cache.children(ino, 0, 20) if n.is_dir]
                raise UsageError(
                    f"{self._config.account.host} has no mailbox {path}; at that place there are: "
                    + (", ".join(shown) or "none")
                )
            ino = node.ino
        return ino

    def close(self) -> None:
        """Release files and note what was used."""
        for file in self._open.values():
            file.close()
        self._open.clear()
        self._bodies.flush_use()

    def _changed(self, changes: Changes) -> None:
        for gone in changes.gone:
            file = self._open.get(gone.ino)
            if file is not None:
                # Whoever has it open goes on reading what is cached.
                file.gone = gone
                if file.fd < 0 and file.download is None:
                    file.fd = self._bodies.pin(gone.ino) or -1
        if changes.directory == self._root:
            changes = replace(changes, directory=ROOT)
        self._on_changes(changes)

    # -- names and attributes ------------------------------------------------------------------------------

    def _node(self, ino: Ino) -> Node:
        node = self._cache.node(self._root if ino == ROOT else ino)
        if node is None:
            raise MessageGone("it was removed on the server")
        return node

    def _directory(self, ino: Ino) -> tuple[Node, Mailbox | None]:
        node = self._node(ino)
        if not node.is_dir:
            raise NotADirectory("a message is no directory")
        return node, self._cache.mailbox(node.ino)

    def _attributes(self, node: Node) -> Attributes:
        ino = ROOT if node.ino == self._root else node.ino
        return Attributes(ino, node.is_dir, node.size, node.mtime)

    def getattr(self, ino: Ino) -> Attributes:
        file = self._open.get(ino)
        if file is not None and file.gone is not None:
            return Attributes(ino, False, file.gone.size, file.gone.mtime)
        return self._attributes(self._node(ino))

    def users(self, ino: Ino) -> int:
        """How many times a message is open."""
        file = self._open.get(ino)
        return file.users if file is not None else 0

    async def lookup(self, parent: Ino, name: bytes) -> Attributes:
        directory, mailbox = self._directory(parent)
        node = self._cache.child(directory.ino, name)
        if node is None and not _is_noise(name):
            await self._freshen(directory.ino, mailbox, names_message=name.endswith(b".eml"))
            node = self._cache.child(directory.ino, name)
        if node is None:
            raise NotFound("no such file")
        return self._attributes(node)

    async def _freshen(self, ino: Ino, mailbox: Mailbox | None, *, names_message: bool) -> None:
        """Learn whether a name that is not known has come into being."""
        if not names_message:
            await self._await(self._sync.refresh_tree(MAX_AGE), known=True)
        elif mailbox is not None and mailbox.selectable:
            known = bool(mailbox.complete)
            await self._await(self._sync.refresh_mailbox(ino, MAX_AGE), known=known)

    async def _await(self, refresh: Refresh | None, *, known: bool) -> None:
        """Wait for a synchronisation: briefly, and whatever comes of it, if there is something to serve."""
        if refresh is None:
            return
        with trio.move_on_after(_PATIENCE if known else math.inf):
            await refresh.finished()
        if refresh.error is not None and not known:
            raise refresh.error

    # -- directories ---------------------------------------------------------------------------------------

    async def opendir(self, ino: Ino) -> None:
        """Bring the directory up to date, so that reading it shows what the server has now."""
        node, mailbox = self._directory(ino)
        tree = self._sync.refresh_tree(MAX_AGE)
        if mailbox is not None and mailbox.selectable:
            messages = self._sync.refresh_mailbox(node.ino, MAX_AGE)
            if mailbox.complete:
                await self._await(messages, known=True)
        await self._await(tree, known=True)

    async def readdir(self, ino: Ino, after: int) -> list[tuple[bytes, Attributes]]:
        """Entries with inode numbers above ``after``, by inode number; none means that there are no more.

        In a mailbox that is being listed for the first time the entries come as they arrive.
        """
        node, _ = self._directory(ino)
        while True:
            page = self._cache.children(node.ino, after, _PAGE)
            if page:
                return [(child.name, self._attributes(child)) for child in page]
            mailbox = self._cache.mailbox(node.ino)
            if mailbox is None or mailbox.complete or not mailbox.selectable:
                return []
            refresh = self._sync.refresh_mailbox(node.ino, MAX_AGE)
            if refresh is None:
                return []
            await refresh.progress()
            if refresh.error is not None:
                raise refresh.error

    # -- bodies --------------------------------------------------------------------------------------------

    async def open(self, ino: Ino, *, wanted: bool) -> bytes | None:
        """Begin to use a message; its exact size is known when this returns.

        ``wanted``: the whole body is of use to the caller, and is returned if it is small.
        """
        node = self._node(ino)
        if node.is_dir:
            raise IsADirectory("it is a directory")
        file = self._open.setdefault(ino, _OpenFile())
        file.users += 1
        try:
            if not node.exact or (wanted and node.size <= SMALL):
                return await self._whole(node, file)
        except BaseException:
            self.release(ino)
            raise
        return None

    async def _whole(self, node: Node, file: _OpenFile) -> bytes | None:
        if node.crc is not None and node.size <= SMALL:
            data = self._bodies.load(node)
            if data is not None:
                return data
        if file.download is None and file.fd < 0:
            file.download = self._fetcher.start(node).acquire()
        if file.download is None:
            return None
        spool = await file.download.wait_for(0)
        if spool.small is None:
            return None
        data = bytes(spool.small)
        kept = self._cache.node(node.ino)
        if file.download is not None and kept is not None and kept.crc is not None:
            # It is in its file: no need to hold it in memory too.
            file.download.release()
            file.download = None
        return data

    async def read(self, ino: Ino, offset: int, size: int) -> bytes:
        """Bytes of an open message; fewer than ``size`` only at its end."""
        file = self._open[ino]
        if file.fd < 0 and file.download is None:
            await self._locate(ino, file)
        if file.fd >= 0:
            return os.pread(file.fd, size, offset)
        assert file.download is not None
        spool = await file.download.wait_for(offset + size)
        if spool.small is not None:
            return bytes(spool.small[offset : offset + size])
        return os.pread(spool.fd, size, offset)

    async def _locate(self, ino: Ino, file: _OpenFile) -> None:
        node = self._node(ino)
        if node.crc is not None:
            if node.size > SMALL and ino in self._verified:
                fd = self._bodies.pin(ino)
            else:
                fd = await self._bodies.open(node)
            if fd is not None:
                if node.size > SMALL:
                    self._verified.add(ino)
                if file.fd >= 0 or not file.users:
                    os.close(fd)  # another reader was quicker, or the last one gave up
                else:
                    file.fd = fd
                return
        if file.download is None:
            file.download = self._fetcher.start(node).acquire()

    def release(self, ino: Ino) -> None:
        """End one use of a message."""
        file = self._open[ino]
        file.users -= 1
        if not file.users:
            del self._open[ino]
            file.close()

    # -- extended attributes -------------------------------------------------------------------------------

    async def getxattr(self, ino: Ino, name: bytes) -> bytes:
        """The value of an attribute. Raises NoAttribute, or NotSupported outside ``user.``"""
        if not name.startswith(b"user."):
            raise NotSupported("only user attributes")
        if ino == ROOT and name == b"user.imapfs.status":
            return json.dumps(self.status()).encode()
        node = self._node(ino)
        details = self._cache.details(node.ino)
        if details is not None:
            found = _message_xattrs(details, self._cache.mailbox(details.parent))
        else:
            found = await self._mailbox_xattrs(node.ino, ask=name in _MAILBOX_NUMBERS)
        try:
            return found[name]
        except KeyError:
            raise NoAttribute("no such attribute") from None

    def listxattr(self, ino: Ino) -> list[bytes]:
        """Names of the attributes, without asking the server."""
        node = self._node(ino)
        names = [b"user.imapfs.status"] if ino == ROOT else []
        details = self._cache.details(node.ino)
        if details is not None:
            return [*names, *_message_xattrs(details, self._cache.mailbox(details.parent))]
        mailbox = self._cache.mailbox(node.ino)
        if mailbox is not None and mailbox.server_name is not None:
            names += _mailbox_xattrs(mailbox)
            if mailbox.selectable:
                names += _MAILBOX_NUMBERS
        return names

    async def _mailbox_xattrs(self, ino: Ino, *, ask: bool) -> dict[bytes, bytes]:
        """Attributes of a directory; with ``ask`` those too that may take a question to the server."""
        mailbox = self._cache.mailbox(ino)
        if mailbox is None or mailbox.server_name is None:
            return {}
        name = mailbox.server_name
        if not ask or not mailbox.selectable:
            return _mailbox_xattrs(mailbox)
        if mailbox.complete:
            await self._await(self._sync.refresh_mailbox(ino, MAX_AGE), known=True)
            mailbox = self._cache.mailbox(ino) or mailbox
            messages, unseen = self._cache.counts(ino)
            numbers = {
                "UIDVALIDITY": int(mailbox.uidvalidity),
                "UIDNEXT": mailbox.uidnext,
                "MESSAGES": messages,
                "UNSEEN": unseen,
            }
        else:
            # Not listed yet: no need to list it only to count.
            numbers = await self._pool.run(partial(Session.status, mailbox=name))
        return {f"user.imap.{key.lower()}".encode(): b"%d" % number for key, number in numbers.items()}

    # -- the whole -----------------------------------------------------------------------------------------

    async def statfs(self) -> Space:
        """The account's STORAGE quota; where it has none, the disk that holds the cache."""
        if time.monotonic() - self._quota_at > _QUOTA_AGE:
            self._quota_at = time.monotonic()
            try:
                with trio.move_on_after(_PATIENCE):
                    self._quota = await self._ask_quota()
            except ImapfsError as error:
                log.debug("quota not known: %s", error)
        if self._quota is not None:
            return Space(self._quota.limit, max(0, self._quota.limit - self._quota.used))
        disk = os.statvfs(self._cache.directory)
        return Space(disk.f_blocks * disk.f_frsize, disk.f_bavail * disk.f_frsize)

    async def _ask_quota(self) -> Quota | None:
        return await self._pool.run(partial(Session.quota, mailbox=b"INBOX"))

    def status(self) -> dict[str, object]:
        """What ``imapfs status`` shows."""
        messages, bodies, size = self._cache.totals()
        return {
            "version": __version__,
            "pid": os.getpid(),
            "source": self._config.account.url,
            "mountpoint": str(self._config.mountpoint),
            "state": "offline" if self._pool.reason else "online",
            "reason": self._pool.reason,
            "since": self._pool.since.isoformat(timespec="seconds"),
            "read_only": self._config.read_only,
            "connections": {"open": self._pool.open, "limit": self._pool.limit},
            "cache": {
                "path": str(self._cache.directory),
                "bytes": size,
                "limit": self._config.cache_size,
                "messages": messages,
                "bodies": bodies,
            },
        }


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


def _mailbox_xattrs(mailbox: Mailbox) -> dict[bytes, bytes]:
    found = {b"user.imap.mailbox": display_name(mailbox.server_name or b"").encode()}
    if mailbox.special_use:
        found[b"user.imap.special_use"] = mailbox.special_use.encode()
    return found


def _message_xattrs(details: Details, mailbox: Mailbox | None) -> dict[bytes, bytes]:
    flags = details.flags.split()
    lower = {flag.lower() for flag in flags}
    found = {"user.imap.flags": details.flags}
    for flag in _SYSTEM_FLAGS:
        found[f"user.imap.{flag}"] = "1" if f"\\{flag}" in lower else "0"
    found |= {
        "user.imap.uid": str(details.uid),
        "user.imap.uidvalidity": str(mailbox.uidvalidity if mailbox else 0),
        "user.imap.internaldate": format_iso(details.mtime, details.zone),
        "user.mime_type": "message/rfc822",
        "user.xdg.tags": ",".join(flag for flag in flags if not flag.startswith("\\")),
    }
    if details.modseq:
        found["user.imap.modseq"] = str(details.modseq)
    for key, value in (
        ("subject", details.subject),
        ("from", details.from_),
        ("message-id", details.message_id),
    ):
        if value:
            found[f"user.xdg.origin.email.{key}"] = value
    return {key.encode(): value.encode("utf-8", "replace") for key, value in found.items()}
