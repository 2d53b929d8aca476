"""The protocol in the log, for ``-vv``: without credentials, and without anything that messages hold."""

import itertools
import logging
import re
from collections.abc import Sequence
from typing import Final

log = logging.getLogger("imapfs.protocol")

_MOST: Final = 1000
"""Most bytes shown of a command or response."""
_QUOTED_BODY: Final = re.compile(rb'(BODY\[[^\]]*\](?:<\d+>)?) "(?:[^"\\]|\\.)*"', re.I)
"""What may also come as a literal (RFC 9051 section 4.3)."""

_numbers = itertools.count(1)


class Trace:
    """What one connection says and hears. Of a literal only the size is shown."""

    def __init__(self) -> None:
        self.on = log.isEnabledFor(logging.DEBUG)
        self.let_in = False
        """Whether the login is through: before, servers may repeat what they were sent."""
        self._number = next(_numbers) if self.on else 0

    def sent(self, tag: bytes, parts: Sequence[bytes | int]) -> None:
        """A command; an int stands for a literal of that size."""
        text = b"".join(part if isinstance(part, bytes) else b"{%d}" % part for part in parts)
        if text[:6].upper() == b"LOGIN ":
            text = b"LOGIN ..."
        elif text[:13].upper() == b"AUTHENTICATE ":
            text = b" ".join(text.split()[:2])
        self._show("C", tag + b" " + text)

    def completed(self, tag: bytes, status: str, line: bytes) -> None:
        """A tagged response."""
        self._show("S", line if self.let_in else tag + b" " + status.encode())

    def received(self, response: Sequence[bytes], sizes: Sequence[int]) -> None:
        """An untagged response, text and literals in turn, and the sizes of the literals."""
        if not self.let_in:
            self._show("S", b" ".join(response[0].split()[:2]))
            return
        text = response[0]
        for size, more in zip(sizes, response[2::2], strict=True):
            text += b"{%d}" % size + more
        self._show("S", _QUOTED_BODY.sub(rb'\1 "..."', text))

    def _show(self, who: str, text: bytes) -> None:
        shown = text[:_MOST].decode("utf-8", "replace").rstrip()
        log.debug("%d %s: %s%s", self._number, who, shown, " ..." if len(text) > _MOST else "")
