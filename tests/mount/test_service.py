"""imapfs as a service: the manager is told, the journal gets its lines, a person hears of a refused login."""

import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from imapfs.daemon import systemd
from tests.cli.test_main import DEADLINE, ROOT, SOURCE, Cli
from tests.support.mounting import Mounter, wait_until
from tests.support.servers.dovecot import Account

UNIT = ROOT / "share/systemd/user/imapfs@.service"


@pytest.fixture
def cli(tmp_path: Path) -> Iterator[Cli]:
    command = Cli(tmp_path)
    yield command
    command.clean_up()


class Manager:
    """The receiving end of $NOTIFY_SOCKET."""

    def __init__(self, address: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.settimeout(DEADLINE)
        self._socket.bind(address.replace("@", "\0", 1) if address.startswith("@") else address)

    def __enter__(self) -> "Manager":
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def hear(self) -> list[str]:
        """The fields of the next message."""
        return self._socket.recv(4096).decode().split("\n")


# ---- The service manager


@pytest.mark.parametrize("kind", ["path", "abstract"])
def test_manager_is_told_when_the_mount_is_live_and_when_it_ends(cli: Cli, kind: str) -> None:
    address = f"@imapfs-test-{os.getpid()}" if kind == "abstract" else str(cli.home / "notify")
    cli.extra = {"NOTIFY_SOCKET": address}
    with Manager(address) as manager, cli.start(*cli.mount_arguments(), "--foreground") as process:
        assert manager.hear() == ["READY=1", f"STATUS={SOURCE} on {cli.mountpoint}: online"]
        assert os.path.ismount(cli.mountpoint)
        assert cli.run("umount", cli.mountpoint).returncode == 0
        assert manager.hear()[0] == "STOPPING=1"
        assert process.wait(DEADLINE) == 0


def test_status_cannot_hold_another_field(tmp_path: Path) -> None:
    with Manager(str(tmp_path / "notify")) as manager:
        systemd.Manager(str(tmp_path / "notify")).tell(STATUS="the server said\nMAINPID=1")
        assert manager.hear() == ["STATUS=the server said MAINPID=1"]


def test_manager_that_is_not_there_is_no_trouble(cli: Cli) -> None:
    cli.extra = {"NOTIFY_SOCKET": "/nonexistent/notify"}
    with cli.start(*cli.mount_arguments(), "--foreground") as process:
        wait_until(lambda: os.path.ismount(cli.mountpoint), "mounted")
        cli.run("umount", cli.mountpoint)
        assert process.wait(DEADLINE) == 0


# ---- The journal


def test_journal_gets_a_line_with_a_priority_for_each_record(cli: Cli) -> None:
    arguments = ["mount", SOURCE, str(cli.mountpoint), "--password-file", str(cli.password), "--foreground"]
    code = "from tests.cli.test_main import run_with_stand_in as run; run()"
    command = [sys.executable, "-c", code, *arguments]
    journal = cli.home / "journal"
    with journal.open("wb") as stream:
        status = os.fstat(stream.fileno())
        cli.extra = {"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"}
        subprocess.run(command, env=cli.environment("break"), stderr=stream, timeout=DEADLINE)
    lines = journal.read_text().splitlines()
    assert lines[0] == "<6>imapfs.daemon.mount: first\\nsecond \\x1b[31m Secret(...)"
    bug = r"<3>imapfs.daemon.background: internal error\\nTraceback .*RuntimeError: a bug"
    assert re.fullmatch(bug, lines[1])
    assert lines[2].startswith("<3>imapfs: internal error: RuntimeError: a bug")
    assert len(lines) == 3


# ---- A person is needed


@pytest.fixture
def notifications(tmp_path: Path) -> Iterator[Path]:
    """A directory for PATH with a notify-send that leaves there what it is told, a word a line."""
    directory = tmp_path / "bin"
    directory.mkdir()
    script = directory / "notify-send"
    script.write_text(
        '#!/bin/sh\nprintf "%s\\n" "$@" >>"${0%/*}/told.new"; mv "${0%/*}/told.new" "${0%/*}/told"\n'
    )
    script.chmod(0o755)
    yield directory


def test_refused_login_of_a_service_is_shown_on_the_desktop_and_not_tried_again(
    user: Account, mount: Mounter, notifications: Path
) -> None:
    made = mount.prepare(user, "--foreground")
    wrong = "not-the-password"
    (made.path.parent / "password").write_text(wrong)
    done = subprocess.run(
        made.command,
        env={**made.environment, "PATH": f"{notifications}:{os.environ['PATH']}"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )
    assert done.returncode == 3, done.stderr
    _, _, title, text = (notifications / "told").read_text().splitlines()
    assert title == f"{user.server.host} refuses the login"
    assert user.name in text
    assert str(made.path) in text
    assert wrong not in title + text


def test_refusal_that_a_person_sees_at_once_is_not_shown_again(cli: Cli, notifications: Path) -> None:
    cli.extra = {"PATH": f"{notifications}:{os.environ['PATH']}"}
    result = cli.mount(stand_in="reject")
    assert (result.returncode, result.stderr) == (3, "imapfs: the server refuses the login\n")
    assert not (notifications / "told").exists()


def test_no_password_to_be_had_has_an_exit_code_of_its_own(cli: Cli) -> None:
    assert cli.run("mount", SOURCE, cli.mountpoint, "--password-command", "exit 7").returncode == 3


def test_library_that_is_gone_is_one_line_that_names_the_packages(cli: Cli) -> None:
    line = cli.refusal(*cli.mount_arguments(), stand_in="unlinked")
    assert "libfuse3.so.3" in line
    assert "install the packages fuse3 and libfuse3-dev" in line


# ---- The unit


def test_unit_is_what_systemd_understands(tmp_path: Path) -> None:
    shutil.copy(UNIT, tmp_path)
    done = subprocess.run(
        ["systemd-analyze", "--user", "verify", "--man=no", tmp_path / "imapfs@work.service"],
        env={**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )
    assert (done.returncode, done.stderr) == (0, "")
