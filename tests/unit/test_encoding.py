"""What IMAPClient encodes, with the guarantees that imapfs adds."""

import base64
import re
from collections.abc import Callable

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from imapfs.encoding import MAX_EPOCH, decode_utf7, encode_utf7, format_internaldate
from imapfs.imap.grammar import parse_date


def reference(text: str) -> bytes:
    """Encode modified UTF-7 in the fewest words: the definition that IMAPClient is compared with."""

    def shift(match: re.Match[str]) -> str:
        code = base64.b64encode(match[0].encode("utf-16-be")).decode()
        return "&-" if match[0] == "&" else f"&{code.rstrip('=').replace('/', ',')}-"

    return re.sub(r"&|[^ -~]+", shift, text).encode("ascii")


def outcome(encode: Callable[[str], bytes], text: str) -> bytes | None:
    """Return what ``encode`` makes of ``text``; None for a UnicodeEncodeError."""
    try:
        return encode(text)
    except UnicodeEncodeError:
        return None


@given(st.text(st.characters()))
@example("R&D")
@example("\ud800")
@example("é" * 1000)
def test_text_is_encoded_as_the_definition_says(text: str) -> None:
    assert outcome(encode_utf7, text) == outcome(reference, text)


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_encoded_text_is_decoded_again(text: str) -> None:
    assert decode_utf7(encode_utf7(text)) == text


@given(
    st.lists(
        st.sampled_from([b"&", b"-", b"+", b"&2AA-", b"&AOk-", b"AGE", b",", b"/", b"a", b"\xc3", b"\0"])
    ).map(b"".join)
    | st.binary()
)
@example(b"&AOk")
@example(b"&AGE-")
@example(b"&AOk-&AOk-")
@example(b"&AOl-")
@example(b"&+AOk-")
@example(b"&2D3cjA-")
def test_bytes_are_decoded_to_the_only_text_or_to_nothing(raw: bytes) -> None:
    text = decode_utf7(raw)
    assert text is None or reference(text) == raw


@pytest.mark.parametrize(
    ("epoch", "offset", "formatted"),
    [
        (837596665, -420, b"17-Jul-1996 02:44:25 -0700"),
        (0, 0, b"01-Jan-1970 00:00:00 +0000"),
        (0, -90, b"31-Dec-1969 22:30:00 -0130"),
        (-1, 0, b"01-Jan-1970 00:00:00 +0000"),
        (10**20, 345, b"14-Mar-2255 21:45:00 +0545"),
    ],
)
def test_dates_are_formatted_for_append(epoch: int, offset: int, formatted: bytes) -> None:
    assert format_internaldate(epoch, offset) == formatted


@given(st.integers(0, MAX_EPOCH), st.integers(-1439, 1439))
def test_formatted_dates_are_read_again(epoch: int, offset: int) -> None:
    assert parse_date(format_internaldate(epoch, offset)) == (epoch, offset)
