"""The composition root of a mount: only this module builds the layers and connects them.

Every object gets all that it needs in its constructor. Changes flow one way: the code that makes a
transaction publishes it on the hub, which calls the listeners in the order of `subscribe`.
"""

import logging
import signal
from collections.abc import AsyncIterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

import trio

from imapfs.daemon import network
from imapfs.daemon.feed import Feed
from imapfs.daemon.status_port import StatusPort
from imapfs.errors import CacheError, ConnectionLost, ImapfsError, Throttled, TlsError, UsageError
from imapfs.fs.drafts import Drafts
from imapfs.fs.event_source import EventSource
from imapfs.fs.events import EventStream
from imapfs.fs.files import Files
from imapfs.fs.filesystem import Filesystem
from imapfs.fs.refresh import DirectoryRefresher
from imapfs.fs.replace import Replacer
from imapfs.fs.scratch import ScratchDirectories
from imapfs.fs.space import SpaceReporter
from imapfs.fs.tree import MailTree
from imapfs.fs.xattrs import ExtendedAttributes
from imapfs.imap.backoff import Connectivity
from imapfs.imap.pool import SessionPool
from imapfs.kernel.adapter import Adapter
from imapfs.kernel.inotify import Announcer
from imapfs.kernel.invalidation import KernelCache
from imapfs.kernel.status import MountStatus
from imapfs.model import ROOT, CredentialProvider, Ino, MountConfig
from imapfs.store.bodies import BodyStore
from imapfs.store.cache import Cache
from imapfs.store.journal import Journal
from imapfs.store.place import JOURNAL, SPOOL, claim
from imapfs.store.spool import Spool
from imapfs.sync.changes import ChangeHub
from imapfs.sync.download import Downloader
from imapfs.sync.flags import FlagChanger
from imapfs.sync.folders import Folders
from imapfs.sync.locate import Locator
from imapfs.sync.move import Mover
from imapfs.sync.prefetch import Prefetcher
from imapfs.sync.replaced import ReplacedMessages
from imapfs.sync.synchroniser import Synchroniser
from imapfs.sync.trash import TrashFinder
from imapfs.sync.upload import Uploader
from imapfs.sync.watching import Watching

log = logging.getLogger(__name__)

_MAX_START_PATIENCE: Final = 10.0
"""Seconds that the mount of a cached account waits for the server. This is long enough for any login, so that
a wrong password is reported, but it does not delay the mount for long if there is no network."""


class Observer(Protocol):
    """Is notified of the state of the mount. Called on the trio thread, so it must not wait."""

    def live(self) -> None:
        """The mount has begun. Called once, and not at all if mounting fails."""

    def state(self, reason: str | None, needs_person: bool) -> None:
        """The account is offline for ``reason``, or online if that is None.

        ``needs_person``: it stays offline until the user corrects the credentials.
        """

    def ending(self) -> None:
        """The mount has ended; pending uploads are being finished."""


@dataclass(frozen=True)
class Model:
    """All objects of a mount that do not know the kernel."""

    config: MountConfig
    pool: SessionPool
    cache: Cache
    bodies: BodyStore
    spool: Spool
    hub: ChangeHub
    sync: Synchroniser
    downloads: Downloader
    mover: Mover
    uploader: Uploader
    replaced: ReplacedMessages
    watching: Watching
    tree: MailTree
    files: Files
    drafts: Drafts
    fs: Filesystem
    xattrs: ExtendedAttributes


def build_model(
    config: MountConfig, pool: SessionPool, cache: Cache, background: trio.Nursery, place: Path | None = None
) -> Model:
    """Build the layers from the cache to the file system. Raises CacheError.

    ``place``: the directory of spool and journal, if it is not that of the cache. Tasks run in
    ``background``.
    """
    hub = ChangeHub()
    bodies = BodyStore(cache, config.cache_size)
    place = cache.directory if place is None else place
    spool = Spool(place / SPOOL)
    journal = Journal(place / JOURNAL)
    spool.hand_over_removals(journal)
    # Before a mailbox is listed for the first time, and gets one.
    cache.reserve_inos(max((draft.ino for draft in spool), default=0))
    sync = Synchroniser(pool, cache, spool, background, hub)
    downloads = Downloader(pool, cache, bodies, sync, background, hub)
    prefetcher = Prefetcher(cache, downloads.prefetch, config.fetch_ahead)
    locator = Locator(cache, sync)
    trash = TrashFinder(cache, config.trash)
    folders = Folders(pool, cache, sync, locator, trash)
    mover = Mover(pool, cache, sync, locator, journal, config.delete, trash, folders, hub)
    flags = FlagChanger(pool, cache, sync, locator, hub)
    replaced = ReplacedMessages(
        cache, spool, journal, locator, mover, downloads, background, sync, hub
    )  # fmt: skip
    uploader = Uploader(
        pool, cache, bodies, spool, journal, sync, locator, replaced, flags, downloads, background, hub
    )  # fmt: skip
    watching = Watching(pool, cache, sync, background, config.poll)
    tree = MailTree(cache, spool)
    refresher = DirectoryRefresher(tree, cache, pool, sync, watching, config.timeout)
    files = Files(cache, bodies, downloads, prefetcher, spool, tree, background)
    scratch = ScratchDirectories(tree, cache, spool, hub)
    drafts = Drafts(tree, cache, spool, journal, scratch, None if config.read_only else uploader, hub)
    replacer = Replacer(tree, cache, spool, files, locator, uploader, replaced)
    reporter = SpaceReporter(pool, cache.directory, background, config.timeout)
    fs = Filesystem(
        tree, refresher, files, drafts, scratch, replacer, reporter, cache, spool, pool, sync, locator, mover,
        folders, uploader, replaced,
    )  # fmt: skip
    xattrs = ExtendedAttributes(tree, refresher, cache, spool, pool, flags, uploader, config.list_attributes)
    return Model(
        config, pool, cache, bodies, spool, hub, sync, downloads, mover, uploader, replaced, watching, tree,
        files, drafts, fs, xattrs,
    )  # fmt: skip


def subscribe(model: Model, kernel: KernelCache, source: EventSource) -> None:
    """Connect the listeners to the hub. It calls them in this order."""
    model.hub.subscribe(model.files.on_changes)
    model.hub.subscribe(model.drafts.on_changes)
    model.hub.subscribe(kernel.on_changes)
    model.hub.subscribe(source.on_changes)
    # Last, because an open file may have to keep a body that is dropped.
    model.hub.subscribe(model.downloads.on_changes)


def serve(config: MountConfig, credentials: CredentialProvider, observer: Observer) -> None:
    """Mount and serve until the mount ends: by umount, SIGINT or SIGTERM.

    Raises ImapfsError if there can be no mount.
    """
    trio.run(_serve, config, credentials, observer)


async def _serve(config: MountConfig, credentials: CredentialProvider, observer: Observer) -> None:
    pool = SessionPool(config.account, credentials, config.connections, config.timeout)
    name = _cache_name(config)
    cache = Cache.open(config.cache_dir / name, config.names, config.own_mail)
    failure: ImapfsError | None = None
    try:
        with claim((config.spool_dir or config.cache_dir) / name, cache.directory) as place:
            async with trio.open_nursery() as background:
                try:
                    with (
                        trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals,
                        trio.CancelScope() as life,
                    ):
                        background.start_soon(_end_on_signal, signals, life)
                        background.start_soon(pool.keep_connected)
                        background.start_soon(_report_state, pool, observer)
                        background.start_soon(network.watch, pool.network_changed, pool.resumed)
                        await _run(build_model(config, pool, cache, background, place), background, observer)
                except ImapfsError as error:
                    # Raised outside of the nursery, which would wrap it in a group.
                    failure = error
                finally:
                    await pool.close()
                    background.cancel_scope.cancel()
    finally:
        cache.close()
    if failure is not None:
        raise failure


async def _report_state(pool: SessionPool, observer: Observer) -> None:
    """Report each change of the account's state. A pause that the server asks for counts as online."""
    while True:
        await pool.state_changed.wait()
        observer.state(pool.reason if pool.state is Connectivity.OFFLINE else None, pool.needs_person)


async def _end_on_signal(signals: AsyncIterable[int], life: trio.CancelScope) -> None:
    async for number in signals:
        log.info("%s: unmounting", signal.Signals(number).name)
        life.cancel()


async def _run(model: Model, background: trio.Nursery, observer: Observer) -> None:
    """Mount, and serve until the mount is unmounted or this is cancelled."""
    config, cache = model.config, model.cache
    events = EventStream()
    kernel = KernelCache(model.tree)
    subscribe(model, kernel, EventSource(model.tree, cache, events))
    announcer = Announcer(model.fs, model.tree, kernel, config.mountpoint, config.read_only)
    status = MountStatus(config, model.pool, cache, model.spool, model.watching, model.tree, kernel)
    adapter = Adapter(
        model.fs, model.files, model.xattrs, status, kernel, announcer, events,
        timeout=config.timeout, read_only=config.read_only,
    )  # fmt: skip
    feed = Feed(cache.directory, model.watching.follow_inbox)
    try:
        await start(model, background)
        # Not earlier: what the first listing finds is not new.
        events.subscribe(announcer.offer)
        events.subscribe(feed.offer)
        adapter.mount(config.mountpoint, _mount_options(config))
        try:
            port = StatusPort(status.in_full)
            status.socket = port.name
            log.info("mounted %s on %s", config.account.url, config.mountpoint)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(announcer.run)
                nursery.start_soon(feed.serve)
                nursery.start_soon(port.serve)
                observer.live()
                await adapter.serve()
                nursery.cancel_scope.cancel()
        finally:
            adapter.unmount()
            log.info("unmounted %s", config.mountpoint)
            observer.ending()
            with trio.CancelScope(shield=True):
                await announcer.end()
    finally:
        with trio.CancelScope(shield=True):
            await end(model)


async def start(model: Model, background: trio.Nursery) -> None:
    """Find the root of the mount, take over drafts of an earlier mount, and start the background tasks.

    A cached account can be mounted without its server. Raises ImapfsError if mounting is impossible.
    """
    await _list_mailboxes(model)
    account = model.config.account
    if account.mailbox is not None:
        model.tree.mount_below(_find_root(model.cache, account.host, account.mailbox))
    model.drafts.restore()
    if not model.config.read_only:
        background.start_soon(model.mover.recover_forever)
        model.uploader.resume()
        background.start_soon(model.replaced.remove_all)
        background.start_soon(_upload_when_online, model.pool, model.uploader)
    background.start_soon(model.bodies.sweep)
    model.watching.start(model.tree.root)


async def _list_mailboxes(model: Model) -> None:
    config, pool = model.config, model.pool
    is_cached = bool(model.cache.children(ROOT, 0, 1))
    refresh = model.sync.refresh_tree(0)
    if refresh is None:
        return
    # The server may ask for a longer pause than a user at the terminal is willing to wait.
    with trio.move_on_after(_MAX_START_PATIENCE if is_cached else 3 * config.timeout):
        await refresh.finished()
    if not refresh.done and not is_cached:
        raise ConnectionLost(pool.reason or f"{config.account.host} does not answer in time")
    if not refresh.done:
        log.warning("mounted from the cache: the server has not answered yet")
    elif refresh.error is not None:
        # A full disk (CacheError) prevents no reading.
        is_transient = isinstance(refresh.error, ConnectionLost | Throttled | CacheError)
        is_transient = is_transient and not isinstance(refresh.error, TlsError)
        if not is_transient or not is_cached:
            raise refresh.error
        log.warning("mounted from the cache: %s", refresh.error)


def _find_root(cache: Cache, host: str, path: str) -> Ino:
    ino = ROOT
    for name in path.strip("/").encode().split(b"/"):
        node = cache.child(ino, name)
        if node is None or not node.is_dir:
            shown = [(n.name or b"").decode() for n in cache.directories(ino)]
            raise UsageError(
                f"{host} has no mailbox {path}; the mailboxes at that level are: "
                + (", ".join(shown) or "none")
            )
        ino = node.ino
    return ino


async def _upload_when_online(pool: SessionPool, uploader: Uploader) -> None:
    """Upload pending drafts as soon as the server can be reached again."""
    while True:
        await pool.wait_for_reconnect()
        uploader.hurry()


async def end(model: Model) -> None:
    """Upload what can be uploaded, and release everything."""
    # The kernel has ended the mount, so no program can write any more.
    model.files.close()
    if not model.config.read_only:
        model.fs.complete_closed()
        with trio.move_on_after(model.config.timeout):
            await model.fs.fsync_directory()
    waiting = model.uploader.pending()
    if waiting:
        log.warning("files not on the server yet: %d; the next mount uploads them", len(waiting))
    model.bodies.close()


def _mount_options(config: MountConfig) -> set[str]:
    options = {*config.fuse_options, "default_permissions", "subtype=imapfs"}
    # A comma would begin another option.
    options.add("fsname=" + config.account.url.replace("\\", "\\\\").replace(",", "\\,"))
    if config.read_only:
        options.add("ro")
    return options


def _cache_name(config: MountConfig) -> str:
    """Return the name of an account's cache directory. It is readable and never has a slash."""
    account = config.account
    return (
        "".join(
            c if c.isalnum() or c in "@.-_+" else f"%{ord(c):02X}" for c in f"{account.user}@{account.host}"
        ).lstrip(".")
        + f"_{account.port}"
    )
