"""What `scripts/servers` checks, in short, on the emulated providers: they need nothing but Dovecot."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.acceptance.checks import CHECKS, Trial
from tests.support.acceptance.peers import Peer
from tests.support.acceptance.providers import PROVIDERS
from tests.support.servers.tls import CertificateAuthority

SHORT = ("list", "bytes", "sizes", "names", "mv", "rm", "cp", "rsync twice", "edit", "tags", "remote")


@pytest.fixture(scope="module", params=PROVIDERS, ids=lambda kind: kind.key)
def peer(request: pytest.FixtureRequest, ca: CertificateAuthority) -> Iterator[Peer]:
    with request.param(ca) as started:
        yield started


@pytest.mark.parametrize("check", SHORT)
def test_acceptance(peer: Peer, check: str, tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        outside = stack.enter_context(peer.outside())
        trial = Trial(peer, check, tmp_path, stack, outside, detailed=False)
        CHECKS[check](trial)
    assert trial.complaints() == []
