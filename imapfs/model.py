"""Plain data types shared by all layers: no I/O and no behaviour beyond their own invariants."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NewType, Protocol

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
Security = Literal["tls", "starttls"]
"""How a connection becomes TLS: from its first byte, or by STARTTLS (RFC 9051 section 6.2.1)."""
AuthMethod = Literal["auto", "plain", "login", "scram-sha-256", "xoauth2", "oauthbearer", "external"]
"""How to log in: ``login`` is the LOGIN command, ``auto`` the strongest way, the others are of SASL."""
DEFAULT_PORTS: Mapping[Security, int] = {"tls": 993, "starttls": 143}

ROOT = Ino(1)


@dataclass(frozen=True, slots=True)
class MessageRef:
    """The identity of a message on the server (RFC 9051 section 2.3.1.1): no other message ever has it."""

    mailbox: bytes
    """As the server spells it."""
    uidvalidity: UidValidity
    uid: Uid


class Secret:
    """A password that cannot reach a log, a traceback or a repr by accident; its own `CredentialProvider`."""

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        return self._value

    def get(self, refused: "Secret | None" = None) -> "Secret":  # noqa: ARG002 - there is no other
        return self

    def __repr__(self) -> str:
        return "Secret(...)"


class AccessToken(Secret):
    """An OAuth 2.0 access token (RFC 6749 section 1.4), which only XOAUTH2 and OAUTHBEARER take."""

    __slots__ = ("accepted",)

    def __init__(self, value: str) -> None:
        super().__init__(value)
        self.accepted = False
        """Whether a server has taken it; set by whoever logs in."""


class CredentialProvider(Protocol):
    """Where each login gets what it proves itself with. Asked in any thread; may wait for the network."""

    def get(self, refused: Secret | None = None) -> Secret | None:
        """What to log in with: a password or an `AccessToken`; None for the TLS client certificate alone.

        With ``refused``, which the server did not take: another one, or the same object where there is none.
        Raises ConnectionLost where a new token cannot be had now.
        """


@dataclass(frozen=True, slots=True)
class Account:
    """Where the mail is: one user on one server, how its identity is checked, and how ours is proven."""

    host: str
    user: str
    port: int = 993
    mailbox: str | None = None
    """The subtree to mount, as the path that the full mount would show it under; None for everything."""
    security: Security = "tls"
    insecure_plaintext: bool = False
    """Whether to do without TLS where STARTTLS is not offered; on this machine that is so anyway.
    Not where `names_certificates`."""
    ca_file: Path | None = None
    """PEM certificates to trust instead of the system's; None for the system's."""
    tls_fingerprint: str | None = None
    """SHA-256 of the server's certificate in DER, 64 lower-case hex digits. Trusted are it and nothing else,
    whatever name, issuer and dates it has."""
    client_cert: Path | None = None
    """PEM certificate, with its chain, that proves who we are (RFC 8446 section 4.4.2)."""
    client_key: Path | None = None
    """Its private key in PEM, unencrypted; None where ``client_cert`` holds it too."""
    auth: AuthMethod = "auto"

    @property
    def names_certificates(self) -> bool:
        """Whether the person wants TLS with these and no others, so that nothing is to be done without it."""
        return any(one is not None for one in (self.ca_file, self.tls_fingerprint, self.client_cert))

    @property
    def url(self) -> str:
        """For people: ``imaps://user@host[:port]``, never with a password; ``imap://`` for STARTTLS."""
        scheme = "imaps" if self.security == "tls" else "imap"
        port = "" if self.port == DEFAULT_PORTS[self.security] else f":{self.port}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{scheme}://{self.user}@{host}{port}"


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
    poll: float
    """Seconds between looks for what the server does not tell by itself."""
    read_only: bool
    fuse_options: frozenset[str]
    """Options handed to fusermount3 as they are, such as ``allow_other``."""
