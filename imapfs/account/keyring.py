"""What the person's keyring (the Secret Service, and what else the keyring library knows) keeps for us.

The keyring is asked in a process of its own (`imapfs.account.helper`).
"""

import logging
from typing import Any

from imapfs.account import helper as apart
from imapfs.errors import CredentialError
from imapfs.model import Secret

PASSWORDS = "imapfs"
"""The service, in the keyring's terms, under which passwords are; the user is the account's URL."""
REFRESH_TOKENS = "imapfs refresh token"
"""The same for OAuth 2.0, so that neither is taken for the other."""

_TIMEOUT = 60.0
"""Seconds that a person has to unlock it."""

_log = logging.getLogger(__name__)


class KeyringUnusable(CredentialError):
    """There is no keyring, or it is locked, or it does not answer."""


def works() -> bool:
    """Whether there is a keyring that something can be put into; it may still be locked."""
    try:
        import keyring

        # The backends that stand for "none" have 0 and less.
        return keyring.get_keyring().priority > 0
    except Exception as error:
        _log.debug("keyring not usable: %s: %s", type(error).__name__, error)
        return False


def load(service: str, url: str) -> Secret | None:
    """What is kept for the account; None where it is nothing. Raises KeyringUnusable."""
    try:
        found = apart.call("imapfs.account.keyring", {"service": service, "url": url}, _TIMEOUT)
    except apart.Failed as error:
        # No backend, no D-Bus, a locked collection ... each backend has exceptions of its own.
        raise KeyringUnusable(f"the keyring cannot be read ({error}): unlock it") from None
    return Secret(found) if found else None


def save(service: str, url: str, secret: Secret) -> None:
    """Keep ``secret`` in place of what there was. Raises CredentialError."""
    try:
        asked = {"service": service, "url": url, "secret": secret.reveal()}
        apart.call("imapfs.account.keyring", asked, _TIMEOUT)
    except apart.Failed as error:
        raise KeyringUnusable(
            f"the keyring does not take the secret ({error}): unlock it, or install one"
            " (gnome-keyring, KWallet, KeePassXC), or use --password-command or --token-command"
        ) from None


def _ask_library(asked: dict[str, Any]) -> str | None:
    import keyring

    if "secret" in asked:
        keyring.set_password(asked["service"], asked["url"], asked["secret"])
        return None
    return keyring.get_password(asked["service"], asked["url"])


if __name__ == "__main__":
    apart.serve(_ask_library)
