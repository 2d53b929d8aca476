"""The stand-in for trio: what it saves, and that other tasks have their turn nonetheless."""

import itertools
import logging
import select
import socket
import types
from collections.abc import Iterator

import pytest
import trio
from trio.testing import assert_no_checkpoints, wait_all_tasks_blocked

from imapfs.kernel import loop
from imapfs.kernel.loop import MAX_IN_A_ROW, MAX_SPIN, Lock, Requests, quick_requests

MANY = 10 * MAX_IN_A_ROW


class Requester:
    """The other end of the descriptor: a request is a byte."""

    def __init__(self) -> None:
        self._ours, theirs = socket.socketpair()
        self.theirs = theirs
        self.fd = theirs.fileno()

    def ask(self, requests: int = 1) -> None:
        self._ours.send(b"x" * requests)

    def close(self) -> None:
        self._ours.close()
        self.theirs.close()


@pytest.fixture
def requester() -> Iterator[Requester]:
    made = Requester()
    yield made
    made.close()


class Clock:
    """Seconds that pass only when a test says so, and at each look."""

    def __init__(self, a_look: float) -> None:
        self.now = 0.0
        self._a_look = a_look

    def perf_counter(self) -> float:
        self.now += self._a_look
        return self.now


class CountingPoll:
    """`select.poll`, with the number of times that it was asked."""

    asked = 0

    def __init__(self) -> None:
        self._poll = select.poll()

    def register(self, fd: int, events: int) -> None:
        self._poll.register(fd, events)

    def poll(self, timeout: float) -> object:
        CountingPoll.asked += 1
        return self._poll.poll(timeout)


# -- the turn of other tasks


@pytest.mark.trio
async def test_a_task_has_its_turn_after_a_bounded_number_of_requests(requester: Requester) -> None:
    requests, lock = Requests(spin=True), Lock()
    served = [0]
    seen: list[int] = []

    async def answer() -> None:
        """What pyfuse3 does: several of these take requests in turn."""
        while served[0] < MANY:
            async with lock:
                await requests.wait_readable(requester.fd)
            requester.theirs.recv(1)
            served[0] += 1

    async def watch() -> None:
        while served[0] < MANY:
            seen.append(served[0])
            await trio.lowlevel.checkpoint()

    requester.ask(2 * MANY)
    with trio.move_on_after(60) as deadline:
        async with trio.open_nursery() as nursery:
            for task in (answer, answer, answer, watch):
                nursery.start_soon(task)
    assert not deadline.cancelled_caught
    assert max(b - a for a, b in itertools.pairwise(seen)) <= 2 * MAX_IN_A_ROW


@pytest.mark.trio
async def test_a_thread_is_heard_during_a_flood(requester: Requester) -> None:
    requests = Requests(spin=True)
    over = trio.Event()

    async def answer() -> None:
        for _ in range(1_000_000):
            if over.is_set():
                return
            await requests.wait_readable(requester.fd)  # it is never read, so there is always another one
        pytest.fail("never heard")

    requester.ask()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(answer)
        # An upload is this: a thread, and word from it.
        await trio.to_thread.run_sync(trio.from_thread.run_sync, over.set)


@pytest.mark.trio
async def test_a_flood_can_be_cancelled(requester: Requester) -> None:
    requests = Requests(spin=True)
    requester.ask()
    with trio.CancelScope() as scope:
        scope.cancel()
        for _ in range(MAX_IN_A_ROW):
            await requests.wait_readable(requester.fd)
    assert scope.cancelled_caught


# -- waiting


@pytest.mark.trio
async def test_a_request_that_is_there_costs_no_turn(requester: Requester) -> None:
    requests = Requests(spin=True)
    requester.ask()
    with assert_no_checkpoints():
        await requests.wait_readable(requester.fd)


@pytest.mark.trio
async def test_a_request_that_comes_later_is_waited_for(requester: Requester) -> None:
    requests = Requests(spin=True)
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(requests.wait_readable, requester.fd)
            await wait_all_tasks_blocked()
            requester.ask()


@pytest.mark.parametrize(
    ("spin", "seconds", "asked"),
    [
        pytest.param(True, MAX_SPIN / 10, range(5, 12), id="close together"),
        pytest.param(True, MAX_SPIN * 10, range(1, 2), id="far apart"),
        pytest.param(False, MAX_SPIN / 10, range(1, 2), id="one processor"),
    ],
)
@pytest.mark.trio
async def test_only_requests_close_together_are_asked_for_again(
    requester: Requester, monkeypatch: pytest.MonkeyPatch, spin: bool, seconds: float, asked: range
) -> None:
    monkeypatch.setattr(loop, "time", Clock(a_look=seconds))
    monkeypatch.setattr(loop, "select", types.SimpleNamespace(poll=CountingPoll, POLLIN=select.POLLIN))
    requests = Requests(spin=spin)

    async def one() -> int:
        """Wait for a request that is not there yet, and return how often ``poll`` was asked."""
        CountingPoll.asked = 0
        async with trio.open_nursery() as nursery:
            nursery.start_soon(requests.wait_readable, requester.fd)
            await wait_all_tasks_blocked()
            before = CountingPoll.asked
            requester.ask()
        requester.theirs.recv(1)
        return before

    with trio.fail_after(60):
        assert await one() == 1
        assert await one() in asked


@pytest.mark.trio
async def test_after_a_pause_the_process_sleeps_at_once(
    requester: Requester, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(a_look=MAX_SPIN / 10)
    monkeypatch.setattr(loop, "time", clock)
    monkeypatch.setattr(loop, "select", types.SimpleNamespace(poll=CountingPoll, POLLIN=select.POLLIN))
    requests = Requests(spin=True)
    asked = []
    with trio.fail_after(60):
        for pause in (0.0, 1.0, 0.0):
            CountingPoll.asked = 0
            async with trio.open_nursery() as nursery:
                nursery.start_soon(requests.wait_readable, requester.fd)
                await wait_all_tasks_blocked()
                clock.now += pause
                requester.ask()
            requester.theirs.recv(1)
            asked.append(CountingPoll.asked)
    assert asked[0] == 1
    assert asked[1] > 1
    assert asked[2] == 1


# -- the lock


@pytest.mark.trio
async def test_a_free_lock_costs_no_turn() -> None:
    lock = Lock()
    with assert_no_checkpoints():
        async with lock:
            pass


@pytest.mark.trio
async def test_a_lock_is_for_one_task_at_a_time() -> None:
    lock = Lock()
    inside = [0]
    done = [0]

    async def use() -> None:
        for _ in range(20):
            async with lock:
                inside[0] += 1
                assert inside[0] == 1
                await trio.lowlevel.checkpoint()
                inside[0] -= 1
            done[0] += 1

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(use)
    assert done[0] == 200


@pytest.mark.trio
async def test_no_task_is_forgotten_when_others_stop_waiting() -> None:
    lock = Lock()
    had = []

    async def use(number: int, scope: trio.CancelScope) -> None:
        with scope:
            async with lock:
                had.append(number)

    scopes = [trio.CancelScope() for _ in range(6)]
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            async with lock:
                for number, scope in enumerate(scopes):
                    nursery.start_soon(use, number, scope)
                    await wait_all_tasks_blocked()
                scopes[2].cancel()
                await wait_all_tasks_blocked()
            # The first was woken, and is overtaken and then cancelled before it has its turn.
            async with lock:
                scopes[0].cancel()
                await wait_all_tasks_blocked()
    assert had == [1, 3, 4, 5]


@pytest.mark.trio
async def test_another_task_takes_the_next_request_while_one_waits_in_its_handler(
    requester: Requester,
) -> None:
    requests, lock = Requests(spin=False), Lock()
    answered = trio.Event()

    async def answer(first: bool) -> None:
        async with lock:
            await requests.wait_readable(requester.fd)
        requester.theirs.recv(1)
        if first:
            await answered.wait()
        else:
            answered.set()

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(answer, True)
            await wait_all_tasks_blocked()
            nursery.start_soon(answer, False)
            await wait_all_tasks_blocked()
            requester.ask(2)


# -- in the place of trio


def test_the_rest_is_trio_and_is_put_back() -> None:
    library = types.ModuleType("library")
    library.trio = trio  # type: ignore[attr-defined]
    with quick_requests(library):
        there = library.trio
        assert there.Lock is Lock
        assert there.open_nursery is trio.open_nursery
        assert there.ClosedResourceError is trio.ClosedResourceError
        assert there.lowlevel.notify_closing is trio.lowlevel.notify_closing
        assert there.lowlevel.wait_readable != trio.lowlevel.wait_readable
    assert library.trio is trio


def test_the_library_that_is_installed_has_its_loop_there() -> None:
    import pyfuse3

    before = vars(pyfuse3)["trio"]
    with quick_requests(pyfuse3):
        assert vars(pyfuse3)["trio"] is not before
    assert vars(pyfuse3)["trio"] is before


@pytest.mark.parametrize("attributes", [{}, {"trio": types.ModuleType("another")}])
def test_an_unknown_library_keeps_its_loop_and_the_log_says_so(
    attributes: dict[str, object], caplog: pytest.LogCaptureFixture
) -> None:
    library = types.ModuleType("library")
    vars(library).update(attributes)
    before = dict(vars(library))
    with caplog.at_level(logging.INFO), quick_requests(library):
        assert vars(library) == before
    assert len(caplog.records) == 1
    assert "pyfuse3" in caplog.text
