"""What another client moved is told from copies and new mail, whichever mailbox is synchronised first."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import trio
import trio.testing

from imapfs.model import ROOT, Ino, ModSeq, Uid, UidValidity
from imapfs.store.cache import Cache
from imapfs.store.rows import Directory, NewMessage
from imapfs.store.spool import Spool
from imapfs.sync.renames import MoveCoordinator, MoveDetector
from tests.support.accounts import session
from tests.support.mail import plain
from tests.support.servers.scripted import Scripted
from tests.support.servers.tls import CertificateAuthority

DATE = 1_700_000_000
VALIDITY = UidValidity(7)
"""What `Scripted` says of its INBOX."""


class Mailboxes(NamedTuple):
    """A cache in which INBOX has the messages 1, 2 and 3, and Archive has none."""

    cache: Cache
    inbox: Ino
    archive: Ino
    inodes: list[Ino]


@pytest.fixture
def known(tmp_path: Path) -> Iterator[Mailboxes]:
    cache = Cache.open(tmp_path / "cache", "uid")
    cache.set_tree([Directory((name,), name, b"/", True, "") for name in (b"INBOX", b"Archive")])
    inbox, archive = (cache.child(ROOT, name) for name in (b"INBOX", b"Archive"))
    assert inbox is not None
    assert archive is not None
    cache.set_state(inbox.ino, VALIDITY, 4, ModSeq(1), complete=True)
    added = cache.add_messages(inbox.ino, [message(number) for number in (1, 2, 3)])
    yield Mailboxes(cache, inbox.ino, archive.ino, [ino for ino, _ in added])
    cache.close()


def message(number: int, uid: int | None = None, *, date: int = DATE, size: int = 100) -> NewMessage:
    """Return the message with this Message-ID, in the mailbox where it has ``uid``."""
    return NewMessage(
        Uid(number if uid is None else uid), size, date, 0, "", ModSeq(1), "", "", "", f"<{number}@x>"
    )


def detector_of(known: Mailboxes) -> MoveDetector:
    """Return what a synchronisation of Archive detects moves with, while no other one runs."""
    coordinator = MoveCoordinator(set(), {}, Spool(known.cache.directory / "spool"))
    return MoveDetector(known.cache, known.archive, coordinator)


async def look(detector: MoveDetector, ca: CertificateAuthority, there: int) -> set[Ino]:
    """Have ``detector`` ask a server whose INBOX still has the messages up to the UID ``there``."""
    with Scripted(ca, [plain(n) for n in range(there)]) as server, session(server) as connected:
        return await trio.to_thread.run_sync(detector.check_sources, connected)


# -- moved, copied, or new


@pytest.mark.trio
async def test_what_is_still_elsewhere_is_a_copy_and_what_is_not_was_moved(
    known: Mailboxes, ca: CertificateAuthority
) -> None:
    detector = detector_of(known)
    unknown = message(9, 1)
    assert detector.keep_back([unknown, message(2, 2), message(3, 3)]) == [unknown]
    assert await look(detector, ca, there=2) == {known.inbox}
    new, moved, rewritten = detector.resolve()
    assert [m.uid for m in new] == [2]
    (was,) = moved
    assert (was.ino, was.parent, was.name) == (known.inodes[2], known.inbox, b"3.eml")
    node = known.cache.node(was.ino)
    assert node is not None
    assert (node.parent, node.uid, node.name) == (known.archive, 3, was.new_name)
    assert [node.ino for node in rewritten] == [was.ino], "nothing proves that its bytes are the same"
    assert detector.resolve() == ([], [], [])


@pytest.mark.parametrize("other", [message(3, date=DATE + 1), message(3, size=101), message(4)])
def test_message_that_differs_is_new(known: Mailboxes, other: NewMessage) -> None:
    assert detector_of(known).keep_back([other]) == [other]


def test_true_size_need_not_be_the_one_that_the_server_announces(known: Mailboxes) -> None:
    known.cache.set_size(known.inodes[2], 99)
    assert detector_of(known).keep_back([message(3)]) == []


def test_message_that_is_known_there_already_is_not_held_back(known: Mailboxes) -> None:
    known.cache.add_messages(known.archive, [message(3)])
    assert detector_of(known).keep_back([message(3)]) == [message(3)]


@pytest.mark.trio
@pytest.mark.parametrize("what", ["renamed meanwhile", "in use", "another UIDVALIDITY"])
async def test_message_that_cannot_be_taken_is_new(
    known: Mailboxes, ca: CertificateAuthority, what: str
) -> None:
    spool = Spool(known.cache.directory / "spool")
    detector = MoveDetector(known.cache, known.archive, MoveCoordinator(set(), {}, spool))
    if what == "another UIDVALIDITY":
        known.cache.set_state(known.inbox, UidValidity(8), 4, ModSeq(1), complete=True)
    assert detector.keep_back([message(3)]) == []
    await look(detector, ca, there=2)
    if what == "renamed meanwhile":
        known.cache.rename(known.inodes[2], b"own name.eml")
    if what == "in use":
        spool.create(known.inodes[2], known.inbox, b"3.eml", (b"INBOX",), 0o600)
    assert detector.resolve() == ([message(3)], [], [])
    node = known.cache.node(known.inodes[2])
    assert node is not None
    assert node.parent == known.inbox


def test_a_whole_archive_at_once_is_not_looked_for(known: Mailboxes) -> None:
    many = [message(3, uid) for uid in range(1, 1002)]
    assert detector_of(known).keep_back(many) == many


# -- who waits for whom


Finished = list[str]


@pytest.fixture
def locks() -> dict[Ino, trio.Lock]:
    return {Ino(2): trio.Lock(), Ino(3): trio.Lock()}


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    return Spool(tmp_path / "spool")


async def waits(call: Callable[[], object], nursery: trio.Nursery, finished: Finished, name: str) -> None:
    """Begin to wait; ``finished`` gets the name when that is over."""

    async def wait() -> None:
        await call()  # type: ignore[misc]
        finished.append(name)

    nursery.start_soon(wait)
    await trio.testing.wait_all_tasks_blocked()


@pytest.mark.trio
async def test_message_is_taken_from_a_mailbox_at_rest(
    locks: dict[Ino, trio.Lock], spool: Spool, autojump_clock: trio.testing.MockClock
) -> None:
    coordinator = MoveCoordinator({Ino(2)}, locks, spool)
    assert coordinator.can_take(Ino(10), Ino(3))
    async with locks[Ino(2)], locks[Ino(3)]:
        assert not coordinator.can_take(Ino(10), Ino(3))
        # Where its own synchronisation waits as well, nothing is about to change.
        async with trio.open_nursery() as nursery:
            nursery.start_soon(coordinator.wait_for_sources, Ino(3), {Ino(2)})
            await trio.testing.wait_all_tasks_blocked()
            assert coordinator.can_take(Ino(10), Ino(3))


@pytest.mark.trio
async def test_message_of_which_a_new_version_is_written_stays(
    locks: dict[Ino, trio.Lock], spool: Spool
) -> None:
    coordinator = MoveCoordinator(set(), locks, spool)
    spool.create(Ino(10), Ino(3), b"x.eml", (b"INBOX",), 0o600)
    assert not coordinator.can_take(Ino(10), Ino(3))
    assert coordinator.can_take(Ino(11), Ino(3))


@pytest.mark.trio
async def test_the_first_to_forget_waits_for_the_others(locks: dict[Ino, trio.Lock], spool: Spool) -> None:
    running = {Ino(2), Ino(3)}
    coordinator = MoveCoordinator(running, locks, spool)
    finished: Finished = []
    async with trio.open_nursery() as nursery:
        await waits(lambda: coordinator.wait_before_removal(Ino(2)), nursery, finished, "first")
        assert finished == []
        await waits(lambda: coordinator.wait_before_removal(Ino(3)), nursery, finished, "second")
    assert set(finished) == {"first", "second"}


@pytest.mark.trio
async def test_end_of_another_synchronisation_ends_the_waiting(
    locks: dict[Ino, trio.Lock], spool: Spool
) -> None:
    running = {Ino(2), Ino(3)}
    coordinator = MoveCoordinator(running, locks, spool)
    finished: Finished = []
    async with trio.open_nursery() as nursery:
        await waits(lambda: coordinator.wait_before_removal(Ino(2)), nursery, finished, "first")
        running.remove(Ino(3))
        coordinator.wake()
        await trio.testing.wait_all_tasks_blocked()
        assert finished == ["first"]


@pytest.mark.trio
async def test_nobody_is_waited_for_longer_than_a_moment(
    locks: dict[Ino, trio.Lock], spool: Spool, autojump_clock: trio.testing.MockClock
) -> None:
    coordinator = MoveCoordinator({Ino(2), Ino(3)}, locks, spool)
    began = trio.current_time()
    await coordinator.wait_before_removal(Ino(2))
    async with locks[Ino(3)]:
        await coordinator.wait_for_sources(Ino(2), {Ino(3)})
    assert trio.current_time() - began == 2.0
