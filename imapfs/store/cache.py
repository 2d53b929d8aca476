"""The local mirror of an account's metadata: every query and every change of it.

INVARIANTS
- An inode number is never used again, not even after the database was rebuilt: numbers start at the time
  of creation.
- Within a directory a name is unique, and so is a UID. A node without a name is hidden: a message that was
  replaced or removed through the mount and is still on the server.
- ``crc`` of a message is set only after its whole body is on disk (see `imapfs.store.bodies`).
- A message row belongs to the UIDVALIDITY in its mailbox's row: a change of UIDVALIDITY drops all message
  rows of that mailbox in the same transaction.

The module is longer than others because these invariants span both tables: a transaction on mailboxes names,
hides and removes messages, and the other way round. Types of rows and the columns of bodies are elsewhere.
"""

import errno
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from imapfs.errors import CacheError
from imapfs.log import report, shown_path
from imapfs.message_names import NameTemplate, variant
from imapfs.model import ROOT, Ino, MessageRef, ModSeq, Uid, UidValidity
from imapfs.names import MAX_NAME, shortened
from imapfs.store.body_table import BodyTable
from imapfs.store.database import Connection, Database, IntegrityError
from imapfs.store.rows import (
    DETAILS_COLUMNS,
    MAILBOX_COLUMNS,
    NODE_COLUMNS,
    Details,
    Directory,
    Mailbox,
    NewMessage,
    Node,
)

_MAX_VARIANT: Final = 8
"""Bytes that `variant` may add to a name."""
MAX_UID: Final = (1 << 63) - 1
"""Above every UID of a server."""


class Cache:
    """One account's metadata. All methods are synchronous, run on the trio thread, and raise CacheError.

    A message row changes its place in many ways. What has happened decides which method is right:

    ================================================================  =============================
    a user has renamed a message within its mailbox                   `rename`
    this mount has moved a message to another mailbox                 `move`
    another client has moved a message to another mailbox             `relocate`
    a draft was uploaded and is a message now                         `adopt`
    ... and it has the inode of its old version: before that          `displace`
    a draft turned out to be the same as its old version              `give_inode`
    a message was replaced, or could not be expunged                  `hide`, undone by `show`
    another client has removed messages                               `remove`
    this mount has removed a message                                  `remove_node`
    ================================================================  =============================
    """

    def __init__(self, database: Database, names: NameTemplate, own_mail: Mapping[str, str]) -> None:
        self._database = database
        self._names = names
        self._own_mail = {tuple(path.encode().split(b"/")): use for path, use in own_mail.items()}
        self._reserved = 0
        """The highest inode number that a draft has, even if the database does not know it."""
        self.directory = database.directory
        self.bodies = BodyTable(database)

    @classmethod
    def open(cls, directory: Path, names: str, own_mail: Mapping[str, str] | None = None) -> "Cache":
        """Open the cache in ``directory``, with message names by the template ``names``.

        ``own_mail`` has paths of mailboxes that are Sent or Drafts even if the server does not mark them,
        each with its RFC 6154 attribute. If messages were named by other rules, all are renamed, except those
        that a user has named. If the disk is full, a later mount renames them.
        """
        cache = cls(Database.open(directory), NameTemplate.parse(names), own_mail or {})
        try:
            cache._use_names()
            cache._shorten_names()
        except BaseException:
            cache.close()
            raise
        return cache

    def close(self) -> None:
        self._database.close()

    @property
    def is_gone(self) -> bool:
        """Whether another program has deleted the cache directory. Queries still work then."""
        return self._database.is_gone

    # -- queries -------------------------------------------------------------------------------------------

    def node(self, ino: Ino) -> Node | None:
        """Return the directory or message with that inode number."""
        with self._database.read() as db:
            row = db.execute(f"SELECT {NODE_COLUMNS} FROM node WHERE ino = ?", (ino,)).fetchone()
        return Node._make(row) if row else None

    def child(self, parent: Ino, name: bytes) -> Node | None:
        """Return the entry of a directory with that name."""
        with self._database.read() as db:
            row = db.execute(
                f"SELECT {NODE_COLUMNS} FROM node WHERE parent = ? AND name = ?", (parent, name)
            ).fetchone()
        return Node._make(row) if row else None

    def children(self, parent: Ino, after: int, limit: int) -> list[Node]:
        """Return up to ``limit`` entries with inode numbers above ``after``, ordered by inode number."""
        with self._database.read() as db:
            rows = db.execute(
                f"SELECT {NODE_COLUMNS} FROM node WHERE parent = ? AND ino > ? AND name IS NOT NULL"
                " ORDER BY ino LIMIT ?",
                (parent, after, limit),
            ).fetchall()
        return [Node._make(row) for row in rows]

    def uncached_after(self, node: Node, by_name: bool, limit: int) -> list[Node]:
        """Return messages of the same mailbox without a cached body that follow by name, or by inode."""
        column, value = ("name", node.name) if by_name else ("ino", node.ino)
        with self._database.read() as db:
            rows = db.execute(
                f"SELECT {NODE_COLUMNS} FROM node WHERE parent = ? AND {column} > ? AND uid IS NOT NULL"
                f" AND crc IS NULL AND name IS NOT NULL ORDER BY {column} LIMIT ?",
                (node.parent, value, limit),
            ).fetchall()
        return [Node._make(row) for row in rows]

    def message(self, mailbox: Ino, uid: Uid) -> Node | None:
        """Return the message with that UID."""
        with self._database.read() as db:
            row = db.execute(
                f"SELECT {NODE_COLUMNS} FROM node WHERE parent = ? AND uid = ?", (mailbox, uid)
            ).fetchone()
        return Node._make(row) if row else None

    def details(self, ino: Ino) -> Details | None:
        """Return the details of a message, or None if there is no such message."""
        with self._database.read() as db:
            row = db.execute(
                f"SELECT {DETAILS_COLUMNS} FROM node WHERE ino = ? AND uid IS NOT NULL", (ino,)
            ).fetchone()
        return Details._make(row) if row else None

    def mailbox(self, ino: Ino) -> Mailbox | None:
        """Return the mailbox of a directory."""
        with self._database.read() as db:
            row = db.execute(f"SELECT {MAILBOX_COLUMNS} FROM mailbox WHERE ino = ?", (ino,)).fetchone()
        return Mailbox._make(row) if row else None

    def mailboxes(self) -> list[Mailbox]:
        """Return all mailboxes that the server lists."""
        with self._database.read() as db:
            rows = db.execute(
                f"SELECT {MAILBOX_COLUMNS} FROM mailbox WHERE server_name IS NOT NULL ORDER BY ino"
            ).fetchall()
        return [Mailbox._make(row) for row in rows]

    def use(self, mailbox: Ino) -> str:
        """Return what a mailbox is for: an RFC 6154 attribute of the configuration, of the server, or ""."""
        box = self.mailbox(mailbox)
        return "" if box is None else self._own_mail.get(self.path(mailbox), box.special_use)

    def special_use(self, use: str) -> Ino | None:
        """Return the directory of the mailbox with this attribute (RFC 6154)."""
        with self._database.read() as db:
            row = db.execute(
                "SELECT ino FROM mailbox WHERE special_use = ? AND selectable ORDER BY ino", (use,)
            ).fetchone()
        return Ino(row[0]) if row else None

    @property
    def made_trash(self) -> bytes | None:
        """The server's name of the Trash that was made here; None if there is none."""
        with self._database.read() as db:
            row = db.execute("SELECT value FROM meta WHERE key = 'made_trash'").fetchone()
        return bytes(row[0]) if row else None

    def note_made_trash(self, server_name: bytes) -> None:
        """Note that this mount has made the Trash."""
        with self._database.write() as db:
            db.execute("INSERT OR REPLACE INTO meta VALUES ('made_trash', ?)", (server_name,))

    def path(self, ino: Ino) -> tuple[bytes, ...]:
        """Return the names from the root down to a directory; () for the root."""
        names: list[bytes] = []
        with self._database.read() as db:
            while ino != ROOT:
                row = db.execute("SELECT parent, name FROM node WHERE ino = ?", (ino,)).fetchone()
                if row is None:
                    break
                ino = row[0]
                names.append(row[1])
        return tuple(reversed(names))

    def shown(self, ino: Ino) -> str:
        """Return the path of a directory for people, from the account's root. Raises nothing."""
        try:
            return shown_path(self.path(ino))
        except CacheError:
            return f"directory {ino}"

    def directory_at(self, path: tuple[bytes, ...]) -> Ino | None:
        """Return the directory with this path from the root."""
        ino = ROOT
        for name in path:
            node = self.child(ino, name)
            if node is None or not node.is_dir:
                return None
            ino = node.ino
        return ino

    def family(self, ino: Ino) -> list[Ino]:
        """Return a directory and all directories below it."""
        return [ino, *(one for child in self.directories(ino) for one in self.family(child.ino))]

    def directories(self, parent: Ino) -> list[Node]:
        """Return the directories in a directory."""
        with self._database.read() as db:
            rows = db.execute(
                f"SELECT {NODE_COLUMNS} FROM node WHERE parent = ? AND uid IS NULL ORDER BY ino", (parent,)
            ).fetchall()
        return [Node._make(row) for row in rows]

    def rename_directory(self, ino: Ino, parent: Ino, name: bytes, old: bytes, new: bytes) -> None:
        """Rename a mailbox and all below it as the server has done, from ``old`` to ``new``.

        ``parent`` and ``name`` are the new place of its directory.
        """
        now = time.time_ns()
        with self._database.write() as db:
            (was,) = db.execute("SELECT parent FROM node WHERE ino = ?", (ino,)).fetchone()
            self._yield_name(db, parent, name)
            db.execute(
                "UPDATE node SET parent = ?, name = ?, ctime = ? WHERE ino = ?", (parent, name, now, ino)
            )
            pending = [ino]
            while pending:
                here = pending.pop()
                (server_name,) = db.execute(
                    "SELECT server_name FROM mailbox WHERE ino = ?", (here,)
                ).fetchone()
                if server_name is not None and server_name.startswith(old):
                    db.execute(
                        "UPDATE mailbox SET server_name = ? WHERE ino = ?",
                        (new + server_name[len(old) :], here),
                    )
                pending += [
                    Ino(child)
                    for (child,) in db.execute(
                        "SELECT node.ino FROM node JOIN mailbox USING (ino) WHERE parent = ?", (here,)
                    )
                ]
            self._changed(db, {Ino(was), parent}, now)

    def add_local_directory(self, parent: Ino, name: bytes) -> Node:
        """Add a directory without a mailbox, which no list of mailboxes removes."""
        now = time.time_ns()
        with self._database.write() as db:
            ino = self._take_inos(db, 1)
            db.execute(
                "INSERT INTO node (ino, parent, name, alias, size, exact, mtime, ctime)"
                " VALUES (?, ?, ?, 0, 0, 1, ?, ?)",
                (ino, parent, name, now, now),
            )
            self._changed(db, {parent}, now)
        return Node(ino, parent, name, None, 0, 1, None, now, now, None, None, None, 0)

    def move_local_directory(self, ino: Ino, parent: Ino, name: bytes) -> None:
        """Give a directory without a mailbox another place."""
        now = time.time_ns()
        with self._database.write() as db:
            (was,) = db.execute("SELECT parent FROM node WHERE ino = ?", (ino,)).fetchone()
            db.execute(
                "UPDATE node SET parent = ?, name = ?, ctime = ? WHERE ino = ?", (parent, name, now, ino)
            )
            self._changed(db, {Ino(was), parent}, now)

    def remove_local_directory(self, ino: Ino) -> None:
        """Remove a directory without a mailbox. The caller knows that it is empty."""
        with self._database.write() as db:
            for node in _delete(db, "ino = ?", (ino,)):
                self._changed(db, {node.parent})

    def last_uid(self, mailbox: Ino, below: int = MAX_UID) -> int:
        """Return the highest known UID that is lower than ``below``, or 0."""
        with self._database.read() as db:
            (uid,) = db.execute(
                "SELECT max(uid) FROM node WHERE parent = ? AND uid < ?", (mailbox, below)
            ).fetchone()
        return int(uid or 0)

    def uidnext(self, mailbox: Mailbox) -> int:
        """Return a UIDNEXT that a mailbox has had; 0 if none is known.

        It is that of the last synchronisation, or follows from a message that this mount has put there since.
        A server that announces a lower one was restored from a backup.
        """
        return max(mailbox.uidnext, self.last_uid(mailbox.ino) + 1) if mailbox.uidnext else 0

    def counts(self, mailbox: Ino) -> tuple[int, int]:
        """Return the number of messages known, and of those without ``\\Seen``."""
        with self._database.read() as db:
            messages, unseen = db.execute(
                "SELECT count(*), coalesce(sum(flags NOT LIKE '%\\Seen%'), 0) FROM node"
                " WHERE parent = ? AND uid IS NOT NULL",
                (mailbox,),
            ).fetchone()
        return int(messages), int(unseen)

    def flags(self, mailbox: Ino) -> dict[int, str]:
        """Return the flags of every message known, by UID."""
        with self._database.read() as db:
            return dict(
                db.execute("SELECT uid, flags FROM node WHERE parent = ? AND uid IS NOT NULL", (mailbox,))
            )

    def identities(self, mailbox: Ino) -> list[MessageRef]:
        """Return the identities of all messages of a mailbox, with what proves them."""
        with self._database.read() as db:
            rows = db.execute(
                "SELECT server_name, uidvalidity, uid, date, announced FROM node"
                " JOIN mailbox ON mailbox.ino = node.parent WHERE parent = ? AND uid IS NOT NULL",
                (mailbox,),
            ).fetchall()
        return [MessageRef(*row) for row in rows]

    def totals(self) -> tuple[int, int, int]:
        """Return the number of messages known, of bodies cached, and of these bodies' bytes."""
        with self._database.read() as db:
            (messages,) = db.execute("SELECT count(uid) FROM node").fetchone()
            bodies, size = db.execute(
                "SELECT count(*), coalesce(sum(size), 0) FROM node WHERE crc IS NOT NULL"
            ).fetchone()
        return int(messages), int(bodies), int(size)

    # -- directories ---------------------------------------------------------------------------------------

    def set_tree(self, wanted: Sequence[Directory]) -> tuple[list[Node], list[Node]]:
        """Make the directories exactly ``wanted``, parents before children; return the added and the removed.

        A directory whose mailbox no longer holds messages loses them.
        """
        added: list[Node] = []
        gone: list[Node] = []
        now = time.time_ns()
        with self._database.write() as db:
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
                    if not directory.selectable and (left := self._empty(db, node.ino, UidValidity(0))):
                        gone += left
                        changed.add(node.ino)
                    continue
                ino = self._take_inos(db, 1)
                inos[directory.path] = ino
                name = directory.path[-1]
                self._yield_name(db, parent, name)
                db.execute(
                    "INSERT INTO node (ino, parent, name, alias, size, exact, mtime, ctime)"
                    " VALUES (?, ?, ?, 0, 0, 1, ?, ?)",
                    (ino, parent, name, now, now),
                )
                db.execute(
                    f"INSERT INTO mailbox ({MAILBOX_COLUMNS}) VALUES (?, ?, ?, ?, ?, 0, 0, 0, 0, NULL)",
                    (ino, *values),
                )
                added.append(Node(ino, parent, name, None, 0, 1, None, now, now, None, None, None, 0))
                changed.add(parent)
            for node in known.values():
                gone += _delete(db, "parent = ? AND uid IS NOT NULL", (node.ino,))
                gone += _delete(db, "ino = ?", (node.ino,))
                db.execute("DELETE FROM mailbox WHERE ino = ?", (node.ino,))
                changed.add(node.parent)
            self._changed(db, changed, now)
        return added, gone

    def _walk(
        self, db: Connection, parent: Ino, path: tuple[bytes, ...]
    ) -> Iterator[tuple[tuple[bytes, ...], Node]]:
        """Yield all directories below ``parent`` with their paths, children first."""
        rows = db.execute(
            f"SELECT {NODE_COLUMNS} FROM node JOIN mailbox USING (ino) WHERE parent = ?", (parent,)
        ).fetchall()
        for row in rows:
            node = Node._make(row)
            here = (*path, node.name or b"")
            yield from self._walk(db, node.ino, here)
            yield here, node

    def set_state(
        self,
        mailbox: Ino,
        uidvalidity: UidValidity,
        uidnext: int,
        modseq: ModSeq,
        *,
        complete: bool,
        object_id: str | None = None,
    ) -> None:
        """Note the state of a mailbox up to which all is known."""
        with self._database.write() as db:
            db.execute(
                "UPDATE mailbox SET uidvalidity = ?, uidnext = ?, modseq = ?, complete = ?, object_id = ?"
                " WHERE ino = ?",
                (uidvalidity, uidnext, modseq, complete, object_id, mailbox),
            )

    def learn_uidvalidity(self, mailbox: Ino, uidvalidity: UidValidity) -> None:
        """Note the UIDVALIDITY that the server has named for a message, before this is added to a mailbox.

        Without it, the next synchronisation would take the message for one of another mailbox. A mailbox of
        which messages are known keeps its UIDVALIDITY, as these are of that one.
        """
        with self._database.write() as db:
            (known,) = db.execute("SELECT uidvalidity FROM mailbox WHERE ino = ?", (mailbox,)).fetchone()
            if known == 0:
                db.execute("UPDATE mailbox SET uidvalidity = ? WHERE ino = ?", (uidvalidity, mailbox))
            elif known != uidvalidity and not self.counts(mailbox)[0]:
                self._empty(db, mailbox, uidvalidity)

    def reset(self, mailbox: Ino, uidvalidity: UidValidity) -> list[Node]:
        """Remove all messages of a mailbox, whose UIDVALIDITY is another one now; return them."""
        with self._database.write() as db:
            gone = self._empty(db, mailbox, uidvalidity)
            if gone:
                self._changed(db, {mailbox})
        return gone

    def _empty(self, db: Connection, mailbox: Ino, uidvalidity: UidValidity) -> list[Node]:
        db.execute(
            "UPDATE mailbox SET uidvalidity = ?, uidnext = 0, modseq = 0, complete = 0, object_id = NULL"
            " WHERE ino = ?",
            (uidvalidity, mailbox),
        )
        return _delete(db, "parent = ? AND uid IS NOT NULL", (mailbox,))

    def _changed(self, db: Connection, directories: Iterable[Ino], now: int | None = None) -> None:
        now = now or time.time_ns()
        db.executemany(
            "UPDATE node SET mtime = max(mtime, ?), ctime = max(ctime, ?) WHERE ino = ?",
            [(now, now, directory) for directory in directories],
        )

    # -- messages ------------------------------------------------------------------------------------------

    def add_messages(self, mailbox: Ino, messages: Sequence[NewMessage]) -> list[tuple[Ino, bytes]]:
        """Add messages; return the inode number and name of each. Messages that are known only get the flags.

        If ``messages`` has a message twice, the last one counts.
        """
        messages = list({m.uid: m for m in messages}.values())
        with self._database.write() as db:
            known = {
                uid
                for m in messages
                for (uid,) in db.execute(
                    "SELECT uid FROM node WHERE parent = ? AND uid = ?", (mailbox, m.uid)
                )
            }
            self._store_flags(db, mailbox, [(m.uid, m.flags, m.modseq) for m in messages if m.uid in known])
            # Caches of format 3 do not know these.
            db.executemany(
                "UPDATE node SET announced = coalesce(announced, ?), object_id = coalesce(object_id, ?),"
                " recipient = ? WHERE parent = ? AND uid = ?",
                [(m.size, m.object_id, m.recipient, mailbox, m.uid) for m in messages if m.uid in known],
            )
            new = [m for m in messages if m.uid not in known]
            first = self._take_inos(db, len(new))
            is_own = self._is_own(mailbox)
            added = [
                (
                    Ino(first + i),
                    self._names.name(m.date, m.sender, m.recipient, m.subject, m.uid, is_own=is_own),
                )
                for i, m in enumerate(new)
            ]
            rows = [_row(ino, mailbox, name, 0, m) for (ino, name), m in zip(added, new, strict=True)]
            try:
                db.executemany(_INSERT_MESSAGE, rows)
            except IntegrityError:
                # The user gave one of these names to another message.
                db.execute("DELETE FROM node WHERE parent = ? AND ino >= ?", (mailbox, first))
                added = []
                for row in rows:
                    name = _free_name(db, mailbox, row[2])
                    db.execute(_INSERT_MESSAGE, (*row[:2], name, *row[3:]))
                    added.append((row[0], name))
            if rows:
                self._changed(db, {mailbox})
        return added

    def set_flags(self, mailbox: Ino, flags: Sequence[tuple[Uid, str, ModSeq]]) -> list[Ino]:
        """Set flags and MODSEQ; return the inode numbers of the messages whose flags have changed."""
        with self._database.write() as db:
            return self._store_flags(db, mailbox, flags)

    def _store_flags(
        self, db: Connection, mailbox: Ino, flags: Sequence[tuple[Uid, str, ModSeq]]
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

    def remove(self, mailbox: Ino, ranges: Iterable[tuple[int, int]], limit: int) -> list[Node]:
        """Remove up to ``limit`` messages with UIDs in ``ranges`` (both ends included); return them."""
        gone: list[Node] = []
        with self._database.write() as db:
            for low, high in ranges:
                gone += _delete(
                    db,
                    "ino IN (SELECT ino FROM node WHERE parent = ? AND uid BETWEEN ? AND ?"
                    " ORDER BY uid LIMIT ?)",
                    (mailbox, low, high, limit - len(gone)),
                )
                if len(gone) >= limit:
                    break
            if gone:
                self._changed(db, {mailbox})
        return gone

    def remove_node(self, ino: Ino) -> list[Node]:
        """Remove one node; return what was removed."""
        with self._database.write() as db:
            gone = _delete(db, "ino = ?", (ino,))
            self._changed(db, {g.parent for g in gone})
        return gone

    def rename(self, ino: Ino, name: bytes) -> None:
        """Give a message a name that the user has chosen.

        A message that has that name gets the one that follows from it.
        """
        now = time.time_ns()
        with self._database.write() as db:
            (parent,) = db.execute("SELECT parent FROM node WHERE ino = ?", (ino,)).fetchone()
            self._yield_name(db, Ino(parent), name)
            db.execute("UPDATE node SET name = ?, alias = 1, ctime = ? WHERE ino = ?", (name, now, ino))
            self._changed(db, {Ino(parent)}, now)

    def hide(self, ino: Ino) -> None:
        """Hide a message that is still on the server: it has no name then."""
        with self._database.write() as db:
            row = db.execute("SELECT parent FROM node WHERE ino = ?", (ino,)).fetchone()
            db.execute("UPDATE node SET name = NULL, alias = 1 WHERE ino = ?", (ino,))
            if row:
                self._changed(db, {Ino(row[0])})

    def count_if_hidden(self, directory: Ino) -> int:
        """Return the number of messages in a directory; 0 if any of them is shown."""
        with self._database.read() as db:
            count, shown = db.execute(
                "SELECT count(*), count(name) FROM node WHERE parent = ? AND uid IS NOT NULL", (directory,)
            ).fetchone()
        return 0 if shown else int(count)

    def hidden(self) -> list[tuple[Ino, MessageRef, str]]:
        """Return inode number, identity and flags of the messages that are hidden."""
        with self._database.read() as db:
            rows = db.execute(
                "SELECT node.ino, flags, server_name, uidvalidity, uid FROM node"
                " JOIN mailbox ON mailbox.ino = node.parent WHERE name IS NULL AND uid IS NOT NULL"
            ).fetchall()
        return [(Ino(ino), MessageRef(*ref), flags) for ino, flags, *ref in rows]

    def show(self, ino: Ino) -> None:
        """Undo `hide`; the message gets the name that follows from it."""
        with self._database.write() as db:
            self._name_after_message(db, ino)

    def _yield_name(self, db: Connection, parent: Ino, name: bytes) -> None:
        """Free a name: a message gets the one that follows from it, a local directory a variant."""
        for (ino,) in db.execute(
            "SELECT ino FROM node LEFT JOIN mailbox USING (ino)"
            " WHERE parent = ? AND name = ? AND uid IS NULL AND mailbox.server_name IS NULL"
            " AND mailbox.delimiter IS NULL",
            (parent, name),
        ).fetchall():
            n = 2
            while db.execute(
                "SELECT 1 FROM node WHERE parent = ? AND name = ?", (parent, b"%s~%d" % (name[:240], n))
            ).fetchone():
                n += 1
            db.execute("UPDATE node SET name = ? WHERE ino = ?", (b"%s~%d" % (name[:240], n), ino))
        for (ino,) in db.execute(
            "SELECT ino FROM node WHERE parent = ? AND name = ? AND uid IS NOT NULL", (parent, name)
        ).fetchall():
            self._name_after_message(db, ino)

    def _name_after_message(self, db: Connection, ino: Ino) -> None:
        parent, *message = db.execute(
            "SELECT parent, date, sender, recipient, subject, uid FROM node WHERE ino = ?", (ino,)
        ).fetchone()
        name = self._names.name(*message, is_own=self._is_own(Ino(parent)))
        name = _free_name(db, Ino(parent), name)
        db.execute("UPDATE node SET name = ?, alias = 0 WHERE ino = ?", (name, ino))
        self._changed(db, {Ino(parent)})

    def move(
        self,
        ino: Ino,
        mailbox: Ino,
        uid: Uid,
        name: bytes,
        *,
        original_stays: bool = False,
        same_bytes: bool = True,
    ) -> list[Node]:
        """Move a message to another mailbox, with ``uid`` and ``name``; inode number and body stay.

        ``same_bytes``: whether the message with this UID is proven to have the same bytes; see `relocate`.

        ``original_stays``: the server could only copy the message, and the original, which is still there, is
        to be hidden. Returns the row that a synchronisation may have added for the message meanwhile.
        """
        now = time.time_ns()
        with self._database.write() as db:
            if original_stays:
                columns = "uid, size, exact, date, mtime, ctime, zone, flags, modseq, subject, sender, from_,"
                columns += " message_id, recipient, object_id, announced"
                db.execute(
                    f"INSERT INTO node (ino, parent, name, alias, {columns})"
                    f" SELECT ?, parent, NULL, 1, -uid {columns.removeprefix('uid')} FROM node WHERE ino = ?",
                    (self._take_inos(db, 1), ino),
                )
            gone = _delete(db, "parent = ? AND uid = ? AND ino <> ?", (mailbox, uid, ino))
            (old,) = db.execute("SELECT parent FROM node WHERE ino = ?", (ino,)).fetchone()
            self._yield_name(db, mailbox, name)
            db.execute(
                "UPDATE node SET parent = ?, uid = ?, name = ?, alias = 1, modseq = 0, ctime = ?"
                " WHERE ino = ?",
                (mailbox, uid, name, now, ino),
            )
            if not same_bytes:
                _forget_body(db, ino)
            # UIDs are unique in a mailbox: only now the original can have its UID again.
            db.execute("UPDATE node SET uid = -uid WHERE parent = ? AND uid < 0", (old,))
            self._changed(db, {Ino(old), mailbox}, now)
        return gone

    def similar(self, message: NewMessage, besides: Ino) -> list[tuple[Node, Details]]:
        """Return messages of other mailboxes than ``besides`` that have the INTERNALDATE of ``message``, and
        its EMAILID or its Message-ID.

        They are ordered by inode number; hidden ones are left out.
        """
        with self._database.read() as db:
            rows = db.execute(
                f"SELECT {NODE_COLUMNS}, {DETAILS_COLUMNS} FROM node"
                " WHERE date = ? AND uid IS NOT NULL AND parent <> ? AND name IS NOT NULL"
                " AND (object_id = ? OR message_id = nullif(?, '')) ORDER BY ino",
                (message.date, besides, message.object_id, message.message_id),
            ).fetchall()
        n = len(Node._fields)
        return [(Node._make(row[:n]), Details._make(row[n:])) for row in rows]

    def same_messages(self, inos: Iterable[Ino]) -> dict[Ino, Node]:
        """Return for each message that the server calls the same as one whose body is cached, that one.

        It has the same EMAILID or X-GM-MSGID, INTERNALDATE and announced size, and its true size is that.
        """
        found = {}
        with self._database.read() as db:
            for ino in inos:
                known = db.execute(
                    "SELECT date, object_id, announced, ino FROM node"
                    " WHERE ino = ? AND object_id IS NOT NULL",
                    (ino,),
                ).fetchone()
                row = (
                    known
                    and db.execute(
                        f"SELECT {NODE_COLUMNS} FROM node WHERE date = ? AND uid IS NOT NULL"
                        " AND object_id = ? AND announced = ? AND ino <> ? AND size = announced"
                        " AND crc IS NOT NULL LIMIT 1",
                        known,
                    ).fetchone()
                )
                if row:
                    found[ino] = Node._make(row)
        return found

    def relocate(self, ino: Ino, mailbox: Ino, message: NewMessage, *, same_bytes: bool) -> bytes:
        """Move a message to the mailbox where the server lists it as ``message``; return its new name.

        The inode number stays. Unless ``same_bytes`` is proven, the cached body is forgotten, and the size is
        the announced one again: `imapfs.store.bodies.BodyStore.drop` then removes the body.
        """
        now = time.time_ns()
        with self._database.write() as db:
            (old,) = db.execute("SELECT parent FROM node WHERE ino = ?", (ino,)).fetchone()
            name = self._names.name(
                message.date,
                message.sender,
                message.recipient,
                message.subject,
                message.uid,
                is_own=self._is_own(mailbox),
            )
            name = _free_name(db, mailbox, name)
            db.execute(
                "UPDATE node SET parent = ?, uid = ?, name = ?, alias = 0, flags = ?, modseq = ?, ctime = ?,"
                " subject = ?, sender = ?, from_ = ?, recipient = ?, object_id = ?, announced = ?"
                " WHERE ino = ?",
                (
                    *(mailbox, message.uid, name, message.flags, message.modseq, now),
                    *(message.subject, message.sender, message.from_, message.recipient),
                    *(message.object_id, message.size, ino),
                ),
            )
            if not same_bytes:
                _forget_body(db, ino)
            self._changed(db, {Ino(old), mailbox}, now)
        return name

    def adopt(self, ino: Ino, mailbox: Ino, name: bytes | None, message: NewMessage) -> list[Node]:
        """Add a message that was uploaded, with the inode number and the name of its draft.

        Returns the rows that it replaces: one that a synchronisation has added for its UID meanwhile, or an
        older version with the same inode number.
        """
        with self._database.write() as db:
            gone = _delete(db, "ino = ? OR (parent = ? AND uid = ?)", (ino, mailbox, message.uid))
            if name is not None:
                self._yield_name(db, mailbox, name)
            db.execute(_INSERT_MESSAGE, _row(ino, mailbox, name, 1, message))
            self._changed(db, {mailbox})
        return gone

    def is_named(self, mailbox: Ino, uid: int) -> bool:
        """Return whether the message with this UID has a name that a user has chosen, or is hidden."""
        with self._database.read() as db:
            row = db.execute("SELECT alias FROM node WHERE parent = ? AND uid = ?", (mailbox, uid)).fetchone()
        return bool(row and row[0])

    def mailbox_named(self, server_name: bytes) -> Mailbox | None:
        """Return the mailbox with that name on the server."""
        with self._database.read() as db:
            row = db.execute(
                f"SELECT {MAILBOX_COLUMNS} FROM mailbox WHERE server_name = ?", (server_name,)
            ).fetchone()
        return Mailbox._make(row) if row else None

    def displace(self, ino: Ino) -> Ino:
        """Hide a message and free its inode number for its new version; return its new number."""
        with self._database.write() as db:
            new = self._take_inos(db, 1)
            db.execute(
                "UPDATE node SET ino = ?, name = NULL, alias = 1, crc = NULL WHERE ino = ?", (new, ino)
            )
        return new

    def give_inode(self, old: Ino, new: Ino, name: bytes) -> None:
        """Give a message the inode number and the name of a draft that has the same bytes."""
        with self._database.write() as db:
            db.execute(
                "UPDATE node SET ino = ?, name = ?, alias = 1, ctime = ? WHERE ino = ?",
                (new, name, time.time_ns(), old),
            )

    def set_local(self, ino: Ino, *, mode: int | None = None, mtime: int | None = None) -> None:
        """Set permission bits, or an mtime in nanoseconds, which the server cannot store."""
        with self._database.write() as db:
            db.execute(
                "UPDATE node SET mode = coalesce(?, mode), mtime = coalesce(?, mtime), ctime = ?"
                " WHERE ino = ?",
                (mode, mtime, time.time_ns(), ino),
            )

    def reserve_inos(self, last: int) -> None:
        """Never assign an inode number up to ``last``, or one that a node has. Raises nothing.

        After a power cut the database may not know that it has assigned them.
        """
        try:
            with self._database.read() as db:
                (highest,) = db.execute("SELECT max(ino) FROM node").fetchone()
                (following,) = db.execute("SELECT value FROM meta WHERE key = 'next_ino'").fetchone()
            self._reserved = max(last, highest)
            if following <= self._reserved:
                with self._database.write() as db:
                    db.execute("UPDATE meta SET value = ? WHERE key = 'next_ino'", (self._reserved + 1,))
        except CacheError as error:
            report(error, "inode numbers are reserved in memory only")

    def new_ino(self) -> Ino:
        """Return an inode number that was never used."""
        with self._database.write() as db:
            return self._take_inos(db, 1)

    def _take_inos(self, db: Connection, n: int) -> Ino:
        """Return the first of ``n`` consecutive inode numbers that were never used."""
        (first,) = db.execute("SELECT value FROM meta WHERE key = 'next_ino'").fetchone()
        first = max(first, self._reserved + 1)
        db.execute("UPDATE meta SET value = ? WHERE key = 'next_ino'", (first + n,))
        return Ino(first)

    def touch_directory(self, ino: Ino) -> None:
        """Note that the entries of a directory have changed."""
        with self._database.write() as db:
            self._changed(db, {ino})

    # -- names ---------------------------------------------------------------------------------------------

    def _is_own(self, mailbox: Ino) -> bool:
        """Return whether the messages in a mailbox are the user's own: whether it is Sent or Drafts."""
        return self.use(mailbox) in {"\\Sent", "\\Drafts"}

    def _use_names(self) -> None:
        """Rename the messages that were named by another template, or when their mailbox had another use."""
        boxes = {box.ino: self._is_own(box.ino) for box in self.mailboxes()}
        own = " ".join(str(ino) for ino, is_own in boxes.items() if is_own)
        with self._database.read() as db:
            known = dict(db.execute("SELECT key, value FROM meta WHERE key IN ('names', 'own_mail')"))
        if known == {"names": self._names.text, "own_mail": own}:
            return
        if known.get("names") == self._names.text:
            known_own = set(known.get("own_mail", "").split())
            boxes = {ino: is_own for ino, is_own in boxes.items() if is_own != (str(ino) in known_own)}
        rules = [("names", self._names.text), ("own_mail", own)]
        try:
            with self._database.write() as db:
                for ino, is_own in boxes.items():
                    self._rename_all(db, ino, is_own)
                db.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?)", rules)
        except CacheError as error:
            if error.errno != errno.ENOSPC:
                raise
            # Files that wait for the server are of no use without a mount.
            report(error, "messages keep their old names until a later mount")

    def _rename_all(self, db: Connection, mailbox: Ino, is_own: bool) -> None:
        """Rename the messages of a mailbox, except those that a user has named."""
        now = time.time_ns()
        rows = db.execute(
            "SELECT ino, name, ctime, date, sender, recipient, subject, uid FROM node"
            " WHERE parent = ? AND uid IS NOT NULL AND NOT alias ORDER BY uid",
            (mailbox,),
        ).fetchall()
        db.executemany("UPDATE node SET name = NULL WHERE ino = ?", [(ino,) for ino, *_ in rows])
        is_changed = False
        for ino, old, ctime, *message in rows:
            name = _free_name(db, mailbox, self._names.name(*message, is_own=is_own))
            if name != old:
                # Backup programs find what was renamed by its ctime.
                ctime = now
                is_changed = True
            db.execute("UPDATE node SET name = ?, ctime = ? WHERE ino = ?", (name, ctime, ino))
        if is_changed:
            self._changed(db, {mailbox}, now)

    def _shorten_names(self) -> None:
        """Shorten names that an earlier version took and that no program can look up now. Raises nothing."""
        try:
            with self._database.read() as db:
                long = db.execute(
                    "SELECT ino, parent, name FROM node WHERE length(name) > ?", (MAX_NAME,)
                ).fetchall()
            for ino, parent, name in long:
                with self._database.write() as db:
                    free = shortened(name)
                    if _is_taken(db, Ino(parent), free):
                        free = _free_name(db, Ino(parent), shortened(name, MAX_NAME - _MAX_VARIANT))
                    db.execute("UPDATE node SET name = ? WHERE ino = ?", (free, ino))
        except CacheError as error:
            report(error, "names that are too long are kept")

    def set_size(self, ino: Ino, size: int) -> bool:
        """Set the exact size of a message; return whether it was not known before."""
        with self._database.write() as db:
            return (
                db.execute(
                    "UPDATE node SET size = ?, exact = 1 WHERE ino = ? AND NOT (exact AND size = ?)",
                    (size, ino, size),
                ).rowcount
                > 0
            )


def _row(ino: Ino, mailbox: Ino, name: bytes | None, alias: int, message: NewMessage) -> tuple[Any, ...]:
    time_ns = message.date * 1_000_000_000
    return (ino, mailbox, name, alias, time_ns, time_ns, message.size, *message)


_INSERT_MESSAGE: Final = (
    "INSERT INTO node (exact, ino, parent, name, alias, mtime, ctime, announced, uid, size, date, zone,"
    " flags, modseq, subject, sender, from_, message_id, recipient, object_id)"
    " VALUES (0, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
)


def _forget_body(db: Connection, ino: Ino) -> None:
    """Forget what was learned from the body of a message whose bytes may be others now."""
    db.execute(
        "UPDATE node SET size = coalesce(announced, size), exact = 0, crc = NULL, pack = NULL, offset = 0"
        " WHERE ino = ?",
        (ino,),
    )


def _is_taken(db: Connection, parent: Ino, name: bytes) -> bool:
    found = db.execute("SELECT 1 FROM node WHERE parent = ? AND name = ?", (parent, name)).fetchone()
    return found is not None


def _free_name(db: Connection, parent: Ino, name: bytes) -> bytes:
    """Return ``name``, or a variant of it if it is taken."""
    wanted, n = name, 1
    while _is_taken(db, parent, name):
        n += 1
        name = variant(wanted, n)
    return name


def _delete(db: Connection, where: str, values: tuple[int, ...]) -> list[Node]:
    rows = db.execute(
        f"SELECT {NODE_COLUMNS} FROM node WHERE {where}",
        values,
    ).fetchall()
    db.execute(f"DELETE FROM node WHERE {where}", values)
    return [Node._make(row) for row in rows]
