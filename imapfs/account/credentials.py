"""Where the password or token comes from; `resolve` has the order, the README explains it.

The secret is never part of an exception: wherever one could hold it, the cause is cut with ``from None``.
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

from imapfs.account import keyring as keystore
from imapfs.account.oauth import OAuthClient, Refresher, is_token
from imapfs.errors import CredentialError, CredentialUnavailable
from imapfs.model import AccessToken, Account, CredentialProvider, Secret

SYSTEMD_NAME = "imapfs"
FOUR_WAYS = "--password-command CMD, --password-file FILE, the keyring, or the prompt on a terminal"

_log = logging.getLogger(__name__)

_COMMAND_TIMEOUT = 60.0
_TOKEN_AGE = 300.0
"""Seconds for which the output of a token command is used again: it knows when a token ends, we do not."""
_MAX_LINE = 64 * 1024


@dataclass(frozen=True, slots=True)
class CredentialSources:
    """What the person named; without any of these, other places are asked."""

    command: str | None = None
    """For ``sh -c``; the first line that it prints is the password."""
    file: Path | None = None
    """Its first line is the password."""
    token_command: str | None = None
    """For ``sh -c``; the first line that it prints is an OAuth 2.0 access token."""
    oauth: OAuthClient | None = None
    """What gives access tokens for the refresh token in the keyring."""
    name: str | None = None
    """The account's in the configuration file, which a systemd credential may have too."""


class _Certificate:
    """A login by the TLS client certificate alone."""

    def get(self, refused: Secret | None = None) -> None:
        """There is nothing else to log in with."""


class _Stored:
    """A password that is looked up once, and again when the server refuses it: it may have been changed.

    ``read`` raises CredentialError; it does so at the first time too.
    """

    def __init__(self, read: Callable[[], Secret]) -> None:
        self._read = read
        self._secret = read()
        self._lock = threading.Lock()

    def get(self, refused: Secret | None = None) -> Secret:
        with self._lock:
            if refused is self._secret:
                # It may have been in a pipe, or the keyring be locked by now.
                with contextlib.suppress(CredentialError):
                    newer = self._read()
                    if newer.reveal() != self._secret.reveal():
                        self._secret = newer
            return self._secret


class Tokens:
    """Access tokens from ``fetch``, each used until it has to be replaced.

    ``fetch`` gives a token and for how many seconds it can be used; it raises CredentialError.
    """

    def __init__(self, fetch: Callable[[], tuple[str, float]]) -> None:
        self._fetch = fetch
        self._token: AccessToken | None = None
        self._until = 0.0
        self._instead = False
        """Whether the token was fetched because the one before was refused."""
        # Held while a token is fetched, so that several connections that come up together ask for one only.
        self._lock = threading.Lock()

    def first(self) -> "Tokens":
        """Fetch a token now, so that what is wrong shows at the start. Raises CredentialError."""
        self._renew()
        return self

    def get(self, refused: Secret | None = None) -> AccessToken:
        with self._lock:
            token, ended = self._token, _now() >= self._until
            # Where the one that came instead was never accepted either, it is not the token that is refused:
            # it may be the number of connections, or the person.
            if (
                token is not None
                and not ended
                and (token is not refused or (self._instead and not token.accepted))
            ):
                return token
            try:
                renewed = self._renew()
            except CredentialError as error:
                raise CredentialUnavailable(str(error)) from None
            self._instead = token is not None and not ended
            return renewed

    def _renew(self) -> AccessToken:
        text, lifetime = self._fetch()
        if not is_token(text):
            raise CredentialError("the access token is not one: it has other characters than printable ASCII")
        self._token, self._until = AccessToken(text), _now() + lifetime
        return self._token


def _now() -> float:
    """Seconds, those in which the machine slept among them: tokens end meanwhile."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def resolve(account: Account, sources: CredentialSources) -> CredentialProvider:
    """What proves who the user of ``account`` is; raises CredentialError.

    A source that was named and fails is an error; it does not fall through to the next one.
    """
    if (command := sources.command) is not None:
        return _Stored(lambda: _from_command(command, "the password command"))
    if (file := sources.file) is not None:
        return _Stored(lambda: _from_file(file, "password file"))
    if sources.token_command is not None:
        return _token_command(sources.token_command).first()
    if sources.oauth is not None:
        refresher = Refresher(sources.oauth, account, f"imapfs login {sources.name}")
        refresher.check()
        return Tokens(refresher)
    if account.auth == "external":
        return _Certificate()
    try:
        return _Stored(lambda: _found(account, sources))
    except _NothingFound:
        if account.client_cert is not None:
            return _Certificate()
        typed = _from_terminal(account)
        if typed is None:
            raise
        return typed


class _NothingFound(CredentialError):
    """No place that is looked at without being named has a password."""


def _found(account: Account, sources: CredentialSources) -> Secret:
    found = _from_systemd(sources.name)
    if found is None:
        try:
            found = keystore.load(keystore.PASSWORDS, account.url)
        except keystore.KeyringUnusable as error:
            _log.debug("%s", error)
    if found is None:
        raise _NothingFound(
            f"no password for {account.url}: use {FOUR_WAYS} "
            f"(to fill the keyring: keyring set {keystore.PASSWORDS} {account.url})"
        )
    return found


def _token_command(command: str) -> Tokens:
    return Tokens(lambda: (_from_command(command, "the token command").reveal(), _TOKEN_AGE))


def _from_command(command: str, what: str) -> Secret:
    # stdin, and with it the terminal, stays the person's: pinentry and the like ask there. For the same
    # reason the command gets no session or process group of its own.
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
        said = next((line.strip() for line in reversed(lines) if line.strip()), "it printed no error")
        how = (
            f"failed with exit code {process.returncode}"
            if process.returncode > 0
            else f"was ended by signal {-process.returncode}"
        )
        raise CredentialError(f"{what} {how}: {said}")
    return _first_line(output, what)


def _from_systemd(name: str | None) -> Secret | None:
    """The credential that has the account's name, or else the program's (systemd.exec(5), "Credentials")."""
    directory = os.environ.get("CREDENTIALS_DIRECTORY")
    if not directory:
        return None
    for one in (name, SYSTEMD_NAME):
        # A name with a slash would lead out of the directory; no credential has one.
        path = Path(directory, one) if one and "/" not in one else None
        if path is not None and path.is_file():
            # Its mode may show an access list as a group's rights; the directory keeps others out.
            return _from_file(path, "systemd credential", private=False)
    return None


def _from_file(path: Path, what: str, *, private: bool = True) -> Secret:
    """The first line of a file, which with ``private`` nobody else may have access to."""
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            # A pipe, such as the shell's <(...), is nobody else's to open whatever its mode says.
            if private and stat.S_ISREG(mode) and mode & 0o077:
                raise CredentialError(
                    f"{what} {path}: others may access it (mode {stat.S_IMODE(mode):04o}): "
                    f"chmod 600 it, and consider the password known"
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
    """Write a password file that nobody else can read; there must be none yet. Raises CredentialError."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(secret.reveal() + "\n")
    except OSError as error:
        raise CredentialError(f"password file {path}: cannot be written: {error.strerror}") from None
