"""An account without a server, for the tests of the file system and of what the kernel has cached of it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.model import Model, model


@pytest.fixture
def account(tmp_path: Path) -> Iterator[Model]:
    """Return an account with the mailboxes INBOX, Work, Work/2024 and Work/2024/May."""
    with model(tmp_path) as made:
        made.list_mailboxes("INBOX", "Work", "Work/2024", "Work/2024/May")
        yield made
