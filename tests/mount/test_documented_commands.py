"""The commands of README and docs, as they are printed there, in a home with an account called ``work``."""

import itertools
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.mailboxes import everything, held
from tests.support.mounting import DEADLINE, ROOT, wait_until
from tests.support.servers.dovecot import Account

DATE = 1_795_184_000
"""2026-11-20 14:13 UTC."""
INVOICE = (
    b"From: Bob Builder <bob@example.org>\r\nSubject: Invoice\r\nDate: Fri, 20 Nov 2026 14:32:00 +0000\r\n"
    b"Message-ID: <invoice@example.org>\r\n\r\ninvoice 4711\r\n"
)
REPORT = INVOICE.replace(b"Invoice", b"Quarterly report").replace(b"invoice", b"report")
NOT_HERE = {
    "sudo ": "changes this machine",
    "scripts/": "has tests of its own",
    "imapfs setup": "tests/cli/test_setup.py",
    "imapfs check SOURCE": "a placeholder: tests/cli/test_check.py",
    "imapfs mount imaps://": "a server that is not here",
    "imapfs mount 'imaps://": "a server that is not here",
    "systemctl ": "tests/mount/test_service.py",
    "restic ": "may not be installed",
    "vim ": "tests/mount/test_write_tools.py",
    "openssl ": "about a file that is not here",
    "imapfs watch ": "does not end: see below",
    "inotifywait ": "does not end: see below",
}
"""Beginnings of commands that are not run, and why."""
_NO_COMMAND = re.compile(r"[\[#/]|[\w-]+ = |\d{4}-|work /|Archive  |\[ |done")


def commands(page: Path) -> list[str]:
    """Return the commands in the code blocks of a page that are run here."""
    found = [line[4:] for line in page.read_text().splitlines() if re.match(r"    \S", line)]
    lines = [line.removeprefix("$ ") for line in found]
    return [
        line
        for line in lines
        if not _NO_COMMAND.match(line) and not any(line.startswith(start) for start in NOT_HERE)
    ]


class Home:
    """A home directory with the account ``work``, and its mount once a command has made it."""

    def __init__(self, directory: Path, user: Account) -> None:
        self.path = directory
        self.user = user
        (directory / "bin").mkdir()
        for name, script in (
            ("imapfs", f'exec {sys.executable} -m imapfs "$@"'),
            ("notify-send", 'echo "$@" >>~/notified'),
        ):
            program = directory / "bin" / name
            program.write_text(f"#!/bin/sh\n{script}\n")
            program.chmod(0o755)
        password = directory / "password"
        password.touch(mode=0o600)
        password.write_text(user.password)
        configuration = directory / ".config" / "imapfs" / "config.toml"
        configuration.parent.mkdir(parents=True)
        configuration.write_text(
            f'[accounts.work]\nhost = "localhost"\nport = {user.server.port}\nuser = "{user.name}"\n'
            f'ca-file = "{user.server.authority.certificate}"\npassword-file = "{password}"\n'
        )
        self.environment = {
            "HOME": str(directory),
            "PATH": f"{directory}/bin:/usr/bin:/bin:/usr/sbin:/sbin",
            "PYTHONPATH": str(ROOT),
            "LC_ALL": "C.UTF-8",
        }

    def start(self, command: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            ["bash", "-c", command],
            env=self.environment,
            cwd=self.path,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, command: str) -> str:
        """Run a command, which must end with 0, and return what it says."""
        process = self.start(command)
        said, _ = process.communicate(timeout=DEADLINE)
        assert process.returncode == 0, f"{command}: {said}"
        return said

    def file(self, pattern: str) -> Path:
        (found,) = (self.path / "mail/work/INBOX").glob(pattern)
        return found


@pytest.fixture
def home(user: Account, tmp_path: Path) -> Iterator[Home]:
    user.deliver("INBOX", [(INVOICE, DATE, ""), (REPORT, DATE - 400 * 86400, ""), (REPORT, DATE, "")])
    user.deliver("Archive", [(INVOICE.replace(b"4711", b"4712"), DATE, "S")])
    made = Home(tmp_path, user)
    made.run("mkdir -p ~/mail/work")
    yield made
    made.run("imapfs umount ~/mail/work")


def test_first_screen(home: Home) -> None:
    mount, ls, grep, mv = commands(ROOT / "README.md")[:4]
    home.run(mount)
    assert {"Archive", "Drafts", "INBOX", "Junk", "Sent", "Trash"} <= set(home.run(ls).split())
    invoice = home.file("*Invoice*")
    assert home.run(grep).split() == [str(invoice)]
    assert invoice.name in mv.replace("_1432_", "_1413_").replace(".1234.", ".1.")
    home.run(mv.replace("_1432_", "_1413_").replace(".1234.", ".1."))
    assert INVOICE in [message.content for message in held(home.user, "Archive").values()]


def test_recipes(home: Home) -> None:
    home.run("imapfs mount work")
    for command in commands(ROOT / "README.md")[4:]:
        home.run(command.replace("FILE", str(home.file("*Invoice*"))))
    home.run("imapfs sync ~/mail/work")
    after = everything(home.user)
    assert [message.content for message in after["Archive/2025"]] == [REPORT]
    tagged = [message.content for message in after["INBOX"] if message.flags == {"invoice", "2026"}]
    assert tagged == [INVOICE]


@pytest.mark.parametrize("page", ["attributes.md", "durability.md", "connecting.md"])
def test_commands_of_docs(home: Home, page: str) -> None:
    """Where they say ~/mail, it is the mount of this account."""
    home.run("imapfs mount work ~/mail/work")
    shutil.copy(home.file("*Invoice*"), home.path / "mail.eml")
    home.run(f"cp mail.eml {home.path}/mail/work/Drafts/letter.eml")
    found = commands(ROOT / "docs" / page)
    assert found
    for command in found:
        command = command.replace("NAME", "work")
        if command.startswith(("imapfs mount", "imapfs umount")):
            continue  # it is mounted
        command = re.sub(r"~/mail(?=/(INBOX|Drafts))", "~/mail/work", command)
        home.run(command.replace("FILE", str(home.file("*Invoice*"))))
    home.run("imapfs sync ~/mail/work")


def test_new_mail_starts_a_program(home: Home) -> None:
    """The two commands that go on for ever."""
    home.run("imapfs mount work")
    readme = (ROOT / "README.md").read_text()
    loop = re.search(r"^    imapfs watch (?:.*\n)+?    done$", readme, re.M)
    follow = re.search(r"^    (inotifywait .*)$", (ROOT / "docs/watching.md").read_text(), re.M)
    assert loop is not None and follow is not None
    notified, named = home.path / "notified", home.path / "named"
    follow_here = follow[1].replace("~/mail/", "~/mail/work/")
    watching = [home.start(loop[0]), home.start(f"{{ {follow_here}; }} >>{named} 2>&1")]
    try:
        home.run(f"until grep -q established {named}; do sleep 0.1; done")
        sent = itertools.count()

        def told() -> bool:
            # Nothing says when `imapfs watch` has begun.
            home.user.append("INBOX", INVOICE.replace(b"4711", b"5%03d" % next(sent)), DATE)
            home.run("sleep 0.5")
            return notified.exists() and "New mail INBOX/" in notified.read_text()

        wait_until(told, "notify-send is run")
        wait_until(lambda: "new: 2026-11-20_1413_Bob" in named.read_text(), "the name is told")
    finally:
        for process in watching:
            subprocess.run(["pkill", "-KILL", "-s", str(process.pid)])
            process.wait(DEADLINE)
            assert process.stdout is not None
            process.stdout.close()


@pytest.mark.parametrize("page", sorted(path.name for path in [*ROOT.glob("docs/*.md"), ROOT / "README.md"]))
def test_every_option_that_is_shown_exists(page: str) -> None:
    """Also in the commands that cannot be run here."""
    from imapfs.cli.main import all_commands

    text = (ROOT / page if page == "README.md" else ROOT / "docs" / page).read_text()
    for name, rest in re.findall(r"^    (?:\$ )?imapfs ([a-z]+)(.*)$", text, re.M):
        known = {option for parameter in all_commands()[name].params for option in parameter.opts}
        shown = set(re.findall(r"(?<= )--[a-z-]+", rest.partition(" # ")[0]))
        assert shown <= known, f"imapfs {name}: {shown - known}"
