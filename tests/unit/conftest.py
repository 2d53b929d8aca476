"""Unit tests run on every machine: without a server to be installed, and without the kernel's FUSE."""

import pytest


@pytest.fixture
def dovecot() -> None:
    """Fail the test that asks for it, or for an account of it."""
    pytest.fail("a test that needs Dovecot does not belong into tests/unit")


@pytest.fixture
def mount() -> None:
    """Fail the test that asks for it."""
    pytest.fail("a test that needs FUSE does not belong into tests/unit")
