"""A person's consent to the use of an account with OAuth 2.0 (RFC 6749); the result goes into the keyring.

The client id is the person's own. There are two ways: a browser on this machine, whose answer returns to a
port on the loopback interface (RFC 8252) and is useless to anybody else (PKCE, RFC 7636); or a device code,
which is entered in a browser on any machine (RFC 8628).
"""

import contextlib
import secrets
import socketserver
import threading
import time
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler
from typing import Any, Final, Self
from urllib.parse import parse_qs, urlencode, urlsplit

from imapfs.account import keyring
from imapfs.account.oauth import Denied, OAuthClient, described, granted, is_token, parse_json, secret_of
from imapfs.account.post import post
from imapfs.errors import CredentialError
from imapfs.model import AccessToken, Account, Secret

TIMEOUT: Final = 600.0
"""Seconds that a person has for consenting."""
_MAX_FAILURES: Final = 4
"""Network failures in a row that are tolerated while waiting for the device code to be entered."""
_MAX_LINE: Final = 1000
"""Maximum number of characters that are shown of a line with text from a server."""
_MICROSOFT: Final = "login.microsoftonline.com"


def ask(
    client: OAuthClient,
    account: Account,
    say: Callable[[str], None],
    *,
    device: bool,
    check: Callable[[AccessToken], None],
) -> None:
    """Have the person consent, and store the refresh token in the keyring. Raises CredentialError.

    ``say`` shows a line to the person. ``device`` asks for a device code; otherwise a browser on this machine
    is used if the provider supports that. ``check`` is called with the first access token; if it raises, the
    keyring stays as it was.
    """
    if device and client.device_url is None:
        raise CredentialError("this provider does not support device codes: leave out --device")
    if device or client.authorize_url is None:
        answer = _by_device(client, say)
    else:
        answer = _by_browser(client, account, client.authorize_url, say)
    provider = urlsplit(client.token_url).netloc
    token = answer.get("refresh_token")
    if not is_token(token):
        raise CredentialError(f"{provider} issued no refresh token: try offline_access in 'scope'")
    if not is_token(answer["access_token"]):
        raise CredentialError(f"{provider} issued an invalid access token: check the addresses in 'oauth'")
    check(AccessToken(answer["access_token"]))
    keyring.save(keyring.REFRESH_TOKENS, account.url, Secret(token))


# ---- With a browser


def _by_browser(
    client: OAuthClient, account: Account, authorize_url: str, say: Callable[[str], None]
) -> Mapping[str, Any]:
    from oauthlib.oauth2 import WebApplicationClient

    web = WebApplicationClient(client.client_id)
    state = secrets.token_urlsafe(24)
    verifier = web.create_code_verifier(64)
    with _RedirectServer(state, authorize_url) as redirect:
        address = web.prepare_request_uri(
            authorize_url,
            redirect_uri=redirect.uri,
            scope=client.scope,
            state=state,
            code_challenge=web.create_code_challenge(verifier, "S256"),
            code_challenge_method="S256",
            # Servers that do not know these ignore them (RFC 6749 section 3.1).
            login_hint=account.user,
            access_type="offline",
        )
        say(f"Open this address in a browser on this machine, if it does not open automatically:\n{address}")
        # Some browsers do not return before they are closed, long after the answer has arrived here.
        threading.Thread(target=_open, args=(address,), daemon=True).start()
        answer = redirect.wait()
    if "code" not in answer:
        raise CredentialError(
            f"no consent: {described(answer, client)}: run it again, or use another client id"
        )
    body = web.prepare_request_body(
        code=answer["code"], redirect_uri=redirect.uri, code_verifier=verifier, **secret_of(client)
    )
    return _final(post(client.token_url, body), client, answer["code"], verifier)


def _open(address: str) -> None:
    import webbrowser

    # The person can still open the address, which was shown.
    with contextlib.suppress(webbrowser.Error, OSError):
        webbrowser.open(address)


class _RedirectServer(socketserver.ThreadingTCPServer):
    """Waits on the loopback interface for the browser to return from the authorization server.

    Each connection has its own thread: browsers open connections that they do not use, and so may others.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(self, state: str, authorize_url: str) -> None:
        super().__init__(("127.0.0.1", 0), _RedirectHandler)
        self.state = state
        self._answer: dict[str, str] = {}
        self._answered = threading.Event()
        # Microsoft accepts any port for this name only, which may not resolve to 127.0.0.1
        # (RFC 8252 section 8.3).
        host = "localhost" if urlsplit(authorize_url).hostname == _MICROSOFT else "127.0.0.1"
        self.uri = f"http://{host}:{self.server_address[1]}/"

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, args=(0.1,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def take(self, answer: dict[str, str]) -> None:
        """Keep the first answer. May be called from any thread."""
        if not self._answered.is_set():
            self._answer = answer
            self._answered.set()

    def wait(self) -> dict[str, str]:
        """Return the first answer. Raises CredentialError if there is none in time."""
        if not self._answered.wait(TIMEOUT):
            raise CredentialError("the browser did not return in time: run it again")
        return self._answer

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignore the failures of other programs that connect to the port."""


class _RedirectHandler(BaseHTTPRequestHandler):
    timeout = 5
    server: _RedirectServer

    def do_GET(self) -> None:
        query = {key: values[0] for key, values in parse_qs(urlsplit(self.path).query).items()}
        # Any web page can send a browser here, but it does not know the state.
        genuine = secrets.compare_digest(query.get("state", "").encode(), self.server.state.encode())
        if genuine:
            self.server.take(query)
        text = (
            b"Done: you can close this window and return to the terminal.\n"
            if genuine
            else b"Unexpected request.\n"
        )
        self.send_response(200 if genuine else 400)
        self.send_header("Content-Type", "text/plain; charset=utf-8")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: object) -> None:
        """Log nothing: the request contains the code."""


# ---- With a device code


def _by_device(client: OAuthClient, say: Callable[[str], None]) -> Mapping[str, Any]:
    from oauthlib.oauth2 import DeviceClient

    assert client.device_url is not None
    body = urlencode({"client_id": client.client_id, "scope": client.scope})
    answer = parse_json(post(client.device_url, body))
    try:
        code, shown = str(answer["device_code"]), str(answer["user_code"])
        # Some servers use the name "verification_url" of an earlier draft.
        address = str(answer.get("verification_uri") or answer["verification_url"])
        interval = max(1.0, float(answer.get("interval", 5)))
        deadline = time.monotonic() + min(TIMEOUT, float(answer.get("expires_in", TIMEOUT)))
    except (KeyError, ValueError, TypeError, OverflowError):
        reason = described(answer, client)
        raise CredentialError(
            f"{urlsplit(client.device_url).netloc} issued no device code: it says {reason}"
        ) from None
    line = f"Open {address} in any browser and enter the code {shown}"
    # Without what could control the terminal.
    say("".join(char for char in line[:_MAX_LINE] if char.isprintable()))
    device = DeviceClient(client.client_id)
    body = device.prepare_request_body(code, include_client_id=True, **secret_of(client))
    failures = 0
    while time.monotonic() + interval < deadline:
        time.sleep(interval)
        try:
            reply = post(client.token_url, body)
        except CredentialError:
            # The network may be down for a moment (RFC 8628 section 3.5).
            failures += 1
            interval *= 2
            if failures > _MAX_FAILURES:
                raise
            continue
        failures = 0
        match parse_json(reply).get("error"):
            case "authorization_pending":
                continue
            case "slow_down":
                interval += 5
            case _:
                return _final(reply, client, code)
    raise CredentialError("the code was not entered in time: run it again")


def _final(reply: bytes, client: OAuthClient, *sent: str) -> Mapping[str, Any]:
    try:
        return granted(reply, client, *sent)
    except Denied as denied:
        raise CredentialError(f"no consent: {denied}") from None
