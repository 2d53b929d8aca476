"""Responses are read as RFC 9051 means them, and nothing that is no response does more than be refused."""

from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imapfs.encoding import format_internaldate
from imapfs.errors import ProtocolError
from imapfs.imap.grammar import (
    Completion,
    FetchData,
    ListEntry,
    format_iso,
    parse_date,
    parse_fetch,
    parse_list,
    parse_sequence_set,
    parse_status,
    sequence_sets,
    values,
)
from imapfs.imap.wire import astring
from imapfs.model import Uid

LINES = st.lists(st.binary(max_size=60), min_size=1, max_size=5).filter(lambda parts: len(parts) % 2 == 1)
UIDS = st.sets(st.integers(1, 2**32 - 1), max_size=200)


# -- FETCH


def test_fetch_items_are_read_in_any_order() -> None:
    items = {
        b"UID 7": ("uid", 7),
        rb"FLAGS (\Seen $Work)": ("flags", r"\Seen $Work"),
        b'INTERNALDATE "20-Nov-2026 10:00:00 +0100"': ("date", b"20-Nov-2026 10:00:00 +0100"),
        b"RFC822.SIZE 1234": ("size", 1234),
        b"MODSEQ (99)": ("modseq", 99),
        b"EMAILID (M6d99ac3275bb4e)": ("object_id", "M6d99ac3275bb4e"),
    }
    for start in range(len(items)):
        order = list(items)[start:] + list(items)[:start]
        data = parse_fetch([b"* 1 FETCH (" + b" ".join(order) + b")\r\n"])
        assert data == FetchData(**dict(items.values()))  # type: ignore[arg-type]


def test_gmail_names_a_message_by_a_number() -> None:
    data = parse_fetch([b"* 1 FETCH (X-GM-MSGID 1278455344230334865 UID 7)\r\n"])
    assert data == FetchData(uid=7, object_id="1278455344230334865")  # type: ignore[arg-type]


def test_fetch_is_not_case_sensitive() -> None:
    data = parse_fetch([rb"* 1 fetch (uid 7 flags (\sEEN) rfc822.size 3)" + b"\r\n"])
    assert data == FetchData(uid=7, flags=r"\sEEN", size=3)  # type: ignore[arg-type]


@pytest.mark.parametrize("flags", [rb"\Recent", rb"\RECENT \Seen", rb"\Seen \Recent"])
def test_recent_is_no_flag_to_keep(flags: bytes) -> None:
    data = parse_fetch([b"* 1 FETCH (FLAGS (" + flags + b"))\r\n"])
    assert data is not None
    assert data.flags in {"", r"\Seen"}


@given(st.binary(max_size=300))
def test_literal_is_data_whatever_it_holds(content: bytes) -> None:
    data = parse_fetch([b"* 1 FETCH (UID 5 BODY[] ", content, b" FLAGS ())\r\n"])
    assert data == FetchData(uid=5, flags="", section=b"", body=content)  # type: ignore[arg-type]


@given(st.binary(max_size=300).map(lambda text: text.translate(None, b"\r\n\0")))
def test_quoted_string_is_data_whatever_it_holds(content: bytes) -> None:
    quoted = content.replace(b"\\", b"\\\\").replace(b'"', b'\\"')
    data = parse_fetch([b'* 1 FETCH (BODY[] "' + quoted + b'" UID 5)\r\n'])
    assert data == FetchData(uid=5, section=b"", body=content)  # type: ignore[arg-type]


def test_nil_body_is_no_body() -> None:
    data = parse_fetch([b"* 1 FETCH (UID 5 BODY[] NIL)\r\n"])
    assert data == FetchData(uid=5, section=b"", body=None)  # type: ignore[arg-type]
    quoted = parse_fetch([b'* 1 FETCH (UID 5 BODY[] "NIL")\r\n'])
    assert quoted is not None
    assert quoted.body == b"NIL"


@pytest.mark.parametrize(
    "unknown",
    [
        [b"X-GM-THRID 1278455344230334865"],
        [b"THREADID (M6d99ac3275bb4e)"],
        [b'ENVELOPE (NIL "a)b(" ((NIL NIL "x" "y")) NIL)'],
        [b"BODYSTRUCTURE ((", b") UID 999 (", b") NIL)"],
        [b"PREVIEW ", b"UID 999 FLAGS (\\Deleted)", b""],
        [b"X ()"],
        [b'X "quoted \\" UID 999"'],
    ],
)
@pytest.mark.parametrize("at", ["first", "last"])
def test_item_that_was_not_asked_for_is_passed_over(unknown: list[bytes], at: str) -> None:
    first, *others = unknown
    if at == "first":
        response = [b"* 1 FETCH (" + first, *others]
        response[-1] += b" UID 5 RFC822.SIZE 6)\r\n"
    else:
        response = [b"* 1 FETCH (UID 5 RFC822.SIZE 6 " + first, *others]
        response[-1] += b")\r\n"
    assert parse_fetch(response) == FetchData(uid=5, size=6)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("rest", "data"),
    [
        (b"UID 5\r\n", FetchData(uid=Uid(5))),
        (b"\r\n", FetchData()),
        (b"UID 5))\r\n", FetchData(uid=Uid(5))),
        (b"UID)\r\n", FetchData()),
        (b"UID 5 FLAGS (a\r\n", FetchData(uid=Uid(5))),
        (b"UID 5 X (y)\r\n", FetchData(uid=Uid(5))),
        (b'X "y)\r\n', FetchData()),
        (b"BODY[]", FetchData()),
        (b"UID 5 BODY[] ", FetchData(uid=Uid(5))),
        (b"UID 5 X", FetchData(uid=Uid(5))),
        (b"UID NIL RFC822.SIZE NIL FLAGS NIL INTERNALDATE NIL MODSEQ NIL)\r\n", FetchData()),
        (b"UID 5 RFC822.SIZE NIL INTERNALDATE NIL FLAGS (a))\r\n", FetchData(uid=Uid(5), flags="a")),
        (b"UID 5 RFC822.SIZE -1 FLAGS (a))\r\n", FetchData(uid=Uid(5), flags="a")),
    ],
)
def test_malformed_item_costs_what_it_is_about(rest: bytes, data: FetchData) -> None:
    assert parse_fetch([b"* 1 FETCH (" + rest]) == data


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(
    ("keyword", "kept"),
    [
        (rb"App-Seen-[Mail]/Trash", True),
        (rb"draft(2)", False),
        (rb'"\\Deleted"', False),
        (rb"done)", False),
        (rb"(todo", False),
        (rb"(to) do", False),
        (rb"((", False),
        (rb"))", False),
        (b"a\x01b", False),
    ],
)
def test_odd_keyword_costs_that_keyword(keyword: bytes, kept: bool, last: bool) -> None:
    flags = rb"FLAGS (\Seen " + keyword + rb" \Flagged)"
    items = (b"UID 5 RFC822.SIZE 6 " + flags) if last else (flags + b" UID 5 RFC822.SIZE 6")
    data = parse_fetch([b"* 1 FETCH (" + items + b")\r\n"])
    assert data is not None
    assert (data.uid, data.size) == (5, 6)
    assert data.flags is not None
    shown = data.flags.split()
    assert "\\Seen" in shown
    assert "\\Flagged" in shown
    assert (keyword.decode() in shown) is kept


def test_bracket_in_a_response_code_costs_nothing() -> None:
    code = rb"PERMANENTFLAGS (\Seen App-[Mail]/Trash draft(2) \*)"
    completion = Completion.parse(b"OK [" + code + b"] Flags [x] permitted.\r\n")
    assert completion is not None
    assert (completion.code, completion.text) == ("PERMANENTFLAGS", "Flags [x] permitted.")
    assert completion.argument == code.partition(b" ")[2]


@given(LINES)
def test_any_bytes_are_read_or_refused(parts: list[bytes]) -> None:
    for prefix, parse in (
        (b"* LIST ", parse_list),
        (b"* STATUS ", parse_status),
        (b"", lambda response: values(response, 0)),
    ):
        response = [prefix + parts[0], *parts[1:]]
        try:
            parse(response)
        except ProtocolError as error:
            assert "\n" not in str(error)
    Completion.parse(parts[0])
    parse_fetch([b"* 1 FETCH (" + parts[0], *parts[1:]])


def test_other_responses_are_not_fetch() -> None:
    for line in (b"* 5 EXISTS\r\n", b"* 5 EXPUNGE\r\n", b"* OK done\r\n", b"* LIST () NIL FETCH\r\n"):
        assert parse_fetch([line]) is None


# -- LIST, STATUS


@pytest.mark.parametrize(
    ("response", "entry"),
    [
        (
            [b'* LIST (\\HasNoChildren) "/" INBOX\r\n'],
            ListEntry(b"INBOX", b"/", frozenset({"\\hasnochildren"})),
        ),
        ([b'* LIST () NIL "a b"\r\n'], ListEntry(b"a b", b"")),
        ([b'* LIST () "\\\\" a\r\n'], ListEntry(b"a", b"\\")),
        ([b'* LIST () "." "a\\"b"\r\n'], ListEntry(b'a"b', b".")),
        ([b'* list () "/" ', b"a\r\nb", b"\r\n"], ListEntry(b"a\r\nb", b"/")),
        ([b'* LIST () "/" a[b\r\n'], ListEntry(b"a[b", b"/")),
        ([b'* LIST () "/" a ("CHILDINFO" ("SUBSCRIBED"))\r\n'], ListEntry(b"a", b"/")),
        ([b'* LIST () "/" ""\r\n'], ListEntry(b"", b"/")),
    ],
)
def test_list_response(response: list[bytes], entry: ListEntry) -> None:
    assert parse_list(response) == entry


@pytest.mark.parametrize(
    "rest", [b"", b"()", b'() "/"', b'"/" INBOX', b"() NIL NIL", b"() NIL (a)", b"(", b")"]
)
def test_malformed_list_is_refused(rest: bytes) -> None:
    with pytest.raises(ProtocolError):
        parse_list([b"* LIST " + rest + b"\r\n"])


def test_attributes_of_a_mailbox() -> None:
    entry = parse_list([b'* LIST (\\NoSelect \\drafts) "/" x\r\n'])
    assert entry is not None
    assert (entry.selectable, entry.special_use) == (False, "\\Drafts")
    assert not ListEntry(b"x", b"/", frozenset({"\\nonexistent"})).selectable
    assert ListEntry(b"x", b"/", frozenset({"\\marked"})).special_use == ""


def test_status_response() -> None:
    assert parse_status([b'* STATUS "a b" (MESSAGES 3 uidnext 4 X (1))\r\n']) == (
        b"a b",
        {"MESSAGES": 3, "UIDNEXT": 4},
    )
    assert parse_status([b"* OK\r\n"]) is None


def test_status_response_with_a_name_that_is_not_quoted() -> None:
    """Twisted writes it so: the mailbox was never polled."""
    assert parse_status([b"* STATUS Two Words (MESSAGES 3)\r\n"]) == (b"Two Words", {"MESSAGES": 3})


@pytest.mark.parametrize("line", [b"x", b"(MESSAGES 3)", b"x NIL (MESSAGES 3)", b"a (b) ("])
def test_malformed_status_response(line: bytes) -> None:
    with pytest.raises(ProtocolError):
        parse_status([b"* STATUS " + line + b"\r\n"])


# -- UID sets


@given(UIDS, st.integers(25, 500))
def test_sequence_sets_name_exactly_the_uids(uids: set[int], limit: int) -> None:
    sets = list(sequence_sets(uids, limit))
    assert all(len(one) <= limit for one in sets)
    found = [uid for one in sets for low, high in parse_sequence_set(one) for uid in range(low, high + 1)]
    assert found == sorted(uids)


def test_runs_become_ranges() -> None:
    assert list(sequence_sets([9, 1, 2, 3, 2, 7, 8])) == [b"1:3,7:9"]
    assert list(sequence_sets(range(1, 100_001))) == [b"1:100000"]
    assert list(sequence_sets([])) == []
    assert parse_sequence_set(b"5:3,9") == [(3, 5), (9, 9)]
    for malformed in (b"", b"1:*", b"a", b"1,,2"):
        with pytest.raises(ProtocolError):
            parse_sequence_set(malformed)


# -- dates


@given(
    st.datetimes(datetime(1971, 1, 1), datetime(2200, 1, 1)),
    st.integers(-14 * 60, 14 * 60),
)
def test_internaldate_is_read_back(moment: datetime, minutes: int) -> None:
    moment = moment.replace(microsecond=0, tzinfo=timezone(timedelta(minutes=minutes)))
    month = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"][
        moment.month - 1
    ]
    raw = f"{moment.day:2d}-{month}-{moment.year:04d} {moment:%H:%M:%S} {moment:%z}"
    epoch, offset = parse_date(raw.encode())
    assert (epoch, offset) == (int(moment.timestamp()), minutes)
    assert datetime.fromisoformat(format_iso(epoch, offset)) == moment


@pytest.mark.parametrize(
    "raw",
    [
        b"", b"yesterday", b"31-Feb-2026 10:00:00 +0000", b"01-Foo-2026 10:00:00 +0000",
        b"01-Jan-0000 10:00:00 +0000", b"01-Jan-2026 25:00:00 +0000", b"\xff\xff", b"01-Jan-2026 10:00:00",
    ],
)  # fmt: skip
def test_what_is_no_date_is_the_epoch(raw: bytes) -> None:
    assert parse_date(raw) == (0, 0)


def test_odd_dates_cost_nobody_a_message() -> None:
    assert (
        parse_date(b"30-Jun-2026 23:59:60 +0000")[0]
        == datetime(2026, 6, 30, 23, 59, 59, tzinfo=UTC).timestamp()
    )
    for raw in (b"01-Jan-0001 00:00:00 +0000", b"31-Dec-9999 23:59:59 -9999", b"20-Nov-2026 10:00:00 +9999"):
        epoch, offset = parse_date(raw)
        assert datetime.fromisoformat(format_iso(epoch, offset))
        # A message that is edited goes back with this date.
        assert format_internaldate(epoch, offset)


# -- what is sent


@given(st.binary(max_size=100))
def test_quoted_astring_is_one_token(value: bytes) -> None:
    sent = astring(value)
    if isinstance(sent, bytes):
        assert not set(sent) & set(b"\r\n\0")
        assert values([sent + b"\r\n"], 0) == [value]
    else:
        assert sent.data == value
