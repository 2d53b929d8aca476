"""Text from outside is shown on one line that steers nothing."""

import pytest

from imapfs.log import printable


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain, Grüße 会議", "plain, Grüße 会議"),
        ("two\r\nlines\tand\x00more", "two lines and more"),
        ("\x1b[31mred\x1b[0m \x9b31m", "[31mred [0m 31m"),
        ("invoice\u202efdp.exe\u2066", "invoice fdp.exe"),
        ("👩\u200d👩\u200d👧", "👩\u200d👩\u200d👧"),
        ("\ud800 surrogate", "surrogate"),
        ("x" * 1000, "x" * 499 + "…"),
    ],
)
def test_printable(text: str, expected: str) -> None:
    assert printable(text) == expected
