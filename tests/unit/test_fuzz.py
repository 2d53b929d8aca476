"""A short run of scripts/fuzz, the same each time."""

from pathlib import Path

import pytest

from scripts import fuzz
from tests.support.parsers import Parser


def test_random_input_breaks_no_parser() -> None:
    for number in range(1500):
        fuzz.run(1, number)


def test_an_input_that_fails_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(data: bytes) -> None:
        raise KeyError(data[:1])

    monkeypatch.setattr(fuzz, "FOUND", tmp_path)
    monkeypatch.setattr(fuzz, "PARSERS", {"broken": Parser(broken, (), (b"a", b"b"))})
    with pytest.raises(fuzz.Failed, match=r"broken: KeyError.*\n.*--repeat 'broken'"):
        fuzz.run(1, 1)
