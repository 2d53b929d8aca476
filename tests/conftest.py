"""What every test may use: a private server, an empty account, and a check on what is logged."""

import itertools
import logging
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.mounting import Mounter, mounter
from tests.support.servers.dovecot import Account, Dovecot
from tests.support.servers.tls import CertificateAuthority

ExpectedLog = Callable[[str], None]

_user_numbers = itertools.count(1)


def pytest_sessionstart() -> None:
    """Let Ctrl-C end what tests start, also in a run that a script has put into the background."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def ca(tmp_path_factory: pytest.TempPathFactory) -> CertificateAuthority:
    """Make the certificate authority of this test run."""
    return CertificateAuthority(tmp_path_factory.mktemp("ca"))


@pytest.fixture(scope="session")
def dovecot(ca: CertificateAuthority) -> Iterator[Dovecot]:
    """Run one server for the whole test run; what a test does to it must not disturb other users."""
    with Dovecot(ca) as server:
        yield server


@pytest.fixture
def user(dovecot: Dovecot) -> Account:
    """Return an empty account that no other test uses."""
    return dovecot.account(f"user{next(_user_numbers)}")


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Mounter]:
    """Return a function that mounts an account, any number of times, until the test ends."""
    with mounter(tmp_path) as made:
        yield made


@pytest.fixture
def expected_log(log_guard: "LogGuard") -> ExpectedLog:
    """Return a function that allows, and demands, a warning or error matching a regular expression."""
    return log_guard.expect


@pytest.fixture(autouse=True)
def log_guard() -> Iterator["LogGuard"]:
    """Fail the test in which imapfs logs a warning or an error that `expected_log` does not allow."""
    guard = LogGuard()
    logger = logging.getLogger("imapfs")
    logger.addHandler(guard)
    yield guard
    logger.removeHandler(guard)
    if complaints := guard.complaints():
        pytest.fail("\n".join(complaints), pytrace=False)


class LogGuard(logging.Handler):
    """Collects the warnings and errors of one test."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._lines: list[str] = []
        self._expected: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.append(f"{record.levelname} {record.name}: {record.getMessage()}")

    def expect(self, pattern: str) -> None:
        self._expected.append(pattern)

    def complaints(self) -> list[str]:
        """Return one line for each record that nobody expected and each expectation that nothing met."""
        stray = [
            line for line in self._lines if not any(re.search(wanted, line) for wanted in self._expected)
        ]
        unmet = [
            wanted for wanted in self._expected if not any(re.search(wanted, line) for line in self._lines)
        ]
        return [f"logged unexpectedly: {line}" for line in stray] + [
            f"never logged: {wanted}" for wanted in unmet
        ]
