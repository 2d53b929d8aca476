"""One HTTPS POST of a form to an address from the configuration: limited in time and size, never redirected.

`discovery` has another HTTP client, for a reason. It GETs public files from hosts that are only guesses,
follows redirections to other hosts, connects as its caller says, and is left behind in a daemon thread when
it is late. Here the form holds secrets. It goes only to the configured address, through the proxy that the
environment names, if any. When the time is up, nothing may remain: a thread that is left behind could still
use the refresh token while another mount does, and a mount must not fork beside it. The standard library
limits each wait for the server, but not their number, so the POST runs in a helper process.
"""

import base64
import contextlib
import http.client
import ssl
import time
import urllib.error
import urllib.request
from typing import Any, Final, NoReturn
from urllib.parse import urlsplit

from imapfs.account import helper
from imapfs.errors import CredentialError

_TIMEOUT: Final = 30.0
"""Maximum seconds of silence from the server, and maximum seconds for the body of its answer."""
_LIMIT: Final = 40.0
"""Maximum seconds for everything."""
_MAX_ANSWER: Final = 1 << 20
"""Maximum size of an answer in bytes."""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Refuses redirections: the form is meant for the configured address only."""

    def redirect_request(self, *_: object, **__: object) -> None:
        return None


def post(url: str, body: str) -> bytes:
    """POST a form and return the body of the answer, whether it reports success or an error.

    Raises CredentialError.
    """
    try:
        answer = helper.call("imapfs.account.post", {"url": url, "body": body}, _LIMIT)
    except helper.Failed as error:
        _refuse(url, str(error))
    return base64.b64decode(answer)


def _post(request: dict[str, str]) -> str:
    return base64.b64encode(_answer(request["url"], request["body"])).decode()


def _answer(url: str, body: str) -> bytes:
    opener = urllib.request.build_opener(
        urllib.request.HTTPSHandler(context=ssl.create_default_context()), _NoRedirects
    )
    headers = {"Content-Type": "application/x-www-form-urlencoded", "Accept": "application/json"}
    request = urllib.request.Request(url, body.encode(), headers)  # noqa: S310 - `settings` permits https only
    deadline = time.monotonic() + _TIMEOUT
    try:
        with opener.open(request, timeout=_TIMEOUT) as response:
            return _read(response, deadline)
    except urllib.error.HTTPError as error:
        with error, contextlib.suppress(OSError, http.client.HTTPException):
            if error.code < 500 and (reply := _read(error, deadline)):
                return reply
        raise CredentialError(
            f"{urlsplit(url).netloc} answered with HTTP status {error.code}: try again later"
        ) from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "reason", error)
        words = getattr(reason, "verify_message", None) or getattr(reason, "strerror", None) or str(reason)
        _refuse(url, words)


def _read(response: Any, deadline: float) -> bytes:
    """Return the body of a response, or of an HTTPError, which is a response too. Raises TimeoutError."""
    pieces: list[bytes] = []
    while piece := response.read1(65536):
        pieces.append(piece)
        if sum(map(len, pieces)) >= _MAX_ANSWER or time.monotonic() > deadline:
            raise TimeoutError("the answer does not end")
    return b"".join(pieces)


def _refuse(url: str, reason: str) -> NoReturn:
    raise CredentialError(
        f"{urlsplit(url).netloc}, which issues the tokens, cannot be reached: {reason}: check the network"
    ) from None


if __name__ == "__main__":
    helper.serve(_post)
