"""Notifications on the person's desktop, if there is one and ``notify-send`` is installed."""

import logging
import shutil
import subprocess
import threading
from typing import Final

_log = logging.getLogger(__name__)

_TIMEOUT: Final = 5.0
"""Maximum seconds for a notification; without a desktop there may be no answer."""


def notify(title: str, text: str) -> None:
    """Show ``title`` and ``text`` for a while. Returns at once; failures are only logged."""
    command = shutil.which("notify-send")
    if command is None:
        _log.debug("no notification, since notify-send is not installed: %s", title)
        return
    # Desktops interpret markup in the text, but not in the title.
    for char, entity in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;")):
        text = text.replace(char, entity)
    # Not a daemon thread: the program must not exit before the notification is sent.
    threading.Thread(target=_run, args=([command, "--app-name=imapfs", "--", title, text],)).start()


def _run(command: list[str]) -> None:
    try:
        subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=_TIMEOUT,
            check=True,
        )
    except (OSError, subprocess.SubprocessError) as error:
        _log.debug("no notification: %s", error)
