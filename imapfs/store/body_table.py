"""The part of the cache that says where bodies are on disk. Only `imapfs.store.bodies` uses it."""

import time
from collections.abc import Iterable, Sequence

from imapfs.model import Ino
from imapfs.store.database import Database
from imapfs.store.rows import NODE_COLUMNS, Body, Node


class BodyTable:
    """Queries and changes of cached bodies. Synchronous, on the trio thread. Raises CacheError."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(self, bodies: Sequence[Body]) -> list[Body]:
        """Note that bodies are cached; return those whose message is gone, or has another UID or body."""
        now = int(time.time())
        with self._database.write() as db:
            noted = db.executemany(
                "UPDATE node SET size = ?, exact = 1, crc = ?, pack = ?, offset = ?, used = ?"
                " WHERE ino = ? AND uid = ? AND crc IS NULL",
                [(b.size, b.crc, b.pack, b.offset, now, b.ino, b.uid) for b in bodies],
            ).rowcount
            if noted == len(bodies):
                return []
            return [
                body
                for body in bodies
                if not db.execute(
                    "SELECT 1 FROM node WHERE ino = ? AND uid = ? AND crc IS NOT NULL"
                    " AND pack IS ? AND offset = ?",
                    (body.ino, body.uid, body.pack, body.offset),
                ).fetchone()
            ]

    def packs(self) -> list[tuple[int | None, int, int, int]]:
        """Return a row per pack: its number, the number of bodies, their bytes, and the end of the last one.

        The row with the number None is about bodies that have a file of their own.
        """
        with self._database.read() as db:
            return db.execute(
                "SELECT pack, count(*), sum(size), max(offset + size) FROM node WHERE crc IS NOT NULL"
                " GROUP BY pack"
            ).fetchall()

    def note_use(self, inos: Iterable[Ino]) -> None:
        """Note that bodies were used now."""
        now = int(time.time())
        with self._database.write() as db:
            db.executemany("UPDATE node SET used = ? WHERE ino = ?", [(now, ino) for ino in inos])

    def forget(self, inos: Iterable[Ino]) -> None:
        """Note that bodies are no longer cached."""
        with self._database.write() as db:
            db.executemany("UPDATE node SET crc = NULL WHERE ino = ?", [(ino,) for ino in inos])

    def oldest(self, size: int) -> list[Node]:
        """Return the messages with the least recently used bodies, at least ``size`` bytes in all."""
        chosen: list[Node] = []
        with self._database.read() as db:
            for row in db.execute(
                f"SELECT {NODE_COLUMNS} FROM node WHERE crc IS NOT NULL ORDER BY used, ino"
            ):
                if size <= 0:
                    break
                chosen.append(Node._make(row))
                size -= chosen[-1].size
        return chosen

    def cached(self, inos: Sequence[Ino]) -> set[Ino]:
        """Return those of ``inos`` whose bodies are cached."""
        with self._database.read() as db:
            return {
                Ino(ino)
                for i in inos
                for (ino,) in db.execute("SELECT ino FROM node WHERE ino = ? AND crc IS NOT NULL", (i,))
            }
