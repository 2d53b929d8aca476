"""One mount for minutes, with several processes, faults, restarts of the server, and a second client.

The changes and what must become of them are those of tests.support.stateful, here several at a time; beside
them programs read everything over and over. In the end the tree, all bytes and all flags are compared with
the server, and the figures say whether anything was lost or doubled, and whether the daemon has grown.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, NamedTuple

from tests.support.mounting import RobustMount
from tests.support.servers.dovecot import Account, Dovecot
from tests.support.servers.proxy import Action, Point, Proxy
from tests.support.servers.tls import CertificateAuthority
from tests.support.stateful import OPERATIONS, Figures, Version, Violation, World

TIMEOUT: Final = 4
"""Seconds: the mount's --timeout."""
AT_ONCE: Final = 5
FRAMES: Final = {"descriptors": 20, "threads": 10, "RSS": 40}
"""By how much each may have grown between the middle of the run and its end; RSS in MiB."""
_SPARE_INODES: Final = 20
"""Inodes that the kernel may hold beyond what there is: of what was deleted a moment ago."""
_ACTIONS: Final[tuple[Action, ...]] = ("cut", "close", "half-close", "corrupt", "stall")
_POINTS: Final[tuple[Point, ...]] = ("command", "answer", "upload", "literal")
_BUSY: Final = b"NO [UNAVAILABLE] Try again in 1 second"
_TROUBLE: Final = rb"APPEND|UID (MOVE|COPY|STORE|EXPUNGE|FETCH)|EXAMINE|SELECT|LIST|STATUS|AUTHENTICATE"


class LongMount(RobustMount):
    patience = 7200.0


class Sample(NamedTuple):
    """What the daemon holds."""

    descriptors: int
    threads: int
    rss: int
    """MiB."""

    @classmethod
    def of(cls, pid: int) -> "Sample":
        status = Path(f"/proc/{pid}/status").read_text()
        fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
        return cls(
            len([*Path(f"/proc/{pid}/fd").iterdir()]),
            int(fields["Threads"]),
            int(fields["VmRSS"].split()[0]) >> 10,
        )


class Soak(World):
    """A world without kills, in which the server fails as well as the connections."""

    mount_type = LongMount
    arguments = ("--timeout", str(TIMEOUT))

    def __init__(self, server: Dovecot, user: Account, proxy: Proxy, directory: Path, seed: int) -> None:
        self._server = server
        self._down: Callable[[], object] | None = None
        """What brings the server back."""
        super().__init__(user, proxy, directory, seed)

    @property
    def pid(self) -> int:
        return self._mount.pid

    def inodes(self) -> int:
        """How many the kernel holds on to."""
        return int(self._mount.status()["inodes"])

    # -- faults --------------------------------------------------------------------------------------------

    def _inject(self) -> None:
        self._heal()
        roll = self.random.random()
        if roll < 0.6:
            return
        if roll < 0.92:
            action = self.random.choice(_ACTIONS)
            point = self.random.choice(_POINTS)
            self._arm({"upload": b"APPEND", "literal": b"UID FETCH"}.get(point, _TROUBLE), action, point, 1)
            return
        match self.random.choice(["busy", "cut all", "slow", "refuse", "freeze", "restart"]):
            case "busy":
                self._arm(_TROUBLE, _BUSY, "command", 1)
                return
            case "cut all" as what:
                self._proxy.cut_all()
            case "slow" as what:
                self._proxy.latency = 0.05
                self._down = self._quicken
            case "refuse" as what:
                self._proxy.refuse()
                self._proxy.cut_all()
                self._down = self._proxy.accept
            case "freeze" as what:
                # Not for long: nobody knows what a server does with a command that was given up meanwhile.
                self._server.freeze()
                self._down = self._server.thaw
            case what:
                self._server.stop()
                self._down = self._server.start_again
        self.figures.faults[what] += 1
        self.history.append(f"  {what}")

    def _quicken(self) -> None:
        self._proxy.latency = 0.0

    def _heal(self) -> None:
        stalled = self._fault is not None and self._fault.action == "stall" and self._fault.hits
        super()._heal()
        if stalled:
            # What a connection holds that was given up must not arrive late.
            self._proxy.cut_all()
            self._proxy.resume()
        if self._down is not None:
            back, self._down = self._down, None
            back()

    def _learn_mailboxes(self) -> None:
        self._heal()
        super()._learn_mailboxes()

    def do(self, operation: str) -> None:
        if operation.startswith("other"):
            self._heal()
        super().do(operation)

    # -- several processes at a time -----------------------------------------------------------------------

    def _at_once(self, what: str, commands: Sequence[Sequence[str | Path]]) -> list[bool]:
        """Run programs beside each other, with perhaps a fault: which of them succeeded."""
        self._inject()
        self.figures.operations[what] += len(commands)
        with ThreadPoolExecutor(AT_ONCE) as executor:
            thaw = threading.Timer(TIMEOUT / 4, self._server.thaw)
            thaw.start()
            succeeded = list(executor.map(_run, commands))
            thaw.cancel()
        self.figures.failed[what] += succeeded.count(False)
        return succeeded

    def _victims(self) -> list[tuple[Path, str, Version]]:
        found: dict[int, tuple[Path, str, Version]] = {}
        for _ in range(AT_ONCE):
            if (victim := self._victim()) is not None:
                found[id(victim[2])] = victim
        return list(found.values())

    def copy_many(self) -> None:
        place = self._place()
        versions = [self._new(place) for _ in range(AT_ONCE)]
        self.history.append(f"copy {[number for number, _ in versions]} to {place}")
        commands: list[list[str | Path]] = []
        for number, version in versions:
            source = self._directory / f"{number}.eml"
            source.write_bytes(version.content)
            commands.append(["cp", source, self.root / place / self._name()])
        for (_, version), succeeded in zip(versions, self._at_once("cp", commands), strict=True):
            if not succeeded:
                version.places |= {"(nowhere)"}
        for command in commands:
            Path(command[1]).unlink()

    def move_many(self) -> None:
        victims, place = self._victims(), self._place()
        self.history.append(f"move {len(victims)} to {place}")
        commands: list[list[str | Path]] = [
            ["mv", path, self.root / place / self._name()] for path, _, _ in victims
        ]
        for victim, succeeded in zip(victims, self._at_once("mv", commands), strict=True):
            self._went(victim[2], victim[1], place, surely=succeeded)

    def remove_many(self) -> None:
        victims = self._victims()[:2]
        self.history.append(f"remove {len(victims)}")
        commands: list[list[str | Path]] = [["rm", path] for path, _, _ in victims]
        for victim, succeeded in zip(victims, self._at_once("rm", commands), strict=True):
            self._deleted(victim[2], victim[1], surely=succeeded)


MORE: Final = [*OPERATIONS, ("copy_many", 8), ("move_many", 6), ("remove_many", 4)]


class Readers:
    """Programs that read the whole mount again and again, each in a process of its own."""

    def __init__(self, root: Path, out: Path) -> None:
        self._commands: list[list[str | Path]] = [
            ["grep", "-r", "-c", "X-Version", root],
            ["rsync", "-a", "--delete", "--exclude=.*", f"{root}/", out],
            ["find", root, "-newermt", "2020-01-01", "-size", "+1k"],
            ["tar", "-cf", "/dev/null", root],
        ]
        self.rounds: Counter[str] = Counter()
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._loop, args=(c,)) for c in self._commands]
        for thread in self._threads:
            thread.start()

    def _loop(self, command: list[str | Path]) -> None:
        while not self._over.is_set():
            # What they cannot read at the moment they complain about.
            subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            self.rounds[str(command[0])] += 1
            self._over.wait(0.5)

    def close(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()


def _run(command: Sequence[str | Path]) -> bool:
    return subprocess.run(command, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL).returncode == 0


class Report(NamedTuple):
    """The figures of a run."""

    seconds: float
    figures: Figures
    rounds: Counter[str]
    commands: int
    logins: int
    samples: list[Sample]
    inodes: int
    """How many the kernel held on to in the end."""
    files: int
    """How many files and directories there were then."""
    violation: str

    @property
    def grown(self) -> list[str]:
        """What is more at the end than it may be."""
        middle, end = self.samples[len(self.samples) // 2], self.samples[-1]
        return [
            f"{name}: {before} -> {after}"
            for (name, allowed), before, after in zip(FRAMES.items(), middle, end, strict=True)
            if after - before > allowed
        ] + ([f"inodes: {self.inodes} of {self.files}"] if self.inodes > self.files + _SPARE_INODES else [])


def soak(directory: Path, seconds: float, seed: int) -> Report:
    """Run, compare, and return the figures."""
    commands: Counter[str] = Counter()
    samples: list[Sample] = []
    violation, inodes, files = "", 0, 0
    with (
        Dovecot(CertificateAuthority(directory), max_userip_connections=100) as server,
        Proxy(server) as proxy,
    ):
        world = Soak(server, server.account("soak"), proxy, directory / "world", seed)
        started = time.monotonic()
        try:
            with contextlib.closing(Readers(world.root, directory / "out")) as readers:
                while time.monotonic() < started + seconds or len(samples) < 3:
                    for _ in range(10):
                        (operation,) = world.random.choices([o for o, _ in MORE], [n for _, n in MORE])
                        world.do(operation)
                    count(proxy, commands)
                    samples.append(Sample.of(world.pid))
                    done = world.figures.operations.total()
                    show(f"{time.monotonic() - started:4.0f} s, {done} operations\r")
                world._heal()
            world._drain()
            files = 1 + sum(len(there) + len(names) for _, there, names in os.walk(world.root))
            inodes = world.inodes()
            world.check()
            count(proxy, commands)
        except (Violation, AssertionError, OSError) as error:
            violation = "\n".join([str(error), *world.history[-100:]])
        finally:
            world._heal()
            world.close()
    return Report(
        time.monotonic() - started,
        world.figures,
        readers.rounds,
        commands.total(),
        commands["AUTHENTICATE"],
        samples or [Sample(0, 0, 0)],
        inodes,
        files,
        violation,
    )


def count(proxy: Proxy, commands: Counter[str]) -> None:
    """Add what was said through the proxy since the last time."""
    commands.update(command.split(b" ")[0].decode("ascii", "replace") for command in proxy.commands())
    proxy.forget_commands()


def show(text: str) -> None:
    """Write to the terminal at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def lines(report: Report) -> Iterator[str]:
    """The figures for people."""
    figures = report.figures
    yield f"{report.seconds:.0f} s"
    yield f"operations: {_listed(figures.operations)}"
    yield f"  of these failed: {_listed(figures.failed)}"
    yield f"rounds of reading everything: {_listed(report.rounds)}"
    yield f"IMAP commands: {report.commands}, faults: {_listed(figures.faults)}"
    yield f"reconnects: {report.logins - 1}"
    yield f"versions of messages: {figures.versions}"
    if report.violation:
        yield report.violation
    else:
        yield "lost: 0, duplicated: 0; tree, bytes and flags are those of the server"
    middle = report.samples[len(report.samples) // 2]
    for name, first, mid, last in zip(FRAMES, report.samples[0], middle, report.samples[-1], strict=True):
        yield f"{name}{' (MiB)' if name == 'RSS' else ''}: start {first}, middle {mid}, end {last}"
    yield f"inodes: {report.inodes} held by the kernel, {report.files} files and directories"
    for grown in report.grown:
        yield f"GROWN: {grown}"


def _listed(counted: Counter[str]) -> str:
    return f"{counted.total()} (" + ", ".join(f"{name} {n}" for name, n in counted.most_common()) + ")"


def main(minutes: float, seed: int) -> int:
    """Print the figures; the exit code says whether all is well."""
    directory = Path(tempfile.mkdtemp(prefix="imapfs-soak-"))
    try:
        report = soak(directory, minutes * 60, seed)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    for line in lines(report):
        show(f"{line}\n")
    return 1 if report.violation or report.grown else 0


if __name__ == "__main__":
    given = [float(argument) for argument in sys.argv[1:3]]
    minutes, seed = (*given, *(10.0, 1.0)[len(given) :])
    sys.exit(main(minutes, int(seed)))
