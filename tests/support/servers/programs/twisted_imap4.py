"""Twisted's IMAP server over a memory store: one user, no TLS. Arguments: port, user, password."""

import io
import sys
from collections.abc import Sequence
from email.utils import formatdate
from typing import Any

from twisted.cred import checkers, portal
from twisted.internet import defer, protocol, reactor
from twisted.mail import imap4
from zope.interface import implementer


@implementer(imap4.IMessage, imap4.IMessageFile)
class Message:
    """One message."""

    def __init__(self, uid: int, content: bytes, flags: list[str], date: bytes | str | None) -> None:
        self.uid = uid
        self.content = content
        self.flags = flags
        given = date.decode() if isinstance(date, bytes) else date
        self.date = given or formatdate(usegmt=True)

    def getUID(self) -> int:
        return self.uid

    def getFlags(self) -> list[str]:
        return self.flags

    def getInternalDate(self) -> str:
        return self.date

    def getHeaders(self, negate: bool, *names: str | bytes) -> dict[str, str]:
        wanted = {(name.decode() if isinstance(name, bytes) else name).lower() for name in names}
        found: dict[str, str] = {}
        head = self.content.partition(b"\r\n\r\n")[0].decode("latin-1")
        for line in head.replace("\r\n ", " ").replace("\r\n\t", " ").split("\r\n"):
            name, colon, value = line.partition(":")
            if colon and (name.lower() in wanted) != negate:
                found[name.lower()] = value.strip()
        return found

    def getBodyFile(self) -> io.BytesIO:
        return io.BytesIO(self.content.partition(b"\r\n\r\n")[2])

    def getSize(self) -> int:
        return len(self.content)

    def isMultipart(self) -> bool:
        return False

    def open(self) -> io.BytesIO:
        return io.BytesIO(self.content)


@implementer(imap4.IMailbox)
class Mailbox:
    """Messages in the order of their UIDs."""

    made = 0

    def __init__(self) -> None:
        Mailbox.made += 1
        self.validity = 1_000_000 + Mailbox.made
        self.next = 1
        self.messages: list[Message] = []
        self.listeners: list[Any] = []

    def getFlags(self) -> list[str]:
        return ["\\Seen", "\\Answered", "\\Flagged", "\\Deleted", "\\Draft"]

    def getHierarchicalDelimiter(self) -> str:
        return "/"

    def getUIDValidity(self) -> int:
        return self.validity

    def getUIDNext(self) -> int:
        return self.next

    def getUID(self, message: int) -> int:
        return self.messages[message - 1].uid

    def getMessageCount(self) -> int:
        return len(self.messages)

    def getRecentCount(self) -> int:
        return 0

    def getUnseenCount(self) -> int:
        return sum("\\Seen" not in message.flags for message in self.messages)

    def isWriteable(self) -> bool:
        return True

    def destroy(self) -> None:
        self.messages.clear()

    def requestStatus(self, names: list[str]) -> dict[str, int]:
        return dict(imap4.statusRequestHelper(self, names))

    def addListener(self, listener: Any) -> None:
        self.listeners.append(listener)

    def removeListener(self, listener: Any) -> None:
        self.listeners.remove(listener)

    def addMessage(self, message: Any, flags: Sequence[str] = (), date: bytes | None = None) -> Any:
        self.messages.append(Message(self.next, message.read(), list(flags), date))
        self.next += 1
        for listener in self.listeners:
            listener.newMessages(len(self.messages), None)
        return defer.succeed(self.next - 1)

    def expunge(self) -> list[int]:
        gone = [n for n, message in enumerate(self.messages, 1) if "\\Deleted" in message.flags]
        self.messages = [message for message in self.messages if "\\Deleted" not in message.flags]
        return gone

    def _chosen(self, numbers: Any, uid: bool) -> list[tuple[int, Message]]:
        if uid:
            numbers.last = self.messages[-1].uid if self.messages else 0
            chosen = {number for number in range(1, self.next) if number in numbers}
            return [(n, m) for n, m in enumerate(self.messages, 1) if m.uid in chosen]
        numbers.last = len(self.messages)
        return [(n, m) for n, m in enumerate(self.messages, 1) if n in numbers]

    def fetch(self, messages: Any, uid: bool) -> list[tuple[int, Message]]:
        return self._chosen(messages, uid)

    def store(self, messages: Any, flags: list[str], mode: int, uid: bool) -> dict[int, list[str]]:
        changed = {}
        for number, message in self._chosen(messages, uid):
            kept = [] if mode == 0 else [flag for flag in message.flags if flag not in flags]
            message.flags = kept if mode == -1 else [*kept, *flags]
            changed[number] = message.flags
        return changed


class Account(imap4.MemoryAccount):
    """Names as they are given; the class that this is made from writes all in upper case."""

    def _name(self, name: str) -> str:
        return "INBOX" if name.upper() == "INBOX" else name

    def create(self, path: str) -> bool:
        parts = [part for part in path.split("/") if part]
        for end in range(1, len(parts) + 1):
            name = self._name("/".join(parts[:end]))
            if name in self.mailboxes and end == len(parts):
                raise imap4.MailboxCollision(name)
            self.mailboxes.setdefault(name, Mailbox())
        return True

    def select(self, name: str, readwrite: bool = True) -> Mailbox | None:
        found: Mailbox | None = self.mailboxes.get(self._name(name))
        return found

    def delete(self, name: str) -> None:
        if self._name(name) not in self.mailboxes:
            raise imap4.NoSuchMailbox(name)
        if any(other.startswith(name + "/") for other in self.mailboxes):
            raise imap4.MailboxException("has mailboxes within")
        del self.mailboxes[name]

    def rename(self, old: str, new: str) -> None:
        if old not in self.mailboxes:
            raise imap4.NoSuchMailbox(old)
        for name in [n for n in self.mailboxes if n == old or n.startswith(old + "/")]:
            self.mailboxes[new + name[len(old) :]] = self.mailboxes.pop(name)

    def isSubscribed(self, name: str) -> bool:
        return name in self.subscriptions

    def subscribe(self, name: str) -> None:
        self.subscriptions.append(name)

    def unsubscribe(self, name: str) -> None:
        self.subscriptions.remove(name)

    def listMailboxes(self, reference: str, wildcard: str) -> list[tuple[str, Mailbox]]:
        pattern = imap4.wildcardToRegexp(wildcard, "/")
        return [(name, box) for name, box in self.mailboxes.items() if pattern.match(name)]


@implementer(portal.IRealm)
class Realm:
    """Has one account."""

    def __init__(self) -> None:
        self.account = Account("user")
        self.account.create("INBOX")

    def requestAvatar(self, user: bytes, mind: Any, *interfaces: Any) -> tuple[Any, Account, Any]:
        return imap4.IAccount, self.account, lambda: None


class Factory(protocol.Factory):
    """Makes a server for each connection."""

    def __init__(self, user: str, password: str) -> None:
        checker = checkers.InMemoryUsernamePasswordDatabaseDontUse(**{user: password.encode()})
        self.portal = portal.Portal(Realm(), [checker])

    def buildProtocol(self, address: Any) -> imap4.IMAP4Server:
        server = imap4.IMAP4Server(chal={b"PLAIN": imap4.PLAINCredentials})
        server.portal = self.portal
        server.factory = self
        return server


if __name__ == "__main__":
    listen: Any = reactor
    listen.listenTCP(int(sys.argv[1]), Factory(*sys.argv[2:4]), interface="127.0.0.1")
    listen.run()
