"""Plain data types shared by all layers: no I/O and no behaviour beyond their own invariants."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NewType

Ino = NewType("Ino", int)
"""Inode number: of a message, a mailbox's directory, or the root. Never used again for anything else."""

Uid = NewType("Uid", int)
"""Unique identifier of a message in one mailbox and UIDVALIDITY (RFC 9051 section 2.3.1.1)."""

UidValidity = NewType("UidValidity", int)
ModSeq = NewType("ModSeq", int)
"""Modification sequence (RFC 7162); 0 where the server keeps none."""

NameScheme = Literal["subject", "uid"]
DeletePolicy = Literal["trash", "expunge"]
"""What rm does with a message that is not in Trash: move it there, or delete it for good."""

ROOT = Ino(1)


class Secret:
    """A password that cannot reach a log, a traceback or a repr by accident."""

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        return self._value

    def __repr__(self) -> str:
        return "Secret(...)"


@dataclass(frozen=True, slots=True)
class Account:
    """Where the mail is: one user on one server, reached by implicit TLS."""

    host: str
    user: str
    port: int = 993
    mailbox: str | None = None
    """The subtree to mount, as the path that the full mount would show it under; None for everything."""
    ca_file: Path | None = None
    """PEM certificates to trust instead of the system's; None for the system's."""

    @property
    def url(self) -> str:
        """For people: ``imaps://user@host[:port]``, never with a password."""
        port = "" if self.port == 993 else f":{self.port}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"imaps://{self.user}@{host}{port}"


@dataclass(frozen=True, slots=True)
class MountConfig:
    """Everything a mount needs to know, resolved: no defaults are applied below this."""

    account: Account
    mountpoint: Path
    """Absolute."""
    cache_dir: Path
    """The directory that holds one subdirectory for each account."""
    cache_size: int
    """Upper bound for cached bodies, in bytes."""
    fetch_ahead: int
    """Most bytes a day that are fetched before they are wanted; 0 for none."""
    names: NameScheme
    delete: DeletePolicy
    connections: int
    """Most IMAP connections open at once, >= 1."""
    timeout: float
    """Seconds that any request may wait for the server."""
    read_only: bool
    fuse_options: frozenset[str]
    """Options handed to fusermount3 as they are, such as ``allow_other``."""
