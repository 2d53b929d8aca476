"""Sleep and changes of the network are noticed."""

import os
import subprocess
import sys

import pytest
import trio
import trio.testing

from imapfs.daemon import network
from imapfs.imap.pool import SessionPool
from imapfs.imap.session import Session
from tests.support.accounts import pool, until
from tests.support.mounting import DEADLINE, ROOT
from tests.support.servers.scripted import Scripted
from tests.support.servers.tls import CertificateAuthority

CHANGE = f"""
import fcntl, socket, struct, trio
from imapfs.daemon import network

async def main():
    changed = trio.Event()
    with trio.fail_after({DEADLINE}):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(network.watch, changed.set, lambda: None)
            await trio.testing.wait_all_tasks_blocked()
            assert not changed.is_set()
            with socket.socket() as control:  # SIOCSIFFLAGS: lo up
                fcntl.ioctl(control, 0x8914, struct.pack("16sh", b"lo", 1) + bytes(22))
            await changed.wait()
            nursery.cancel_scope.cancel()

import trio.testing
trio.run(main)
print("noticed")
"""


def test_another_address_is_noticed() -> None:
    # In a network of its own.
    command = ["unshare", "--map-root-user", "--net", sys.executable, "-c", CHANGE]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=2 * DEADLINE)
    assert done.stdout == "noticed\n", done.stderr


@pytest.mark.parametrize(("asleep", "times"), [(0.1, 0), (3600.0, 1)])
@pytest.mark.trio
async def test_a_sleep_is_told_from_a_clock_that_is_set(
    monkeypatch: pytest.MonkeyPatch, asleep: float, times: int
) -> None:
    resumed: list[None] = []
    slept = 0.0
    monkeypatch.setattr(network, "slept", lambda: slept)
    timer, clock = os.pipe()
    monkeypatch.setattr(network, "_never_due", lambda: timer)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(network.watch, lambda: None, lambda: resumed.append(None))
            await trio.testing.wait_all_tasks_blocked()
            slept += asleep
            os.write(clock, bytes(8))
            await trio.testing.wait_all_tasks_blocked(0.01)
            nursery.cancel_scope.cancel()
    finally:
        os.close(clock)
    assert len(resumed) == times


def test_the_timer_is_one() -> None:
    timer = network._never_due()
    try:
        with pytest.raises(BlockingIOError):
            os.read(timer, 8)
    finally:
        os.close(timer)


def _silently(session: Session) -> None:
    session.examine(b"INBOX")


@pytest.mark.trio
async def test_connections_from_before_a_sleep_are_not_waited_for(ca: CertificateAuthority) -> None:
    """The server has forgotten them, and says nothing any more on them."""

    def script(tag: bytes, command: bytes) -> object:
        return server.hang() if server.accepted == 1 and command[:7] == b"EXAMINE" else None

    with Scripted(ca, script=script) as server, trio.fail_after(DEADLINE):  # type: ignore[arg-type]
        async with pool(server, 2, timeout=600.0) as made, trio.open_nursery() as nursery:
            nursery.start_soon(made.run, _silently)
            await until(lambda: b'EXAMINE "INBOX"' in server.commands)
            made.resumed()
        assert server.accepted == 2


@pytest.mark.trio
async def test_a_connection_whose_address_is_gone_is_dropped(
    ca: CertificateAuthority, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Scripted(ca) as server, trio.fail_after(DEADLINE):
        async with pool(server) as made:
            await made.run(_silently)
            made.network_changed()
            assert (made.open, made.state) == (1, "online")
            monkeypatch.setattr(Session, "is_stranded", lambda _: True)
            made.network_changed()
            await _back(made)
        assert server.accepted == 2


async def _back(made: SessionPool) -> None:
    assert made.state == "connecting"
    await made.wait_for_reconnect()
    assert made.state == "online"
