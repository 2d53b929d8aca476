"""The pictures in docs/pictures: a file manager while mail arrives, and what the commands print."""

import contextlib
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.support.mail import arriving, sample_account
from tests.support.servers.account import DEADLINE
from tests.support.servers.dovecot import Account, Dovecot
from tests.support.servers.tls import CertificateAuthority

ROOT = Path(__file__).parent.parent
PICTURES = ROOT / "docs" / "pictures"
SIZE = (1100, 620)
FILE_MANAGER = f"""
[ui]
view_mode=list
sort=mtime;descending;
win_width={SIZE[0]}
win_height={SIZE[1]}
splitter_pos=160
pathbar_mode_buttons=1
"""
COMMANDS = {
    "check": ("imapfs check demo", 28),
    "status": ("imapfs status ~/mail", 12),
    "fetch": ("imapfs fetch ~/mail", 4),
}
"""What is shown in a terminal, and the lines that it takes."""


class Screen:
    """An X server without a screen, for programs of a person whose home is ``home``."""

    def __init__(self, home: Path, stack: contextlib.ExitStack) -> None:
        self._stack = stack
        receiver, sender = os.pipe()
        size = f"{SIZE[0]}x{SIZE[1]}x24"
        command = ["Xvfb", "-displayfd", str(sender), "-screen", "0", size, "-nolisten", "tcp"]
        self._start(command, None, pass_fds=[sender])
        os.close(sender)
        with os.fdopen(receiver) as display:
            number = display.readline().strip()
        self.environment = {
            **os.environ,
            "DISPLAY": f":{number}",
            "HOME": str(home),
            "XDG_RUNTIME_DIR": str(home),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "LC_ALL": "C.UTF-8",
            "TZ": "UTC",
        }
        for name in ("XDG_CONFIG_HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME", "XDG_STATE_HOME"):
            self.environment.pop(name, None)

    def _start(
        self, command: list[str], environment: dict[str, str] | None, pass_fds: list[int]
    ) -> subprocess.Popen[bytes]:
        null = subprocess.DEVNULL
        process = subprocess.Popen(
            command, env=environment, pass_fds=pass_fds, stdin=null, stdout=null, stderr=null
        )
        self._stack.callback(end, process)
        return process

    def start(self, *command: str) -> subprocess.Popen[bytes]:
        """Start a program on the screen; it ends with the screen."""
        return self._start(list(command), self.environment, [])

    def run(self, *command: str) -> bytes:
        """Return what a command prints."""
        done = subprocess.run(
            command, env=self.environment, stdout=subprocess.PIPE, check=True, timeout=DEADLINE
        )
        return done.stdout

    def save(self, program: str, name: str, until: Callable[[bytes], bool]) -> bytes:
        """Save and return a picture of a program's window once ``until`` holds for it and it is at rest."""
        found = self.run("xdotool", "search", "--sync", "--onlyvisible", "--class", program)
        identifier = found.split()[-1].decode()
        ends = time.monotonic() + DEADLINE
        last = b""
        while time.monotonic() < ends:
            now = self.run("import", "-window", identifier, "-strip", "png:-")
            if now == last and until(now):
                PICTURES.mkdir(exist_ok=True)
                (PICTURES / f"{name}.png").write_bytes(now)
                print(PICTURES.relative_to(ROOT) / f"{name}.png", flush=True)
                return now
            last = now
            time.sleep(0.5)
        raise RuntimeError(f"the screen for the picture {name} did not come to rest")


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process that was started here."""
    process.terminate()
    process.wait(DEADLINE)


def main() -> int:
    """Take all pictures and return the exit status."""
    with tempfile.TemporaryDirectory(prefix="alice-") as name, contextlib.ExitStack() as stack:
        home = Path(name)
        server = stack.enter_context(Dovecot(CertificateAuthority(home)))
        account = server.account("alice")
        for mailbox, content, date, flags in sample_account():
            account.deliver(mailbox, [(content, date, flags)])
        configure(home, server, account)
        screen = Screen(home, stack)
        mail = home / "mail"
        mail.mkdir()
        screen.run("imapfs", "mount", "demo", str(mail))
        stack.callback(screen.run, "imapfs", "umount", str(mail))
        window(screen, mail / "INBOX", account)
        for picture, (command, lines) in COMMANDS.items():
            terminal(screen, picture, command, lines, home)
    return 0


def configure(home: Path, server: Dovecot, account: Account) -> None:
    """Write the account into the configuration of the person at ``home``, and how the file manager looks."""
    password = home / "password"
    password.touch(mode=0o600)
    password.write_text(account.password)
    settings = {
        "host": server.host,
        "user": account.name,
        "password-file": str(password),
        "ca-file": str(server.authority.certificate),
    }
    config = home / ".config/imapfs/config.toml"
    config.parent.mkdir(parents=True)
    lines = [f'{key} = "{value}"' for key, value in settings.items()]
    config.write_text("\n".join(["[accounts.demo]", f"port = {server.port}", *lines, ""]))
    manager = home / ".config/pcmanfm/default/pcmanfm.conf"
    manager.parent.mkdir(parents=True)
    manager.write_text(FILE_MANAGER)


def window(screen: Screen, inbox: Path, account: Account) -> None:
    """A file manager shows INBOX; a message arrives and shows up by itself."""
    process = screen.start("pcmanfm", "--no-desktop", str(inbox))
    before = screen.save("pcmanfm", "window", lambda _: True)
    content, date = arriving()
    account.append("INBOX", content, date)
    screen.save("pcmanfm", "window-new-mail", lambda picture: picture != before)
    end(process)


def terminal(screen: Screen, picture: str, command: str, lines: int, home: Path) -> None:
    """A terminal shows what a command prints."""
    done = home / f"{picture}.done"
    script = f"printf '$ %s\\n' {shlex.quote(command)}; {command}; touch {done}; read -r _"
    process = screen.start(
        *("xterm", "-fa", "DejaVu Sans Mono", "-fs", "10", "-bg", "white", "-fg", "black", "-b", "8"),
        *("-geometry", f"132x{lines}+0+0", "+sb", "-e", "bash", "-c", script),
    )
    screen.save("xterm", picture, lambda _: done.exists())
    end(process)


if __name__ == "__main__":
    sys.exit(main())
