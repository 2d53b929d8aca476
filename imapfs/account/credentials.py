"""Where the password or token comes from. `resolve` decides the order, which docs/accounts.md explains.

No exception contains the secret: a cause that could hold it is cut off with ``from None``.
"""

import contextlib
import getpass
import logging
import os
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from imapfs.account import keyring
from imapfs.account.oauth import OAuthClient, TokenRefresher, is_token
from imapfs.errors import CredentialError, CredentialUnavailable
from imapfs.model import AccessToken, Account, CredentialProvider, Secret

SYSTEMD_NAME = "imapfs"
FOUR_WAYS = "--password-command CMD, --password-file FILE, the keyring, or the prompt on a terminal"

_log = logging.getLogger(__name__)

_COMMAND_TIMEOUT = 60.0
_TOKEN_AGE = 300.0
"""Seconds for which the output of a token command is reused: it does not say when the token ends."""
_MAX_LINE = 64 * 1024


@dataclass(frozen=True, slots=True)
class CredentialSources:
    """The sources that the person named. Without any, other places are searched."""

    command: str | None = None
    """For ``sh -c``; the first line of its output is the password."""
    file: Path | None = None
    """Its first line is the password."""
    token_command: str | None = None
    """For ``sh -c``; the first line of its output is an OAuth 2.0 access token."""
    oauth: OAuthClient | None = None
    """Obtains access tokens with the refresh token in the keyring."""
    name: str | None = None
    """The account's name in the configuration file, which may also be the name of a systemd credential."""


class _CertificateLogin:
    """A login with the TLS client certificate alone."""

    def get(self, refused: Secret | None = None) -> None:
        """Return None: there is no other secret."""


class _StoredPassword:
    """A password that is read once, and again when the server refuses it, as it may have been changed.

    ``read`` raises CredentialError; the constructor then does as well.
    """

    def __init__(self, read: Callable[[], Secret]) -> None:
        self._read = read
        self._secret = read()
        self._lock = threading.Lock()

    def get(self, refused: Secret | None = None) -> Secret:
        with self._lock:
            if refused is self._secret:
                # The source may have been a pipe, or the keyring may be locked by now.
                with contextlib.suppress(CredentialError):
                    newer = self._read()
                    if newer.reveal() != self._secret.reveal():
                        self._secret = newer
            return self._secret


class Tokens:
    """Access tokens from ``fetch``, each used until it has to be replaced.

    ``fetch`` returns a token and for how many seconds it can be used. It raises CredentialError.
    """

    def __init__(self, fetch: Callable[[], tuple[str, float]]) -> None:
        self._fetch = fetch
        self._token: AccessToken | None = None
        self._until = 0.0
        self._is_replacement = False
        """Whether the token was fetched because the previous one was refused."""
        # Held during a fetch, so that several connections that open together cause only one.
        self._lock = threading.Lock()

    def first(self) -> "Tokens":
        """Fetch a token now, so that a mistake shows at the start. Raises CredentialError."""
        self._renew()
        return self

    def get(self, refused: Secret | None = None) -> AccessToken:
        with self._lock:
            token, ended = self._token, _now() >= self._until
            # If a replacement was never accepted either, the token is not the reason for the refusal: it may
            # be the number of connections, or the person.
            if (
                token is not None
                and not ended
                and (token is not refused or (self._is_replacement and not token.accepted))
            ):
                return token
            try:
                renewed = self._renew()
            except CredentialError as error:
                raise CredentialUnavailable(str(error)) from None
            self._is_replacement = token is not None and not ended
            return renewed

    def _renew(self) -> AccessToken:
        text, lifetime = self._fetch()
        if not is_token(text):
            raise CredentialError("the access token is not one: tokens consist of printable ASCII characters")
        self._token, self._until = AccessToken(text), _now() + lifetime
        return self._token


def _now() -> float:
    """Return seconds on a clock that also runs while the machine sleeps, since tokens expire meanwhile."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def resolve(account: Account, sources: CredentialSources) -> CredentialProvider:
    """Return what proves who the user of ``account`` is. Raises CredentialError.

    If a source that the person named fails, no other source is tried.
    """
    if (command := sources.command) is not None:
        return _StoredPassword(lambda: _from_command(command, "the password command"))
    if (file := sources.file) is not None:
        return _StoredPassword(lambda: _from_file(file, "password file"))
    if sources.token_command is not None:
        return _token_command(sources.token_command).first()
    if sources.oauth is not None:
        refresher = TokenRefresher(sources.oauth, account, f"imapfs login {sources.name}")
        refresher.check()
        return Tokens(refresher)
    if account.auth == "external":
        return _CertificateLogin()
    try:
        return _StoredPassword(lambda: _search(account, sources))
    except _NothingFound:
        if account.client_cert is not None:
            return _CertificateLogin()
        typed = _from_terminal(account)
        if typed is None:
            raise
        return typed


class _NothingFound(CredentialError):
    """None of the places that are searched by default has a password."""


def _search(account: Account, sources: CredentialSources) -> Secret:
    found = _from_systemd(sources.name)
    if found is None:
        try:
            found = keyring.load(keyring.PASSWORDS, account.url)
        except keyring.KeyringUnusable as error:
            _log.debug("%s", error)
    if found is None:
        raise _NothingFound(
            f"no password for {account.url}: use {FOUR_WAYS} "
            f"(to put it into the keyring: keyring set {keyring.PASSWORDS} {account.url})"
        )
    return found


def _token_command(command: str) -> Tokens:
    return Tokens(lambda: (_from_command(command, "the token command").reveal(), _TOKEN_AGE))


def _from_command(command: str, what: str) -> Secret:
    # The command inherits stdin and the terminal, where pinentry and the like ask questions. For the same
    # reason it gets no session or process group of its own.
    try:
        process = subprocess.Popen(["sh", "-c", command], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    except (OSError, ValueError) as error:
        raise CredentialError(f"{what} cannot be started: {getattr(error, 'strerror', error)}") from None
    with process:
        try:
            output, errors = process.communicate(timeout=_COMMAND_TIMEOUT)
        except subprocess.TimeoutExpired:
            process.kill()
            raise CredentialError(
                f"{what} did not end within {_COMMAND_TIMEOUT:g} s: run it by hand to see why"
            ) from None
    if process.returncode != 0:
        lines = errors.decode(errors="replace").split("\n")
        message = next((line.strip() for line in reversed(lines) if line.strip()), "it printed no error")
        how = (
            f"failed with exit code {process.returncode}"
            if process.returncode > 0
            else f"was killed by signal {-process.returncode}"
        )
        raise CredentialError(f"{what} {how}: {message}")
    return _first_line(output, what)


def _from_systemd(name: str | None) -> Secret | None:
    """Return the credential named like the account, or else like the program (systemd.exec(5))."""
    directory = os.environ.get("CREDENTIALS_DIRECTORY")
    if not directory:
        return None
    for one in (name, SYSTEMD_NAME):
        # A name with a slash would leave the directory, and no credential has one.
        path = Path(directory, one) if one and "/" not in one else None
        if path is not None and path.is_file():
            # An access list may show as group permissions; the directory keeps others out.
            return _from_file(path, "systemd credential", private=False)
    return None


def _from_file(path: Path, what: str, *, private: bool = True) -> Secret:
    """Return the first line of a file. If ``private``, nobody else may have access to the file."""
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            # Others cannot open a pipe, such as the shell's <(...), whatever its mode says.
            if private and stat.S_ISREG(mode) and mode & 0o077:
                raise CredentialError(
                    f"{what} {path}: other users may access it (mode {stat.S_IMODE(mode):04o}): "
                    f"chmod 600 it, and consider changing the password"
                )
            return _first_line(file.readline(_MAX_LINE), f"{what} {path}")
    except OSError as error:
        raise CredentialError(f"{what} {path}: cannot be read: {error.strerror}") from None


def _first_line(data: bytes, where: str) -> Secret:
    try:
        line = data.split(b"\n", 1)[0].removesuffix(b"\r").decode()
    except UnicodeDecodeError:
        raise CredentialError(f"{where}: the first line is not UTF-8 text") from None
    if not line:
        raise CredentialError(f"{where}: the first line, which should be the password, is empty")
    return Secret(line)


def _from_terminal(account: Account) -> Secret | None:
    if sys.stdin is None or not sys.stdin.isatty():
        return None
    try:
        typed = getpass.getpass(f"Password for {account.url}: ")
    except (EOFError, OSError):
        return None
    return Secret(typed) if typed else None


def to_file(path: Path, secret: Secret) -> None:
    """Write a new password file that nobody else can read. Raises CredentialError, also if it exists."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(secret.reveal() + "\n")
    except OSError as error:
        raise CredentialError(f"password file {path}: cannot be written: {error.strerror}") from None
