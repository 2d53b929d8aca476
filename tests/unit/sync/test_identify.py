"""Which message is taken for which, and which is not."""

import mmap

import pytest

from imapfs.model import Ino, ModSeq, Uid, UidValidity
from imapfs.store.rows import NewMessage, Node
from imapfs.store.spool import Attempt
from imapfs.sync import upload
from imapfs.sync.identify import Fingerprint, digest, is_alike, is_upload, may_be_upload

MAIL = b"Subject: x\r\n\r\nbody\r\n"


def attempt(content: bytes, uidnext: int = 10) -> Attempt:
    return Attempt(b"INBOX", UidValidity(1), uidnext, len(content), digest(content))


@pytest.mark.parametrize(
    ("one", "other", "is_copy"),
    [
        (Fingerprint(5, 1, "<a>"), Fingerprint(5, 2, "<a>"), True),
        (Fingerprint(0, 1, "<a>"), Fingerprint(5, 2, "<a>"), True),
        (Fingerprint(5, 1, "<a>"), Fingerprint(6, 1, "<a>"), False),
        (Fingerprint(5, 1, "<a>"), Fingerprint(5, 1, "<b>"), False),
        (Fingerprint(5, 1, "<a>"), Fingerprint(5, 1, ""), False),
        (Fingerprint(5, 1, ""), Fingerprint(5, 1, ""), True),
        (Fingerprint(5, 1, ""), Fingerprint(5, 2, ""), False),
        (Fingerprint(0, 1, ""), Fingerprint(5, 1, ""), False),
    ],
)
def test_a_copy_has_the_same_message_id_and_size(one: Fingerprint, other: Fingerprint, is_copy: bool) -> None:
    assert one.matches(other) is is_copy


@pytest.mark.parametrize(
    ("uid", "added", "may_be"),
    [(10, 0, True), (11, 2, True), (9, 0, False), (10, 3, False), (10, -1, False)],
)
def test_an_upload_is_searched_among_later_messages_of_its_size(uid: int, added: int, may_be: bool) -> None:
    assert may_be_upload(attempt(MAIL), uid, len(MAIL) + added) is may_be


@pytest.mark.parametrize(
    ("uploaded", "content", "is_it"),
    [
        (MAIL, MAIL, True),
        (MAIL, MAIL + b"\r\n", True),
        (MAIL, MAIL.replace(b"body", b"else"), False),
        (b"Subject: \xff\r\n\r\nx", b"Subject: \xfe\r\n\r\nx", True),
        (b"Subject: \xff\r\n\r\nx", b"Subject: \xfe\r\n\r\nxy", False),
        (MAIL, MAIL.replace(b"body", b"b\0dy"), True),
    ],
)
def test_an_upload_has_the_same_bytes_but_for_what_servers_change(
    uploaded: bytes, content: bytes, is_it: bool
) -> None:
    assert is_upload(attempt(uploaded), content) is is_it


@pytest.mark.parametrize(
    ("announced", "size", "date", "alike"),
    [
        (5, 5, 1, True),
        (5, 6, 1, False),
        (5, 9, 1, False),
        (None, 6, 1, True),
        (5, 5, 2, False),
        (None, 5, 2, False),
    ],
)
def test_a_message_keeps_its_date_and_announced_size(
    announced: int | None, size: int, date: int, alike: bool
) -> None:
    """The true size (9) matches nothing; of a cache of an earlier version the announced one is not known."""
    node = Node(Ino(7), Ino(2), b"x.eml", Uid(3), 9, 1, 1, 0, 0, None, None, None, 0, announced)
    message = NewMessage(Uid(3), size, date, 0, "", ModSeq(0), "", "", "", "<a>")
    assert is_alike(node, message) is alike


@pytest.mark.parametrize("change", [None, 0, 4, 9])
def test_large_contents_are_compared_to_their_last_byte(
    change: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = b"0123456789"
    monkeypatch.setattr(upload, "_CHUNK", 4)
    with mmap.mmap(-1, len(content)) as data:
        data[:] = content
        if change is not None:
            data[change] = ord("x")
        assert upload._equal(content, data) is (change is None)
