"""The protocol trace in the log (``-vv``), without credentials and without the content of messages."""

import itertools
import logging
import re
from collections.abc import Sequence
from typing import Final

log = logging.getLogger("imapfs.protocol")

_MAX_SHOWN: Final = 1000
"""Maximum number of bytes shown of a command or response."""
_MAX_READ: Final = 8 * _MAX_SHOWN
"""Bytes of a response that are looked at."""
_QUOTED_BODY: Final = re.compile(rb'(BODY\[[^][]*+\](?:<\d++>)?) "(?:[^"\\]++|\\.)*+"?', re.I | re.S)
"""A body as a quoted string instead of a literal (RFC 9051 section 4.3)."""

_numbers = itertools.count(1)


class Trace:
    """Commands and responses of one connection. Of a literal only the size is shown."""

    def __init__(self) -> None:
        self.on = log.isEnabledFor(logging.DEBUG)
        self.logged_in = False
        """Whether the login is over. Before, only the kind of a response is shown: servers may repeat
        secrets."""
        self._number = next(_numbers) if self.on else 0

    def sent(self, tag: bytes, parts: Sequence[bytes | int]) -> None:
        """Log a command; an int stands for a literal of that size."""
        text = b"".join(part if isinstance(part, bytes) else b"{%d}" % part for part in parts)
        if text[:6].upper() == b"LOGIN ":
            text = b"LOGIN ..."
        elif text[:13].upper() == b"AUTHENTICATE ":
            text = b" ".join(text.split()[:2])
        self._show("C", tag + b" " + text)

    def completed(self, tag: bytes, status: str, line: bytes) -> None:
        """Log a tagged response."""
        self._show("S", line if self.logged_in else tag + b" " + status.encode())

    def received(self, response: Sequence[bytes], sizes: Sequence[int]) -> None:
        """Log an untagged response: text and literals alternate; ``sizes`` are those of the literals."""
        if not self.logged_in:
            self._show("S", b" ".join(response[0].split(None, 2)[:2]))
            return
        text = response[0][:_MAX_READ]
        for size, more in zip(sizes, response[2::2], strict=True):
            if len(text) > _MAX_READ:
                break
            text += b"{%d}" % size + more[:_MAX_READ]
        self._show("S", _QUOTED_BODY.sub(rb'\1 "..."', text))

    def _show(self, who: str, text: bytes) -> None:
        shown = text[:_MAX_SHOWN].decode("utf-8", "replace").rstrip()
        log.debug("%d %s: %s%s", self._number, who, shown, " ..." if len(text) > _MAX_SHOWN else "")
