"""Mailboxes are created, deleted and renamed on a real server: each once, whenever the connection breaks."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from imapfs.errors import Refused
from imapfs.model import ROOT
from imapfs.sync.folders import Folders
from imapfs.sync.locate import Locator
from imapfs.sync.trash import TrashFinder
from tests.support.mail import plain
from tests.support.mailboxes import everything, mailboxes
from tests.support.mirror import Mirror, mirror
from tests.support.servers.dovecot import Account
from tests.support.servers.proxy import Point, Proxy

DATE = 1_700_000_000
BREAKS: list[Point | None] = [None, "command", "answer"]
"""Where the connection breaks once; None for not at all."""


@pytest.fixture
def proxy(user: Account) -> Iterator[Proxy]:
    user.deliver("Work", [])
    user.deliver("Full/below", [(plain(1), DATE, "")])
    with Proxy(user.server) as made:
        yield made


def folders(here: Mirror) -> Folders:
    locator = Locator(here.cache, here.sync)
    return Folders(here.pool, here.cache, here.sync, locator, TrashFinder(here.cache, None))


def cut(proxy: Proxy, command: bytes, point: Point | None) -> None:
    if point is not None:
        proxy.fault(command, "cut", at=point)


@pytest.mark.trio
@pytest.mark.parametrize("point", BREAKS)
async def test_create(user: Account, proxy: Proxy, tmp_path: Path, point: Point | None) -> None:
    async with mirror(proxy.account(user), tmp_path) as here:
        cut(proxy, b"CREATE", point)
        await folders(here).create(b"Work/New")
        mailbox = here.cache.mailbox(here.ino("Work/New"))
        assert mailbox is not None
        assert (mailbox.server_name, mailbox.selectable) == (b"Work/New", 1)
        assert sum(line.startswith(b"CREATE") for line in proxy.commands()) == (
            2 if point == "command" else 1
        )
    assert "Work/New" in mailboxes(user)


@pytest.mark.trio
async def test_create_what_another_client_has_created(user: Account, proxy: Proxy, tmp_path: Path) -> None:
    async with mirror(proxy.account(user), tmp_path) as here:
        with user.client() as client:
            client.create("Theirs")
        with pytest.raises(Refused) as refused:
            await folders(here).create(b"Theirs")
        assert refused.value.code == "ALREADYEXISTS"


@pytest.mark.trio
@pytest.mark.parametrize("point", BREAKS)
async def test_delete(user: Account, proxy: Proxy, tmp_path: Path, point: Point | None) -> None:
    async with mirror(proxy.account(user), tmp_path) as here:
        cut(proxy, b"DELETE", point)
        assert await folders(here).delete(here.ino("Work"))
        assert here.cache.child(ROOT, b"Work") is None
    assert "Work" not in mailboxes(user)


@pytest.mark.trio
async def test_mailbox_with_a_message_is_not_deleted(user: Account, proxy: Proxy, tmp_path: Path) -> None:
    """Also one that has come since the mailbox was listed."""
    async with mirror(proxy.account(user), tmp_path) as here:
        await here.refresh("Work")
        user.append("Work", plain(2), DATE)
        assert not await folders(here).delete(here.ino("Work"))
        assert here.cache.child(ROOT, b"Work") is not None
    assert [m.content for m in everything(user)["Work"]] == [plain(2)]


@pytest.mark.trio
@pytest.mark.parametrize("point", BREAKS)
async def test_rename_takes_along_what_is_below(
    user: Account, proxy: Proxy, tmp_path: Path, point: Point | None
) -> None:
    async with mirror(proxy.account(user), tmp_path) as here:
        await here.refresh("Full/below")
        inodes = [here.ino(mailbox) for mailbox in ("Full", "Full/below")]
        messages = here.messages("Full/below")
        cut(proxy, b"RENAME", point)
        work = here.ino("Work")
        await folders(here).rename(inodes[0], b"Full", b"Work/Now", work, b"Now")
        assert [here.ino(mailbox) for mailbox in ("Work/Now", "Work/Now/below")] == inodes
        assert here.cache.child(ROOT, b"Full") is None
        await here.refresh_tree()
        await here.refresh("Work/Now/below")
        assert here.messages("Work/Now/below") == messages
        assert here.ino("Work/Now/below") == inodes[1]
    assert "Work/Now/below" in mailboxes(user)
    assert "Full" not in mailboxes(user)
