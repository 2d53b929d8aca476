"""Random operations, faults and kills: no message is lost or doubled. Long runs: scripts/stateful."""

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from tests.support.servers.dovecot import Dovecot
from tests.support.servers.proxy import Proxy
from tests.support.servers.tls import CertificateAuthority
from tests.support.stateful import OPERATIONS, World

CHECK_EVERY = 20
"""Operations between two looks at everything."""


@pytest.fixture(scope="module")
def server(ca: CertificateAuthority) -> Iterator[Dovecot]:
    # A session that a kill has left behind counts until the server has noticed.
    with Dovecot(ca, max_userip_connections=100) as made:
        yield made


@pytest.mark.parametrize("hide", [(), ("MOVE",)], ids=["MOVE", "COPY"])
def test_no_message_is_lost_or_doubled(server: Dovecot, hide: tuple[str, ...]) -> None:
    class Machine(RuleBasedStateMachine):
        """A world, and operations on it in an order that Hypothesis chooses."""

        made = 0

        def __init__(self) -> None:
            super().__init__()
            Machine.made += 1
            self._directory = TemporaryDirectory(ignore_cleanup_errors=True)
            self._proxy = Proxy(server, hide=hide)
            self._proxy.__enter__()
            self._world: World | None = None
            self._steps = 0

        @initialize(seed=st.integers(0, 2**32 - 1))
        def start(self, seed: int) -> None:
            user = server.account(f"{'-'.join(['stateful', *hide]).lower()}{Machine.made}")
            self._world = World(user, self._proxy, Path(self._directory.name), seed)

        @rule(operation=st.sampled_from([name for name, often in OPERATIONS for _ in range(often)]))
        def do(self, operation: str) -> None:
            assert self._world is not None
            self._world.do(operation)
            self._steps += 1

        @invariant()
        def hold(self) -> None:
            if self._world is not None and self._steps % CHECK_EVERY == CHECK_EVERY - 1:
                self._world.check()

        def teardown(self) -> None:
            try:
                if self._world is not None:
                    self._world.check()
            finally:
                if self._world is not None:
                    self._world.close()
                self._proxy.__exit__(None, None, None)
                self._directory.cleanup()

    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=3,
            stateful_step_count=60,
            deadline=None,
            derandomize=True,
            # What a server and a kernel do is not the same twice, so that there is nothing to be shrunk.
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        ),
    )
