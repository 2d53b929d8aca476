"""Recognises responses by which a server asks clients to try again later, and when; pure.

RFC 5530 has response codes for some of them. Large providers use words only: Exchange Online "Request is
throttled. Suggested Backoff Time: 89117 milliseconds" and "Server Unavailable. 15", Gmail "Too many
simultaneous connections" and, with the code for a full mailbox, "Account exceeded command or bandwidth
limits", Dovecot "Maximum number of connections from user+IP exceeded".
"""

import re
from typing import Final

_LATER: Final = frozenset({"THROTTLED", "UNAVAILABLE"})
"""Codes that always mean it."""
_FINAL: Final = frozenset(
    {
        "ALREADYEXISTS", "AUTHENTICATIONFAILED", "AUTHORIZATIONFAILED", "CANNOT", "EXPIRED", "NONEXISTENT",
        "NOPERM", "TOOBIG", "TRYCREATE",
    }
)  # fmt: skip
"""Codes that rule it out, whatever the text."""
_WORDS: Final = re.compile(
    r"\bthrottl|\bback-?off time\b|\btoo many\b.{0,40}\b(?:connections|sessions|logins|requests|commands)\b"
    r"|\bconnections\b.{0,60}\bexceeded\b|\bexceeded\b.{0,40}\b(?:command|bandwidth|connection|rate)\b"
    r"|\brate.?limit|\btry again (?:later|soon|in|after)\b|\bserver (?:is )?(?:too )?(?:busy|unavailable)\b"
    r"|\bauthenticated but not connected\b",
    re.I,
)
_OF_ONE: Final = re.compile(r"\btry again (?:later|soon)\b", re.I)
"""Words that a server may also use of one mailbox or message, as it may the code UNAVAILABLE."""
_TIME: Final = re.compile(
    r"\b(?:time|in|after|for|wait)\W{0,3}(\d{1,9})\s*(milliseconds?|ms|seconds?|secs?|s|minutes?|mins?|m|"
    r"hours?|h)\b",
    re.I,
)
_UNITS: Final = {"ms": 0.001, "mi": 60.0, "m": 60.0, "s": 1.0, "h": 3600.0}
_MAX_WAIT: Final = 600.0
"""A server's longer time is cut to this, in seconds: what one response says shall not end a day's work, and a
server that means more says it again."""


def asked_wait(code: str, text: str) -> float | None:
    """Return the seconds that a NO, BAD or BYE response asks to wait before the next attempt.

    ``code`` is the response code in upper case, or "". Return 0.0 where the server names no time, and None
    where the response means something else. OK responses are not for this function, although Gmail ends some
    with [THROTTLED].
    """
    if code in _FINAL or not (code in _LATER or _WORDS.search(text)):
        return None
    named = _TIME.search(text)
    if named is None:
        return 0.0
    unit = named[2].lower()
    if unit.startswith("milli"):
        unit = "ms"
    factor = next(seconds for prefix, seconds in _UNITS.items() if unit.startswith(prefix))
    return min(_MAX_WAIT, int(named[1]) * factor)


def may_be_of_one(code: str, text: str) -> bool:
    """Return whether a response for which `asked_wait` has an answer may be about one object only.

    Yahoo answers the FETCH of some messages with ``NO [UNAVAILABLE]``, for ever, and serves all others.
    """
    return code != "THROTTLED" and not _TIME.search(text) and not _WORDS.search(_OF_ONE.sub("", text))
