"""A long run of tests.support.adversity: a part each on servers with and without MOVE, and on worse ones."""

import argparse
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from tests.support.adversity import KINDS, AdverseWorld, altered, without
from tests.support.servers.dovecot import Dovecot
from tests.support.servers.proxy import Proxy
from tests.support.servers.tls import CertificateAuthority
from tests.support.stateful import Figures, Violation

CHECK_EVERY = 40
"""Operations between two looks at everything."""


class Kind(NamedTuple):
    """A kind of server."""

    hide: tuple[str, ...] = ()
    alter: Callable[[bytes], bytes] | None = None


SERVERS: Final = {
    "MOVE": Kind(),
    "COPY": Kind(("MOVE",)),
    "no-UIDPLUS": Kind(("MOVE", "UIDPLUS")),
    "altering": Kind(alter=altered),
}
"""All that a run may be on; the first two by default."""


def run(
    server: Dovecot,
    directory: Path,
    operations: int,
    seed: int,
    name: str,
    leave_out: frozenset[str],
    *,
    check_every: int = CHECK_EVERY,
) -> Figures:
    """Run one world on a server of the kind ``name`` and return its figures. Raises Violation."""
    kind = SERVERS[name]
    with Proxy(server, hide=kind.hide, alter=kind.alter) as proxy:
        user = server.account(f"user{seed}{name.lower()}")
        world = AdverseWorld(user, proxy, directory, seed, leave_out)
        number = 0
        try:
            for number in range(1, operations + 1):
                world.step()
                if number % check_every == 0 or number == operations:
                    world.check()
                    show(f"{name}: {number} of {operations} operations\r")
        except BaseException as error:
            error.add_note("\n".join([f"after {number} operations:", *world.history[-200:]]))
            raise
        finally:
            world.close()
        return world.figures


def show(text: str) -> None:
    """Write to the terminal at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def main(operations: int, seed: int, servers: Sequence[str], leave_out: frozenset[str]) -> int:
    """Print the figures of a run; the exit code says whether nothing was lost or doubled."""
    started = time.monotonic()
    total = Figures()
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        with Dovecot(CertificateAuthority(directory), max_userip_connections=100) as server:
            for name in servers:
                try:
                    figures = run(server, directory / name, operations // len(servers), seed, name, leave_out)
                except (Violation, AssertionError, OSError) as error:
                    show(f"\nseed {seed}, {name}: {error}\n")
                    show("\n".join(getattr(error, "__notes__", [])) + "\n")
                    return 1
                total.operations += figures.operations
                total.failed += figures.failed
                total.faults += figures.faults
                total.checks += figures.checks
                total.versions += figures.versions
    show(f"{operations} operations, seed {seed}, {time.monotonic() - started:.0f} s: 0 lost, 0 doubled\n")
    show(f"versions of messages: {total.versions}, comparisons with the server: {total.checks}\n")
    for what, counted in (
        ("operations", total.operations),
        ("faults that struck", total.faults),
        ("operations that failed", total.failed),
    ):
        show(f"{what}: {_listed(counted)}\n")
    return 0


def _listed(counted: Counter[str]) -> str:
    return f"{counted.total()} (" + ", ".join(f"{name} {n}" for name, n in counted.most_common()) + ")"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="scripts/stateful", description="Random operations and faults.")
    parser.add_argument("operations", type=int, nargs="?", default=10_000)
    parser.add_argument("seed", type=int, nargs="?", default=1)
    parser.add_argument(
        "--on", nargs="+", choices=SERVERS, default=["MOVE", "COPY"], help="kinds of servers (MOVE COPY)"
    )
    parser.add_argument(
        "--without", type=without, default="", help=f"kinds to leave out, with commas: {', '.join(KINDS)}"
    )
    given = parser.parse_args()
    sys.exit(main(given.operations, given.seed, given.on, given.without))
