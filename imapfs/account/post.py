"""One POST of a form over TLS to an address that a person configured: bounded, verified, never redirected.

It is made in a process of its own (`helper`): the standard library bounds each wait for the server, but
not how often a server makes it wait.
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

from imapfs.account import helper as apart
from imapfs.errors import CredentialError

_TIMEOUT: Final = 30.0
"""Seconds that the server may be silent, and that the body of its answer may take."""
_LIMIT: Final = 40.0
"""Seconds that all may take."""
_LONGEST: Final = 1 << 20
"""Most bytes of an answer."""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """What is posted is for the one address that was configured."""

    def redirect_request(self, *_: object, **__: object) -> None:
        return None


def post(url: str, body: str) -> bytes:
    """POST a form and return the answer, of success or not. Raises CredentialError."""
    try:
        return base64.b64decode(apart.call("imapfs.account.post", {"url": url, "body": body}, _LIMIT))
    except apart.Failed as error:
        _refuse(url, str(error))


def _post(asked: dict[str, str]) -> str:
    return base64.b64encode(_answer(asked["url"], asked["body"])).decode()


def _answer(url: str, body: str) -> bytes:
    opener = urllib.request.build_opener(
        urllib.request.HTTPSHandler(context=ssl.create_default_context()), _NoRedirects
    )
    headers = {"Content-Type": "application/x-www-form-urlencoded", "Accept": "application/json"}
    request = urllib.request.Request(url, body.encode(), headers)  # noqa: S310 - the configuration takes https only
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
    """The body of a response, or of an HTTPError, which is one too."""
    pieces: list[bytes] = []
    while piece := response.read1(65536):
        pieces.append(piece)
        if sum(map(len, pieces)) >= _LONGEST or time.monotonic() > deadline:
            raise TimeoutError("the answer does not end")
    return b"".join(pieces)


def _refuse(url: str, words: str) -> NoReturn:
    raise CredentialError(
        f"{urlsplit(url).netloc}, which gives the tokens, cannot be asked: {words}: check the network"
    ) from None


if __name__ == "__main__":
    apart.serve(_post)
