"""A keyring in a file, for tests in which several processes use one: see `FileKeyring`."""

import json
import os
from pathlib import Path

import keyring.backend
import keyring.errors


class FileKeyring(keyring.backend.KeyringBackend):
    """Keeps what it is given in the file that IMAPFS_TEST_KEYRING names; locked while that does not exist.

    Nothing can be put into it while nobody may write the file.

    PYTHON_KEYRING_BACKEND=tests.support.keyrings.FileKeyring makes the keyring library use it.
    """

    priority = 1.0

    def _load(self) -> dict[str, str]:
        try:
            kept: dict[str, str] = json.loads(_path().read_text())
        except FileNotFoundError:
            raise keyring.errors.KeyringLocked("locked") from None
        return kept

    def get_password(self, service: str, username: str) -> str | None:
        return self._load().get(f"{service}|{username}")

    def set_password(self, service: str, username: str, password: str) -> None:
        kept = {**self._load(), f"{service}|{username}": password}
        if _path().stat().st_mode & 0o222 == 0:
            raise keyring.errors.PasswordSetError("read-only")
        _path().write_text(json.dumps(kept))


def _path() -> Path:
    return Path(os.environ["IMAPFS_TEST_KEYRING"])
