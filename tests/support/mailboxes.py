"""What an account holds, as a second, plain IMAP client sees it: the judge of everything that writes."""

import os
import re
from datetime import datetime
from imaplib import IMAP4
from pathlib import Path
from typing import NamedTuple

from tests.support.mounting import Mount
from tests.support.servers.account import ImapAccount

_FETCHED = re.compile(rb'UID (\d+) FLAGS \(([^)]*)\) INTERNALDATE "([^"]+)"')
_LISTED = re.compile(rb'\(([^)]*)\) (?:"[^"]+"|NIL) "?(.+?)"?$')


class Held(NamedTuple):
    """A message but for its UID."""

    content: bytes
    date: int
    """INTERNALDATE, seconds since the epoch."""
    flags: frozenset[str] = frozenset()
    """Without ``\\Recent``."""


def mailboxes(account: ImapAccount) -> list[str]:
    """Return the names of all mailboxes that can be selected, as the server spells them."""
    with account.client() as client:
        return _mailboxes(client)


def _mailboxes(client: IMAP4) -> list[str]:
    found = []
    for line in client.list()[1]:
        assert isinstance(line, bytes)
        listed = _LISTED.match(line)
        assert listed is not None, line
        if b"\\Noselect" not in listed[1]:
            found.append(listed[2].decode())
    return sorted(found)


def held(account: ImapAccount, mailbox: str = "INBOX") -> dict[int, Held]:
    """Return the messages of a mailbox by UID."""
    with account.client() as client:
        return _held(client, mailbox)


def _held(client: IMAP4, mailbox: str) -> dict[int, Held]:
    found: dict[int, Held] = {}
    status, data = client.select(f'"{mailbox}"', readonly=True)
    assert status == "OK", data
    if data == [b"0"]:
        return found
    for part in client.uid("FETCH", "1:*", "(UID FLAGS INTERNALDATE BODY.PEEK[])")[1]:
        if isinstance(part, tuple):
            message = _FETCHED.search(part[0])
            assert message is not None, part[0]
            date = datetime.strptime(message[3].decode().strip(), "%d-%b-%Y %H:%M:%S %z")
            flags = frozenset(message[2].decode().split()) - {"\\Recent"}
            found[int(message[1])] = Held(part[1], int(date.timestamp()), flags)
    return found


def everything(account: ImapAccount) -> dict[str, list[Held]]:
    """Return the messages of every mailbox that has some, in a fixed order."""
    with account.client() as client:
        found = {name: sorted(_held(client, name).values(), key=repr) for name in _mailboxes(client)}
    return {name: messages for name, messages in found.items() if messages}


def all_uids(account: ImapAccount) -> dict[str, list[int]]:
    """Return the UIDs in every mailbox: the same twice where nothing was done to the server between."""
    with account.client() as client:
        return {name: sorted(_held(client, name)) for name in _mailboxes(client)}


def in_order(*messages: Held) -> list[Held]:
    """Return ``messages`` in the order of `everything`."""
    return sorted(messages, key=repr)


def file_of(mount: Mount, uid: int, mailbox: str = "INBOX") -> Path:
    """Return the file of the message that has had this UID since it was listed."""
    (name,) = [name for name in os.listdir(mount.path / mailbox) if name.endswith(f".{uid}.eml")]
    return mount.path / mailbox / name


def settle(mount: Mount) -> None:
    """Wait until what can be sent is sent: fsync of a directory does that."""
    directory = os.open(mount.path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def waiting(mount: Mount) -> list[tuple[str, str]]:
    """Return path and state of the files that the server does not have yet."""
    return [(one["path"], one["state"]) for one in mount.status()["waiting"]]
