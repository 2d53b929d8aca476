"""A person's consent to the use of an account by OAuth 2.0 (RFC 6749); its fruit goes into the keyring.

The client id is the person's own. Two ways: a browser on this machine, whose answer comes back to a port on
the loopback interface (RFC 8252) and is of use to nobody else (PKCE, RFC 7636); or a code that is typed into
a browser anywhere (RFC 8628).
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

from imapfs.account import keyring as keystore
from imapfs.account.oauth import Denied, OAuthClient, described, granted, is_token, parse_json, secret_of
from imapfs.account.post import post
from imapfs.errors import CredentialError
from imapfs.model import AccessToken, Account, Secret

TIMEOUT: Final = 600.0
"""Seconds that a person has."""
_FAILURES: Final = 4
"""In a row, of the network while it is asked whether the code was entered, that are passed over."""
_LINE: Final = 1000
"""Most characters of a line that are shown, of those from a server."""
_MICROSOFT: Final = "login.microsoftonline.com"


def ask(
    client: OAuthClient,
    account: Account,
    say: Callable[[str], None],
    *,
    device: bool,
    check: Callable[[AccessToken], None],
) -> None:
    """Have the person consent, and put the refresh token into the keyring. Raises CredentialError.

    ``say`` shows a line. ``device`` is for a code; otherwise it is a browser here, if the server has that.
    ``check`` gets the first access token; what it raises leaves the keyring as it was.
    """
    if device and client.device_url is None:
        raise CredentialError("this provider has no login by device code: leave out --device")
    if device or client.authorize_url is None:
        answer = _by_device(client, say)
    else:
        answer = _by_browser(client, account, client.authorize_url, say)
    token = answer.get("refresh_token")
    if not is_token(token):
        raise CredentialError(
            f"{urlsplit(client.token_url).netloc} gave no refresh token: try offline_access in 'scope'"
        )
    if not is_token(answer["access_token"]):
        raise CredentialError(f"{urlsplit(client.token_url).netloc} gave what is no access token")
    check(AccessToken(answer["access_token"]))
    keystore.save(keystore.REFRESH_TOKENS, account.url, Secret(token))


# ---- By browser


def _by_browser(
    client: OAuthClient, account: Account, authorize_url: str, say: Callable[[str], None]
) -> Mapping[str, Any]:
    from oauthlib.oauth2 import WebApplicationClient

    web = WebApplicationClient(client.client_id)
    state = secrets.token_urlsafe(24)
    verifier = web.create_code_verifier(64)
    with _Redirect(state, authorize_url) as redirect:
        address = web.prepare_request_uri(
            authorize_url,
            redirect_uri=redirect.uri,
            scope=client.scope,
            state=state,
            code_challenge=web.create_code_challenge(verifier, "S256"),
            code_challenge_method="S256",
            # For those who know these; others pass over them (RFC 6749 section 3.1).
            login_hint=account.user,
            access_type="offline",
        )
        say(f"Open this address in a browser on this machine, if it does not open by itself:\n{address}")
        # Some browsers return only when they are closed, after the answer that is waited for here.
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

    # The address was shown as well.
    with contextlib.suppress(webbrowser.Error, OSError):
        webbrowser.open(address)


class _Redirect(socketserver.ThreadingTCPServer):
    """Waits on the loopback interface for the browser to come back from the authorisation server.

    Each connection has a thread: browsers open some that they do not use, and so may others.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(self, state: str, authorize_url: str) -> None:
        super().__init__(("127.0.0.1", 0), _Returning)
        self.state = state
        self._answer: dict[str, str] = {}
        self._came = threading.Event()
        # Microsoft knows only the name, with any port; it may lead elsewhere (RFC 8252 section 8.3).
        host = "localhost" if urlsplit(authorize_url).hostname == _MICROSOFT else "127.0.0.1"
        self.uri = f"http://{host}:{self.server_address[1]}/"

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, args=(0.1,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def take(self, answer: dict[str, str]) -> None:
        """Called by any thread; the first answer counts."""
        if not self._came.is_set():
            self._answer = answer
            self._came.set()

    def wait(self) -> dict[str, str]:
        if not self._came.wait(TIMEOUT):
            raise CredentialError("nobody came back from the browser in time: run it again")
        return self._answer

    def handle_error(self, request: object, client_address: object) -> None:
        """Whatever else connects to this port is not our business."""


class _Returning(BaseHTTPRequestHandler):
    timeout = 5
    server: _Redirect

    def do_GET(self) -> None:
        query = {key: values[0] for key, values in parse_qs(urlsplit(self.path).query).items()}
        # Only who was sent by us knows the state; any page can make a browser come here.
        genuine = secrets.compare_digest(query.get("state", "").encode(), self.server.state.encode())
        if genuine:
            self.server.take(query)
        text = (
            b"Back to the terminal: this window can be closed.\n" if genuine else b"Not what was expected.\n"
        )
        self.send_response(200 if genuine else 400)
        self.send_header("Content-Type", "text/plain; charset=utf-8")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: object) -> None:
        """Not on the terminal: the request has the code in it."""


# ---- By code


def _by_device(client: OAuthClient, say: Callable[[str], None]) -> Mapping[str, Any]:
    from oauthlib.oauth2 import DeviceClient

    assert client.device_url is not None
    body = urlencode({"client_id": client.client_id, "scope": client.scope})
    answer = parse_json(post(client.device_url, body))
    try:
        code, shown = str(answer["device_code"]), str(answer["user_code"])
        # Some spell it with "url", as it was in a draft.
        address = str(answer.get("verification_uri") or answer["verification_url"])
        interval = max(1.0, float(answer.get("interval", 5)))
        deadline = time.monotonic() + min(TIMEOUT, float(answer.get("expires_in", TIMEOUT)))
    except (KeyError, ValueError, TypeError, OverflowError):
        why = described(answer, client)
        raise CredentialError(f"{urlsplit(client.device_url).netloc} gave no device code: {why}") from None
    line = f"Open {address} in any browser and enter the code {shown}"
    # What steers the terminal is left out.
    say("".join(char for char in line[:_LINE] if char.isprintable()))
    device = DeviceClient(client.client_id)
    body = device.prepare_request_body(code, include_client_id=True, **secret_of(client))
    failures = 0
    while time.monotonic() + interval < deadline:
        time.sleep(interval)
        try:
            reply = post(client.token_url, body)
        except CredentialError:
            # A network may be away for a moment (RFC 8628 section 3.5).
            failures += 1
            interval *= 2
            if failures > _FAILURES:
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
