"""The acceptance on every server that can be had on this machine; see tests/support/acceptance."""

import argparse
import sys
from pathlib import Path

from tests.support.acceptance.checks import CHECKS
from tests.support.acceptance.everywhere import PEERS
from tests.support.acceptance.matrix import LOG, run_server, table, write

PAGE = Path(__file__).parents[1] / "docs" / "servers.md"


def show(text: str) -> None:
    """Write to the terminal at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def main(arguments: list[str]) -> int:
    """Print the matrix; the exit code is 0 where nothing fails."""
    kinds = {kind.key: kind for kind in PEERS}
    parser = argparse.ArgumentParser(prog="scripts/servers", description=__doc__)
    parser.add_argument("servers", nargs="*", metavar="SERVER", help=f"of: {', '.join(kinds)}")
    parser.add_argument("--check", action="append", choices=[*CHECKS], help="only this check")
    parser.add_argument("--write", action="store_true", help="write the matrix into docs/servers.md")
    parser.add_argument("--detailed", action="store_true", help="print tracebacks and protocols")
    given = parser.parse_args(arguments)
    if unknown := [name for name in given.servers if name not in kinds]:
        parser.error(f"unknown server: {unknown[0]}; there are: {', '.join(kinds)}")
    if given.write and (given.servers or given.check):
        parser.error("--write writes the whole matrix: leave out servers and checks")
    names = given.check or [*CHECKS]
    rows = [run_server(kinds[key], names, show, detailed=given.detailed) for key in given.servers or [*kinds]]
    lines = [*table(rows, [*names, LOG])]
    show("\n" + "\n".join(lines) + "\n")
    if given.write:
        write(PAGE, lines)
    return 1 if any(row.fails for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
