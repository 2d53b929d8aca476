"""Changes of flags on a real server, beside those of other clients."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from imapfs.errors import MessageGone, NotSupported, Refused
from imapfs.model import Ino
from imapfs.sync.flags import FlagChanger
from imapfs.sync.locate import Locator
from tests.support import compare
from tests.support.mail import plain
from tests.support.mirror import Mirror, mirror
from tests.support.servers.dovecot import Account
from tests.support.servers.proxy import Proxy

DATE = 1_700_000_000
Change = Callable[[list[str]], tuple[set[str], set[str]]]


@pytest.fixture
def filled(user: Account) -> Account:
    user.deliver("INBOX", [(plain(1), DATE, "S")])
    return user


@pytest.fixture(params=[True, False], ids=["CONDSTORE", "without"])
def condstore(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture
def proxy(condstore: bool, filled: Account) -> Iterator[Proxy]:
    with Proxy(filled.server, hide=() if condstore else ("CONDSTORE", "QRESYNC")) as made:
        yield made


def changer(here: Mirror) -> FlagChanger:
    return FlagChanger(here.pool, here.cache, here.sync, Locator(here.cache, here.sync), here.hub)


async def the_message(here: Mirror) -> Ino:
    await here.refresh()
    here.changes.clear()
    return here.messages()[1][0]


def on_server(account: Account) -> set[str]:
    return compare.flags(account)[1] - {"\\Recent"}


def store(account: Account, what: str, flags: str) -> None:
    """Change flags by another client."""
    with account.client() as client:
        client.select("INBOX")
        client.uid("STORE", "1", what, flags)


def set_to(*wanted: str) -> Change:
    return lambda has: (set(wanted) - set(has), set(has) - set(wanted))


def add(*flags: str) -> Change:
    return lambda _: (set(flags), set())


@pytest.mark.trio
async def test_flags_are_added_and_removed(filled: Account, proxy: Proxy, tmp_path: Path) -> None:
    async with mirror(proxy.account(filled), tmp_path) as here:
        ino = await the_message(here)
        await changer(here).change(ino, set_to("\\Flagged", "$Work"))
        assert here.flags() == {1: {"\\Flagged", "$Work"}}
        assert here.flagged() == [ino]
    assert on_server(filled) == {"\\Flagged", "$Work"}


@pytest.mark.trio
async def test_no_change_asks_the_server_nothing(filled: Account, proxy: Proxy, tmp_path: Path) -> None:
    async with mirror(proxy.account(filled), tmp_path) as here:
        ino = await the_message(here)
        proxy.forget_commands()
        await changer(here).change(ino, lambda _: (set(), set()))
        assert proxy.commands() == []
        assert here.changes == []


@pytest.mark.trio
async def test_change_is_derived_from_what_another_client_has_set(
    filled: Account, proxy: Proxy, condstore: bool, tmp_path: Path
) -> None:
    """With CONDSTORE the server refuses what is derived from older flags, and it is derived again."""
    async with mirror(proxy.account(filled), tmp_path) as here:
        ino = await the_message(here)
        store(filled, "FLAGS", "(\\Answered theirs)")
        derived_from: list[set[str]] = []

        def change(has: list[str]) -> tuple[set[str], set[str]]:
            derived_from.append(set(has))
            return {"\\Draft"}, set()

        await changer(here).change(ino, change)
        assert derived_from[0] == {"\\Seen"}
        assert derived_from[1:] == ([{"\\Answered", "theirs"}] if condstore else [])
        assert here.flags() == {1: {"\\Answered", "theirs", "\\Draft"}}
    assert on_server(filled) == {"\\Answered", "theirs", "\\Draft"}


@pytest.mark.trio
@pytest.mark.parametrize("condstore", [True], indirect=True)
async def test_message_that_others_keep_changing_is_given_up(
    filled: Account, proxy: Proxy, tmp_path: Path
) -> None:
    turns = iter(range(100))

    def change(has: list[str]) -> tuple[set[str], set[str]]:
        store(filled, "+FLAGS", f"(theirs{next(turns)})")
        return {"\\Draft"}, set()

    async with mirror(proxy.account(filled), tmp_path) as here:
        ino = await the_message(here)
        with pytest.raises(Refused, match="keeps changing") as refused:
            await changer(here).change(ino, change)
        assert refused.value.code == "INUSE"
    assert "\\Draft" not in on_server(filled)


@pytest.mark.trio
async def test_message_that_is_gone(filled: Account, proxy: Proxy, tmp_path: Path) -> None:
    async with mirror(proxy.account(filled), tmp_path) as here:
        ino = await the_message(here)
        store(filled, "+FLAGS", "(\\Deleted)")
        with filled.client() as client:
            client.select("INBOX")
            client.expunge()
        with pytest.raises(MessageGone):
            await changer(here).change(ino, add("\\Flagged"))


@pytest.mark.trio
async def test_flag_that_the_mailbox_does_not_keep(filled: Account, tmp_path: Path) -> None:
    def limited(line: bytes) -> bytes:
        return b"* OK [PERMANENTFLAGS (\\Seen)] Limited\r\n" if b"PERMANENTFLAGS" in line else line

    with Proxy(filled.server, edits=[limited]) as proxy:
        async with mirror(proxy.account(filled), tmp_path) as here:
            ino = await the_message(here)
            for flag in ("$Work", "\\Flagged"):
                with pytest.raises(NotSupported, match="does not keep"):
                    await changer(here).change(ino, add(flag))
            await changer(here).change(ino, set_to())
            assert here.flags() == {1: set()}
    assert on_server(filled) == set()


@pytest.mark.trio
async def test_flags_of_a_mailbox_that_only_says_that_keywords_can_be_made(
    filled: Account, tmp_path: Path
) -> None:
    def limited(line: bytes) -> bytes:
        return b"* OK [PERMANENTFLAGS (\\*)] Flags\r\n" if b"PERMANENTFLAGS" in line else line

    with Proxy(filled.server, edits=[limited]) as proxy:
        async with mirror(proxy.account(filled), tmp_path) as here:
            await changer(here).change(await the_message(here), add("\\Flagged", "$Work"))
    assert {"\\Flagged", "$Work"} <= on_server(filled)
