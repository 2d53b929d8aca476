"""Which message is taken for which, and which is not."""

import mmap
from collections.abc import Callable
from typing import cast

import pytest

from imapfs.imap.grammar import FetchData
from imapfs.imap.session import Session
from imapfs.model import Ino, ModSeq, Uid, UidValidity
from imapfs.store.journal import Attempt
from imapfs.store.rows import NewMessage, Node
from imapfs.sync import upload
from imapfs.sync.identify import Fingerprint, Sought, digest, find_uploads, is_alike, message_id_of

MAIL = b"Subject: x\r\n\r\nbody\r\n"


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


ID = b"Message-ID: <a@b>\r\n"
SENT = ID + MAIL
OTHER = SENT.replace(b"body", b"else")


class Mailbox:
    """A mailbox for `find_uploads`: its messages by UID. Counts the bodies that are fetched."""

    def __init__(self, messages: dict[int, bytes], uidvalidity: int = 1, uidnext: int = 100) -> None:
        self.messages = messages
        self.uidnext = uidnext
        self.uidvalidity = uidvalidity
        self.highestmodseq = 0
        self.fetched: list[int] = []
        self.passes = 0

    def examine(self, mailbox: bytes) -> "Mailbox":
        assert mailbox == b"INBOX"
        return self

    def fetch_metadata_from(self, uidnext: int, take: Callable[[FetchData], None]) -> None:
        self.passes += 1
        for uid, content in self.messages.items():
            head = content[: content.find(b"\r\n\r\n") + 2]
            take(FetchData(uid=Uid(uid), size=len(content), body=head))

    def fetch_body(self, mailbox: bytes, uidvalidity: int, uid: int) -> bytes:
        self.fetched.append(uid)
        return self.messages[uid]


def sought(sent: bytes, *others: int, uidnext: int = 10) -> Sought:
    attempt = Attempt(b"INBOX", UidValidity(1), uidnext, len(sent), digest(sent), message_id_of(sent))
    return Sought(attempt, lambda ref: ref.uid in others, lambda: sent)


def look(mailbox: Mailbox, *uploads: Sought) -> list[int | str | None]:
    """Return the UID of each upload, ``"UID?"`` if that is not known, None if it is not there."""
    return [
        answer.found.uid if answer.found else None if answer.perhaps is None else f"{answer.perhaps}?"
        for answer in find_uploads(cast(Session, mailbox), uploads)
    ]


@pytest.mark.parametrize(
    ("sent", "stored", "answer"),
    [
        (SENT, SENT, 10),
        (MAIL, MAIL, 10),
        # Altered, with the same Message-ID.
        (SENT, SENT + b"\r\n", 10),
        (SENT.replace(b"o", b"\0"), SENT.replace(b"o", b"\x80"), 10),
        (SENT.replace(b"x", b"\xff"), SENT.replace(b"x", b"X"), 10),
        (SENT, b"Received: by me\r\n" + SENT.replace(b"Subject", b"X-UID: 7\r\nSubject"), 10),
        # The same Message-ID, but other differences: a person has to look.
        (SENT, OTHER, "10?"),
        (SENT, SENT.replace(b"Subject: x\r\n", b""), "10?"),
        (SENT, SENT.replace(b"body", b"bo\xffy"), "10?"),
        # Altered, but without a Message-ID that is proof.
        (MAIL, MAIL + b"\r\n", "10?"),
        # Another message, however alike.
        (SENT, SENT.replace(b"a@b", b"c@d"), None),
        (MAIL, MAIL.replace(b"body", b"else"), None),
        (b"Subject: \xff\r\n\r\nbody", b"Subject: \xfe\r\n\r\nmore", None),
        (b"Subject: \xff\r\n\r\nbody", ID[:3] + b"ject: \xfe\r\n\r\nbody", None),
    ],
)
def test_an_upload_is_proven_by_its_bytes(sent: bytes, stored: bytes, answer: int | str | None) -> None:
    """A message of the same size with 8-bit header was taken for it, and the only copy dropped."""
    assert look(Mailbox({10: stored}), sought(sent)) == [answer]


def test_what_was_there_before_the_upload_is_not_fetched() -> None:
    mailbox = Mailbox({9: SENT, 10: SENT.replace(b"<a", b"<c"), 11: MAIL * 3})
    assert look(mailbox, sought(SENT)) == [None]
    assert mailbox.fetched == [10], "of the same size"


def test_all_uploads_are_looked_for_in_one_pass() -> None:
    messages = {uid: b"Message-ID: <%03d>\r\n\r\nbody" % uid for uid in range(10, 60)}
    mailbox = Mailbox(messages)
    wanted = [sought(content) for content in reversed(messages.values())]
    assert look(mailbox, *wanted) == [*reversed(messages)]
    assert (mailbox.passes, sorted(mailbox.fetched)) == (1, [*messages])


def test_each_of_identical_files_is_a_message() -> None:
    mailbox = Mailbox({10: SENT, 11: SENT})
    assert look(mailbox, sought(SENT), sought(SENT), sought(SENT)) == [10, 11, None]
    assert look(mailbox, sought(SENT, 10), sought(SENT, 10)) == [11, None], "10 is another file's"


def test_an_equal_message_goes_before_an_altered_one() -> None:
    assert look(Mailbox({10: SENT + b"\r\n", 11: SENT}), sought(SENT)) == [11]


def test_in_a_mailbox_that_was_restored_an_upload_has_a_lower_uid() -> None:
    """At stake: it is not found beyond the UIDNEXT of that time, and is uploaded again."""
    restored = Mailbox({3: SENT.replace(b"body", b"else"), 4: SENT}, uidnext=5)
    assert look(restored, sought(SENT)) == [4]


def test_an_upload_is_found_by_its_bytes_also_where_uidvalidity_is_another_one() -> None:
    """It was uploaded again, and doubled. Its UIDNEXT says nothing in that mailbox."""
    found = find_uploads(cast(Session, Mailbox({9: SENT}, uidvalidity=2)), [sought(SENT, uidnext=10)])
    assert [(one.found and one.found.uid, one.uidvalidity, one.is_restored) for one in found] == [
        (9, 2, True)
    ]


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
