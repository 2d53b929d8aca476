"""A long run of tests.support.stateful: half on a server with MOVE, half on one without it."""

import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.support.servers.dovecot import Dovecot
from tests.support.servers.proxy import Proxy
from tests.support.servers.tls import CertificateAuthority
from tests.support.stateful import Figures, Violation, World

CHECK_EVERY = 40
"""Operations between two looks at everything."""


def run(server: Dovecot, directory: Path, operations: int, seed: int, hide: tuple[str, ...]) -> Figures:
    """Run one world and return its figures. Raises Violation."""
    with Proxy(server, hide=hide) as proxy:
        world = World(server.account(f"user{seed}{''.join(hide).lower()}"), proxy, directory, seed)
        number = 0
        try:
            for number in range(1, operations + 1):
                world.step()
                if number % CHECK_EVERY == 0 or number == operations:
                    world.check()
                    show(f"{number} of {operations} operations\r")
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


def main(operations: int, seed: int) -> int:
    """Print the figures of a run; the exit code says whether nothing was lost or doubled."""
    started = time.monotonic()
    total = Figures()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        with Dovecot(CertificateAuthority(directory), max_userip_connections=100) as server:
            for hide in ((), ("MOVE",)):
                try:
                    figures = run(server, directory / "-".join(["world", *hide]), operations // 2, seed, hide)
                except (Violation, AssertionError, OSError) as error:
                    show(f"\nseed {seed}, without {hide or 'nothing'}: {error}\n")
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
    arguments = [int(argument) for argument in sys.argv[1:3]]
    sys.exit(main(*arguments, *(10_000, 1)[len(arguments) :]))
