"""Where the password comes from: a command, a file, the keyring, or a person at a terminal.

The password is never part of an exception: wherever one could hold it, the cause is cut with ``from None``.
"""

import getpass
import logging
import os
import stat
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from imapfs.errors import CredentialError
from imapfs.model import Account, Secret

KEYRING_SERVICE = "imapfs"
FOUR_WAYS = "--password-command CMD, --password-file FILE, the keyring, or the prompt on a terminal"

_COMMAND_TIMEOUT = 60.0
_MAX_LINE = 64 * 1024

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CredentialSources:
    """What the person named; without either, keyring and terminal are asked."""

    command: str | None = None
    """For ``sh -c``; the first line that it prints is the password."""
    file: Path | None = None
    """Its first line is the password."""


def resolve(account: Account, sources: CredentialSources) -> Secret:
    """The password of ``account``; raises CredentialError.

    A source that was named and fails is an error; it does not fall through to the next one.
    """
    if sources.command is not None:
        return _from_command(sources.command)
    if sources.file is not None:
        return _from_file(sources.file)
    found = _from_keyring(account) or _from_terminal(account)
    if found is None:
        raise CredentialError(
            f"no password for {account.url}: use {FOUR_WAYS} "
            f"(to fill the keyring: keyring set {KEYRING_SERVICE} {account.url})"
        )
    return found


def _from_command(command: str) -> Secret:
    # stdin, and with it the terminal, stays the person's: pinentry and the like ask there. For the same
    # reason the command gets no session or process group of its own.
    with subprocess.Popen(["sh", "-c", command], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            output, errors = process.communicate(timeout=_COMMAND_TIMEOUT)
        except subprocess.TimeoutExpired:
            process.kill()
            raise CredentialError(
                f"the password command did not end within {_COMMAND_TIMEOUT:g} s: run it by hand to see why"
            ) from None
    if process.returncode != 0:
        lines = errors.decode(errors="replace").split("\n")
        said = next((line.strip() for line in reversed(lines) if line.strip()), "it printed no error")
        how = (
            f"failed with exit code {process.returncode}"
            if process.returncode > 0
            else f"was ended by signal {-process.returncode}"
        )
        raise CredentialError(f"the password command {how}: {said}")
    return _first_line(output, "the password command")


def _from_file(path: Path) -> Secret:
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            # A pipe, such as the shell's <(...), is nobody else's to open whatever its mode says.
            if stat.S_ISREG(mode) and mode & 0o077:
                raise CredentialError(
                    f"password file {path}: others may access it (mode {stat.S_IMODE(mode):04o}): "
                    f"chmod 600 it, and consider the password known"
                )
            return _first_line(file.readline(_MAX_LINE), f"password file {path}")
    except OSError as error:
        raise CredentialError(f"password file {path}: cannot be read: {error.strerror}") from None


def _first_line(data: bytes, where: str) -> Secret:
    try:
        line = data.split(b"\n", 1)[0].removesuffix(b"\r").decode()
    except UnicodeDecodeError:
        raise CredentialError(f"{where}: the first line is not UTF-8 text") from None
    if not line:
        raise CredentialError(f"{where}: the first line, which should be the password, is empty")
    return Secret(line)


def _from_keyring(account: Account) -> Secret | None:
    try:
        import keyring

        found = keyring.get_password(KEYRING_SERVICE, account.url)
    except Exception as error:
        # No backend, no D-Bus, a locked collection ... each backend has exceptions of its own.
        _log.debug("keyring not usable: %s: %s", type(error).__name__, error)
        return None
    return Secret(found) if found else None


def _from_terminal(account: Account) -> Secret | None:
    if sys.stdin is None or not sys.stdin.isatty():
        return None
    try:
        typed = getpass.getpass(f"Password for {account.url}: ")
    except (EOFError, OSError):
        return None
    return Secret(typed) if typed else None
