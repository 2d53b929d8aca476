"""SASL mechanisms (RFC 4422), the client's side. Pure: nothing is sent or logged here.

`choose` alone decides which mechanism is used.
"""

import base64
import binascii
import hashlib
import hmac
import json
import secrets
import stringprep
import unicodedata
from collections.abc import Callable, Collection
from typing import Final, Protocol

from imapfs.errors import AuthenticationFailed, NoMechanism
from imapfs.model import AccessToken, Account, AuthMethod, Secret

MAX_ITERATIONS: Final = 2_000_000
"""Maximum number of PBKDF2 iterations that a server may demand: about a second's work, which nothing
interrupts."""


class Mechanism(Protocol):
    """One exchange: `initial` first, then a response to each challenge until the server ends it."""

    name: str
    """The name that follows ``AUTH=`` in a capability."""

    def initial(self) -> bytes:
        """Return the first message. The client speaks first in every mechanism here."""

    def respond(self, challenge: bytes) -> bytes | None:
        """Return the response to a challenge, or None to cancel. Raises AuthenticationFailed for an
        impostor."""

    def complaint(self) -> str:
        """Return the reason for a refusal that the server gave within the exchange, or ""."""

    def finish(self) -> None:
        """Complete a successful login. Raises AuthenticationFailed if the server has not proven its
        identity."""


class _Simple:
    """A mechanism of one message."""

    def __init__(self, name: str, message: bytes) -> None:
        self.name = name
        self._message = message

    def initial(self) -> bytes:
        return self._message

    def respond(self, challenge: bytes) -> bytes | None:  # noqa: ARG002 - there is no second message
        return None

    def complaint(self) -> str:
        return ""

    def finish(self) -> None:
        """Accept: in this mechanism the server proves nothing."""


def plain(user: str, password: Secret) -> Mechanism:
    """PLAIN (RFC 4616). The server prepares name and password, so they are sent as they are."""
    return _Simple("PLAIN", f"\0{user}\0{password.reveal()}".encode())


def external(user: str) -> Mechanism:
    """EXTERNAL (RFC 4422 appendix A): log in as ``user`` by the TLS client certificate."""
    return _Simple("EXTERNAL", user.encode())


class _Bearer(_Simple):
    """A mechanism of one message with an access token. The reason for a refusal is a challenge, in JSON."""

    def __init__(self, name: str, message: bytes, dummy: bytes) -> None:
        super().__init__(name, message)
        self._dummy = dummy
        self._complaint = ""

    def respond(self, challenge: bytes) -> bytes | None:
        self._complaint = _bearer_error(challenge)
        return self._dummy

    def complaint(self) -> str:
        return self._complaint


def xoauth2(user: str, token: Secret) -> Mechanism:
    """XOAUTH2, Google's and Microsoft's mechanism from before RFC 7628."""
    return _Bearer("XOAUTH2", f"user={user}\1auth=Bearer {token.reveal()}\1\1".encode(), b"")


def oauthbearer(account: Account, token: Secret) -> Mechanism:
    """OAUTHBEARER (RFC 7628 section 3.1)."""
    message = (
        f"n,a={_saslname(account.user)},\1host={account.host}\1port={account.port}\1"
        f"auth=Bearer {token.reveal()}\1\1"
    )
    return _Bearer("OAUTHBEARER", message.encode(), b"\1")


def _bearer_error(challenge: bytes) -> str:
    """Return the error that a challenge reports (RFC 7628 section 3.2.2)."""
    text = challenge.decode("utf-8", "replace")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if isinstance(found, dict):
        parts = (found.get(key) for key in ("status", "error", "error_description", "scope"))
        text = ", ".join(str(part) for part in parts if part)
    return text


class ScramSha256:
    """SCRAM-SHA-256 (RFC 5802, RFC 7677), without channel binding.

    The password is not sent, and the server proves that it knows it too. ``nonce`` is for tests.
    """

    name = "SCRAM-SHA-256"

    def __init__(self, user: str, password: Secret, nonce: str | None = None) -> None:
        self._password = saslprep(password.reveal())
        self._nonce = nonce or secrets.token_urlsafe(24)
        self._bare = f"n={_saslname(saslprep(user))},r={self._nonce}"
        self._expected: bytes | None = None
        self._verified = False
        self._complaint = ""

    def initial(self) -> bytes:
        return f"n,,{self._bare}".encode()

    def respond(self, challenge: bytes) -> bytes | None:
        if self._expected is None:
            return self._prove(challenge)
        fields = _fields(challenge)
        if "e" in fields:
            self._complaint = fields["e"]
        elif hmac.compare_digest(_decoded(fields.get("v", "")), self._expected):
            self._verified = True
        else:
            raise AuthenticationFailed("the server does not know the password, so it is not the genuine one")
        return b""

    def _prove(self, challenge: bytes) -> bytes:
        fields = _fields(challenge)
        nonce, salt, rounds = fields.get("r", ""), _decoded(fields.get("s", "")), fields.get("i", "")
        # "m" marks an extension that a client must not ignore (RFC 5802 section 5.1).
        genuine = nonce.startswith(self._nonce) and nonce != self._nonce and salt and "m" not in fields
        if not (genuine and rounds.isascii() and rounds.isdigit() and 1 <= len(rounds) <= 9 and int(rounds)):
            raise AuthenticationFailed("the server's SCRAM challenge is malformed")
        if int(rounds) > MAX_ITERATIONS:
            raise AuthenticationFailed(f"the server demands {rounds} SCRAM iterations, which is too many")
        salted = hashlib.pbkdf2_hmac("sha256", self._password.encode(), salt, int(rounds))
        key = hmac.digest(salted, b"Client Key", "sha256")
        without_proof = f"c=biws,r={nonce}"
        signed = b",".join((self._bare.encode(), challenge, without_proof.encode()))
        signature = hmac.digest(hashlib.sha256(key).digest(), signed, "sha256")
        proof = bytes(a ^ b for a, b in zip(key, signature, strict=True))
        self._expected = hmac.digest(hmac.digest(salted, b"Server Key", "sha256"), signed, "sha256")
        return f"{without_proof},p={base64.b64encode(proof).decode()}".encode()

    def complaint(self) -> str:
        return self._complaint

    def finish(self) -> None:
        if not self._verified:
            raise AuthenticationFailed(
                "the server accepted the login without proving that it knows the password"
            )


def _fields(message: bytes) -> dict[str, str]:
    found = (field.partition("=") for field in message.decode("utf-8", "replace").split(","))
    return {name: value for name, _, value in found}


def _decoded(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return b""


def _saslname(user: str) -> str:
    return user.replace("=", "=3D").replace(",", "=2C")


def saslprep(text: str) -> str:
    """Prepare ``text`` by RFC 4013 as a stored string. Raises NoMechanism, also for unassigned code
    points."""
    mapped = "".join(
        " " if stringprep.in_table_c12(char) else char for char in text if not stringprep.in_table_b1(char)
    )
    prepared = unicodedata.ucd_3_2_0.normalize("NFKC", mapped)
    forbidden = (
        stringprep.in_table_a1,
        stringprep.in_table_c12,
        stringprep.in_table_c21_c22,
        stringprep.in_table_c3,
        stringprep.in_table_c4,
        stringprep.in_table_c5,
        stringprep.in_table_c6,
        stringprep.in_table_c7,
        stringprep.in_table_c8,
        stringprep.in_table_c9,
    )
    if any(refuses(char) for char in prepared for refuses in forbidden) or not _is_bidi_sane(prepared):
        raise NoMechanism(
            "name or password contains characters that SCRAM-SHA-256 does not allow: set auth to plain"
        )
    return prepared


def _is_bidi_sane(text: str) -> bool:
    """Check RFC 3454 section 6: text with right-to-left characters starts and ends with one, and has no
    left-to-right ones."""
    if not any(stringprep.in_table_d1(char) for char in text):
        return True
    ends = stringprep.in_table_d1(text[0]) and stringprep.in_table_d1(text[-1])
    return ends and not any(stringprep.in_table_d2(char) for char in text)


# -- choosing a mechanism


def choose(account: Account, secret: Secret | None, offered: Collection[str]) -> Mechanism | None:
    """Return the strongest mechanism that both sides have, or the one that the account names.

    None stands for the LOGIN command. Without ``secret`` only EXTERNAL is possible. Raises NoMechanism if
    there is no common mechanism.
    """
    host = account.host
    for method in _candidates(account, secret):
        if method == "login":
            _check_login_command(account, secret, offered)
            return None
        if f"AUTH={method.upper()}" in offered:
            try:
                return _MAKE[method](account, secret or Secret(""))
            except NoMechanism:
                # This mechanism does not allow the name or password; PLAIN sends them as they are.
                if account.auth != "auto" or "AUTH=PLAIN" not in offered:
                    raise
    if account.auth != "auto":
        known = " ".join(sorted(c.removeprefix("AUTH=") for c in offered if c.startswith("AUTH="))) or "none"
        raise NoMechanism(
            f"{host} does not offer {account.auth.upper()}, as set by 'auth', but {known}: set auth to auto"
        )
    if secret is None:
        raise NoMechanism(
            f"{host} accepts no login by client certificate (no AUTH=EXTERNAL): give a password as well"
        )
    raise NoMechanism(
        f"{host} takes no OAuth tokens (no OAUTHBEARER, no XOAUTH2): use a password for {account.user}"
    )


def _candidates(account: Account, secret: Secret | None) -> tuple[AuthMethod, ...]:
    if account.auth != "auto":
        return (account.auth,)
    if isinstance(secret, AccessToken):
        return ("oauthbearer", "xoauth2")
    if secret is None:
        return ("external",)
    # If there is a password as well, the certificate may be meant for TLS only.
    certificate: tuple[AuthMethod, ...] = ("external",) if account.client_cert is not None else ()
    return ("scram-sha-256", "plain", *certificate, "login")


def _check_login_command(account: Account, secret: Secret | None, offered: Collection[str]) -> None:
    if "LOGINDISABLED" in offered:
        raise NoMechanism(
            f"{account.host} offers no login with a password; it may require OAuth or an app password"
        )
    if not (account.user + (secret.reveal() if secret else "")).isascii():
        raise NoMechanism(
            f"{account.host} accepts only ASCII names and passwords (no AUTH=PLAIN): change your password"
        )


_MAKE: Final[dict[AuthMethod, Callable[[Account, Secret], Mechanism]]] = {
    "plain": lambda account, secret: plain(account.user, secret),
    "scram-sha-256": lambda account, secret: ScramSha256(account.user, secret),
    "oauthbearer": oauthbearer,
    "xoauth2": lambda account, secret: xoauth2(account.user, secret),
    "external": lambda account, _: external(account.user),
}
