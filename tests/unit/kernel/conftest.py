"""An account without a server, as for the file system."""

from tests.unit.fs.conftest import account

__all__ = ["account"]
