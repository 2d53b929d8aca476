"""What a server has, asked by a client of its own, and what a mount shows, in the same form."""

import re
from pathlib import Path

from tests.support.servers.dovecot import Account


def served(account: Account, mailbox: str = "INBOX") -> dict[int, bytes]:
    """Return BODY[] of every message by UID, without setting a flag."""
    with account.client() as client:
        status, data = client.select(f'"{account.server_name(mailbox)}"', readonly=True)
        assert status == "OK", data
        found = {}
        for part in client.uid("FETCH", "1:*", "(UID BODY.PEEK[])")[1]:
            if isinstance(part, tuple):
                uid = re.search(rb"UID (\d+)", part[0])
                assert uid is not None
                found[int(uid[1])] = part[1]
        return found


def flags(account: Account, mailbox: str = "INBOX") -> dict[int, set[str]]:
    """Return the flags of every message by UID, ``\\Recent`` included."""
    with account.client() as client:
        client.select(f'"{account.server_name(mailbox)}"', readonly=True)
        lines = [line for line in client.uid("FETCH", "1:*", "(UID FLAGS)")[1] if isinstance(line, bytes)]
    found = {}
    for line in lines:
        match = re.search(rb"UID (\d+) FLAGS \(([^)]*)\)", line)
        assert match is not None
        found[int(match[1])] = set(match[2].decode().split())
    return found


def shown(directory: Path) -> dict[int, Path]:
    """Return the message files in a directory of a mount by the UID in their names."""
    return {int(path.name.split(".")[-2]): path for path in directory.iterdir() if path.suffix == ".eml"}


def contents(directory: Path) -> dict[int, bytes]:
    """Return the bytes of every message in a directory of a mount by UID, each read to its end."""
    return {uid: path.read_bytes() for uid, path in shown(directory).items()}
