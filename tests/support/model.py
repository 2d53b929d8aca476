"""An account as the file system sees it, without a server or a kernel: a real cache and a real spool."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from imapfs.fs.tree import MailTree
from imapfs.model import ROOT, Ino, ModSeq, Uid, UidValidity
from imapfs.store.cache import Cache
from imapfs.store.journal import Attempt
from imapfs.store.rows import Directory, NewMessage, Node
from imapfs.store.spool import Base, Draft, Spool

DATE = 1_700_000_000
UIDVALIDITY = UidValidity(99)


@dataclass
class Model:
    """An account with mailboxes by their paths, such as ``INBOX`` and ``Work/2024``."""

    cache: Cache
    spool: Spool
    tree: MailTree
    mailboxes: list[str] = field(default_factory=list)

    def list_mailboxes(self, *names: str) -> None:
        """Have exactly these mailboxes; those that are new have no messages."""
        self.mailboxes = list(names)
        self.cache.set_tree(
            [Directory(tuple(name.encode().split(b"/")), name.encode(), b"/", True, "") for name in names]
        )
        for name in names:
            ino = self.ino(name)
            self.cache.set_state(ino, UIDVALIDITY, 1, ModSeq(1), complete=True)

    def ino(self, path: str) -> Ino:
        """Return the inode in the cache of a directory or message."""
        ino = ROOT
        for name in path.encode().split(b"/") if path else ():
            node = self.cache.child(ino, name)
            assert node is not None, path
            ino = node.ino
        return ino

    def node(self, ino: Ino) -> Node:
        node = self.cache.node(ino)
        assert node is not None
        return node

    def deliver(self, mailbox: str, *uids: int, size: int = 100, flags: str = "") -> list[Ino]:
        """Add messages as a synchronisation does, named ``UID.eml``; return their inodes."""
        added = self.cache.add_messages(
            self.ino(mailbox),
            [
                NewMessage(
                    Uid(uid), size, DATE, 0, flags, ModSeq(1), "Subject", "Sender", "a@b", f"<{uid}@x>"
                )
                for uid in uids
            ],
        )
        return [ino for ino, _ in added]

    def write(self, directory: str, name: bytes, content: bytes = b"From: me\r\n\r\n") -> Draft:
        """Make a new file and write to it, as a program does."""
        parent = self.ino(directory)
        draft = self.spool.create(self.cache.new_ino(), parent, name, self.cache.path(parent), 0o600)
        return _written(draft, content)

    def change(self, message: Ino, content: bytes = b"From: you\r\n\r\nchanged") -> Draft:
        """Begin a new version of a message, as the first write to it does."""
        return _written(self.tree.new_version(self.node(message)), content)

    def attempt(self, draft: Draft, mailbox: str, uidnext: int) -> None:
        """Note that a draft may have become a message from ``uidnext`` on."""
        draft.attempt = Attempt(mailbox.encode(), UIDVALIDITY, uidnext, draft.size, "")

    def base(self, message: Ino) -> Base:
        found = self.tree.reference(self.node(message))
        assert found is not None
        return found[0]

    def names(self, directory: Ino) -> list[str]:
        """Return the names in a directory of the kernel's, in the order in which they are listed."""
        found, after = list[str](), 0
        while page := self.tree.page(directory, after):
            inos = [entry.ino for entry in page]
            assert inos == sorted(set(inos)) and inos[0] > after
            found += [entry.name.decode() for entry in page]
            after = inos[-1]
        return found


def _written(draft: Draft, content: bytes) -> Draft:
    draft.file.write_bytes(content)
    draft.dirty = True
    draft.save()
    return draft


@contextmanager
def model(directory: Path, spool_directory: Path | None = None) -> Iterator[Model]:
    """Make an account without mailboxes in a directory, with a spool of its own or that of another one."""
    cache = Cache.open(directory / "cache", "uid")
    try:
        spool = Spool(spool_directory or directory / "spool")
        yield Model(cache, spool, MailTree(cache, spool))
    finally:
        cache.close()
