"""A second client, IMAPClient: what it sees is what the server holds, whatever imapfs shows of it."""

import contextlib
import ssl
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

from imapclient import IMAPClient

from tests.support.servers.account import Endpoint

DEADLINE = 30.0
"""Seconds that one answer of the server may take."""


class Message(NamedTuple):
    """A message as the server gives it."""

    uid: int
    content: bytes
    size: int
    """What the server announces (RFC822.SIZE), which is not always true."""
    date: int
    """INTERNALDATE, seconds since the epoch."""
    flags: frozenset[str]
    """Without ``\\Recent``."""


class Outside:
    """Mailboxes are named by decoded paths with ``/``, and without the prefix of the personal namespace."""

    def __init__(self, client: IMAPClient) -> None:
        self._client = client
        self.capabilities = frozenset(word.decode().upper() for word in client.capabilities())
        listed = client.list_folders("", "")
        self._delimiter = (listed[0][1] or b"/").decode() if listed else "/"
        self._prefix = ""
        if "NAMESPACE" in self.capabilities and (personal := client.namespace().personal):
            self._prefix = personal[0][0] or ""

    def mailboxes(self) -> set[str]:
        """Return the mailboxes that can be selected."""
        return {
            self._path(str(name))
            for flags, _, name in self._client.list_folders()
            if b"\\noselect" not in {flag.lower() for flag in flags}
        }

    def make(self, mailbox: str) -> None:
        """CREATE and subscribe."""
        self._client.create_folder(self._name(mailbox))
        self._client.subscribe_folder(self._name(mailbox))

    def put(self, mailbox: str, content: bytes, date: int, flags: Sequence[str] = ()) -> None:
        """APPEND; line ends become CRLF."""
        self._client.append(self._name(mailbox), content, flags, datetime.fromtimestamp(date, UTC))

    def held(self, mailbox: str) -> list[Message]:
        """Return the messages of a mailbox, by UID; no flag is set."""
        self._client.select_folder(self._name(mailbox), readonly=True)
        uids = self._client.search("ALL")
        items = ["FLAGS", "INTERNALDATE", "RFC822.SIZE", "BODY.PEEK[]"]
        found = self._client.fetch(uids, items) if uids else {}
        # Courier takes nothing in while a mailbox is opened for reading.
        try:
            self._client.close_folder()
        except IMAPClient.Error:
            # pymap refuses CLOSE, and then everything once the selected mailbox was renamed.
            self._client.select_folder("INBOX", readonly=True)
        return [_message(uid, data) for uid, data in sorted(found.items())]

    def everywhere(self, content: bytes) -> list[str]:
        """Return the mailboxes that hold these bytes, as often as they do; what is marked as deleted is not
        counted."""
        return [
            mailbox
            for mailbox in sorted(self.mailboxes())
            for message in self.held(mailbox)
            if message.content == content and "\\Deleted" not in message.flags
        ]

    def add_flags(self, mailbox: str, uid: int, *flags: str) -> None:
        """STORE +FLAGS."""
        self._client.select_folder(self._name(mailbox))
        self._client.add_flags([uid], flags)

    def keeps_keywords(self, mailbox: str, uid: int) -> bool:
        """Tell by a try whether the server keeps keywords."""
        with contextlib.suppress(IMAPClient.Error):
            self.add_flags(mailbox, uid, "Probe")
        # go-imap makes small letters of them.
        kept = any(flag.lower() == "probe" for message in self.held(mailbox) for flag in message.flags)
        if kept:
            self._client.select_folder(self._name(mailbox))
            self._client.remove_flags([uid], ["Probe"])
        return kept

    def renames_within(self, mailbox: str) -> bool:
        """Tell by a try below ``mailbox`` whether RENAME takes along the mailboxes within."""
        self.make(f"{mailbox}/Probe")
        self.make(f"{mailbox}/Probe/Within")
        self._client.rename_folder(self._name(f"{mailbox}/Probe"), self._name(f"{mailbox}/Probed"))
        return f"{mailbox}/Probed/Within" in self.mailboxes()

    def delete(self, mailbox: str, uid: int) -> None:
        """Delete one message for good."""
        self.add_flags(mailbox, uid, "\\Deleted")
        if "UIDPLUS" in self.capabilities:
            self._client.uid_expunge([uid])
        else:
            self._client.expunge()

    def _name(self, mailbox: str) -> str:
        return mailbox if mailbox == "INBOX" else self._prefix + mailbox.replace("/", self._delimiter)

    def _path(self, name: str) -> str:
        if name.upper() == "INBOX":
            return "INBOX"
        return name.removeprefix(self._prefix).replace(self._delimiter, "/")


@contextlib.contextmanager
def outside(endpoint: Endpoint, name: str, password: str) -> Iterator[Outside]:
    """Log in over TLS; logged out when the block ends."""
    context = ssl.create_default_context(cafile=endpoint.authority.certificate)
    client = IMAPClient(endpoint.host, endpoint.port, ssl_context=context, timeout=DEADLINE)
    client.normalise_times = False
    try:
        client.login(name, password)
        if client.has_capability("ID"):
            client.id_()
        yield Outside(client)
    finally:
        # The server may have ended the connection first.
        with contextlib.suppress(Exception):
            client.logout()


def living(messages: Iterable[Message]) -> list[Message]:
    """Return those that are not marked as deleted: the others are gone to whoever reads mail."""
    return [message for message in messages if "\\Deleted" not in message.flags]


def _message(uid: int, data: dict[bytes, Any]) -> Message:
    flags = frozenset(flag.decode() for flag in data[b"FLAGS"]) - {"\\Recent"}
    date = int(data[b"INTERNALDATE"].timestamp())
    return Message(uid, data[b"BODY[]"] or b"", data[b"RFC822.SIZE"], date, flags)
