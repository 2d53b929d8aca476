"""Proving who we are, on a connection that is open and safe; and telling a refusal from a server's bad day.

Nothing that was sent here is ever repeated in an error: a server may echo it.
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
    """Authenticate by the strongest way that both sides have, and learn the capabilities that there are then.

    ``secret`` None is for the client certificate alone. A connection that greeted with PREAUTH is logged in
    already. Raises AuthenticationFailed, ConnectionLost; the wire is of no further use then.
    """
    if wire.preauthenticated:
        wire.lift_login_limits()
        return
    host, user = account.host, account.user
    mechanism = sasl.choose(account, secret, wire.capabilities)
    sent = list(_forms(secret))
    completion, complaint = _offer(wire, account, secret, mechanism, sent)
    words = " ".join(dict.fromkeys(filter(None, (completion.text or completion.status, complaint))))
    if isinstance(mechanism, sasl.ScramSha256) and "AUTH=PLAIN" in wire.capabilities:
        # A server may offer it for all and have what it takes for some.
        words += " (by SCRAM-SHA-256: if the password is right, try --auth plain)"
    # Looked up in full: the remedy is of our own words.
    refusal = refusals.explain(host, completion.code, words, of_token=isinstance(secret, AccessToken))
    if completion.code:
        words = f"[{completion.code}] {words}"
    words = _shown(words, sent)
    if completion.status != "OK":
        if refusal.transient:
            wait = asked_wait(completion.code, completion.text) or 0.0
            raise ServerBusy(f"{host} does not let {user} in now: {words}", wait, remedy=refusal.remedy)
        if completion.status == "BAD":
            # The credentials were not looked at.
            raise ConnectionLost(f"{host} does not understand the login of {user}: {words}")
        raise AuthenticationFailed(
            f"{host} refused the {_what(secret)} of {user}: {words}", remedy=refusal.remedy
        )
    if mechanism is not None:
        mechanism.finish()
    if isinstance(secret, AccessToken):
        secret.accepted = True
    wire.lift_login_limits()


def _offer(
    wire: Wire, account: Account, secret: Secret | None, mechanism: sasl.Mechanism | None, sent: list[bytes]
) -> tuple[Completion, str]:
    """The answer to the login, and what the server said before of it; ``sent`` gets what may not be shown."""
    with _nothing_shown(account.host, sent):
        if mechanism is not None:
            return wire.authenticate(mechanism, sent), mechanism.complaint()
        assert secret is not None
        return wire.login(astring(account.user.encode()), astring(secret.reveal().encode())), ""


@contextlib.contextmanager
def _nothing_shown(host: str, sent: list[bytes]) -> Iterator[None]:
    try:
        yield
    except ProtocolError:
        # What it sent is not shown: it may be a part of the command, with the password.
        raise ProtocolError(f"{host} answered the login with what is not IMAP") from None
    except ConnectionLost as error:
        words = str(error)
        if _shown(words, sent) != words:
            raise ConnectionLost(_shown(words, sent, f"{host} closed the connection: {_HIDDEN}")) from None
        raise


def _what(secret: Secret | None) -> str:
    if secret is None:
        return "client certificate"
    return "access token" if isinstance(secret, AccessToken) else "password"


def _forms(secret: Secret | None) -> Iterable[bytes]:
    """The forms in which a server may repeat a secret."""
    if secret is not None:
        text = secret.reveal()
        yield text.encode()
        yield text.replace("\\", "\\\\").replace('"', '\\"').encode()
        yield base64.b64encode(text.encode())


def _shown(words: str, sent: Iterable[bytes], instead: str = _HIDDEN) -> str:
    return shown(words, [form.decode("utf-8", "replace") for form in sent], instead)
