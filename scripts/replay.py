"""Every change of the spool, and a sample of those of the database, cut off; see tests.support.replay."""

import argparse
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.support.replay import DATABASE, SPOOL, Replay, Wrong
from tests.support.servers.dovecot import Dovecot
from tests.support.servers.proxy import Proxy
from tests.support.servers.tls import CertificateAuthority


def show(text: str) -> None:
    """Write to the terminal at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


class Run:
    """All replays on one kind of server."""

    def __init__(self, server: Dovecot, directory: Path, hide: tuple[str, ...]) -> None:
        self._server = server
        self._directory = directory
        self._hide = hide
        self._number = 0
        self.done: Counter[str] = Counter()
        self.wrong: list[str] = []

    def replay(self, stop: int, only: str) -> bool:
        """Cut off before change number ``stop`` and look at all that may be left; false at the end."""
        self._number += 1
        name = f"{self._number}{''.join(self._hide).lower()}"
        with Proxy(self._server, hide=self._hide) as proxy:
            replay = Replay(self._server.account(f"u{name}"), proxy, self._directory / name, stop, only)
            for wreck in replay.wrecks:
                self.done[wreck] += 1
                try:
                    replay.judge(wreck)
                except (Wrong, AssertionError, OSError) as error:
                    self.wrong.append(f"{only} change {stop}, {wreck}: {error}")
                    show(f"\n{self.wrong[-1]}\n")
            replay.close()
        show(f"{only} {stop}\r")
        return replay.was_cut_off


def main(first: int, last: int, step: int, sample: int, seed: int, hide: tuple[str, ...]) -> int:
    """Print what is wrong; the exit code says whether anything is."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        with Dovecot(CertificateAuthority(directory), max_userip_connections=100) as server:
            run = Run(server, directory, hide)
            for stop in range(first, last + 1, step):
                if not run.replay(stop, SPOOL):
                    break
            for stop in sorted(random.Random(seed).sample(range(1, 300), sample)):
                run.replay(stop, DATABASE)
    counted = ", ".join(f"{wreck} {n}" for wreck, n in run.done.items())
    show(f"\n{time.monotonic() - started:.0f} s; mounts: {counted}; wrong: {len(run.wrong)}\n")
    return 1 if run.wrong else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="scripts/replay", description="Cut off at every change of the disk."
    )
    parser.add_argument("--first", type=int, default=1, help="the first change of the spool (1)")
    parser.add_argument("--last", type=int, default=10_000, help="the last (10000, beyond the end)")
    parser.add_argument("--step", type=int, default=1, help="from one to the next (1)")
    parser.add_argument("--sample", type=int, default=20, help="how many changes of the database (20)")
    parser.add_argument("--seed", type=int, default=1, help="which of those (1)")
    parser.add_argument("--hide", nargs="*", default=(), help="extensions that the server lacks")
    given = parser.parse_args()
    sys.exit(main(given.first, given.last, given.step, given.sample, given.seed, tuple(given.hide)))
