"""Messages leave their mailbox on a real server: at most once, whatever it lacks and whenever it breaks."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from imapfs.errors import ConnectionLost, MessageGone, Refused
from imapfs.model import DeletePolicy, Ino
from imapfs.store.journal import Journal
from imapfs.sync.folders import Folders
from imapfs.sync.locate import Locator
from imapfs.sync.move import Mover
from imapfs.sync.trash import TrashFinder
from tests.support.mail import plain
from tests.support.mailboxes import Held, everything, in_order
from tests.support.mirror import Mirror, mirror
from tests.support.servers.dovecot import Account
from tests.support.servers.proxy import Point, Proxy

DATE = 1_700_000_000
LACKING = {"all": (), "no MOVE": ("MOVE",), "no UIDPLUS": ("UIDPLUS",), "neither": ("MOVE", "UIDPLUS")}


def message(number: int, *flags: str) -> Held:
    return Held(plain(number), DATE + number, frozenset(flags))


@pytest.fixture
def filled(user: Account) -> Account:
    user.deliver("INBOX", [(plain(n), DATE + n, "") for n in (1, 2)])
    user.deliver("Work", [(plain(3), DATE + 3, "")])
    return user


@pytest.fixture(params=LACKING)
def lacking(request: pytest.FixtureRequest) -> tuple[str, ...]:
    return LACKING[request.param]


@pytest.fixture
def proxy(lacking: tuple[str, ...], filled: Account) -> Iterator[Proxy]:
    with Proxy(filled.server, hide=lacking) as made:
        yield made


@pytest.fixture
def whole(filled: Account) -> Iterator[Proxy]:
    """A proxy that hides nothing."""
    with Proxy(filled.server) as made:
        yield made


@pytest.fixture
def without_move(filled: Account) -> Iterator[Proxy]:
    with Proxy(filled.server, hide=["MOVE"]) as made:
        yield made


def mover(here: Mirror, policy: DeletePolicy = "trash") -> Mover:
    locator = Locator(here.cache, here.sync)
    journal = Journal(here.cache.directory / "journal.json")
    trash = TrashFinder(here.cache, None)
    folders = Folders(here.pool, here.cache, here.sync, locator, trash)
    return Mover(here.pool, here.cache, here.sync, locator, journal, policy, trash, folders, here.hub)


def journalled(here: Mirror) -> int:
    """How many moves an earlier process would have left."""
    return len(Journal(here.cache.directory / "journal.json").interrupted)


async def inode(here: Mirror, uid: int, mailbox: str = "INBOX") -> Ino:
    """Synchronise a mailbox; the inode of a message in it."""
    await here.refresh(mailbox)
    here.changes.clear()
    return here.messages(mailbox)[uid][0]


@pytest.mark.trio
async def test_move_keeps_the_inode_and_gives_the_name(
    filled: Account, proxy: Proxy, lacking: tuple[str, ...], tmp_path: Path
) -> None:
    async with mirror(proxy.account(filled), tmp_path) as here:
        await here.refresh("Work")
        ino = await inode(here, 1)
        await mover(here).move(ino, here.ino("Work"), b"own name.eml")
        node = here.cache.node(ino)
        assert node is not None
        assert (node.parent, node.name, node.uid) == (here.ino("Work"), b"own name.eml", 2)
        assert journalled(here) == 0
        await here.refresh()
        await here.refresh("Work")
        assert here.messages("Work")[2][0] == ino
    # Without UID EXPUNGE the original can only be marked.
    rest = [message(1, "\\Deleted")] if len(lacking) == 2 else []
    assert everything(filled) == {
        "INBOX": in_order(message(2), *rest), "Work": in_order(message(1), message(3))
    }  # fmt: skip


@pytest.mark.trio
@pytest.mark.parametrize("point", ["command", "answer"])
async def test_move_whose_connection_breaks_is_carried_out_once(
    filled: Account, proxy: Proxy, tmp_path: Path, point: Point
) -> None:
    async with mirror(proxy.account(filled), tmp_path) as here:
        await here.refresh("Work")
        ino = await inode(here, 1)
        fault = proxy.fault(b"UID (MOVE|COPY)", "cut", at=point)
        await mover(here).move(ino, here.ino("Work"), b"x.eml")
        fault.wait_hit()
        node = here.cache.node(ino)
        assert node is not None
        assert (node.parent, node.uid) == (here.ino("Work"), 2)
        assert journalled(here) == 0
    held = everything(filled)
    assert held["Work"] == in_order(message(1), message(3))
    assert [m for m in held["INBOX"] if "\\Deleted" not in m.flags] == [message(2)]


@pytest.mark.trio
async def test_move_cut_between_copy_and_deletion_is_finished_later(
    filled: Account, without_move: Proxy, tmp_path: Path
) -> None:
    """By another process as well: the journal has it until then."""
    async with mirror(without_move.account(filled), tmp_path) as here:
        await here.refresh("Work")
        ino = await inode(here, 1)
        fault = without_move.fault(b"UID STORE", "cut", times=None)
        with pytest.raises(ConnectionLost):
            await mover(here).move(ino, here.ino("Work"), b"x.eml")
        fault.wait_hit(2)
        fault.cancel()
        assert journalled(here) == 1
        assert everything(filled)["Work"] == in_order(message(1), message(3))
        assert message(1) in everything(filled)["INBOX"]
        another = mover(here)
        assert await another.recover()
        assert journalled(here) == 0
        assert here.gone() == [ino]
        await here.refresh("Work")
        assert len(here.messages("Work")) == 2
    assert everything(filled) == {"INBOX": [message(2)], "Work": in_order(message(1), message(3))}


@pytest.mark.trio
async def test_second_attempt_finishes_the_first_one_and_copies_nothing(
    filled: Account, without_move: Proxy, tmp_path: Path
) -> None:
    async with mirror(without_move.account(filled), tmp_path) as here:
        await here.refresh("Work")
        ino = await inode(here, 1)
        mine = mover(here)
        fault = without_move.fault(b"UID STORE", "cut", times=None)
        with pytest.raises(ConnectionLost):
            await mine.move(ino, here.ino("Work"), b"x.eml")
        fault.cancel()
        with pytest.raises(MessageGone):
            await mine.move(ino, here.ino("Work"), b"x.eml")
        assert journalled(here) == 0
    assert everything(filled) == {"INBOX": [message(2)], "Work": in_order(message(1), message(3))}


@pytest.mark.trio
async def test_message_that_is_gone_leaves_the_cache(filled: Account, whole: Proxy, tmp_path: Path) -> None:
    async with mirror(whole.account(filled), tmp_path) as here:
        await here.refresh("Work")
        ino = await inode(here, 1)
        with filled.client() as client:
            client.select("INBOX")
            client.uid("STORE", "1", "+FLAGS", "(\\Deleted)")
            client.expunge()
        with pytest.raises(MessageGone):
            await mover(here).move(ino, here.ino("Work"), b"x.eml")
        assert here.cache.node(ino) is None
        assert here.gone() == [ino]
    assert everything(filled) == {"INBOX": [message(2)], "Work": [message(3)]}


@pytest.mark.trio
async def test_mailbox_that_is_gone_takes_no_message(filled: Account, whole: Proxy, tmp_path: Path) -> None:
    async with mirror(whole.account(filled), tmp_path) as here:
        await here.refresh("Work")
        ino = await inode(here, 1)
        with filled.client() as client:
            client.delete("Work")
        with pytest.raises(Refused) as refused:
            await mover(here).move(ino, here.ino("Work"), b"x.eml")
        assert refused.value.code == "TRYCREATE"
        node = here.cache.node(ino)
        assert node is not None
        assert node.parent == here.ino("INBOX")
    assert everything(filled) == {"INBOX": in_order(message(1), message(2))}


@pytest.mark.trio
@pytest.mark.parametrize(
    ("policy", "mailbox", "after"),
    [
        ("trash", "INBOX", {"INBOX": [2], "Trash": [1], "Work": [3]}),
        ("expunge", "INBOX", {"INBOX": [2], "Work": [3]}),
        ("trash", "Trash", {"INBOX": [1, 2], "Work": [3]}),
        ("trash", "Trash/below", {"INBOX": [1, 2], "Work": [3]}),
    ],
)
async def test_remove_follows_the_policy(
    filled: Account,
    whole: Proxy,
    tmp_path: Path,
    policy: DeletePolicy,
    mailbox: str,
    after: dict[str, list[int]],
) -> None:
    if mailbox != "INBOX":
        filled.deliver(mailbox, [(plain(9), DATE + 9, "")])
    async with mirror(whole.account(filled), tmp_path) as here:
        ino = await inode(here, 1, mailbox)
        await mover(here, policy).remove(ino)
        assert here.cache.node(ino) is None
        assert here.gone() == [ino]
    assert everything(filled) == {
        name: in_order(*(message(n) for n in numbers)) for name, numbers in after.items()
    }


@pytest.mark.parametrize(
    ("target", "there"), [("Work", [message(1), message(3)]), ("Trash", [message(1)])], ids=["full", "empty"]
)
@pytest.mark.trio
async def test_move_that_is_offered_and_refused_becomes_a_copy(
    filled: Account, whole: Proxy, tmp_path: Path, target: str, there: list[Held]
) -> None:
    """What the journal notes of the original is of the original, not of what has its UID in the target."""
    async with mirror(whole.account(filled), tmp_path) as here:
        await here.refresh(target)
        whole.fault(b"UID MOVE", b"NO Unknown command", at="command", times=None)
        await mover(here).move(await inode(here, 1), here.ino(target), b"x.eml")
    assert everything(filled) == {"INBOX": [message(2)], "Work": [message(3)], target: in_order(*there)}


@pytest.mark.trio
async def test_move_over_quota_is_not_tried_as_a_copy(filled: Account, whole: Proxy, tmp_path: Path) -> None:
    async with mirror(whole.account(filled), tmp_path) as here:
        await here.refresh("Work")
        whole.fault(b"UID MOVE", b"NO [OVERQUOTA] Full", at="command", times=None)
        with pytest.raises(Refused, match="Full"):
            await mover(here).move(await inode(here, 1), here.ino("Work"), b"x.eml")
        assert not [command for command in whole.commands() if b"UID COPY" in command]
    assert everything(filled) == {"INBOX": in_order(message(1), message(2)), "Work": [message(3)]}
