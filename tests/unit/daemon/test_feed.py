"""The socket of `imapfs watch`."""

import json
import os
import socket
from pathlib import Path

import pytest
import trio

from imapfs.daemon.feed import Feed
from imapfs.fs.events import SOCKET, Event, Place, address
from imapfs.model import Ino, Uid
from tests.support.accounts import until
from tests.support.mounting import DEADLINE

ROUNDS = 20


@pytest.mark.trio
async def test_a_reader_that_finds_the_socket_can_connect(tmp_path: Path) -> None:
    path = tmp_path / SOCKET
    for _ in range(ROUNDS):
        with trio.fail_after(DEADLINE):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(Feed(tmp_path, lambda: None).serve)
                while not path.exists():
                    await trio.lowlevel.checkpoint()
                with trio.socket.socket(socket.AF_UNIX) as reader, address(tmp_path) as short:
                    await reader.connect(short)
                    assert b"watching" in await reader.recv(1 << 16)
                nursery.cancel_scope.cancel()
        assert os.listdir(tmp_path) == []


@pytest.mark.trio
async def test_sockets_that_a_kill_left_are_replaced(tmp_path: Path) -> None:
    for name in (SOCKET, f"{SOCKET}.new"):
        with socket.socket(socket.AF_UNIX) as left:
            left.bind(str(tmp_path / name))
    with trio.fail_after(DEADLINE):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(Feed(tmp_path, lambda: None).serve)
            with address(tmp_path) as short:
                while True:
                    with trio.socket.socket(socket.AF_UNIX) as reader:
                        try:
                            await reader.connect(short)
                        except ConnectionRefusedError:
                            continue
                        assert b"watching" in await reader.recv(1 << 16)
                        break
            nursery.cancel_scope.cancel()


def event(number: int) -> Event:
    return Event("arrived", Place(Ino(2), (b"INBOX",), b"%d.eml" % number), Ino(number), Uid(number), "")


@pytest.mark.trio
async def test_reader_that_is_slow_is_told_what_it_lost(tmp_path: Path) -> None:
    feed = Feed(tmp_path, lambda: None)
    count, records = 30_000, []
    with trio.fail_after(DEADLINE):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(feed.serve)
            await until((tmp_path / SOCKET).exists)
            with trio.socket.socket(socket.AF_UNIX) as reader, address(tmp_path) as short:
                await reader.connect(short)
                data = await reader.recv(1 << 16)
                for number in range(count):
                    feed.offer(event(number))
                while b"lost" not in data:
                    data += await reader.recv(1 << 16)
                records = [json.loads(line) for line in data.splitlines()]
            nursery.cancel_scope.cancel()
    kinds = [record["event"] for record in records]
    assert kinds == ["watching"] + ["arrived"] * (len(records) - 2) + ["lost"]
    assert 10_000 <= len(records) - 2 < count
    assert len(records) - 2 + records[-1]["count"] == count
