"""What the rows use: a private server, mail on it, a delayed link to it, mounts, and the peers.

Where a row compares with mbsync, both begin as a program that is started and has no connection. Where it
compares with IMAPClient, both are logged in. Programs are measured from outside, as a person waits for them,
and their output is counted, so that nothing is quick because it did not do its work.
"""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import imapclient

from imapfs import mountinfo
from imapfs.atomic import replace_file
from imapfs.daemon import control
from imapfs.errors import ImapfsError
from scripts.benchmark.link import ROOT, Link
from scripts.benchmark.results import RowFailed, Settings
from tests.support.mail import plain
from tests.support.servers.dovecot import Account, Dovecot
from tests.support.servers.tls import CertificateAuthority

MAILBOX = "Archive"
"""The mailbox of every account here that something is read from."""
NEEDLE = b"needle-in-a-haystack"
_EVERY = 50
"""Every how many messages there is a `NEEDLE`."""
_EPOCH = 1_700_000_000
_SFTP_SERVER = "/usr/lib/openssh/sftp-server"
_BOXES = 100
"""Mailboxes of the account with very many messages."""
_DEADLINE = 20.0
"""Seconds in which a daemon must tell its status."""
_RESTED = 12.0
"""Seconds after which the threads of a pool that has nothing to do have ended."""


@dataclass(frozen=True, slots=True)
class Mounted:
    """A mount that is live."""

    path: Path
    pid: int
    seconds: float
    """How long ``imapfs mount`` took."""

    @property
    def mailbox(self) -> Path:
        return self.path / MAILBOX

    def status(self, field: str) -> int:
        """A number in ``/proc/PID/status``, summed over the threads where it is theirs."""
        # Each thread has its own file, and memory is the same in all of them.
        of_all = "status" if field.startswith("Vm") else "task/*/status"
        pattern = re.compile(rf"^{field}:\s*(\d+)", re.MULTILINE)
        texts = (path.read_text() for path in Path(f"/proc/{self.pid}").glob(of_all))
        return sum(int(found[1]) for text in texts if (found := pattern.search(text)))

    def used(self) -> float:
        """Seconds of processor time since the daemon began."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Million(NamedTuple):
    """What an account with very many messages takes."""

    first: float
    """Seconds of the first listing of the first half of the mailboxes."""
    second: float
    """The same of the second half."""
    peak: int
    """Resident bytes of the daemon after that, at most."""
    database: int
    """Bytes."""
    warm: list[float]
    """Seconds of ``ls -R`` afterwards."""
    remounted: list[float]
    """Seconds of ``ls -R`` in a new mount with this cache."""


class Bench:
    """The surroundings of one run below ``directory``, which must be empty and on a local disk."""

    def __init__(self, settings: Settings, directory: Path, server: Dovecot, link: Link) -> None:
        self.settings = settings
        self.server = server
        self.link = link
        self._directory = directory
        self._made = 0
        self._password = self._file("password", server.password)
        self._environment = {
            **os.environ,
            "HOME": str(directory),
            "XDG_CONFIG_HOME": str(directory / "config"),
            "LC_ALL": "C.UTF-8",
            "TZ": "UTC",
        }

    # ---- Time

    def repetitions(self) -> Iterator[int]:
        return iter(range(self.settings.repeat))

    def at_a_distance(self, rate: float = 0) -> int:
        """Delay the link as the settings say, at most ``rate`` bytes a second, and return its port."""
        self.link.set(self.settings.round_trip, rate)
        return self.link.port

    def time(self, *command: str | Path, lines: int | None = None) -> float:
        """Seconds that ``command`` takes; it must print so many lines. Raises RowFailed."""
        name = " ".join(map(str, command[2:4] if command[0] == sys.executable else command[:1]))
        started = time.perf_counter()
        # Through a pipe: grep stops at the first match where its output is /dev/null.
        try:
            done = subprocess.run(
                command,
                cwd=ROOT,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=self.settings.limit,
            )
        except subprocess.TimeoutExpired:
            raise RowFailed(f"{name} did not end within {self.settings.limit:g} s") from None
        seconds = time.perf_counter() - started
        if done.returncode != 0:
            said = done.stderr.decode(errors="replace").strip().partition("\n")[0]
            said = said.replace(f"{self._directory}/", "")
            raise RowFailed(f"{name}: exit code {done.returncode}: {said[:200]}")
        printed = done.stdout.count(b"\n")
        if lines is not None and printed != lines:
            raise RowFailed(f"{name} printed {printed} lines, not {lines}")
        return seconds

    def grep(self, directory: Path, messages: int) -> float:
        """Seconds of a ``grep -r`` that reads every byte."""
        return self.time("grep", "-rlF", NEEDLE.decode(), directory, lines=-(-messages // _EVERY))

    def ls(self, directory: Path, messages: int) -> float:
        """Seconds of ``ls -l``."""
        return self.time("ls", "-l", directory, lines=messages + 1)

    # ---- Mail

    @cached_property
    def archive(self) -> Account:
        """An account with ``messages`` in `MAILBOX`, of the sizes that mail has: 600 bytes to 200 KB."""
        rng = random.Random(1)
        sizes = (min(200_000, 600 + int(rng.lognormvariate(8.3, 1.4))) for _ in range(self.settings.messages))
        return self._filled("archive", list(sizes))

    @cached_property
    def crowd(self) -> Account:
        """An account with ``crowd`` messages of 1 KB in `MAILBOX`."""
        return self._filled("crowd", [1000] * self.settings.crowd)

    @cached_property
    def gathering(self) -> Account:
        """A fifth of `crowd`."""
        return self._filled("gathering", [1000] * (self.settings.crowd // 5))

    def new_account(self, sizes: Sequence[int], mailbox: str = MAILBOX) -> Account:
        """An account that nothing knows yet, with messages of these bytes."""
        return self._filled(self._fresh("account").name, sizes, mailbox)

    def _filled(self, name: str, sizes: Sequence[int], mailbox: str = MAILBOX) -> Account:
        account = self.server.account(name)
        # All of them seen: mbsync, as every Maildir program, puts the others into another directory.
        account.deliver(
            mailbox, ((message(number, size), _EPOCH + number, "S") for number, size in enumerate(sizes))
        )
        # Whoever comes first would pay for the server's own index.
        self.bare_metadata(account, self.server.port, mailbox)
        return account

    def count(self, account: Account, mailbox: str, criterion: str = "ALL") -> int:
        """How many messages another client finds there."""
        with account.client() as client:
            client.select(account.server_name(mailbox), readonly=True)
            return len(client.search(None, criterion)[1][0].split())

    def change(self, account: Account, number: int) -> int:
        """Another client adds 10 messages to `MAILBOX`, expunges 5 and flags 20; how many there are then.

        For each ``number`` other ones; none with a `NEEDLE`.
        """
        first = number * _EVERY + 2
        last = self.settings.crowd - 20 * number
        with account.client() as client:
            client.select(MAILBOX)
            for new in range(10):
                client.append(MAILBOX, "", "", plain(self.settings.crowd + 10 * number + new, 1000))
            client.uid("STORE", f"{last - 19}:{last}", "+FLAGS", "(\\Flagged)")
            client.uid("STORE", f"{first}:{first + 4}", "+FLAGS", "(\\Deleted)")
            client.uid("EXPUNGE", f"{first}:{first + 4}")
        return self.count(account, MAILBOX)

    # ---- imapfs

    @contextlib.contextmanager
    def mounted(
        self, account: Account, port: int, *options: str, cache: Path | None = None
    ) -> Iterator[Mounted]:
        """Mount through ``port`` with an empty cache, or with ``cache``, while the block lasts."""
        directory = self._fresh("mount")
        path = directory / "mnt"
        path.mkdir(parents=True)
        log = directory / "log"
        daemon: int | None = None
        try:
            command = self._mount_command(account, port, path, cache or directory / "cache", log)
            seconds = self.time(sys.executable, "-m", "imapfs", *command, *options)
            pid = control.read_status(path, _DEADLINE)["pid"]
            daemon = os.pidfd_open(pid)
            yield Mounted(path, pid, seconds)
        finally:
            _unmount(path, daemon)
            shutil.rmtree(directory)

    def _mount_command(
        self, account: Account, port: int, path: Path, cache: Path, log: Path
    ) -> tuple[str | Path, ...]:
        return (
            "mount", f"imaps://{account.name}@{self.server.host}:{port}", path,
            "--ca-file", self.server.authority.certificate, "--password-file", self._password,
            "--cache-dir", cache, "--log-file", log,
        )  # fmt: skip

    def fresh_cache(self) -> Path:
        """A cache directory that outlives the mount."""
        return self._fresh("cache")

    @cached_property
    def warm_cache(self) -> Path:
        """A cache, for mounts of `archive` through the link, that holds everything."""
        cache = self.fresh_cache()
        self.link.set(0)
        with self.mounted(self.archive, self.link.port, cache=cache) as mount:
            self.grep(mount.mailbox, self.settings.messages)
        return cache

    @contextlib.contextmanager
    def warm(self, *options: str) -> Iterator[Path]:
        """`MAILBOX` of `archive`, mounted at a distance, listed and read once."""
        cache = self.warm_cache
        with self.mounted(self.archive, self.at_a_distance(), *options, cache=cache) as mount:
            self.grep(mount.mailbox, self.settings.messages)
            self.ls(mount.mailbox, self.settings.messages)
            yield mount.mailbox

    def bare(self, mode: str) -> contextlib.AbstractContextManager[Path]:
        """The files of `maildir` in a bare pyfuse3 file system, ``rw`` or ``ro``, read once."""
        return self.peer_mount(
            lambda path: (sys.executable, "-m", "scripts.benchmark.bare", path, self.maildir / "cur", mode)
        )

    def bindfs(self) -> contextlib.AbstractContextManager[Path]:
        """The files of `maildir` in another directory by bindfs, read once."""
        return self.peer_mount(lambda path: ("bindfs", "-f", "-o", "ro", self.maildir / "cur", path))

    def rclone(self) -> contextlib.AbstractContextManager[Path]:
        """The files of `maildir` by rclone, with its full cache of attributes and bytes, read once."""
        cache = self._fresh("rclone")
        return self.peer_mount(
            lambda path: (
                "rclone", "mount", self.maildir / "cur", path, "--read-only", "--vfs-cache-mode", "full",
                "--dir-cache-time", "1h", "--attr-timeout", "1h", "--cache-dir", cache,
                "--config", "/dev/null",
            )
        )  # fmt: skip

    def sshfs(self) -> contextlib.AbstractContextManager[Path]:
        """The files of `maildir` by sshfs with caches that last an hour, read once.

        It talks to its server by a pipe, without ssh and a network. That is a favour to it.
        """
        transport = self._file("transport", f"#!/bin/sh\nexec {_SFTP_SERVER}\n")
        transport.chmod(0o700)
        return self.peer_mount(
            lambda path: (
                "sshfs", "-f", f"{self.server.host}:{self.maildir / 'cur'}", path,
                "-o", f"ssh_command={transport},ro,kernel_cache",
                "-o", "cache_timeout=3600,entry_timeout=3600,attr_timeout=3600",
            )
        )  # fmt: skip

    @contextlib.contextmanager
    def peer_mount(self, command: Callable[[Path], Sequence[str | Path]]) -> Iterator[Path]:
        """The files of `maildir` as the file system of a program in the foreground shows them, read once."""
        path = self._fresh("peer")
        path.mkdir()
        with self._in_foreground(path, command(path)):
            self.grep(path, self.settings.messages)
            yield path

    @contextlib.contextmanager
    def _in_foreground(self, path: Path, command: Sequence[str | Path]) -> Iterator[None]:
        """Run a program that mounts something on ``path`` and serves it."""
        with subprocess.Popen(command, cwd=ROOT, env=self._environment, stdin=subprocess.DEVNULL) as process:
            try:
                deadline = time.monotonic() + _DEADLINE
                while not path.is_mount():
                    if process.poll() is not None or time.monotonic() > deadline:
                        raise RowFailed(f"{Path(command[0]).name} did not mount")
                    time.sleep(0.01)
                yield
                subprocess.run(["fusermount3", "-u", path], check=True, capture_output=True)
                process.wait(_DEADLINE)
            finally:
                subprocess.run(["fusermount3", "-uz", path], capture_output=True)
                process.terminate()

    def profile(self) -> dict[str, float]:
        """Seconds of processor time of each layer in a cold ``grep -r`` of `archive`, with the start."""
        directory = self._fresh("profile")
        path = directory / "mnt"
        path.mkdir(parents=True)
        place = path, directory / "cache", directory / "log"
        mount = self._mount_command(self.archive, self.at_a_distance(), *place)
        sampled = (sys.executable, "-m", "scripts.benchmark.sampled", directory / "profile.json")
        with self._in_foreground(path, (*sampled, *mount, "--foreground")):
            self.grep(path / MAILBOX, self.settings.messages)
        spent: dict[str, float] = json.loads((directory / "profile.json").read_text())
        return spent

    def durable(self, sources: Path) -> float:
        """Seconds of writing the same files to the local disk, each safe from a power cut before the next."""
        directory = self._fresh("durable")
        directory.mkdir()
        started = time.perf_counter()
        for path in sorted(sources.iterdir()):
            replace_file(directory / path.name, path.read_bytes(), durable=True)
        return time.perf_counter() - started

    def at_once(self, commands: Sequence[Sequence[str | Path]]) -> float:
        """Seconds of several commands that run beside each other."""
        started = time.perf_counter()
        with ThreadPoolExecutor(len(commands)) as pool:
            list(pool.map(lambda command: self.time(*command), commands))
        return time.perf_counter() - started

    def wait_until_sent(self, mount: Mounted) -> float:
        """Seconds until everything that was put into the mount is on the server."""
        return self.time(sys.executable, "-m", "imapfs", "sync", mount.path)

    @cached_property
    def idle(self) -> tuple[float, float]:
        """Of a daemon that was used and then left alone: wake-ups a second, and processor time in percent."""
        with self.mounted(self.archive, self.at_a_distance()) as mount:
            self.ls(mount.mailbox, self.settings.messages)
            time.sleep(_RESTED)
            before, used = mount.status("voluntary_ctxt_switches"), mount.used()
            started = time.monotonic()
            time.sleep(min(20.0, 3.0 * self.settings.repeat))
            seconds = time.monotonic() - started
            wakeups = mount.status("voluntary_ctxt_switches") - before
            return wakeups / seconds, 100 * (mount.used() - used) / seconds

    @cached_property
    def million(self) -> "Million":
        """What an account with very many messages takes."""
        total, boxes = self.settings.million, _BOXES
        account = self.server.account("million")
        for box in range(boxes):
            numbers = range(box * total // boxes, (box + 1) * total // boxes)
            mailbox = f"Box{box:03}"
            account.deliver(mailbox, ((plain(n, 0), _EPOCH + n, "S") for n in numbers))
            # Whoever comes first would pay for the server's own index.
            items = "hdr.from hdr.to hdr.subject hdr.date hdr.message-id date.received size.virtual"
            self.server.doveadm("fetch", "-u", account.name, items, "mailbox", mailbox, "all")
        cache = self.fresh_cache()
        with self.mounted(account, self.server.port, cache=cache) as mount:
            halves = [
                [mount.path / f"Box{box:03}" for box in range(start, start + boxes // 2)]
                for start in (0, boxes // 2)
            ]
            # A line for each message, one for each directory, and empty ones between these.
            lines = total // 2 + 2 * (boxes // 2) - 1
            first, second = (self.time("ls", *half, lines=lines) for half in halves)
            peak = mount.status("VmHWM") * 1024
            warm = [self._list_all(mount, total) for _ in self.repetitions()]
        database = sum(path.stat().st_size for path in cache.glob("*/*.db*"))
        remounted: list[float] = []
        for _ in self.repetitions():
            with self.mounted(account, self.server.port, cache=cache) as mount:
                remounted.append(self._list_all(mount, total))
        return Million(first, second, peak, database, warm, remounted)

    def _list_all(self, mount: Mounted, total: int) -> float:
        seconds = time.perf_counter()
        found = subprocess.run(["ls", "-R", mount.path], capture_output=True, timeout=self.settings.limit)
        seconds = time.perf_counter() - seconds
        if (shown := found.stdout.count(b".eml\n")) != total:
            raise RowFailed(f"ls -R shows {shown} messages, not {total}")
        return seconds

    @cached_property
    def memory(self) -> tuple[int, int]:
        """Peak resident bytes of a daemon after ``ls`` and ``grep`` of `gathering`, and of `crowd`."""
        crowd = self.settings.crowd
        return self._peak(self.gathering, crowd // 5), self._peak(self.crowd, crowd)

    def _peak(self, account: Account, messages: int) -> int:
        with self.mounted(account, self.server.port) as mount:
            self.ls(mount.mailbox, self.count(account, MAILBOX))
            self.grep(mount.mailbox, messages)
            return mount.status("VmHWM") * 1024

    # ---- Peers

    @cached_property
    def maildir(self) -> Path:
        """`MAILBOX` of `archive` as mbsync makes it on the local disk, read once."""
        directory = self._fresh("maildir")
        self.mbsync(self.archive, self.server.port, directory)
        self.grep(directory / MAILBOX, self.settings.messages)
        return directory / MAILBOX

    def first_mbsync(
        self, account: Account, port: int, then: Callable[[Path], float] = lambda _: 0.0
    ) -> float:
        """Seconds of mbsync bringing `MAILBOX` to an empty disk and of what is done with it ``then``."""
        directory = self._fresh("maildir")
        try:
            return self.mbsync(account, port, directory) + then(directory / MAILBOX)
        finally:
            shutil.rmtree(directory)

    def mbsync(
        self, account: Account, port: int, directory: Path, mailbox: str = MAILBOX, *, push: bool = False
    ) -> float:
        """Seconds of one run of mbsync, at its best: without fsync, only our CA, all else as by default."""
        directory.mkdir(exist_ok=True)
        # Renamed in 1.5, where the old name draws a warning.
        tls = "TLSType" if _mbsync_version() >= (1, 5) else "SSLType"
        configuration = self._file(
            f"mbsyncrc-{directory.name}",
            f"""\
FSync no
IMAPAccount far
Host {self.server.host}
Port {port}
User {account.name}
Pass {self.server.password}
{tls} IMAPS
SystemCertificates no
CertificateFile {self.server.authority.certificate}

IMAPStore far
Account far

MaildirStore near
Path {directory}/
Inbox {directory}/INBOX
SubFolders Verbatim

Channel channel
Far :far:
Near :near:
Patterns {mailbox}
Sync {"Push" if push else "Pull"}
Create Both
SyncState *
""",
        )
        return self.time("mbsync", "-q", "-c", configuration, "channel")

    def bare_metadata(self, account: Account, port: int, mailbox: str = MAILBOX) -> float:
        """Seconds in which IMAPClient, logged in, selects a mailbox and fetches what a listing needs."""
        items = [
            "FLAGS",
            "INTERNALDATE",
            "RFC822.SIZE",
            "BODY.PEEK[HEADER.FIELDS (FROM TO SUBJECT DATE MESSAGE-ID)]",
        ]
        context = ssl.create_default_context(cafile=self.server.authority.certificate)
        with imapclient.IMAPClient(
            self.server.host, port, ssl_context=context, timeout=self.settings.limit
        ) as client:
            client.login(account.name, account.password)
            started = time.perf_counter()
            client.select_folder(mailbox, readonly=True)
            client.fetch("1:*", items)
            return time.perf_counter() - started

    # ---- Files

    def sources(self, count: int) -> Path:
        """A directory of ``count`` new messages, as a program would have saved them."""
        directory = self._fresh("sources")
        directory.mkdir()
        for number in range(count):
            (directory / f"{number:05}.eml").write_bytes(message(number, 4000))
        return directory

    def maildir_of(self, sources: Path, mailbox: str) -> Path:
        """The same messages in a Maildir that mbsync has not seen, with the line ends that it expects."""
        directory = self._fresh("maildir")
        for name in ("cur", "new", "tmp"):
            (directory / mailbox / name).mkdir(parents=True)
        for path in sorted(sources.iterdir()):
            target = directory / mailbox / "cur" / f"{_EPOCH}.{path.stem}.localhost:2,S"
            target.write_bytes(path.read_bytes().replace(b"\r\n", b"\n"))
        return directory

    def scratch(self) -> Path:
        """A path where there is nothing yet."""
        return self._fresh("out")

    def _fresh(self, name: str) -> Path:
        self._made += 1
        return self._directory / f"{name}-{self._made}"

    def _file(self, name: str, text: str) -> Path:
        path = self._directory / name
        path.touch(mode=0o600)
        path.write_text(text)
        return path


def message(number: int, size: int) -> bytes:
    """Message ``number`` of ``size`` bytes; some of them hold the `NEEDLE`."""
    if number % _EVERY:
        return plain(number, size)
    return plain(number, size - len(NEEDLE) - 2) + NEEDLE + b"\r\n"


@contextlib.contextmanager
def surroundings(settings: Settings, directory: Path) -> Iterator[Bench]:
    """Start the server and the link, and end them with everything that depends on them."""
    with Dovecot(CertificateAuthority(directory)) as server, Link(server.port) as link:
        yield Bench(settings, directory, server, link)


def _mbsync_version() -> tuple[int, ...]:
    done = subprocess.run(["mbsync", "--version"], capture_output=True, text=True, check=True)
    return tuple(int(part) for part in re.findall(r"\d+", done.stdout))


def _unmount(path: Path, daemon: int | None) -> None:
    """Unmount as a person does, else by force and with an end to the process of the pidfd ``daemon``."""
    try:
        if mountinfo.mount_at(path) is not None:
            control.unmount(path)
    except ImapfsError:
        subprocess.run(["fusermount3", "-uz", path], capture_output=True)
        if daemon is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(daemon, signal.SIGKILL)
    finally:
        if daemon is not None:
            os.close(daemon)
    if mountinfo.mount_at(path) is not None:
        raise RuntimeError(f"{path} is still mounted; unmount it (fusermount3 -uz), then remove it")
