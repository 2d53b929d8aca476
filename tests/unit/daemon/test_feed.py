"""The socket of `imapfs watch`."""

import os
import socket
from pathlib import Path

import pytest
import trio

from imapfs.daemon.feed import Feed
from imapfs.fs.events import SOCKET, address
from tests.support.mounting import DEADLINE

ROUNDS = 20


@pytest.mark.trio
async def test_a_reader_that_finds_the_socket_can_connect(tmp_path: Path) -> None:
    path = tmp_path / SOCKET
    for _ in range(ROUNDS):
        with trio.fail_after(DEADLINE):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(Feed(tmp_path).serve)
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
            nursery.start_soon(Feed(tmp_path).serve)
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
