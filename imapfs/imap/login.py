"""Logging in on a protected connection, and telling a refusal from a temporary failure.

Errors never repeat what was sent here, even if the server's words do.
"""

import base64
import contextlib
from collections.abc import Iterable, Iterator
from typing import Final

from imapfs.errors import AuthenticationFailed, ConnectionLost, ProtocolError, ServerBusy
from imapfs.imap import refusals, sasl
from imapfs.imap.grammar import Completion
from imapfs.imap.throttle import asked_wait
from imapfs.imap.wire import Wire, astring
from imapfs.log import shown
from imapfs.model import AccessToken, Account, Secret

_HIDDEN: Final = "(its answer repeats the password and is not shown)"


def log_in(wire: Wire, account: Account, secret: Secret | None) -> None:
    """Log in by the strongest method that client and server share; ``wire`` then knows the new capabilities.

    Without ``secret`` the TLS client certificate alone is used. After a PREAUTH greeting there is nothing to
    do. Raises AuthenticationFailed or ConnectionLost, after which the wire is useless.
    """
    if wire.preauthenticated:
        wire.lift_login_limits()
        return
    host, user = account.host, account.user
    mechanism = sasl.choose(account, secret, wire.capabilities)
    sent = list(_forms(secret))
    completion, complaint = _authenticate(wire, account, secret, mechanism, sent)
    words = " ".join(dict.fromkeys(filter(None, (completion.text or completion.status, complaint))))
    if isinstance(mechanism, sasl.ScramSha256) and "AUTH=PLAIN" in wire.capabilities:
        # A server may offer SCRAM to all users, but have the data for it only for some.
        words += " (by SCRAM-SHA-256: if the password is right, try --auth plain)"
    # All words are used to find the remedy, which is our own text; what is shown is filtered below.
    refusal = refusals.explain(host, completion.code, words, of_token=isinstance(secret, AccessToken))
    if completion.code:
        words = f"[{completion.code}] {words}"
    words = _shown(words, sent)
    if completion.status != "OK":
        if refusal.transient:
            wait = asked_wait(completion.code, completion.text) or 0.0
            raise ServerBusy(
                f"{host} accepts no login of {user} at present: {words}", wait, remedy=refusal.remedy
            )
        if completion.status == "BAD":
            # The server has not judged the credentials.
            raise ConnectionLost(f"{host} does not understand the login of {user}: {words}")
        raise AuthenticationFailed(
            f"{host} refused the {_kind(secret)} of {user}: {words}", remedy=refusal.remedy
        )
    if mechanism is not None:
        mechanism.finish()
    if isinstance(secret, AccessToken):
        secret.accepted = True
    wire.lift_login_limits()


def _authenticate(
    wire: Wire, account: Account, secret: Secret | None, mechanism: sasl.Mechanism | None, sent: list[bytes]
) -> tuple[Completion, str]:
    """Return the completion, and the server's complaint before it; add to ``sent`` what must not be shown."""
    with _errors_without_secrets(account.host, sent):
        if mechanism is not None:
            return wire.authenticate(mechanism, sent), mechanism.complaint()
        assert secret is not None
        return wire.login(astring(account.user.encode()), astring(secret.reveal().encode())), ""


@contextlib.contextmanager
def _errors_without_secrets(host: str, sent: list[bytes]) -> Iterator[None]:
    try:
        yield
    except ProtocolError:
        # The server's line is not shown: it may repeat part of the command, with the password.
        raise ProtocolError(f"{host} answered the login with something that is not IMAP") from None
    except ConnectionLost as error:
        words = str(error)
        if _shown(words, sent) != words:
            raise ConnectionLost(_shown(words, sent, f"{host} closed the connection: {_HIDDEN}")) from None
        raise


def _kind(secret: Secret | None) -> str:
    if secret is None:
        return "client certificate"
    return "access token" if isinstance(secret, AccessToken) else "password"


def _forms(secret: Secret | None) -> Iterable[bytes]:
    """Yield the forms in which a server may repeat a secret."""
    if secret is not None:
        text = secret.reveal()
        yield text.encode()
        yield text.replace("\\", "\\\\").replace('"', '\\"').encode()
        yield base64.b64encode(text.encode())


def _shown(words: str, sent: Iterable[bytes], instead: str = _HIDDEN) -> str:
    return shown(words, [form.decode("utf-8", "replace") for form in sent], instead)
