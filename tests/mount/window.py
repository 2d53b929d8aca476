"""A real file manager shows what another client does without being asked to: run by scripts/window.

Not among the tests that always run, because of what it needs: an X server and a file manager.
"""

import contextlib
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.mail import plain
from tests.support.mounting import DEADLINE, Mounter, wait_until
from tests.support.servers.dovecot import Account
from tests.support.watching import wait_looking

DATE = 1_700_000_000
CONFIGURATION = "[ui]\nview_mode=list\nwin_width=900\nwin_height=400\nsplitter_pos=150\n"


class Desktop:
    """An X server without a screen, and a file manager in it that shows one directory."""

    def __init__(self, directory: Path, shown: Path, stack: contextlib.ExitStack) -> None:
        configuration = directory / "config" / "pcmanfm" / "default" / "pcmanfm.conf"
        configuration.parent.mkdir(parents=True)
        configuration.write_text(CONFIGURATION)
        receiver, sender = os.pipe()
        command = ["Xvfb", "-displayfd", str(sender), "-screen", "0", "900x400x24", "-nolisten", "tcp"]
        null = subprocess.DEVNULL
        server = subprocess.Popen(command, pass_fds=[sender], stdin=null, stdout=null, stderr=null)
        stack.callback(_end, server)
        os.close(sender)
        with os.fdopen(receiver) as display:
            number = display.readline().strip()
        self._environment = {
            **os.environ,
            "DISPLAY": f":{number}",
            "HOME": str(directory),
            "XDG_CONFIG_HOME": str(directory / "config"),
            "XDG_RUNTIME_DIR": str(directory),
            "LC_ALL": "C.UTF-8",
        }
        manager = subprocess.Popen(
            ["pcmanfm", "--no-desktop", shown], env=self._environment, stdin=null, stdout=null, stderr=null
        )
        stack.callback(_end, manager)
        self._run("xdotool", "search", "--sync", "--onlyvisible", "--class", "pcmanfm")

    def _run(self, *command: str) -> bytes:
        return subprocess.run(
            command, env=self._environment, capture_output=True, check=True, timeout=DEADLINE
        ).stdout

    def picture(self) -> bytes:
        """What is on the screen."""
        return self._run("import", "-window", "root", "png:-")

    def pixels(self) -> bytes:
        """What is on the screen above the status bar, which shows free space, once it changes no more."""
        seen: list[bytes] = []

        def still() -> bool:
            seen.append(
                self._run("import", "-window", "root", "-crop", "900x370+0+0", "-depth", "8", "rgb:-")
            )
            return len(seen) > 3 and seen[-1] == seen[-2] == seen[-3]

        wait_until(still, "a window that does not change")
        return seen[-1]

    def reload(self) -> None:
        """Have the file manager read the directory afresh."""
        self._run("xdotool", "search", "--onlyvisible", "--class", "pcmanfm", "key", "F5")


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    process.wait(DEADLINE)


@pytest.fixture
def desktop(tmp_path: Path) -> Iterator[Callable[[Path], Desktop]]:
    """Return a function that shows a directory until the test ends."""
    with contextlib.ExitStack() as stack:
        yield lambda shown: Desktop(tmp_path / "desktop", shown, stack)


def test_window_shows_what_another_client_does(
    user: Account, mount: Mounter, desktop: Callable[[Path], Desktop], tmp_path: Path
) -> None:
    artefacts = Path(os.environ.get("IMAPFS_ARTEFACTS") or tmp_path)
    user.deliver("INBOX", ((plain(n), DATE + n, "") for n in range(4)))
    inbox = mount(user).path / "INBOX"
    assert len(os.listdir(inbox)) == 4
    shown = desktop(inbox)
    shown.pixels()
    # Without the frame around the first row, which a reload takes away.
    shown.reload()
    before = shown.pixels()
    (artefacts / "window-before.png").write_bytes(shown.picture())

    def wait_for_change(old: bytes, what: str) -> bytes:
        wait_looking(lambda: shown.pixels() != old, what, inbox)
        new = shown.pixels()
        (artefacts / f"window-{what}.png").write_bytes(shown.picture())
        shown.reload()
        assert shown.pixels() == new, "only a reload showed it right"
        return new

    user.append("INBOX", plain(7), DATE)
    arrived = wait_for_change(before, "arrived")
    with user.client() as client:
        client.select("INBOX")
        client.uid("STORE", "1:2", "+FLAGS", "(\\Deleted)")
        client.expunge()
    wait_for_change(arrived, "expunged")
