"""Fetching ahead: a scan costs few round trips, whatever its order; nothing else is fetched unasked."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.mail import plain
from tests.support.mounting import DEADLINE, Mounter, wait_until
from tests.support.servers.dovecot import Account, Dovecot
from tests.support.servers.proxy import Proxy

COUNT = 400
DATE = 1_700_000_000


@pytest.fixture
def proxy(dovecot: Dovecot) -> Iterator[Proxy]:
    with Proxy(dovecot) as made:
        yield made


@pytest.fixture
def scanned(user: Account) -> dict[int, bytes]:
    """Messages whose order by name is the reverse of that by UID."""
    messages = {n + 1: plain(n, 2000) for n in range(COUNT)}
    user.deliver("INBOX", ((content, DATE - 86400 * uid, "S") for uid, content in messages.items()))
    return messages


def fetches(proxy: Proxy) -> list[bytes]:
    return [command for command in proxy.commands() if b"BODY.PEEK[])" in command]


def read_all(directory: Path, *, by_name: bool) -> dict[int, bytes]:
    paths = sorted(directory.iterdir()) if by_name else list(directory.iterdir())
    return {int(path.name.split(".")[-2]): path.read_bytes() for path in paths}


@pytest.mark.parametrize("by_name", [False, True])
def test_a_scan_is_fetched_in_batches(
    user: Account, mount: Mounter, proxy: Proxy, scanned: dict[int, bytes], by_name: bool
) -> None:
    made = mount(proxy.account(user))
    assert read_all(made.path / "INBOX", by_name=by_name) == scanned
    assert 3 <= len(fetches(proxy)) < COUNT / 10
    proxy.forget_commands()
    assert read_all(made.path / "INBOX", by_name=by_name) == scanned
    assert not fetches(proxy)


def test_without_a_budget_nothing_is_fetched_ahead(
    user: Account, mount: Mounter, proxy: Proxy, scanned: dict[int, bytes]
) -> None:
    made = mount(proxy.account(user), "--fetch-ahead", "0")
    some = list((made.path / "INBOX").iterdir())[:20]
    for path in some:
        assert path.read_bytes() == scanned[int(path.name.split(".")[-2])]
    assert len(fetches(proxy)) == len(some)


def test_the_budget_bounds_what_is_fetched_ahead(
    user: Account, mount: Mounter, proxy: Proxy, scanned: dict[int, bytes]
) -> None:
    made = mount(proxy.account(user), "--fetch-ahead", "100K")
    assert read_all(made.path / "INBOX", by_name=False) == scanned
    alone = [command for command in fetches(proxy) if re.search(rb"UID FETCH \d+ ", command)]
    assert COUNT / 2 < len(alone) < COUNT


def test_two_reads_are_no_scan(
    user: Account, mount: Mounter, proxy: Proxy, scanned: dict[int, bytes]
) -> None:
    made = mount(proxy.account(user))
    for path in list((made.path / "INBOX").iterdir())[:2]:
        path.read_bytes()
    assert len(fetches(proxy)) == 2
    assert made.status()["cache"]["bodies"] == 2


def test_a_message_in_a_batch_that_is_gone_does_not_spoil_the_others(
    user: Account, mount: Mounter, proxy: Proxy, scanned: dict[int, bytes]
) -> None:
    made = mount(proxy.account(user))
    paths = list((made.path / "INBOX").iterdir())
    with user.client() as client:
        client.select("INBOX")
        client.uid("STORE", "100", "+FLAGS", r"(\Deleted)")
        client.expunge()
    for path in paths:
        uid = int(path.name.split(".")[-2])
        if uid == 100:
            with pytest.raises(OSError):
                path.read_bytes()
        else:
            assert path.read_bytes() == scanned[uid]


def test_fetch_brings_everything_into_the_cache(
    user: Account, mount: Mounter, proxy: Proxy, scanned: dict[int, bytes]
) -> None:
    user.deliver("Archive", [(plain(9000, 400_000), DATE, "S")])
    made = mount(proxy.account(user))
    command = [sys.executable, "-m", "imapfs", "fetch", str(made.path)]
    done = subprocess.run(
        command, env=made.environment, capture_output=True, text=True, timeout=DEADLINE, check=True
    )
    assert done.stdout == f"{COUNT + 1} messages are in the cache\n"
    wait_until(lambda: made.status()["cache"]["bodies"] == COUNT + 1, "all bodies are cached")
    proxy.forget_commands()
    subprocess.run(command, env=made.environment, capture_output=True, timeout=DEADLINE, check=True)
    assert not fetches(proxy)


def test_fetch_outside_a_mount_is_one_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "imapfs", "fetch", str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr == (
        f"imapfs: {tmp_path} is not in an imapfs mount: 'imapfs status' lists the mounts\n"
    )
