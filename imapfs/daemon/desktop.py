"""A word to the person at the desktop, where there is one and ``notify-send`` is installed."""

import logging
import shutil
import subprocess
import threading
from typing import Final

_log = logging.getLogger(__name__)

_PATIENCE: Final = 5.0
"""Seconds; without a desktop there may be nobody who answers."""


def notify(title: str, text: str) -> None:
    """Show ``title`` and ``text`` for a while; returns at once, and nothing that goes wrong is an error."""
    command = shutil.which("notify-send")
    if command is None:
        _log.debug("no notification, as there is no notify-send: %s", title)
        return
    # Desktops take the text, not the title, for markup.
    for char, entity in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;")):
        text = text.replace(char, entity)
    # Waited for at the end of the program, which else may be over before the notification is sent.
    threading.Thread(target=_run, args=([command, "--app-name=imapfs", "--", title, text],)).start()


def _run(command: list[str]) -> None:
    try:
        subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=_PATIENCE,
            check=True,
        )
    except (OSError, subprocess.SubprocessError) as error:
        _log.debug("no notification: %s", error)
