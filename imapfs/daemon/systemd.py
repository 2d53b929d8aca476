"""The protocols of systemd: service status (sd_notify(3)), and log lines with priorities for the journal."""

import logging
import os
import socket
from typing import Final

_log = logging.getLogger(__name__)

_TIMEOUT: Final = 1.0
"""Seconds that a message may wait for a service manager that is busy."""
_PRIORITIES: Final = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3}


class Manager:
    """The service manager that started this process and expects status messages, if there is one."""

    def __init__(self, address: str | None) -> None:
        """``address`` is as in $NOTIFY_SOCKET: a path, or "@" and an abstract name; None for no manager."""
        self._address = address

    @classmethod
    def take(cls) -> "Manager":
        """Return the manager that the environment names, and remove it there for child processes."""
        return cls(os.environ.pop("NOTIFY_SOCKET", None))

    def tell(self, **fields: str) -> None:
        """Send fields such as ``READY="1"`` in one datagram. Failures are only logged."""
        if not self._address:
            return
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        # A newline would start another field.
        message = "\n".join(f"{name}={' '.join(value.split())}" for name, value in fields.items())
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
                sender.settimeout(_TIMEOUT)
                sender.sendto(message.encode(errors="surrogateescape"), address)
        except OSError as error:
            _log.debug("cannot notify the service manager: %s", error)


def is_journal(fd: int) -> bool:
    """Return whether a file descriptor is connected to the journal (systemd.exec(5), $JOURNAL_STREAM)."""
    try:
        status = os.fstat(fd)
    except OSError:
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def priority(level: int) -> str:
    """Return the prefix that gives a line in the journal the priority of a ``logging`` level
    (sd-daemon(3))."""
    return f"<{_PRIORITIES.get(level, 2)}>"
