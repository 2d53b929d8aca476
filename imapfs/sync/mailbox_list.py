"""The tree of directories that follows from the mailboxes that a server lists."""

import hashlib
import logging
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache
from typing import Final

from imapfs.imap.budget import MAX_DEPTH, MAX_DIRECTORIES, MAX_UNLISTED
from imapfs.imap.grammar import ListEntry
from imapfs.names import decode_mailbox, entry_name, is_inbox
from imapfs.store.rows import Directory

log = logging.getLogger(__name__)

_MAX_STEM: Final = 230
"""Bytes of a name that are kept when a suffix tells it apart from another one."""

_entry_name = lru_cache(4096)(entry_name)


def plan_tree(entries: Iterable[ListEntry], prefix: bytes) -> list[Directory]:
    """Return the directories for a LIST response, parents before children.

    The root is the personal namespace (``prefix``, such as ``INBOX.``). INBOX is always spelled like this
    (RFC 9051 section 5.1). Ancestors that the server does not list become directories without messages. If
    two mailboxes would have the same name, which takes an unusual server, one of them gets a suffix.

    Time and memory are linear in the directories, whose number is bounded: mailboxes beyond that, and those
    that are nested too deeply, are not shown.
    """
    planned: dict[tuple[bytes, ...], Directory] = {}
    unlisted = 0
    left_out: Counter[str] = Counter()
    for entry in sorted(entries, key=lambda e: e.name):
        if entry.delimiter and entry.name.count(entry.delimiter) > MAX_DEPTH:
            left_out[f"nested more than {MAX_DEPTH} levels deep"] += 1
            continue
        path = tuple(map(_entry_name, _components(entry, prefix)))
        above: list[tuple[bytes, ...]] = []
        for depth in range(len(path) - 1, 0, -1):
            if path[:depth] in planned:
                break
            above.append(path[:depth])
        if unlisted + len(above) > MAX_UNLISTED or len(planned) + len(above) >= MAX_DIRECTORIES:
            left_out["beyond the number of directories that an account may have"] += 1
            continue
        unlisted += len(above)
        for parent in reversed(above):
            planned[parent] = Directory(parent, None, entry.delimiter, False, "")
        there = planned.get(path)
        if there is not None and there.server_name is None:
            unlisted -= 1
        elif there is not None and is_inbox(there.server_name) and is_inbox(entry.name):
            continue  # the server lists INBOX in two spellings
        elif there is not None and there.server_name != entry.name:
            digest = hashlib.sha256(entry.name).hexdigest()[:16].encode()
            path = (*path[:-1], path[-1][:_MAX_STEM].decode("utf-8", "ignore").encode() + b"%~" + digest)
        planned[path] = Directory(path, entry.name, entry.delimiter, entry.selectable, entry.special_use)
    for why, count in left_out.items():
        log.warning("mailboxes are not shown that are %s: %d", why, count)
    return [planned[path] for path in sorted(planned, key=lambda p: (len(p), p))]


def _components(entry: ListEntry, prefix: bytes) -> list[bytes]:
    """Return the hierarchy levels of a mailbox name as the mount shows them, still encoded."""
    name, delimiter = entry.name, entry.delimiter
    if not delimiter:
        return [b"INBOX" if is_inbox(name) else name]
    name = name.removesuffix(delimiter)
    if prefix and name[: len(prefix)].upper() == prefix.upper() and len(name) > len(prefix):
        rest = name[len(prefix) :].split(delimiter)
        # INBOX.INBOX stays below INBOX, as INBOX itself has that name.
        if not is_inbox(rest[0]):
            return rest
    components = name.split(delimiter)
    if is_inbox(components[0]):
        components[0] = b"INBOX"
    return components


def display_name(server_name: bytes) -> str:
    """Return a mailbox name for people; bytes in no known encoding are escaped."""
    decoded = decode_mailbox(server_name)
    return decoded if decoded is not None else server_name.decode("ascii", "backslashreplace")
