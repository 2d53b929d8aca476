"""Plain data types that all layers share: no I/O, and no behaviour beyond their own invariants."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NewType, Protocol

Ino = NewType("Ino", int)
"""Inode number of a message, a directory or the root. Never assigned to anything else."""

Uid = NewType("Uid", int)
"""Unique identifier of a message within a mailbox and its UIDVALIDITY (RFC 9051 section 2.3.1.1)."""

UidValidity = NewType("UidValidity", int)
ModSeq = NewType("ModSeq", int)
"""Modification sequence (RFC 7162); 0 if the server has none."""

DeletePolicy = Literal["trash", "expunge"]
"""What rm does with a message outside Trash: move it to Trash, or delete it permanently."""
Security = Literal["tls", "starttls"]
"""How TLS starts: with the first byte, or by STARTTLS (RFC 9051 section 6.2.1)."""
AuthMethod = Literal["auto", "plain", "login", "scram-sha-256", "xoauth2", "oauthbearer", "external"]
"""How to log in: ``login`` is the LOGIN command, ``auto`` the strongest method, the others are of SASL."""
DEFAULT_PORTS: Mapping[Security, int] = {"tls": 993, "starttls": 143}

ROOT = Ino(1)


@dataclass(frozen=True, slots=True)
class MessageRef:
    """The identity of a message on the server (RFC 9051 section 2.3.1.1): no other message ever has it."""

    mailbox: bytes
    """As the server spells it."""
    uidvalidity: UidValidity
    uid: Uid
    date: int | None = field(default=None, compare=False)
    """INTERNALDATE, seconds since the epoch; None if not known. With ``size`` it proves that the UID still is
    this message's, although the server may have been restored from a backup."""
    size: int | None = field(default=None, compare=False)
    """RFC822.SIZE as the server announces it, in bytes; None if not known."""


class Secret:
    """A password that cannot get into a log, a traceback or a repr by accident.

    It is its own `CredentialProvider`.
    """

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
    """An OAuth 2.0 access token (RFC 6749 section 1.4), for XOAUTH2 and OAUTHBEARER only."""

    __slots__ = ("accepted",)

    def __init__(self, value: str) -> None:
        super().__init__(value)
        self.accepted = False
        """Whether a server has accepted it; set by the login."""


class CredentialProvider(Protocol):
    """Source of credentials for each login. Called in any thread; may wait for the network."""

    def get(self, refused: Secret | None = None) -> Secret | None:
        """Return a password or an `AccessToken`, or None if the TLS client certificate alone is enough.

        ``refused``: what the server has refused. Another credential is returned then, or the same object if
        there is no other. Raises ConnectionLost if a new token cannot be obtained now.
        """


@dataclass(frozen=True, slots=True)
class Account:
    """One user on one server, how the server is verified, and how to log in."""

    host: str
    user: str
    port: int = 993
    mailbox: str | None = None
    """Path of the subtree to mount, as a mount of the whole account shows it; None for everything."""
    security: Security = "tls"
    insecure_plaintext: bool = False
    """Whether to continue without TLS if STARTTLS is not offered. To this machine that is always allowed.
    Has no effect if `names_certificates`."""
    ca_file: Path | None = None
    """PEM file with the certificates to trust; None for those of the system."""
    tls_fingerprint: str | None = None
    """SHA-256 of the server's certificate in DER, 64 lower-case hex digits. Only this certificate is trusted,
    with any name, issuer and dates."""
    client_cert: Path | None = None
    """PEM file with the client certificate and its chain (RFC 8446 section 4.4.2)."""
    client_key: Path | None = None
    """PEM file with its private key, unencrypted; None if ``client_cert`` has it too."""
    auth: AuthMethod = "auto"

    @property
    def names_certificates(self) -> bool:
        """Whether the user has named certificates, so that a connection without TLS is never wanted."""
        return any(one is not None for one in (self.ca_file, self.tls_fingerprint, self.client_cert))

    @property
    def url(self) -> str:
        """``imaps://user@host[:port]``, or ``imap://`` for STARTTLS; for people, without a password."""
        scheme = "imaps" if self.security == "tls" else "imap"
        port = "" if self.port == DEFAULT_PORTS[self.security] else f":{self.port}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{scheme}://{self.user}@{host}{port}"


@dataclass(frozen=True, slots=True)
class MountConfig:
    """The complete settings of a mount, with all defaults applied."""

    account: Account
    mountpoint: Path
    """Absolute."""
    cache_dir: Path
    """The directory with a subdirectory for each account."""
    cache_size: int
    """Maximum size of all cached bodies, in bytes."""
    fetch_ahead: int
    """Maximum bytes per day that are prefetched; 0 for none."""
    names: str
    """A template of `message_names.NameTemplate`, or a short form of one."""
    own_mail: Mapping[str, str]
    """Path of a mailbox that the configuration calls Sent or Drafts -> its RFC 6154 attribute."""
    list_attributes: bool
    """Whether extended attributes are listed that cannot be set."""
    delete: DeletePolicy
    trash: str | None
    """Path of the mailbox that rm moves to; None for the one that the server marks, or that is called so."""
    connections: int
    """Maximum number of IMAP connections, at least 1."""
    timeout: float
    """Maximum seconds that a request waits for the server."""
    poll: float
    """Seconds between polls for changes that the server does not announce."""
    read_only: bool
    fuse_options: frozenset[str]
    """Options that are passed on to fusermount3, such as ``allow_other``."""
    spool_dir: Path | None = field(default=None, kw_only=True)
    """The directory with a subdirectory for each account's spool and journal; None for ``cache_dir``."""
