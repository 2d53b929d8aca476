"""The local mirror of an account's metadata: the only module that writes SQL.

One SQLite database an account, used on the trio thread only and synchronously, so that everything between
two awaits is atomic for the rest of the program; no transaction is open across an await. It holds nothing
that the server does not have: whatever is wrong with it, it is moved aside and built anew.

INVARIANTS
- An inode number is never used again, not even after the database was rebuilt: numbers start at the time
  of creation.
- Within a directory a name is unique, and so is a UID.
- ``crc`` of a message is set only after its whole body is in its file (see `imapfs.bodies`).
- A message row is of the UIDVALIDITY in its mailbox's row: a change of it drops all rows of that mailbox
  in the same transaction.
"""

import contextlib
import errno
import fcntl
import logging
import os
import sqlite3
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

from imapfs.errors import CacheError
from imapfs.model import ROOT, Ino, ModSeq, NameScheme, Uid, UidValidity
from imapfs.names import message_name

log = logging.getLogger(__name__)

_VERSION: Final = 1
_SCHEMA: Final = """
CREATE TABLE meta (
  key TEXT PRIMARY KEY,        -- 'next_ino': first inode number not yet given out; 'names': naming scheme
  value
) WITHOUT ROWID;
CREATE TABLE node (            -- every directory entry
  ino INTEGER PRIMARY KEY,
  parent INTEGER NOT NULL,     -- ino of the directory it is in
  name BLOB NOT NULL,          -- directory entry name
  uid INTEGER,                 -- of a message; NULL for a directory
  size INTEGER NOT NULL,       -- bytes; of a message the server's RFC822.SIZE until exact; 0 for a directory
  exact INTEGER NOT NULL,      -- 1 once size is the number of bytes that BODY[] has
  mtime INTEGER NOT NULL,      -- seconds since the epoch: INTERNALDATE, or a directory's last change
  crc INTEGER,                 -- CRC-32 of the cached body; NULL while it is not cached
  used INTEGER,                -- when the cached body was last wanted, seconds since the epoch
  zone INTEGER,                -- minutes east of UTC in INTERNALDATE
  flags TEXT,                  -- space-separated as the server spells them, without \\Recent
  modseq INTEGER,              -- 0 where the server keeps none
  subject TEXT, sender TEXT, from_ TEXT, message_id TEXT,  -- decoded header fields
  UNIQUE (parent, name)
);
CREATE INDEX node_order ON node (parent, ino);
CREATE UNIQUE INDEX node_uid ON node (parent, uid) WHERE uid IS NOT NULL;
CREATE INDEX node_lru ON node (used) WHERE crc IS NOT NULL;
CREATE TABLE mailbox (         -- what a directory stands for on the server
  ino INTEGER PRIMARY KEY,
  server_name BLOB,            -- as the server spells it; NULL for a directory that only leads to others
  delimiter BLOB NOT NULL,     -- hierarchy delimiter, one byte or none
  selectable INTEGER NOT NULL, -- 0: holds no messages
  special_use TEXT NOT NULL,   -- RFC 6154 attribute or ''
  uidvalidity INTEGER NOT NULL,
  uidnext INTEGER NOT NULL,    -- at the last synchronisation
  modseq INTEGER NOT NULL,     -- HIGHESTMODSEQ up to which all changes are known
  complete INTEGER NOT NULL    -- 1 once every message was listed
);
"""


class Node(NamedTuple):
    """A directory entry; columns as in the schema."""

    ino: Ino
    parent: Ino
    name: bytes
    uid: Uid | None
    size: int
    exact: int
    mtime: int
    crc: int | None

    @property
    def is_dir(self) -> bool:
        return self.uid is None


_NODE: Final = "ino, parent, name, uid, size, exact, mtime, crc"


class NewMessage(NamedTuple):
    """A message as the server lists it; columns as in the schema."""

    uid: Uid
    size: int
    date: int
    zone: int
    flags: str
    modseq: ModSeq
    subject: str
    sender: str
    from_: str
    message_id: str


class Details(NamedTuple):
    """What the extended attributes of a message show; columns as in the schema."""

    parent: Ino
    uid: Uid
    mtime: int
    zone: int
    flags: str
    modseq: ModSeq
    subject: str
    from_: str
    message_id: str


class Mailbox(NamedTuple):
    """What a directory stands for on the server; columns as in the schema."""

    ino: Ino
    server_name: bytes | None
    delimiter: bytes
    selectable: int
    special_use: str
    uidvalidity: UidValidity
    uidnext: int
    modseq: ModSeq
    complete: int


_MAILBOX: Final = (
    "ino, server_name, delimiter, selectable, special_use, uidvalidity, uidnext, modseq, complete"
)


@dataclass(frozen=True, slots=True)
class Directory:
    """A directory that the account should have: entry names from the root, and what it stands for."""

    path: tuple[bytes, ...]
    server_name: bytes | None
    delimiter: bytes
    selectable: bool
    special_use: str


class Gone(NamedTuple):
    """A directory entry that was removed."""

    parent: Ino
    name: bytes
    ino: Ino
    size: int
    mtime: int
    had_body: bool


class Cache:
    """One account's database, locked for this process. All methods are synchronous and raise CacheError."""

    def __init__(self, directory: Path, lock: int, db: sqlite3.Connection) -> None:
        self.directory = directory
        self._lock = lock
        self._db = db

    @classmethod
    def open(cls, directory: Path, names: NameScheme) -> "Cache":
        """Open the cache in ``directory``, making or rebuilding it where needed.

        Raises CacheError if another mount has it, or the disk does not let us.
        """
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            directory.chmod(0o700)
            lock = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise CacheError.from_os_error(error, f"cannot use the cache directory {directory}") from None
        try:
            _take_lock(lock, directory)
            path = directory / "cache.db"
            try:
                db = _connect(path)
            except (sqlite3.DatabaseError, _Unusable) as error:
                if isinstance(error, sqlite3.OperationalError) and not _is_damage(error):
                    raise CacheError(f"cannot open the cache {path}: {error}") from None
                log.warning("the cache %s is not usable (%s): it is built anew from the server", path, error)
                for name in ("cache.db", "cache.db-wal", "cache.db-shm"):
                    (directory / name).unlink(missing_ok=True)
                db = _connect(path)
            cache = cls(directory, lock, db)
            cache._use_names(names)
        except BaseException:
            os.close(lock)
            raise
        return cache

    def close(self) -> None:
        """Close the database and let another mount have it."""
        with contextlib.suppress(sqlite3.Error):
            self._db.close()
        os.close(self._lock)

    @contextlib.contextmanager
    def _guard(self) -> Iterator[sqlite3.Connection]:
        """Turn what SQLite says into an error of ours."""
        try:
            yield self._db
        except sqlite3.Error as error:
            if _is_damage(error):
                # Found by the next mount, which then does not trust the file.
                with contextlib.suppress(OSError):
                    (self.directory / "damaged").touch(mode=0o600)
                raise CacheError(
                    f"the cache in {self.directory} is damaged: unmount and mount again to build it anew"
                ) from None
            made = CacheError(f"the cache in {self.directory} cannot be written ({error}): is the disk full?")
            made.errno = errno.ENOSPC if error.sqlite_errorcode == sqlite3.SQLITE_FULL else errno.EIO
            raise made from None

    @contextlib.contextmanager
    def _write(self) -> Iterator[sqlite3.Connection]:
        with self._guard() as db:
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
            except BaseException:
                # A full disk may have rolled back by itself already.
                if db.in_transaction:
                    db.execute("ROLLBACK")
                raise
            db.execute("COMMIT")

    def checkpoint(self) -> None:
        """From any thread: move the write-ahead log into the database, so that no reader pays for it."""
        with (
            contextlib.suppress(sqlite3.Error),
            contextlib.closing(_plain(self.directory / "cache.db")) as db,
        ):
            db.execute("PRAGMA wal_checkpoint(PASSIVE)")

    # -- looking -------------------------------------------------------------------------------------------

    def node(self, ino: Ino) -> Node | None:
        with self._guard() as db:
            row = db.execute(f"SELECT {_NODE} FROM node WHERE ino = ?", (ino,)).fetchone()
        return Node._make(row) if row else None

    def child(self, parent: Ino, name: bytes) -> Node | None:
        with self._guard() as db:
            row = db.execute(
                f"SELECT {_NODE} FROM node WHERE parent = ? AND name = ?", (parent, name)
            ).fetchone()
        return Node._make(row) if row else None

    def children(self, parent: Ino, after: int, limit: int) -> list[Node]:
        """Entries of a directory by inode number, beginning after ``after``."""
        with self._guard() as db:
            rows = db.execute(
                f"SELECT {_NODE} FROM node WHERE parent = ? AND ino > ? ORDER BY ino LIMIT ?",
                (parent, after, limit),
            ).fetchall()
        return [Node._make(row) for row in rows]

    def message(self, mailbox: Ino, uid: Uid) -> Node | None:
        with self._guard() as db:
            row = db.execute(
                f"SELECT {_NODE} FROM node WHERE parent = ? AND uid = ?", (mailbox, uid)
            ).fetchone()
        return Node._make(row) if row else None

    def details(self, ino: Ino) -> Details | None:
        """What is known of a message; None if it is none."""
        with self._guard() as db:
            row = db.execute(
                "SELECT parent, uid, mtime, zone, flags, modseq, subject, from_, message_id"
                " FROM node WHERE ino = ? AND uid IS NOT NULL",
                (ino,),
            ).fetchone()
        return Details._make(row) if row else None

    def mailbox(self, ino: Ino) -> Mailbox | None:
        with self._guard() as db:
            row = db.execute(f"SELECT {_MAILBOX} FROM mailbox WHERE ino = ?", (ino,)).fetchone()
        return Mailbox._make(row) if row else None

    def last_uid(self, mailbox: Ino) -> int:
        """The highest UID known, or 0."""
        with self._guard() as db:
            (uid,) = db.execute("SELECT max(uid) FROM node WHERE parent = ?", (mailbox,)).fetchone()
        return int(uid or 0)

    def counts(self, mailbox: Ino) -> tuple[int, int]:
        """Numbers of messages known, and of those without ``\\Seen``."""
        with self._guard() as db:
            messages, unseen = db.execute(
                "SELECT count(*), coalesce(sum(flags NOT LIKE '%\\Seen%'), 0) FROM node"
                " WHERE parent = ? AND uid IS NOT NULL",
                (mailbox,),
            ).fetchone()
        return int(messages), int(unseen)

    def flags(self, mailbox: Ino) -> dict[int, str]:
        """UID -> flags of every message known."""
        with self._guard() as db:
            return dict(
                db.execute("SELECT uid, flags FROM node WHERE parent = ? AND uid IS NOT NULL", (mailbox,))
            )

    def totals(self) -> tuple[int, int, int]:
        """Numbers of messages known and bodies cached, and the bodies' bytes."""
        with self._guard() as db:
            (messages,) = db.execute("SELECT count(uid) FROM node").fetchone()
            bodies, size = db.execute(
                "SELECT count(*), coalesce(sum(size), 0) FROM node WHERE crc IS NOT NULL"
            ).fetchone()
        return int(messages), int(bodies), int(size)

    # -- directories ---------------------------------------------------------------------------------------

    def set_tree(self, wanted: Sequence[Directory]) -> tuple[list[Node], list[Gone]]:
        """Make the directories be exactly ``wanted`` (parents before children): the added and the removed."""
        added: list[Node] = []
        gone: list[Gone] = []
        now = int(time.time())
        with self._write() as db:
            known: dict[tuple[bytes, ...], Node] = dict(self._walk(db, ROOT, ()))
            inos: dict[tuple[bytes, ...], Ino] = {(): ROOT}
            changed: set[Ino] = set()
            for directory in wanted:
                parent = inos[directory.path[:-1]]
                values = (
                    directory.server_name,
                    directory.delimiter,
                    directory.selectable,
                    directory.special_use,
                )
                node = known.pop(directory.path, None)
                if node is not None:
                    inos[directory.path] = node.ino
                    db.execute(
                        "UPDATE mailbox SET server_name = ?, delimiter = ?, selectable = ?, special_use = ?"
                        " WHERE ino = ?",
                        (*values, node.ino),
                    )
                    continue
                ino = _take_inos(db, 1)
                inos[directory.path] = ino
                db.execute(
                    "INSERT INTO node (ino, parent, name, size, exact, mtime) VALUES (?, ?, ?, 0, 1, ?)",
                    (ino, parent, directory.path[-1], now),
                )
                db.execute(
                    f"INSERT INTO mailbox ({_MAILBOX}) VALUES (?, ?, ?, ?, ?, 0, 0, 0, 0)", (ino, *values)
                )
                added.append(Node(ino, parent, directory.path[-1], None, 0, 1, now, None))
                changed.add(parent)
            for node in known.values():
                gone += _delete(db, "parent = ? AND uid IS NOT NULL", (node.ino,))
                gone += _delete(db, "ino = ?", (node.ino,))
                db.execute("DELETE FROM mailbox WHERE ino = ?", (node.ino,))
                changed.add(node.parent)
            self._changed(db, changed, now)
        return added, gone

    def _walk(
        self, db: sqlite3.Connection, parent: Ino, path: tuple[bytes, ...]
    ) -> Iterator[tuple[tuple[bytes, ...], Node]]:
        """All directories below ``parent`` with their paths, children first."""
        rows = db.execute(
            f"SELECT {_NODE} FROM node JOIN mailbox USING (ino) WHERE parent = ?", (parent,)
        ).fetchall()
        for row in rows:
            node = Node._make(row)
            yield from self._walk(db, node.ino, (*path, node.name))
            yield (*path, node.name), node

    def set_state(
        self, mailbox: Ino, uidvalidity: UidValidity, uidnext: int, modseq: ModSeq, *, complete: bool
    ) -> None:
        """Note up to where a mailbox is known."""
        with self._write() as db:
            db.execute(
                "UPDATE mailbox SET uidvalidity = ?, uidnext = ?, modseq = ?, complete = ? WHERE ino = ?",
                (uidvalidity, uidnext, modseq, complete, mailbox),
            )

    def reset(self, mailbox: Ino, uidvalidity: UidValidity) -> list[Gone]:
        """Forget all messages of a mailbox: from now on its UIDs are of ``uidvalidity``."""
        with self._write() as db:
            gone = _delete(db, "parent = ? AND uid IS NOT NULL", (mailbox,))
            db.execute(
                "UPDATE mailbox SET uidvalidity = ?, uidnext = 0, modseq = 0, complete = 0 WHERE ino = ?",
                (uidvalidity, mailbox),
            )
            if gone:
                self._changed(db, {mailbox}, int(time.time()))
        return gone

    def _changed(self, db: sqlite3.Connection, directories: Iterable[Ino], now: int) -> None:
        db.executemany("UPDATE node SET mtime = max(mtime, ?) WHERE ino = ?", [(now, d) for d in directories])

    # -- messages ------------------------------------------------------------------------------------------

    def add_messages(self, mailbox: Ino, messages: Sequence[NewMessage]) -> list[tuple[Ino, bytes]]:
        """Add messages not known yet; known ones only get their flags. The inode and name of each new one."""
        with self._write() as db:
            names = self._names(db)
            known = {
                uid
                for m in messages
                for (uid,) in db.execute(
                    "SELECT uid FROM node WHERE parent = ? AND uid = ?", (mailbox, m.uid)
                )
            }
            self._store_flags(db, mailbox, [(m.uid, m.flags, m.modseq) for m in messages if m.uid in known])
            new = [m for m in messages if m.uid not in known]
            first = _take_inos(db, len(new))
            rows = [
                (first + i, mailbox, message_name(names, m.date, m.sender, m.subject, m.uid), *m)
                for i, m in enumerate(new)
            ]
            db.executemany(
                "INSERT INTO node (exact, ino, parent, name, uid, size, mtime, zone, flags, modseq,"
                " subject, sender, from_, message_id) VALUES (0, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                rows,
            )
            if rows:
                self._changed(db, {mailbox}, int(time.time()))
        return [(Ino(row[0]), row[2]) for row in rows]

    def set_flags(self, mailbox: Ino, flags: Sequence[tuple[Uid, str, ModSeq]]) -> list[Ino]:
        """Set flags and MODSEQ; the inodes of those whose flags differ from before."""
        with self._write() as db:
            return self._store_flags(db, mailbox, flags)

    def _store_flags(
        self, db: sqlite3.Connection, mailbox: Ino, flags: Sequence[tuple[Uid, str, ModSeq]]
    ) -> list[Ino]:
        changed = []
        for uid, text, modseq in flags:
            row = db.execute(
                "SELECT ino, flags FROM node WHERE parent = ? AND uid = ?", (mailbox, uid)
            ).fetchone()
            if row:
                db.execute(
                    "UPDATE node SET flags = ?, modseq = max(modseq, ?) WHERE ino = ?", (text, modseq, row[0])
                )
                if set(row[1].split()) != set(text.split()):
                    changed.append(Ino(row[0]))
        return changed

    def remove(self, mailbox: Ino, ranges: Iterable[tuple[int, int]]) -> list[Gone]:
        """Remove the messages whose UIDs are in ``ranges`` (both ends included)."""
        gone: list[Gone] = []
        with self._write() as db:
            for low, high in ranges:
                gone += _delete(db, "parent = ? AND uid BETWEEN ? AND ?", (mailbox, low, high))
            if gone:
                self._changed(db, {mailbox}, int(time.time()))
        return gone

    # -- names ---------------------------------------------------------------------------------------------

    def _names(self, db: sqlite3.Connection) -> NameScheme:
        (names,) = db.execute("SELECT value FROM meta WHERE key = 'names'").fetchone()
        return "uid" if names == "uid" else "subject"

    def _use_names(self, names: NameScheme) -> None:
        with self._guard() as db:
            if self._names(db) == names:
                return
        with self._write() as db:
            rows = db.execute("SELECT ino, mtime, sender, subject, uid FROM node WHERE uid IS NOT NULL")
            db.executemany(
                "UPDATE node SET name = ? WHERE ino = ?",
                [
                    (message_name(names, date, sender, subject, uid), ino)
                    for ino, date, sender, subject, uid in rows
                ],
            )
            db.execute("UPDATE meta SET value = ? WHERE key = 'names'", (names,))

    # -- bodies --------------------------------------------------------------------------------------------

    def set_size(self, ino: Ino, size: int) -> bool:
        """Note the exact size of a message; true if it was not known as such."""
        with self._write() as db:
            return (
                db.execute(
                    "UPDATE node SET size = ?, exact = 1 WHERE ino = ? AND NOT (exact AND size = ?)",
                    (size, ino, size),
                ).rowcount
                > 0
            )

    def add_bodies(self, bodies: Iterable[tuple[Ino, int, int]]) -> int:
        """Note that bodies are cached: inode, exact size in bytes, CRC-32. The number still wanted."""
        now = int(time.time())
        with self._write() as db:
            return db.executemany(
                "UPDATE node SET size = ?, exact = 1, crc = ?, used = ? WHERE ino = ?",
                [(size, crc, now, ino) for ino, size, crc in bodies],
            ).rowcount

    def use_bodies(self, inos: Iterable[Ino]) -> None:
        """Note that bodies were wanted now."""
        now = int(time.time())
        with self._write() as db:
            db.executemany("UPDATE node SET used = ? WHERE ino = ?", [(now, ino) for ino in inos])

    def forget_body(self, ino: Ino) -> None:
        """Note that the body is not cached."""
        with self._write() as db:
            db.execute("UPDATE node SET crc = NULL WHERE ino = ?", (ino,))

    def oldest_bodies(self, size: int) -> list[tuple[Ino, int]]:
        """The least recently used bodies that have ``size`` bytes together: inode and bytes of each."""
        chosen: list[tuple[Ino, int]] = []
        with self._guard() as db:
            for ino, bytes_ in db.execute(
                "SELECT ino, size FROM node WHERE crc IS NOT NULL ORDER BY used, ino"
            ):
                if size <= 0:
                    break
                chosen.append((Ino(ino), bytes_))
                size -= bytes_
        return chosen

    def cached(self, inos: Sequence[Ino]) -> set[Ino]:
        """Those of ``inos`` whose bodies are cached."""
        with self._guard() as db:
            return {
                Ino(ino)
                for i in inos
                for (ino,) in db.execute("SELECT ino FROM node WHERE ino = ? AND crc IS NOT NULL", (i,))
            }


class _Unusable(Exception):
    """The database is of another version, or was found damaged."""


def _is_damage(error: sqlite3.Error) -> bool:
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}


def _plain(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(path, isolation_level=None, timeout=5)


def _connect(path: Path) -> sqlite3.Connection:
    """Open or create the database. Raises _Unusable or sqlite3.DatabaseError if it cannot be trusted."""
    damaged = path.parent / "damaged"
    if damaged.exists():
        damaged.unlink()
        raise _Unusable("it was found damaged")
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    db = _plain(path)
    try:
        (version,) = db.execute("PRAGMA user_version").fetchone()
        (tables,) = db.execute("SELECT count(*) FROM sqlite_schema").fetchone()
        # No fsync at each commit: what a power cut takes is fetched again.
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = NORMAL")
        # `Cache.checkpoint` does it in a thread.
        db.execute("PRAGMA wal_autocheckpoint = 0")
        db.execute("PRAGMA cache_size = -16384")
        if version == 0 and tables == 0:
            db.executescript(
                f"BEGIN; {_SCHEMA}"
                f"INSERT INTO meta VALUES ('names', 'subject'), ('next_ino', {int(time.time()) << 20});"
                f"INSERT INTO node (ino, parent, name, size, exact, mtime)"
                f" VALUES ({ROOT}, 0, '', 0, 1, {int(time.time())});"
                f"PRAGMA user_version = {_VERSION}; COMMIT;"
            )
            return db
        if version != _VERSION:
            raise _Unusable(f"it has format {version}, this imapfs reads format {_VERSION}")
        (verdict,) = db.execute("PRAGMA quick_check(1)").fetchone()
        if verdict != "ok":
            raise _Unusable("it is damaged")
    except BaseException:
        db.close()
        raise
    return db


def _take_lock(lock: int, directory: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(lock, 64, 0).decode("ascii", "replace").strip()
        by = f" (process {holder})" if holder else ""
        raise CacheError(
            f"another mount{by} uses the cache {directory}: unmount it first, or give another --cache-dir"
        ) from None
    os.ftruncate(lock, 0)
    os.pwrite(lock, b"%d\n" % os.getpid(), 0)


def _take_inos(db: sqlite3.Connection, n: int) -> Ino:
    """The first of ``n`` consecutive inode numbers that were never used."""
    (first,) = db.execute("SELECT value FROM meta WHERE key = 'next_ino'").fetchone()
    db.execute("UPDATE meta SET value = ? WHERE key = 'next_ino'", (first + n,))
    return Ino(first)


def _delete(db: sqlite3.Connection, where: str, values: tuple[int, ...]) -> list[Gone]:
    rows = db.execute(
        f"SELECT parent, name, ino, size, mtime, crc IS NOT NULL FROM node WHERE {where}", values
    ).fetchall()
    db.execute(f"DELETE FROM node WHERE {where}", values)
    return [Gone._make(row) for row in rows]
