"""What the kernel has to drop: what it has cached and what has changed, and nothing else."""

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from imapfs.kernel.invalidation import Invalidation, KernelCache
from imapfs.model import ROOT, Ino, Uid
from imapfs.sync.changes import Changes, Moved, Renamed
from tests.support.model import Model

pytestmark = pytest.mark.trio


@pytest.fixture
def kernel(account: Model) -> KernelCache:
    return KernelCache(account.tree)


async def told(kernel: KernelCache, changes: Changes) -> Invalidation:
    """Return what the kernel has to drop because of changes, if anything."""
    kernel.on_changes(changes)
    with trio.move_on_after(0):
        return await kernel.next_invalid()
    return Invalidation()


# -- references


async def test_references_are_counted(kernel: KernelCache) -> None:
    ino = Ino(7)
    assert kernel.holds(ROOT)
    assert not kernel.holds(ino)
    for _ in range(3):
        kernel.remember(ino)
    kernel.remember(Ino(8))
    assert len(kernel) == 2
    kernel.forget(ino, 2)
    assert kernel.holds(ino)
    kernel.forget(ino, 1)
    assert not kernel.holds(ino)
    assert len(kernel) == 1
    kernel.forget(ino, 1)
    assert len(kernel) == 1


async def test_with_the_last_reference_everything_is_forgotten(kernel: KernelCache) -> None:
    ino = Ino(7)
    for _ in range(2):
        kernel.remember(ino)
    kernel.pushed.add(ino)
    kernel.resized.add(ino)
    kernel.forget(ino, 1)
    assert ino in kernel.pushed
    assert ino in kernel.resized
    kernel.forget(ino, 1)
    assert len(kernel.pushed) == len(kernel.resized) == 0


# -- names


async def test_what_is_removed(account: Model, kernel: KernelCache) -> None:
    inbox = account.ino("INBOX")
    held, unknown, hidden = account.deliver("INBOX", 1, 2, 3)
    account.cache.hide(hidden)
    for ino in (held, hidden):
        kernel.remember(ino)
    gone = [node for ino in (held, unknown, hidden) for node in account.cache.remove_node(ino)]
    assert await told(kernel, Changes(inbox, gone=gone)) == Invalidation(
        attributes={inbox}, entries=[(inbox, b"1.eml", held)]
    )


async def test_what_is_added_changes_the_directory(account: Model, kernel: KernelCache) -> None:
    inbox = account.ino("INBOX")
    (ino,) = account.deliver("INBOX", 1)
    assert await told(kernel, Changes(inbox, [(ino, b"1.eml")])) == Invalidation(attributes={inbox})
    assert await told(kernel, Changes(inbox, replaced=[b"1.eml"])) == Invalidation(attributes={inbox})


async def test_what_is_moved_leaves_its_name(account: Model, kernel: KernelCache) -> None:
    inbox, work = account.ino("INBOX"), account.ino("Work")
    held, unknown = account.deliver("INBOX", 1, 2)
    kernel.remember(held)
    moved = [Moved(ino, inbox, b"%d.eml" % uid, b"x.eml") for uid, ino in ((1, held), (2, unknown))]
    assert await told(kernel, Changes(work, moved=moved)) == Invalidation(
        attributes={inbox, work}, names=[(inbox, b"1.eml")]
    )


async def test_flags_are_not_cached(account: Model, kernel: KernelCache) -> None:
    (ino,) = account.deliver("INBOX", 1)
    kernel.remember(ino)
    assert await told(kernel, Changes(account.ino("INBOX"), flagged=[ino])) == Invalidation()


async def test_a_removed_mailbox(account: Model, kernel: KernelCache) -> None:
    work = account.node(account.ino("Work"))
    kernel.remember(work.ino)
    assert await told(kernel, Changes(ROOT, gone=[work])) == Invalidation(
        attributes={ROOT}, entries=[(ROOT, b"Work", work.ino)]
    )


# -- bytes and sizes


async def test_a_resized_message(account: Model, kernel: KernelCache) -> None:
    inbox = account.ino("INBOX")
    held, unknown = account.deliver("INBOX", 1, 2)
    kernel.remember(held)
    assert await told(kernel, Changes(inbox, resized=[held, unknown])) == Invalidation(attributes={held})
    assert held in kernel.resized
    assert unknown not in kernel.resized


async def test_a_rewritten_file(account: Model, kernel: KernelCache) -> None:
    inbox = account.ino("INBOX")
    held, unknown = account.deliver("INBOX", 1, 2)
    kernel.remember(held)
    kernel.pushed.add(held)
    kernel.pushed.add(unknown)
    assert await told(kernel, Changes(inbox, rewritten=[held, unknown])) == Invalidation(contents={held})
    assert len(kernel.pushed) == 0


async def test_the_version_of_a_listing(account: Model, kernel: KernelCache) -> None:
    inbox, work = account.ino("INBOX"), account.ino("Work")
    (ino,) = account.deliver("INBOX", 1)

    def versions() -> list[tuple[int, int]]:
        return [kernel.listing_version(directory) for directory in (inbox, work)]

    before = versions()
    for changes in (
        Changes(inbox, flagged=[ino]),
        Changes(inbox, rewritten=[ino]),
        Changes(inbox, uploaded=[ino]),
    ):
        kernel.on_changes(changes)
        assert versions() == before
    for changes in (
        Changes(inbox, [(ino, b"1.eml")]),
        Changes(inbox, gone=[account.node(ino)]),
        Changes(inbox, replaced=[b"1.eml"]),
        # Of a message elsewhere, that the kernel does not even know: it may be in any page.
        Changes(account.ino("Work/2024"), resized=[ino]),
    ):
        kernel.on_changes(changes)
        assert versions()[0] != before[0]
        assert (versions()[1] != before[1]) == bool(changes.resized)
        before = versions()
    kernel.on_changes(Changes(work, moved=[Moved(ino, inbox, b"1.eml", b"2.eml")]))
    assert versions()[0] != before[0]
    assert versions()[1] != before[1]


# -- notifications


async def test_what_comes_together_is_dropped_together(account: Model, kernel: KernelCache) -> None:
    inbox, work = account.ino("INBOX"), account.ino("Work")
    (ino,) = account.deliver("INBOX", 1)
    kernel.remember(ino)
    kernel.on_changes(Changes(inbox, resized=[ino]))
    kernel.on_changes(Changes(work, replaced=[b"x"]))
    assert await kernel.next_invalid() == Invalidation(attributes={ino, work})
    assert await told(kernel, Changes(inbox, flagged=[ino])) == Invalidation()


async def test_waiting_ends_with_the_next_change(account: Model, kernel: KernelCache) -> None:
    inbox, batches = account.ino("INBOX"), list[Invalidation]()

    async def collect() -> None:
        while True:
            batches.append(await kernel.next_invalid())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(collect)
        for n in range(3):
            kernel.on_changes(Changes(inbox, flagged=[Ino(7)]))
            kernel.on_changes(Changes(inbox, replaced=[b"x"]))
            await wait_all_tasks_blocked()
            assert len(batches) == n + 1
        nursery.cancel_scope.cancel()
    assert batches == [Invalidation(attributes={inbox})] * 3


# -- a subtree


async def test_a_mounted_subtree(account: Model, kernel: KernelCache) -> None:
    work = account.ino("Work")
    account.tree.mount_below(work)
    (ino,) = account.deliver("Work", 1)
    kernel.remember(ino)
    node = account.node(ino)
    before = kernel.listing_version(ROOT)
    assert await told(kernel, Changes(work, gone=[node])) == Invalidation(
        attributes={ROOT}, entries=[(ROOT, b"1.eml", ino)]
    )
    assert kernel.listing_version(ROOT) != before
    moved = Moved(ino, work, b"1.eml", b"2.eml")
    year = account.ino("Work/2024")
    assert await told(kernel, Changes(year, moved=[moved])) == Invalidation(
        attributes={ROOT, year}, names=[(ROOT, b"1.eml")]
    )


async def test_the_accounts_root_is_not_the_mountpoint(account: Model, kernel: KernelCache) -> None:
    account.tree.mount_below(account.ino("Work"))
    year = account.ino("Work/2024")
    kernel.remember(year)
    before = kernel.listing_version(ROOT)
    # A mailbox that the kernel knows was moved out of the mount, and is renamed and removed there.
    account.cache.rename_directory(year, ROOT, b"Old", b"Work/2024", b"Old")
    moved = Moved(year, ROOT, b"Old", b"Older", Renamed(b"Old", b"Older", b"/"))
    assert await told(kernel, Changes(ROOT, moved=[moved])) == Invalidation()
    assert await told(kernel, Changes(ROOT, gone=[account.node(year)])) == Invalidation()
    assert kernel.listing_version(ROOT) == before


async def test_a_message_that_left_the_mount_and_is_removed(account: Model, kernel: KernelCache) -> None:
    account.tree.mount_below(account.ino("Work"))
    inbox = account.ino("INBOX")
    (ino,) = account.deliver("Work", 1)
    kernel.remember(ino)
    account.cache.move(ino, inbox, Uid(5), b"5.eml")
    (gone,) = account.cache.remove_node(ino)
    # The kernel knows no such directory, and refuses the notification.
    assert await told(kernel, Changes(inbox, gone=[gone])) == Invalidation(
        attributes={inbox}, entries=[(inbox, b"5.eml", ino)]
    )
