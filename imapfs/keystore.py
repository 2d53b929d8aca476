"""What the person's keyring (the Secret Service, and what else the keyring library knows) keeps for us."""

import logging

from imapfs.errors import CredentialError
from imapfs.model import Secret

PASSWORDS = "imapfs"
"""The service, in the keyring's terms, under which passwords are; the user is the account's URL."""
REFRESH_TOKENS = "imapfs refresh token"
"""The same for OAuth 2.0, so that neither is taken for the other."""

_log = logging.getLogger(__name__)


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
    """What is kept for the account; None also where there is no keyring, or it is locked."""
    try:
        import keyring

        found = keyring.get_password(service, url)
    except Exception as error:
        # No backend, no D-Bus, a locked collection ... each backend has exceptions of its own.
        _log.debug("keyring not usable: %s: %s", type(error).__name__, error)
        return None
    return Secret(found) if found else None


def save(service: str, url: str, secret: Secret) -> None:
    """Keep ``secret`` in place of what there was. Raises CredentialError."""
    try:
        import keyring

        keyring.set_password(service, url, secret.reveal())
    except Exception as error:
        # An exception of a backend may hold what it was given.
        raise CredentialError(
            f"the keyring does not take the secret ({type(error).__name__}): unlock it, or install one"
            " (gnome-keyring, KWallet, KeePassXC), or use --password-command or --token-command"
        ) from None
