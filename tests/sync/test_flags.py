"""Changes of flags on a real server, beside those of other clients."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trio
import trio.testing

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


# ---- several at once


@pytest.fixture
def several(user: Account) -> Account:
    user.deliver("INBOX", [(plain(n), DATE + n, "S") for n in range(6)])
    return user


@pytest.mark.trio
async def test_changes_that_come_together_share_a_round_trip_and_have_their_own_outcome(
    several: Account, condstore: bool, tmp_path: Path
) -> None:
    with Proxy(several.server, hide=() if condstore else ("CONDSTORE", "QRESYNC")) as proxy:
        async with mirror(proxy.account(several), tmp_path) as here:
            await here.refresh()
            flags = changer(here)
            inos = {uid: ino for uid, (ino, *_) in here.messages().items()}
            with several.client() as client:
                client.select("INBOX")
                client.uid("STORE", "3", "+FLAGS", "(\\Deleted)")
                client.expunge()
            proxy.forget_commands()
            outcomes: dict[int, MessageGone | None] = {}

            async def run(uid: int, wanted: Change) -> None:
                outcomes[uid] = None
                try:
                    await flags.change(inos[uid], wanted)
                except MessageGone as error:
                    outcomes[uid] = error

            async with trio.open_nursery() as nursery:
                for uid in range(1, 7):
                    nursery.start_soon(run, uid, add("\\Flagged", f"tag{uid}"))
            assert isinstance(outcomes.pop(3), MessageGone)
            assert set(outcomes.values()) == {None}
            stored = [number for number, one in enumerate(proxy.commands()) if b"UID STORE" in one]
            # The first to come goes alone; the others wait for it, and are sent together. The message that
            # is gone may not be asked for.
            assert len(stored) in {5, 6}
            assert stored[1:] == list(range(stored[1], stored[1] + len(stored) - 1))
            expected = {uid: {"\\Seen", "\\Flagged", f"tag{uid}"} for uid in (1, 2, 4, 5, 6)}
            assert {uid: found for uid, found in here.flags().items() if uid != 3} == expected
        assert {uid: found - {"\\Recent"} for uid, found in compare.flags(several).items()} == expected


@pytest.mark.trio
async def test_changes_of_others_do_not_end_with_the_one_that_carries_them_out(
    several: Account, tmp_path: Path
) -> None:
    with Proxy(several.server) as proxy:
        async with mirror(proxy.account(several), tmp_path) as here:
            await here.refresh()
            flags = changer(here)
            inos = {uid: ino for uid, (ino, *_) in here.messages().items()}
            stalled = proxy.fault(b"UID STORE", "stall")
            async with trio.open_nursery() as nursery:
                first, second = trio.CancelScope(), trio.CancelScope()

                async def run(uid: int, scope: trio.CancelScope) -> None:
                    with scope:
                        await flags.change(inos[uid], add("\\Flagged"))

                nursery.start_soon(run, 1, first)
                await trio.to_thread.run_sync(stalled.wait_hit)
                for uid, scope in ((2, second), (3, trio.CancelScope()), (4, trio.CancelScope())):
                    nursery.start_soon(run, uid, scope)
                await trio.testing.wait_all_tasks_blocked()
                first.cancel()
                await trio.testing.wait_all_tasks_blocked()
                second.cancel()
                proxy.resume()
            changed = {uid for uid, found in compare.flags(several).items() if "\\Flagged" in found}
            assert {3, 4} <= changed


@pytest.mark.trio
async def test_changes_of_one_message_that_come_together_are_all_made(
    filled: Account, proxy: Proxy, tmp_path: Path
) -> None:
    async with mirror(proxy.account(filled), tmp_path) as here:
        ino = await the_message(here)
        flags = changer(here)
        async with trio.open_nursery() as nursery:
            for number in range(5):
                nursery.start_soon(flags.change, ino, add(f"tag{number}"))
        assert here.flags() == {1: {"\\Seen", *(f"tag{number}" for number in range(5))}}
    assert on_server(filled) == {"\\Seen", *(f"tag{number}" for number in range(5))}
