"""Bodies of messages that the server calls the same: one that is cached serves the others.

Gmail has a message in each of its labels, and in All Mail; a COPY is the same message elsewhere. X-GM-MSGID
and EMAILID (RFC 8474 section 5.1) say so: messages with the same one have the same bytes. That is believed of
messages with the same INTERNALDATE and announced size, and not before the bytes of two of them have been
compared.
"""

import logging
from collections.abc import Sequence

from imapfs.model import Ino
from imapfs.store.bodies import BodyStore, IncomingBody
from imapfs.store.cache import Cache
from imapfs.store.rows import Node

log = logging.getLogger(__name__)


class SameBodies:
    """Finds cached bodies of the same messages. Used on the trio thread."""

    def __init__(self, cache: Cache, bodies: BodyStore) -> None:
        self._cache = cache
        self._bodies = bodies
        self._is_believed: bool | None = None
        """Whether the server keeps its word; None until that was tried."""
        self._tried: tuple[Ino, bytes] | None = None
        """A message that is being fetched, and the bytes that it should have."""

    def find(self, nodes: Sequence[Node]) -> dict[Ino, Node]:
        """Return for each message whose bytes the cache has as those of another one, that other one."""
        if self._is_believed is False:
            return {}
        found = self._cache.same_messages([node.ino for node in nodes])
        if self._is_believed:
            return found
        self._tried = None
        for ino, other in found.items():
            data = self._bodies.load(other)
            if data is not None:
                self._tried = ino, data
                break
        return {}

    def arrived(self, ino: Ino, incoming: IncomingBody) -> None:
        """Compare a body that was fetched with the one that it should be."""
        if self._tried is None or self._tried[0] != ino or incoming.small is None:
            return
        self._is_believed, self._tried = incoming.small == self._tried[1], None
        if not self._is_believed:
            log.info("the server calls messages the same that have different bytes: each is fetched")
