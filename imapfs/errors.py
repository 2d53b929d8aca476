"""Every way in which imapfs can fail, with the errno that a program sees.

The message of each exception is one line for a person: what happened, to what, and what to do. The class
says how far the failure reaches (this message, this mailbox, this connection, the account), because that
decides what the caller does next; the errno is a property of the class so that it is decided here only.
"""

import errno
import os
from typing import ClassVar


class ImapfsError(Exception):
    """Base of all expected failures; ``str()`` is one line fit for a person.

    ``remedy`` is the part of it that says what to do, where that can be told apart, and ``problem`` the rest.
    """

    errno: int = errno.EIO

    def __init__(self, problem: str, *, remedy: str = "") -> None:
        super().__init__(problem)
        self.problem = problem
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.problem}: {self.remedy}" if self.remedy else self.problem


class UsageError(ImapfsError):
    """The command line, the configuration or the mountpoint is not usable as given."""

    errno = errno.EINVAL


class CredentialError(ImapfsError):
    """No password could be had from any of the places asked."""

    errno = errno.EACCES


class MessageGone(ImapfsError):
    """The message was expunged on the server: scope is this message only."""

    errno = errno.ESTALE


class OtherMessage(MessageGone):
    """Another message has the UID of the message: the server was restored, for example."""


class MailboxGone(ImapfsError):
    """The mailbox does not exist, was renamed, or has a new UIDVALIDITY: scope is this mailbox."""

    errno = errno.ENOENT


class OtherMailbox(MailboxGone):
    """Numbers of the mailbox went back that only grow: its UIDs may belong to other messages now."""


class Refused(ImapfsError):
    """The server answered a command with NO or BAD: the connection is fine, the request is not.

    ``code`` is the response code (RFC 9051 section 7.1, RFC 5530) in upper case, or "".
    """

    _ERRNO: ClassVar[dict[str, int]] = {
        "ALREADYEXISTS": errno.EEXIST,
        "AUTHORIZATIONFAILED": errno.EACCES,
        "CANNOT": errno.EPERM,
        "INUSE": errno.EBUSY,
        "LIMIT": errno.EFBIG,
        "NONEXISTENT": errno.ENOENT,
        "NOPERM": errno.EACCES,
        "OVERQUOTA": errno.EDQUOT,
        "TOOBIG": errno.EFBIG,
        "TRYCREATE": errno.ENOENT,
        # Not EAGAIN: programs take that for a file that is not ready, and some for the end of it.
        "UNAVAILABLE": errno.EBUSY,
    }

    def __init__(self, problem: str, code: str = "", *, remedy: str = "") -> None:
        super().__init__(problem, remedy=remedy)
        self.code = code
        self.errno = self._ERRNO.get(code, errno.EIO)


class Throttled(Refused):
    """The server asks to come back later: scope is the account, or perhaps one object. Nothing was carried
    out."""

    def __init__(
        self, problem: str, code: str, wait: float, *, remedy: str = "", of_one: bool = False
    ) -> None:
        super().__init__(problem, code, remedy=remedy)
        self.errno = errno.EBUSY
        self.wait = wait
        """Seconds that the server named, else 0."""
        self.of_one = of_one
        """Whether it may be about nothing but the mailbox or the message of this command."""


class ConnectionLost(ImapfsError):
    """The connection ended, or could not be made: scope is this connection; another may succeed."""

    errno = errno.EHOSTUNREACH
    silent = False
    """Whether nothing was heard any more, so that other connections may have ended as well."""
    by_server = False
    """Whether the server itself has ended the connection, or has complained before it fell silent."""


class NetworkLost(ConnectionLost):
    """The network, not the server, ended the connection."""

    silent = True


class Offline(ConnectionLost):
    """The server is known to be away: nothing was tried. With the errno of what was tried last."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.errno = number


class TimedOut(ConnectionLost):
    """The server did not answer within the timeout."""

    errno = errno.ETIMEDOUT
    silent = True


class ServerBusy(ConnectionLost):
    """The server lets nobody in, or ended the connection, and asks to come back later."""

    errno = errno.EBUSY

    def __init__(self, problem: str, wait: float, *, remedy: str = "") -> None:
        super().__init__(problem, remedy=remedy)
        self.wait = wait
        """Seconds that the server named, else 0."""


class CredentialUnavailable(ConnectionLost):
    """There is no access token to log in with at the moment: it was not tried, and may work later."""

    errno = errno.EACCES


class ProtocolError(ConnectionLost):
    """The server sent what is not IMAP: the connection is of no further use."""

    errno = errno.EPROTO


class Malformed(ProtocolError):
    """One response cannot be read. It is passed over, and the connection goes on."""


class TlsError(ConnectionLost):
    """No trustworthy TLS connection: scope is the account, until somebody sets the server or us right."""

    errno = errno.EPROTO


class CertificateRejected(TlsError):
    """The server's certificate is none that the account trusts."""


class AuthenticationFailed(ImapfsError):
    """The server refused the credentials, or says so when it is busy: trying again may lock the account."""

    errno = errno.EACCES


class NoMechanism(AuthenticationFailed):
    """The server has no way to log in that we have too: it was told nothing."""


class NotFound(ImapfsError):
    """No such file or directory."""

    errno = errno.ENOENT


class NameTooLong(ImapfsError):
    """A name has more than 255 bytes."""

    errno = errno.ENAMETOOLONG


class NoAttribute(ImapfsError):
    """No such extended attribute."""

    errno = errno.ENODATA


class NotSupported(ImapfsError):
    """Neither imapfs nor the server can do this, now or later."""

    errno = errno.ENOTSUP


class NotADirectory(ImapfsError):
    errno = errno.ENOTDIR


class IsADirectory(ImapfsError):
    errno = errno.EISDIR


class NotEmpty(ImapfsError):
    """The mailbox holds messages, other mailboxes or local files."""

    errno = errno.ENOTEMPTY


class Exists(ImapfsError):
    """There is something by that name already."""

    errno = errno.EEXIST


class NotPermitted(ImapfsError):
    """What a file can do but mail cannot."""

    errno = errno.EPERM


class CrossDevice(ImapfsError):
    """It cannot be moved there, only copied, as between file systems."""

    errno = errno.EXDEV


class Invalid(ImapfsError):
    """The value or name makes no sense to an IMAP server."""

    errno = errno.EINVAL


class TooBig(ImapfsError):
    """Larger than the server takes."""

    errno = errno.EFBIG


class CacheError(ImapfsError):
    """The local cache cannot be used: locked by another mount, no space, not writable."""

    errno = errno.EIO

    @classmethod
    def from_os_error(cls, error: OSError, what: str) -> "CacheError":
        """Keep the errno of ``error`` (ENOSPC, EROFS ...), so that the program sees the real cause.

        But not ENOENT, which would be understood of the file in the mount, or of its directory's end.
        """
        number = error.errno or cls.errno
        if number == errno.ENOENT:
            return cls(f"{what}: it was deleted by another program: unmount, and mount again")
        if number == errno.ENOTDIR:
            return cls(f"{what}: {error.strerror}")
        made = cls(f"{what}: {os.strerror(number)}; free or repair that disk")
        made.errno = number
        return made
