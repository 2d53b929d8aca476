"""What is made of a draft before it is sent."""

import contextlib
import hashlib
import mmap
import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from imapfs.errors import Invalid
from imapfs.model import ROOT, Ino, UidValidity
from imapfs.store.journal import Attempt
from imapfs.store.spool import Draft, Spool
from imapfs.sync import append, identify, upload_notes


@pytest.fixture
def draft(tmp_path: Path) -> Draft:
    return Spool(tmp_path / "spool").create(Ino(7), ROOT, b"new.eml", (), 0o600)


def crlf(content: bytes) -> bytes:
    """The definition, without any care for size."""
    return re.sub(rb"(?<!\r)\n", b"\r\n", content)


def fit(draft: Draft, content: bytes) -> append.Payload:
    draft.file.write_bytes(content)
    return append.make_payload(draft)


@given(content=st.lists(st.sampled_from([b"\r", b"\n", b"a", b"\0", b"\xff"]), max_size=40).map(b"".join))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300, deadline=None)
def test_line_ends_become_crlf_wherever_a_chunk_ends(draft: Draft, content: bytes) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(append, "_CHUNK", 4)
        made = fit(draft, content)
    assert isinstance(made.data, mmap.mmap) == (len(content) > 4)
    assert made.data[:] == crlf(content)
    assert made.converted == (crlf(content) != content)
    assert draft.file.read_bytes() == content
    assert sorted(path.name for path in draft.spool.directory.iterdir()) == ["7", "7.json"]


@pytest.mark.parametrize("content", [b"\r\n", b"\n", b"\n\r", b"x\r\n"])
def test_a_large_message_at_the_border_of_a_real_chunk(draft: Draft, content: bytes) -> None:
    whole = b"x" * ((1 << 20) - 1) + content + b"y" * 10
    made = fit(draft, whole)
    assert made.data[:] == crlf(whole)
    assert made.converted == (crlf(whole) != whole)


def test_a_copy_is_not_changed_by_what_is_written_later(draft: Draft) -> None:
    whole = b"x" * (2 << 20)
    made = fit(draft, whole)
    with draft.file.open("r+b") as file:
        file.truncate(10)
    draft.touch()
    assert made.data[:] == whole
    assert not made.is_current(draft)


def test_a_draft_that_is_written_again_is_not_current(draft: Draft) -> None:
    draft.state = "sending"
    made = fit(draft, b"a: b\r\n")
    assert made.is_current(draft)
    draft.state = "open"
    assert not made.is_current(draft)


@given(content=st.binary(max_size=30), ends=st.sampled_from([b"", b"\r\n", b"\n", b"\r", b"\r\n\r\n"]))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_what_an_earlier_version_noted_is_still_looked_for(draft: Draft, content: bytes, ends: bytes) -> None:
    """Its digest was without the line ends at the end: all bytes are compared since."""
    whole = crlf(content + ends)
    draft.file.write_bytes(content + ends)
    noted = Attempt(b"INBOX", UidValidity(1), 5, 0, hashlib.sha256(whole.rstrip(b"\r\n")).hexdigest())
    assert upload_notes._complete_attempt(draft, noted).digest == hashlib.sha256(whole).hexdigest()
    other = replace(noted, digest="0")
    assert upload_notes._complete_attempt(draft, other) == other


@pytest.mark.parametrize(
    ("content", "clean"),
    [
        (b"Subject: x\r\n\r\nbody", True),
        (b"Subject: x\r\n\r\nb\xffdy", True),
        (b"Subject: \xff\r\n\r\nbody", False),
        (b"Subject: x\r\n\r\nbo\0dy", False),
    ],
)
def test_what_servers_are_known_to_change_is_not_clean(content: bytes, clean: bool) -> None:
    assert identify.is_clean(content) is clean


@pytest.mark.parametrize(
    ("start", "is_mail"),
    [
        (b"From: a\r\n", True),
        (b"X-Y:z\r\n", True),
        (b"Subject : x\r\n", True),
        (b"From a@b Fri Nov 20\r\n", False),
        (b"\r\nFrom: a\r\n", False),
        (b" From: a\r\n", False),
        (b"no header at all\r\n", False),
        (b"h\xe9ader: x\r\n", False),
        (b"x" * 77 + b": y\r\n", False),
        (b"", False),
    ],
)
def test_mail_begins_with_a_header_field(start: bytes, is_mail: bool) -> None:
    with contextlib.nullcontext() if is_mail else pytest.raises(Invalid):
        append.check_is_message(start)
