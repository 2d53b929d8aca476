"""OAuth 2.0 (RFC 6749): access tokens, obtained with the refresh token that `consent` put into the keyring.

oauthlib builds the requests and reads the answers. No exception contains a token or a secret.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import IO, Any, Final, TypeGuard
from urllib.parse import urlsplit

from imapfs.account import keyring
from imapfs.errors import CredentialError
from imapfs.log import shown
from imapfs.model import Account, Secret

_LIFETIME: Final = 300.0
"""Lifetime in seconds of a token for which the server states none (RFC 6749 section 5.1)."""
_RENEW_BEFORE_END: Final = 60.0
"""Seconds before its end at which a token is replaced."""

_LOCK_TIMEOUT: Final = 200.0
"""Maximum seconds to wait for another mount: longer than keyring and server together can take."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class OAuthClient:
    """A client that is registered with an authorization server, and that server's ``https://`` addresses."""

    client_id: str
    token_url: str
    scope: str
    """Space-separated."""
    authorize_url: str | None = None
    device_url: str | None = None
    client_secret: Secret | None = None
    """For servers, such as Google's, that require one even from programs that cannot keep it secret."""


PROVIDERS: Final[Mapping[str, Mapping[str, str]]] = {
    # developers.google.com/identity/protocols/oauth2/native-app. Device codes do not cover this scope.
    "google": {
        "authorize-url": "https://accounts.google.com/o/oauth2/v2/auth",
        "token-url": "https://oauth2.googleapis.com/token",
        "scope": "https://mail.google.com/",
    },
    # learn.microsoft.com/exchange/client-developer/legacy-protocols, "Authenticate an IMAP ... using OAuth".
    "microsoft": {
        "authorize-url": "https://login.microsoftonline.com/common/oauth2/v2.0/authorize",
        "token-url": "https://login.microsoftonline.com/common/oauth2/v2.0/token",
        "device-url": "https://login.microsoftonline.com/common/oauth2/v2.0/devicecode",
        "scope": "https://outlook.office.com/IMAP.AccessAsUser.All offline_access",
    },
}
"""What ``provider`` stands for in the configuration file."""


class TokenRefresher:
    """Obtains access tokens for ``account`` with the refresh token in the keyring. Called with a lock held.

    A refresh token that was refused is not sent again; only a new one in the keyring helps.
    """

    def __init__(self, client: OAuthClient, account: Account, login: str) -> None:
        self._client = client
        self._account = account
        self._login = login
        """The command that obtains a new refresh token."""
        self._latest: Secret | None = None
        """The refresh token that the server issued last, in case the keyring is not available."""
        self._replaced: Secret | None = None
        """The token that ``_latest`` replaced, as long as the keyring still holds it."""
        self._refused: Secret | None = None
        self._reason = ""

    def check(self) -> None:
        """Raise CredentialError if there was no consent yet."""
        self._refresh_token()

    def __call__(self) -> tuple[str, float]:
        """Return an access token, and for how many seconds it can be used. Raises CredentialError."""
        with _one_at_a_time(self._account):
            return self._refresh()

    def _refresh(self) -> tuple[str, float]:
        token = self._refresh_token()
        if self._refused is not None and token.reveal() == self._refused.reveal():
            raise CredentialError(self._reason)
        # Slow to import, and only accounts with OAuth need it.
        from oauthlib.oauth2 import WebApplicationClient

        from imapfs.account.post import post

        body = WebApplicationClient(self._client.client_id).prepare_refresh_body(
            refresh_token=token.reveal(), client_id=self._client.client_id, **secret_of(self._client)
        )
        try:
            answer = granted(post(self._client.token_url, body), self._client, token.reveal())
        except Denied as denied:
            if denied.error not in ("invalid_grant", "invalid_client", "unauthorized_client"):
                raise CredentialError(f"no new access token: {denied}") from None
            self._refused = token
            self._reason = f"the consent for {self._account.url} has ended: {denied}: run '{self._login}'"
            raise CredentialError(self._reason) from None
        self._keep(token, answer)
        seconds = answer.get("expires_in", _LIFETIME)
        return answer["access_token"], max(seconds - _RENEW_BEFORE_END, seconds / 2)

    def _refresh_token(self) -> Secret:
        # Read each time: another mount may have replaced it, or the person may have consented again.
        try:
            token = keyring.load(keyring.REFRESH_TOKENS, self._account.url) or self._latest
        except keyring.KeyringUnusable:
            if self._latest is None:
                raise
            token = self._latest
        if token is not None and self._replaced is not None and token.reveal() == self._replaced.reveal():
            # The new one could not be stored. Sending a replaced token looks like theft and ends the consent
            # (RFC 9700 section 4.14.2).
            assert self._latest is not None
            token = self._latest
        if token is None:
            raise CredentialError(f"the keyring has no consent for {self._account.url}: run '{self._login}'")
        return token

    def _keep(self, used: Secret, answer: Mapping[str, Any]) -> None:
        """Store the new refresh token, if the server replaced the ``used`` one (RFC 6749 section 6)."""
        newer = answer.get("refresh_token")
        self._latest = Secret(newer) if is_token(newer) else used
        if self._latest.reveal() == used.reveal() and self._replaced is None:
            return
        self._replaced = self._replaced or used
        try:
            keyring.save(keyring.REFRESH_TOKENS, self._account.url, self._latest)
            self._replaced = None
        except CredentialError as error:
            _log.warning("the next mount will need '%s': %s", self._login, error)


@contextlib.contextmanager
def _one_at_a_time(account: Account) -> Iterator[None]:
    """Keep other mounts of ``account`` from using the same refresh token meanwhile.

    The lock ends with the process that holds it. If it cannot be obtained in time, or at all, the work is
    done without it.
    """
    import platformdirs

    name = hashlib.sha256(account.url.encode()).hexdigest()[:32]
    with contextlib.ExitStack() as held:
        try:
            directory = platformdirs.user_state_path("imapfs")
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = held.enter_context((directory / f"{name}.lock").open("ab"))
            deadline = time.monotonic() + _LOCK_TIMEOUT
            while not _locked(lock) and time.monotonic() < deadline:
                time.sleep(0.1)
        except OSError as error:
            _log.debug("no lock for the refresh token: %s", error.strerror)
        yield


def _locked(file: IO[bytes]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


# ---- Answers


class Denied(Exception):
    """The authorization server's refusal (RFC 6749 section 5.2); the text may be shown to a person."""

    def __init__(self, error: str, text: str) -> None:
        super().__init__(text)
        self.error = error


def secret_of(client: OAuthClient) -> dict[str, Any]:
    """Return the client secret as a parameter of a request; empty if there is none."""
    return {"client_secret": client.client_secret.reveal()} if client.client_secret else {}


def granted(reply: bytes, client: OAuthClient, *sent: str) -> Mapping[str, Any]:
    """Return the answer of a token endpoint: "access_token" is a string, "expires_in" a sane float or absent.

    ``sent`` are the secrets in the request; they do not appear in an error. Raises Denied.
    """
    from oauthlib.oauth2 import WebApplicationClient

    found = parse_json(reply)
    # Checked here: oauthlib adds any value to the time, and would fail on one that is not a number.
    lifetime = found.pop("expires_in", None)
    try:
        parser = WebApplicationClient(client.client_id)
        answer: dict[str, Any] = dict(parser.parse_request_body_response(json.dumps(found)))
        if not isinstance(answer["access_token"], str):
            raise TypeError
    except Exception as error:
        # Besides exceptions of its own, oauthlib raises any other for JSON of an unexpected shape.
        code = getattr(error, "error", "") or ""
        message = described(found, client, *sent)
        raise Denied(code, f"{urlsplit(client.token_url).netloc} says {message}") from None
    # Some servers send the number as a string.
    if re.fullmatch(r"\d{1,9}(\.\d*)?", str(lifetime)[:20], re.ASCII) and float(lifetime) > 0:
        answer["expires_in"] = float(lifetime)
    return answer


def is_token(value: object) -> TypeGuard[str]:
    """Return whether ``value`` has the syntax of a token (RFC 6749 appendices A.12 and A.17)."""
    return isinstance(value, str) and value.isascii() and value.isprintable() and value != ""


def parse_json(reply: bytes) -> dict[str, Any]:
    """Return the JSON object in ``reply``, or an empty one if it holds anything else."""
    try:
        found = json.loads(reply)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def described(answer: Mapping[str, Any], client: OAuthClient, *sent: str) -> str:
    """Return the error in an answer on one short line, without the secrets that were ``sent``."""
    parts = (answer.get("error"), answer.get("error_description"))
    text = ": ".join(part for part in parts if isinstance(part, str) and part)
    text = shown(text, [*secret_of(client).values(), *sent], "(its answer repeats a secret and is not shown)")
    return text or "something that is not OAuth 2.0"
