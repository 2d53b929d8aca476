"""What comes from outside costs time in proportion to its size, whatever it is.

The one place where tests look at time: processor time, at two sizes, with a wide margin. Linear work takes
eight times as long for eight times as much; what is quadratic takes 64 times as long.
"""

import gc
import itertools
import time

import pytest

from tests.support.parsers import PARSERS, Parser

_SMALL = 8_000
_FACTOR = 8
_MARGIN = 3
_LEAST = 0.006
"""Seconds for the small size that are nothing on any machine."""


def _seconds(parser: Parser, data: bytes) -> float:
    # A collection takes time for all that other tests have left.
    gc.disable()
    begin = time.process_time()
    try:
        parser(data)
        return time.process_time() - begin
    finally:
        gc.enable()


@pytest.mark.parametrize("name", PARSERS)
def test_parser_takes_linear_time(name: str) -> None:
    parser = PARSERS[name]
    for start, piece in itertools.product(parser.starts, parser.pieces):
        small, large = (
            start + piece * (size // len(piece)) + parser.end for size in (_SMALL, _SMALL * _FACTOR)
        )
        # The least of several, as other processes disturb the processor's caches.
        before = min(_seconds(parser, small) for _ in range(2))
        bound = _FACTOR * _MARGIN * max(before, _LEAST)
        assert min(_seconds(parser, large) for _ in range(2)) <= bound, (start, piece)
