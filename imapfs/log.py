"""Text for people: failures of background tasks, text on one line, a server's words without secrets."""

import logging
import re
import time
from collections.abc import Iterable
from typing import Final

from imapfs.errors import CacheError, ImapfsError, Offline

log = logging.getLogger(__name__)

_REMINDER: Final = 60.0
"""Seconds after which the log repeats what a disk says."""
_PIECE: Final = 16
"""So many characters of a secret in a row are no chance."""
_SHOWN: Final = 300
"""Most characters of a server's words that are shown."""


def one_line(text: str) -> str:
    """``text`` on one line, without what would steer a terminal or cannot be encoded."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def shown_path(path: Iterable[bytes]) -> str:
    """Return a path for people, of the names from the top down."""
    return b"/".join(path).decode("utf-8", "replace")


def printable(text: str, maximum: int = 500) -> str:
    """Return a text from outside for a person: one line, cut, without what would steer a terminal or turn the
    direction of writing. Characters that join others, as in emoji, stay."""
    kept = "".join(c if c.isprintable() or c in "\u200c\u200d" else " " for c in text[: 4 * maximum])
    line = " ".join(kept.split())
    return line if len(line) <= maximum else line[: maximum - 1] + "…"


def shown(words: str, secrets: Iterable[str], instead: str) -> str:
    """``words`` on one short line; ``instead`` if they repeat one of ``secrets``, or a part of it."""
    # Response codes are in upper case by now.
    folded = words.casefold()
    pieces = {folded[at : at + _PIECE] for at in range(len(folded) - _PIECE + 1)}
    for secret in filter(None, (one.casefold() for one in secrets)):
        # As a word of its own: a short password may well be a part of some other word.
        if re.search(rf"(?<!\w){re.escape(secret)}(?!\w)", folded):
            return instead
        if any(secret[at : at + _PIECE] in pieces for at in range(len(secret) - _PIECE + 1)):
            return instead
    line = " ".join("".join(char if char.isprintable() else " " for char in words).split())
    return line[:_SHOWN]


class _Told:
    """What was logged a moment ago."""

    def __init__(self) -> None:
        self._at: dict[str, float] = {}

    def is_news(self, text: str) -> bool:
        now = time.monotonic()
        self._at = {told: at for told, at in self._at.items() if now - at < _REMINDER}
        return self._at.setdefault(text, now) == now


_told = _Told()


def report(error: Exception, what: str) -> ImapfsError:
    """Log the end of a background task and give the error for those who wait for it.

    What the network does is worth a line, once; what the disk or our own mistake does is a warning or worse.
    """
    if isinstance(error, ImapfsError):
        level = logging.INFO
        if isinstance(error, CacheError):
            # A full disk is met by every message of a mailbox.
            level = logging.WARNING if _told.is_news(str(error)) else logging.DEBUG
        elif isinstance(error, Offline):
            level = logging.DEBUG
        log.log(level, "%s: %s", what, error)
        return error
    log.error("%s: internal error", what, exc_info=error)
    return ImapfsError(f"{what}: internal error, see the log")
