"""Random input for `tests.support.parsers`: until the time is over, or until an input is found that fails."""

import argparse
import hashlib
import random
import resource
import sys
import time
from pathlib import Path
from typing import Final

from tests.support.parsers import PARSERS, Parser

FOUND: Final = Path(__file__).parent.parent / "build" / "fuzz"
_MAX_PIECES: Final = 3000
_MAX_LATENCY: Final = 0.5
"""Seconds of processor time for any input."""
_PER_BYTE: Final = 50e-6
"""Seconds of processor time for each byte beyond that."""
_MAX_GROWTH: Final = 128 << 10
"""KiB by which the memory of the process may grow with one input."""


class Failed(Exception):
    """An input is too slow, takes too much memory, or raises what the parser must not raise."""


def write(parser: Parser, order: random.Random) -> bytes:
    """Return a random input for a parser: pieces in any order, some of them damaged."""
    pieces = order.choices(parser.pieces, k=int(_MAX_PIECES ** order.random()))
    if order.random() < 0.3:
        pieces = [order.choice(pieces)] * len(pieces) + pieces[:3]
    data = bytearray(order.choice(parser.starts) + b"".join(pieces) + order.choice([b"", parser.end]))
    for _ in range(order.choice([0, 0, 1, 5, 50])):
        at = order.randrange(len(data) + 1)
        match order.randrange(4):
            case 0:
                data[at:at] = bytes([order.randrange(256)])
            case 1:
                del data[at : at + order.randrange(1, 20)]
            case 2:
                data[at:at] = data[at : at + order.randrange(1, 200)]
            case _:
                data[at : at + 1] = order.choice(parser.pieces)
    return bytes(data)


def judge(parser: Parser, data: bytes) -> None:
    """Run one input. Raises Failed."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin = time.process_time()
    try:
        parser(data)
    except Exception as error:
        raise Failed(f"{type(error).__name__}: {error}") from error
    took = time.process_time() - begin
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    if took > _MAX_LATENCY + _PER_BYTE * len(data):
        raise Failed(f"{took:.2f} s for {len(data)} bytes")
    if grown > _MAX_GROWTH:
        raise Failed(f"{grown >> 10} MiB more memory for {len(data)} bytes")


def run(seed: int, number: int) -> None:
    """Judge the input ``number`` of ``seed``. Raises Failed, with how to repeat it."""
    order = random.Random(f"{seed} {number}")
    name = order.choice(list(PARSERS))
    data = write(PARSERS[name], order)
    try:
        judge(PARSERS[name], data)
    except Failed as failure:
        FOUND.mkdir(parents=True, exist_ok=True)
        kept = FOUND / hashlib.sha256(data).hexdigest()[:16]
        kept.write_bytes(data)
        raise Failed(f"{name}: {failure}\nrepeat: scripts/fuzz --repeat {name!r} {kept}") from failure


def main() -> int:
    """Fuzz and return the exit status: 1 if an input failed."""
    arguments = argparse.ArgumentParser(prog="scripts/fuzz", description=__doc__)
    arguments.add_argument("seconds", nargs="?", type=float, default=60.0)
    arguments.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    arguments.add_argument("--repeat", nargs=2, metavar=("PARSER", "FILE"))
    given = arguments.parse_args()
    try:
        if given.repeat:
            judge(PARSERS[given.repeat[0]], Path(given.repeat[1]).read_bytes())
            print("nothing is wrong with it")
            return 0
        print(f"seed {given.seed}; Ctrl-C stops", flush=True)
        began, number, said = time.monotonic(), 0, 0.0
        while (past := time.monotonic() - began) < given.seconds:
            run(given.seed, number)
            number += 1
            if sys.stdout.isatty() and past - said > 0.5:
                said = past
                print(
                    f"{number} inputs, {number / past:.0f}/s, {given.seconds - past:.0f} s left  ", end="\r"
                )
    except Failed as failure:
        print(failure, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        pass
    print(f"{number} inputs for {len(PARSERS)} parsers: none failed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
