"""Secrets in the person's keyring: the Secret Service, or whatever else the keyring library supports.

The library runs in a helper process (`imapfs.account.helper`).
"""

import logging
from typing import Any

from imapfs.account import helper
from imapfs.errors import CredentialError
from imapfs.model import Secret

PASSWORDS = "imapfs"
"""The service name, as keyrings call it, of passwords; the user name is the account's URL."""
REFRESH_TOKENS = "imapfs refresh token"
"""The service name of OAuth 2.0 refresh tokens; a different one, so that neither is mistaken for the
other."""

_TIMEOUT = 60.0
"""Seconds in which a person can unlock the keyring."""

_log = logging.getLogger(__name__)


class KeyringUnusable(CredentialError):
    """The keyring does not exist, is locked, or does not answer."""


def works() -> bool:
    """Return whether there is a keyring that can store something; it may still be locked."""
    try:
        import keyring

        # The backends that stand for "no keyring" have priority 0 or less.
        return keyring.get_keyring().priority > 0
    except Exception as error:
        _log.debug("keyring not usable: %s: %s", type(error).__name__, error)
        return False


def load(service: str, url: str) -> Secret | None:
    """Return the secret of the account, or None if the keyring has none. Raises KeyringUnusable."""
    try:
        found = helper.call("imapfs.account.keyring", {"service": service, "url": url}, _TIMEOUT)
    except helper.Failed as error:
        # No backend, no D-Bus, a locked collection ... each backend has exceptions of its own.
        raise KeyringUnusable(f"the keyring cannot be read ({error}): unlock it") from None
    return Secret(found) if found else None


def save(service: str, url: str, secret: Secret) -> None:
    """Store ``secret`` for the account, replacing any other. Raises CredentialError."""
    request = {"service": service, "url": url, "secret": secret.reveal()}
    try:
        helper.call("imapfs.account.keyring", request, _TIMEOUT)
    except helper.Failed as error:
        raise KeyringUnusable(
            f"the keyring does not take the secret ({error}): unlock it, or install one"
            " (gnome-keyring, KWallet, KeePassXC), or use --password-command or --token-command"
        ) from None


def _ask_library(request: dict[str, Any]) -> str | None:
    import keyring

    if "secret" in request:
        keyring.set_password(request["service"], request["url"], request["secret"])
        return None
    return keyring.get_password(request["service"], request["url"])


if __name__ == "__main__":
    helper.serve(_ask_library)
