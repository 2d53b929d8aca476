"""Kills and power cuts at chosen changes of the disk. All of them: scripts/replay."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.replay import DATABASE, SPOOL, Replay, Wreck
from tests.support.servers.dovecot import Account, Dovecot
from tests.support.servers.proxy import Proxy
from tests.support.servers.tls import CertificateAuthority


@pytest.fixture(scope="module")
def server(ca: CertificateAuthority) -> Iterator[Dovecot]:
    # Not the one of other tests: it is restarted.
    with Dovecot(ca, max_userip_connections=100) as made:
        yield made


def judge(server: Dovecot, directory: Path, stop: int, only: str, wrecks: list[Wreck]) -> None:
    """Cut the story off, and look at these of the wrecks that differ."""
    account: Account = server.account(f"{directory.name}-{stop}"[-40:].lower())
    with Proxy(server) as proxy:
        replay = Replay(account, proxy, directory / "replay", stop, only)
        assert replay.was_cut_off
        for wreck in replay.wrecks:
            if wreck in wrecks:
                replay.judge(wreck)


@pytest.mark.parametrize("stop", [40, 110])
def test_a_kill_before_a_change_of_the_spool_loses_nothing(
    server: Dovecot, tmp_path: Path, stop: int
) -> None:
    judge(server, tmp_path, stop, SPOOL, ["kill"])


@pytest.mark.parametrize("stop", [30, 80])
def test_a_power_cut_before_a_change_of_the_spool_loses_nothing(
    server: Dovecot, tmp_path: Path, stop: int
) -> None:
    judge(server, tmp_path, stop, SPOOL, ["dropped", "bytes only", "names only"])


@pytest.mark.parametrize("stop", [60])
def test_a_kill_within_the_database_loses_nothing(server: Dovecot, tmp_path: Path, stop: int) -> None:
    judge(server, tmp_path, stop, DATABASE, ["kill"])
