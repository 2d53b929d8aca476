"""What may be shown of what a server says, which may repeat what it was told."""

import re
from collections.abc import Iterable
from typing import Final

_PIECE: Final = 16
"""So many characters of a secret in a row are no chance."""
_SHOWN: Final = 300
"""Most characters of a server's words that are shown."""


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
