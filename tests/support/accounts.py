"""Accounts of a test server in the types of imapfs, for tests below the mount."""

import contextlib
from collections.abc import AsyncIterator, Callable, Iterator

import pytest
import trio

from imapfs.imap.connect import tls_context
from imapfs.imap.pool import SessionPool
from imapfs.imap.session import Session
from imapfs.imap.wire import Wire
from imapfs.model import Account, Secret
from tests.support.mounting import MailAccount

TIMEOUT = 20.0


def address(account: MailAccount) -> Account:
    """Return where ``account`` is."""
    server = account.server
    return Account(server.host, account.name, server.port, ca_file=server.authority.certificate)


@contextlib.contextmanager
def session(account: MailAccount, timeout: float = TIMEOUT) -> Iterator[Session]:
    """Log in; a connection of its own while the block lasts."""
    where = address(account)
    made = Session.connect(where, Secret(account.password), tls_context(where), timeout)
    try:
        yield made
    finally:
        made.close()


@contextlib.asynccontextmanager
async def pool(account: MailAccount, limit: int = 2, timeout: float = TIMEOUT) -> AsyncIterator[SessionPool]:
    """Return a pool that is closed when the block ends."""
    made = SessionPool(address(account), Secret(account.password), limit, timeout)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(made.keep_connected)
        try:
            yield made
        finally:
            await made.close()
            nursery.cancel_scope.cancel()


def hide(monkeypatch: pytest.MonkeyPatch, *capabilities: str) -> None:
    """Let servers lack ``capabilities`` as far as imapfs sees."""

    def keep(wire: Wire, announced: frozenset[str]) -> None:
        vars(wire)["announced"] = announced - set(capabilities)

    announced = property(lambda wire: vars(wire)["announced"], keep)
    monkeypatch.setattr(Wire, "capabilities", announced, raising=False)


async def until(condition: Callable[[], object]) -> None:
    """Wait for ``condition`` to be true; for as long as the caller's deadline allows."""
    while True:
        if condition():
            return
        await trio.sleep(0.01)
