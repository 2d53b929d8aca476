"""What a service tells systemd: how it is (sd_notify(3)), and log lines as the journal wants them."""

import logging
import os
import socket
from typing import Final

_log = logging.getLogger(__name__)

_PATIENCE: Final = 1.0
"""Seconds that a message may wait for a manager that is busy."""
_PRIORITIES: Final = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3}


class Manager:
    """The service manager that started this process, if one did and wants to hear of it."""

    def __init__(self, address: str | None) -> None:
        """``address`` as in $NOTIFY_SOCKET: a path, or a name with "@" before it; None for nobody."""
        self._address = address

    @classmethod
    def take(cls) -> "Manager":
        """The one that the environment names; programs started from here are not to speak to it."""
        return cls(os.environ.pop("NOTIFY_SOCKET", None))

    def tell(self, **fields: str) -> None:
        """Send fields such as ``READY="1"`` in one datagram. What goes wrong is no reason to fail."""
        if not self._address:
            return
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        # A newline would begin another field.
        message = "\n".join(f"{name}={' '.join(value.split())}" for name, value in fields.items())
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
                sender.settimeout(_PATIENCE)
                sender.sendto(message.encode(errors="surrogateescape"), address)
        except OSError as error:
            _log.debug("the service manager was not told: %s", error)


def is_journal(fd: int) -> bool:
    """Whether a file descriptor is connected to the journal, by $JOURNAL_STREAM (systemd.exec(5))."""
    try:
        status = os.fstat(fd)
    except OSError:
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def priority(level: int) -> str:
    """What makes the journal file a line under the syslog priority of a ``logging`` level (sd-daemon(3))."""
    return f"<{_PRIORITIES.get(level, 2)}>"
