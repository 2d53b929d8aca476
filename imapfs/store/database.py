"""The SQLite file of one account's cache: opening, locking, trusting it. The only module that knows SQLite.

It is used synchronously and on the trio thread only, so that everything between two awaits is atomic for the
rest of the program. No transaction is open across an await. The file has nothing that the server does not
have: if it is damaged, or of another version, it is removed and rebuilt.
"""

import contextlib
import errno
import fcntl
import logging
import os
import sqlite3
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from imapfs.errors import CacheError
from imapfs.model import ROOT
from imapfs.store.private import make_private

log = logging.getLogger(__name__)

Connection = sqlite3.Connection
IntegrityError = sqlite3.IntegrityError

_MAX_LOG_PAGES: Final = 2000
"""Changed pages (of 4 KiB) after which the write-ahead log is moved into the database."""
_MIN_PAGES_EACH: Final = 4
"""Pages that any transaction changes: tables, indexes, and the pages above them."""
_VERSION: Final = 4
_SCHEMA: Final = """
CREATE TABLE meta (
  key TEXT PRIMARY KEY,        -- 'next_ino': first inode number not yet given out; 'names', 'own_mail': how
                               -- messages are named: the template, inos of the mailboxes of own mail
  value
) WITHOUT ROWID;
CREATE TABLE node (            -- every directory entry
  ino INTEGER PRIMARY KEY,
  parent INTEGER NOT NULL,     -- ino of the directory it is in
  name BLOB,                   -- directory entry name; NULL for what is not shown
  alias INTEGER NOT NULL,      -- 1: the name was given by the user, 0: it follows from the message
  uid INTEGER,                 -- of a message; NULL for a directory
  size INTEGER NOT NULL,       -- bytes; of a message the server's RFC822.SIZE until exact; 0 for a directory
  exact INTEGER NOT NULL,      -- 1 once size is the number of bytes that BODY[] has
  date INTEGER,                -- INTERNALDATE, seconds since the epoch
  mtime INTEGER NOT NULL,      -- nanoseconds since the epoch: INTERNALDATE unless set by the user
  ctime INTEGER NOT NULL,      -- nanoseconds since the epoch: INTERNALDATE, or the last change made here
  mode INTEGER,                -- permission bits set by the user, else NULL
  crc INTEGER,                 -- CRC-32 of the cached body; NULL while it is not cached
  pack INTEGER,                -- the pack that a cached body is in; NULL if it has a file of its own
  offset INTEGER NOT NULL DEFAULT 0,  -- of the cached body in its pack, bytes
  used INTEGER,                -- when the cached body was last wanted, seconds since the epoch
  zone INTEGER,                -- minutes east of UTC in INTERNALDATE
  flags TEXT,                  -- space-separated as the server spells them, without \\Recent
  modseq INTEGER,              -- 0 where the server keeps none
  subject TEXT, sender TEXT, from_ TEXT, message_id TEXT,  -- decoded header fields
  announced INTEGER,           -- RFC822.SIZE as last listed, whatever the true size is; NULL if not known
  object_id TEXT,              -- EMAILID (RFC 8474) or X-GM-MSGID; NULL if the server gave none
  recipient TEXT NOT NULL DEFAULT '',  -- decoded: who is named first in To; '' if not known
  UNIQUE (parent, name)
);
CREATE INDEX node_order ON node (parent, ino);
CREATE UNIQUE INDEX node_uid ON node (parent, uid) WHERE uid IS NOT NULL;
CREATE INDEX node_lru ON node (used) WHERE crc IS NOT NULL;
CREATE INDEX node_date ON node (date) WHERE uid IS NOT NULL;
CREATE TABLE mailbox (         -- what a directory stands for on the server
  ino INTEGER PRIMARY KEY,
  server_name BLOB,            -- as the server spells it; NULL for a directory that only leads to others
  delimiter BLOB NOT NULL,     -- hierarchy delimiter, one byte or none
  selectable INTEGER NOT NULL, -- 0: holds no messages
  special_use TEXT NOT NULL,   -- RFC 6154 attribute or ''
  uidvalidity INTEGER NOT NULL,
  uidnext INTEGER NOT NULL,    -- at the last synchronisation
  modseq INTEGER NOT NULL,     -- HIGHESTMODSEQ up to which all changes are known
  complete INTEGER NOT NULL,   -- 1 once every message was listed
  object_id TEXT               -- MAILBOXID (RFC 8474); NULL if the server gave none
);
"""
_UPGRADES: Final = {
    # Unless a message was read, its size is the announced one.
    3: """
ALTER TABLE node ADD COLUMN announced INTEGER;
ALTER TABLE node ADD COLUMN object_id TEXT;
ALTER TABLE node ADD COLUMN recipient TEXT NOT NULL DEFAULT '';
ALTER TABLE mailbox ADD COLUMN object_id TEXT;
UPDATE node SET announced = size WHERE uid IS NOT NULL AND NOT exact;
""",
}
"""By format: the statements that make the next one of it, so that nothing has to be listed again."""

_MIN_FREE: Final = 1 << 18
"""Bytes that a disk takes on which an empty database has room."""


class Database:
    """An open database, locked for this process. Errors of SQLite are raised as CacheError."""

    def __init__(self, directory: Path, lock: int, db: Connection) -> None:
        self.directory = directory
        self._lock = lock
        self._db = db
        self._pages = 0
        """Upper bound of the pages written since the last checkpoint began."""
        self._rows = db.total_changes
        self._checkpoint: threading.Thread | None = None

    @classmethod
    def open(cls, directory: Path) -> "Database":
        """Open the database in ``directory``; create or rebuild it if necessary.

        Raises CacheError if another mount uses it, or the disk cannot be used.
        """
        make_private(directory, "cache")
        try:
            lock = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise CacheError.from_os_error(error, f"cannot use the cache directory {directory}") from None
        try:
            _take_lock(lock, directory)
            return cls(directory, lock, _open_or_rebuild(directory))
        except BaseException:
            os.close(lock)
            raise

    @property
    def is_gone(self) -> bool:
        """Whether another program has deleted the directory, or the lock in it."""
        try:
            return not os.path.samestat(os.fstat(self._lock), (self.directory / "lock").stat())
        except OSError:
            return True

    def close(self) -> None:
        """Close the database, and release it for other mounts."""
        if self._checkpoint is not None:
            self._checkpoint.join()
        with contextlib.suppress(sqlite3.Error):
            self._db.close()
        os.close(self._lock)

    @contextlib.contextmanager
    def read(self) -> Iterator[Connection]:
        """Lend the connection for queries."""
        try:
            yield self._db
        except sqlite3.Error as error:
            if _is_damage(error):
                # The next mount finds this note and does not trust the file.
                with contextlib.suppress(OSError):
                    (self.directory / "damaged").touch(mode=0o600)
                raise CacheError(
                    f"the cache in {self.directory} is damaged: unmount and mount again to rebuild it"
                ) from None
            made = CacheError(f"the cache in {self.directory} cannot be written ({error}): is the disk full?")
            made.errno = errno.ENOSPC if error.sqlite_errorcode == sqlite3.SQLITE_FULL else errno.EIO
            raise made from None

    @contextlib.contextmanager
    def write(self) -> Iterator[Connection]:
        """Lend the connection for one transaction, which an exception rolls back."""
        with self.read() as db:
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
            except BaseException:
                # SQLite itself rolls back when the disk is full.
                if db.in_transaction:
                    db.execute("ROLLBACK")
                raise
            db.execute("COMMIT")
            self._bound_log()

    def _bound_log(self) -> None:
        """Move the write-ahead log into the database when it is long, so that reads stay fast.

        A thread with its own connection does this, because it waits for the disk.
        """
        self._pages += _MIN_PAGES_EACH + self._db.total_changes - self._rows
        self._rows = self._db.total_changes
        if self._pages < _MAX_LOG_PAGES or (self._checkpoint is not None and self._checkpoint.is_alive()):
            return
        self._pages = 0
        self._checkpoint = threading.Thread(target=_checkpoint, args=(self.directory / "cache.db",))
        self._checkpoint.start()


def _checkpoint(path: Path) -> None:
    # A failure does no harm: the next checkpoint moves what this one has not.
    with contextlib.suppress(sqlite3.Error), contextlib.closing(_plain(path)) as db:
        _, pages, _ = db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
        if pages > 4 * _MAX_LOG_PAGES:
            # The log only restarts when it is empty, which does not happen while it is written to all the
            # time. This keeps writers out while it moves what was written during the first checkpoint.
            db.execute("PRAGMA wal_checkpoint(RESTART)")


def _open_or_rebuild(directory: Path) -> Connection:
    path = directory / "cache.db"
    try:
        return _connect(path)
    except (sqlite3.DatabaseError, _Unusable) as error:
        if isinstance(error, sqlite3.OperationalError) and not _is_damage(error):
            log.warning("the cache %s cannot be written (%s): is the disk full?", path, error)
            try:
                return _connect(path, alone=True)
            except (sqlite3.DatabaseError, _Unusable):
                if _has_room(directory):
                    raise CacheError(f"cannot open the cache {path}: {error}") from None
            log.warning("there is no room for the cache %s: this mount keeps it in memory", path)
            return _in_memory()
        log.warning("the cache %s is not usable (%s): it is rebuilt from the server", path, error)
    for name in ("cache.db", "cache.db-wal", "cache.db-shm"):
        (directory / name).unlink(missing_ok=True)
    return _connect(path)


def _has_room(directory: Path) -> bool:
    """Return whether a file can be written. The free space that a disk reports knows nothing of quotas."""
    try:
        with tempfile.TemporaryFile(dir=directory) as file:
            file.write(bytes(_MIN_FREE))
            file.flush()
    except OSError as error:
        return error.errno not in {errno.ENOSPC, errno.EDQUOT}
    return True


def _in_memory() -> Connection:
    """Return a new database that is gone with the process: a full disk prevents no mount."""
    db = sqlite3.connect(":memory:", isolation_level=None)
    _create(db)
    return db


def _create(db: Connection) -> None:
    # About a million per second since the epoch: a database that is rebuilt in the same second continues
    # above the numbers of the old one.
    first_ino = (time.time_ns() << 20) // 10**9
    db.executescript(
        f"BEGIN; {_SCHEMA}"
        f"INSERT INTO meta VALUES ('names', 'subject'), ('next_ino', {first_ino});"
        f"INSERT INTO node (ino, parent, name, alias, size, exact, mtime, ctime)"
        f" VALUES ({ROOT}, 0, '', 0, 0, 1, {time.time_ns()}, {time.time_ns()});"
        f"PRAGMA user_version = {_VERSION}; COMMIT;"
    )


class _Unusable(Exception):
    """The database has another version, or was found damaged."""


def _is_damage(error: sqlite3.Error) -> bool:
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}


def _plain(path: Path) -> Connection:
    return sqlite3.connect(path, isolation_level=None, timeout=5)


def _connect(path: Path, *, alone: bool = False) -> Connection:
    """Open or create the database. Raises _Unusable or sqlite3.DatabaseError if it cannot be trusted.

    ``alone``: without the file that connections share, for which a full disk has no room. Reading then works.
    """
    damaged = path.parent / "damaged"
    if damaged.exists():
        damaged.unlink()
        raise _Unusable("it was found damaged")
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    db = _plain(path)
    try:
        if alone:
            db.execute("PRAGMA locking_mode = EXCLUSIVE")
        (version,) = db.execute("PRAGMA user_version").fetchone()
        (tables,) = db.execute("SELECT count(*) FROM sqlite_schema").fetchone()
        # No fsync at each commit: what a power cut destroys is fetched again.
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = NORMAL")
        # `Database.write` starts checkpoints, unless no other connection can be made.
        db.execute(f"PRAGMA wal_autocheckpoint = {_MAX_LOG_PAGES if alone else 0}")
        db.execute("PRAGMA cache_size = -8192")
        if version == 0 and tables == 0:
            _create(db)
            return db
        if version != _VERSION and version not in _UPGRADES:
            raise _Unusable(f"it has format {version}, this imapfs reads format {_VERSION}")
        (verdict,) = db.execute("PRAGMA quick_check(1)").fetchone()
        if verdict != "ok":
            raise _Unusable("it is damaged")
        if version != _VERSION:
            _upgrade(db, version)
    except BaseException:
        db.close()
        raise
    return db


def _upgrade(db: Connection, version: int) -> None:
    """Bring a database of an earlier format up to date, in one transaction: a kill leaves it as it was."""
    steps = "".join(_UPGRADES[step] for step in range(version, _VERSION))
    db.executescript(f"BEGIN IMMEDIATE; {steps} PRAGMA user_version = {_VERSION}; COMMIT;")


def _take_lock(lock: int, directory: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(lock, 64, 0).decode("ascii", "replace").strip()
        by = f" (process {holder})" if holder else ""
        raise CacheError(
            f"another mount{by} uses the cache {directory}: unmount it first, or give another --cache-dir"
        ) from None
    # Only for the message to the next one: a full disk must not prevent a mount.
    with contextlib.suppress(OSError):
        os.ftruncate(lock, 0)
        os.pwrite(lock, b"%d\n" % os.getpid(), 0)
