"""Which answers of a server mean "later", and how much later; pure.

RFC 5530 has codes for some of it, and the large providers say the rest in words only: Exchange Online
"Request is throttled. Suggested Backoff Time: 89117 milliseconds" and "Server Unavailable. 15", Gmail "Too
many simultaneous connections" and, with the code of a full mailbox, "Account exceeded command or bandwidth
limits", Dovecot "Maximum number of connections from user+IP exceeded".
"""

import re
from typing import Final

_LATER: Final = frozenset({"THROTTLED", "UNAVAILABLE"})
"""Codes that say so by themselves."""
_FINAL: Final = frozenset(
    {
        "ALREADYEXISTS", "AUTHENTICATIONFAILED", "AUTHORIZATIONFAILED", "CANNOT", "EXPIRED", "NONEXISTENT",
        "NOPERM", "TOOBIG", "TRYCREATE",
    }
)  # fmt: skip
"""Codes after which no words make it worth another attempt."""
_WORDS: Final = re.compile(
    r"\bthrottl|\bback-?off time\b|\btoo many\b.{0,40}\b(?:connections|sessions|logins|requests|commands)\b"
    r"|\bconnections\b.{0,60}\bexceeded\b|\bexceeded\b.{0,40}\b(?:command|bandwidth|connection|rate)\b"
    r"|\brate.?limit|\btry again (?:later|soon|in|after)\b|\bserver (?:is )?(?:too )?(?:busy|unavailable)\b"
    r"|\bauthenticated but not connected\b",
    re.I,
)
_TIME: Final = re.compile(
    r"\b(?:time|in|after|for|wait)\W{0,3}(\d{1,9})\s*(milliseconds?|ms|seconds?|secs?|s|minutes?|mins?|m|"
    r"hours?|h)\b",
    re.I,
)
_UNITS: Final = {"ms": 0.001, "mi": 60.0, "m": 60.0, "s": 1.0, "h": 3600.0}
_LONGEST: Final = 86400.0
"""Seconds: what is asked for beyond a day is taken for a day."""


def asked_wait(code: str, text: str) -> float | None:
    """Seconds that a NO, BAD or BYE asks to wait before anything is tried again.

    ``code`` is the response code in upper case or "". 0.0 where no time is named, None where the answer means
    something else. "OK" answers are never looked at, though Gmail writes [THROTTLED] at their end.
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
    return min(_LONGEST, int(named[1]) * factor)
