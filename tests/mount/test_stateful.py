"""Random operations, faults, kills and a bad world: no message is lost, doubled or altered.

Long runs: scripts/stateful. Seeds that failed are added here.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from scripts.stateful import run
from tests.support.servers.dovecot import Dovecot
from tests.support.servers.tls import CertificateAuthority

OPERATIONS: Final = 40
CHECK_EVERY: Final = 20
"""Operations between two looks at everything."""


@pytest.fixture(scope="module")
def server(ca: CertificateAuthority) -> Iterator[Dovecot]:
    # A session that a kill has left behind counts until the server has noticed.
    with Dovecot(ca, max_userip_connections=100) as made:
        yield made


@pytest.mark.parametrize(
    ("kind", "seed"),
    [
        ("MOVE", 11),
        ("COPY", 12),
        ("no-UIDPLUS", 13),
        ("altering", 14),
    ],
)
def test_no_message_is_lost_doubled_or_altered(server: Dovecot, tmp_path: Path, kind: str, seed: int) -> None:
    run(server, tmp_path / "world", OPERATIONS, seed, kind, frozenset(), check_every=CHECK_EVERY)
