"""A small authorisation server (RFC 6749) on the loopback interface: consents to everything at once."""

import base64
import hashlib
import itertools
import json
import ssl
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from urllib.parse import parse_qs, urlencode, urlsplit

from tests.support.servers.tls import CertificateAuthority

Answer = tuple[int, dict[str, object]]


class TokenServer:
    """Running while the ``with`` block lasts, at ``url``; what looks at tokens asks at ``introspection``.

    Access tokens are for the user ``user`` and end after ``lifetime`` seconds, as far as clients are told.
    Each refresh token can be used once, and comes with its successor. ``refusal``, if set, answers all who
    want a token. A device code is entered upon the ``pending``-th poll after the first,
    of which the first ``failing`` ones get no answer.
    """

    def __init__(self, authority: CertificateAuthority, user: str, *, lifetime: int = 3600) -> None:
        self._authority = authority
        self.user = user
        self.lifetime = lifetime
        self.pending = 0
        self.failing = 0
        self.refusal: Answer | bytes | None = None
        self.requests: list[dict[str, str]] = []
        """Parameters of what was posted to the token endpoint."""
        self.access_tokens: list[str] = []
        """Those that are valid, the newest last."""
        self.refresh_token = ""
        """The one that is valid."""
        self._numbers = itertools.count(1)
        self._challenges: dict[str, tuple[str, str]] = {}

    def __enter__(self) -> "TokenServer":
        self._tls = self._serve()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*self._authority.issue())
        self._tls.socket = context.wrap_socket(self._tls.socket, server_side=True)
        self._plain = self._serve()
        self.url = f"https://localhost:{self._tls.server_port}"
        self.introspection = f"http://127.0.0.1:{self._plain.server_port}/introspect"
        self._threads = [threading.Thread(target=s.serve_forever, args=(0.05,)) for s in self._servers]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()
        for thread in self._threads:
            thread.join()

    @property
    def _servers(self) -> tuple[ThreadingHTTPServer, ...]:
        return self._tls, self._plain

    def _serve(self) -> ThreadingHTTPServer:
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(302)
                self.send_header("Location", owner.authorize(_parameters(urlsplit(self.path).query)))
                self.end_headers()

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"])).decode()
                answer = owner.answer(urlsplit(self.path).path, _parameters(body))
                status, reply = (200, answer) if isinstance(answer, bytes) else _encoded(answer)
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(reply)))
                self.end_headers()
                self.wfile.write(reply)

            def log_message(self, *_: object) -> None:
                """Quiet."""

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request: object, client_address: object) -> None:
                """A client that went away."""

        return Server(("127.0.0.1", 0), Handler)

    def end_tokens(self) -> None:
        """Let every access token end before its time."""
        self.access_tokens.clear()

    def revoke(self) -> None:
        """Let the person take the consent back."""
        self.end_tokens()
        self.refresh_token = ""

    def authorize(self, asked: dict[str, str]) -> str:
        """Return where to send the browser (RFC 6749 section 4.1.2)."""
        code = f"code-{next(self._numbers)}"
        self._challenges[code] = asked["code_challenge"], asked["redirect_uri"]
        assert asked["code_challenge_method"] == "S256"
        return f"{asked['redirect_uri']}?{urlencode({'code': code, 'state': asked['state']})}"

    def answer(self, path: str, asked: dict[str, str]) -> Answer | bytes:
        """Answer what was posted."""
        if path == "/introspect":
            active = asked["token"] in self.access_tokens
            return 200, {"active": active, **({"username": self.user} if active else {})}
        if path == "/device":
            return 200, {
                "device_code": "device-1",
                "user_code": "ABCD\x1b[2J-EFGH",
                "verification_uri": "https://example.org/device",
                "expires_in": 60,
                "interval": 1,
            }
        self.requests.append(asked)
        if self.refusal is not None:
            return self.refusal
        match asked["grant_type"]:
            case "authorization_code":
                challenge, redirect = self._challenges.pop(asked["code"])
                digest = hashlib.sha256(asked["code_verifier"].encode()).digest()
                proven = base64.urlsafe_b64encode(digest).decode().rstrip("=") == challenge
                good = proven and redirect == asked["redirect_uri"]
            case "refresh_token":
                good = asked["refresh_token"] == self.refresh_token
            case _:
                good = asked["device_code"] == "device-1"
                if self.failing:
                    self.failing -= 1
                    return 503, {}
                if self.pending:
                    self.pending -= 1
                    return 400, {"error": "authorization_pending"}
        if not good:
            return 400, {"error": "invalid_grant", "error_description": "Token has been expired or revoked."}
        self.refresh_token = f"refresh-{next(self._numbers)}"
        self.access_tokens.append(f"access-{next(self._numbers)}")
        return 200, {
            "access_token": self.access_tokens[-1],
            "token_type": "Bearer",
            "expires_in": self.lifetime,
            "refresh_token": self.refresh_token,
        }


def _parameters(query: str) -> dict[str, str]:
    return {key: values[0] for key, values in parse_qs(query).items()}


def _encoded(answer: Answer) -> tuple[int, bytes]:
    return answer[0], json.dumps(answer[1]).encode()
