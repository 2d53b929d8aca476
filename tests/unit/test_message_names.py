"""File names of messages: what a template may be, and what it makes of hostile mail."""

import re
import unicodedata
from typing import NamedTuple

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from imapfs.message_names import FIELDS, MAX_LENGTH, NameTemplate, variant

SUBJECT = NameTemplate.parse("subject")
UID = NameTemplate.parse("uid")
MINUTE = 1_795_132_800 + 14 * 3600 + 32 * 60
"""2026-11-20 14:32 UTC."""

moments = st.one_of(st.integers(), st.integers(-(10**11), 10**12))
uids = st.one_of(st.integers(1, 300), st.integers(1, 2**64 - 1))
# Dense in what imitates another name, hides a file, or is cut at the wrong place.
_PIECES = ["1", "12", ".", "-", "~", "_", " ", "/", "\\", "a", "é", "語", "\U0001f48c", "\u0301", "\u1161"]
_PIECES += ["\0", "\n", "\x1b[1m", "\u202e", "\ud800", "\uffff", ".eml", "..", "x" * 50, "語" * 30]
texts = st.one_of(st.text(), st.lists(st.sampled_from(_PIECES), max_size=9).map("".join))
literals = st.text(st.sampled_from("ab1.-~_ {}=\u0301\u1161é語"), max_size=3)


class Mail(NamedTuple):
    date: int
    sender: str
    recipient: str
    subject: str


mails = st.builds(Mail, moments, texts, texts, texts)


@st.composite
def templates(draw: st.DrawFn) -> NameTemplate:
    """Any template that is accepted."""
    others = draw(st.lists(st.sampled_from(FIELDS).filter(lambda field: field != "uid"), unique=True))
    fields = draw(
        st.sampled_from([["uid", *others], [*others, "uid"], draw(st.permutations([*others, "uid"]))])
    )
    text = draw(literals) + "".join(f"{{{field}}}{draw(literals)}" for field in fields)
    try:
        return NameTemplate.parse(text)
    except ValueError:
        separator = draw(st.sampled_from(["=", "a", "\u0301", "\u1161"]))
        return NameTemplate.parse(separator.join(f"{{{field}}}" for field in [*others, "uid"]))


# ---- The names


@pytest.mark.parametrize(
    ("sender", "subject", "name"),
    [
        ("Alice Example", "Quarterly report", "2026-11-20_1432_Alice_Example_Quarterly_report.1234.eml"),
        ("", "Quarterly report", "2026-11-20_1432_Quarterly_report.1234.eml"),
        ("Alice", "", "2026-11-20_1432_Alice.1234.eml"),
        ("", "", "2026-11-20_1432.1234.eml"),
        (" \t", "\u200b\u202e\0", "2026-11-20_1432.1234.eml"),
        ("a/b", "../../etc/passwd", "2026-11-20_1432_a_b_.._.._etc_passwd.1234.eml"),
        ("Ops: on call", "Re: [x] 10:30?", "2026-11-20_1432_Ops_on_call_Re_[x]_10_30.1234.eml"),
        ("", '\\\\host\\a *"<b>"* | c', "2026-11-20_1432_host_a_b_c.1234.eml"),
        ("__init__", " ___ ", "2026-11-20_1432_init.1234.eml"),
        ("Zoë", "naïve  \t café", "2026-11-20_1432_Zoë_naïve_café.1234.eml"),
        ("", "cafe\u0301", "2026-11-20_1432_caf\u00e9.1234.eml"),
        ("", "a \0 b\x1b[1mc\u2028d\u00a0e", "2026-11-20_1432_a_b[1mc_d_e.1234.eml"),
        ("", "gnp.\u202efdp\ud800\ue000\uffff", "2026-11-20_1432_gnp.fdp.1234.eml"),
        ("", "...", "2026-11-20_1432_....1234.eml"),
        ("", "日本語 \U0001f48c", "2026-11-20_1432_日本語_\U0001f48c.1234.eml"),
    ],
)
def test_messages_are_named_by_date_time_sender_subject_and_uid(sender: str, subject: str, name: str) -> None:
    assert SUBJECT.name(MINUTE + 59, sender, "Bob", subject, 1234).decode() == name
    assert UID.name(MINUTE, sender, "Bob", subject, 1234) == b"1234.eml"


@pytest.mark.parametrize(
    ("date", "moment"),
    [
        (0, "1970-01-01_0000"),
        (-1, "1969-12-31_2359"),
        (86_399, "1970-01-01_2359"),
        (86_400, "1970-01-02_0000"),
        (-58_979_923_200, "0101-01-01_0000"),
        (10**30, "9999-12-31_2359"),
        (-(10**30), "0001-01-01_0000"),
    ],
)
def test_date_and_time_are_in_utc_and_clamped(date: int, moment: str) -> None:
    assert SUBJECT.name(date, "", "", "", 1) == f"{moment}.1.eml".encode()


@pytest.mark.parametrize(
    ("template", "recipient", "own", "others"),
    [
        ("{from}.{uid}", "Bob", "Bob.7", "Alice.7"),
        ("{from}.{uid}", "", "7", "Alice.7"),
        ("{from}-{to}.{uid}", "Bob", "Alice-Bob.7", "Alice-Bob.7"),
        ("{to}.{uid}", "Bob", "Bob.7", "Bob.7"),
    ],
)
def test_own_mail_is_named_after_the_recipient(template: str, recipient: str, own: str, others: str) -> None:
    """In Sent, the name of oneself would be in each name and tell nothing."""
    found = [
        NameTemplate.parse(template).name(0, "Alice", recipient, "", 7, is_own=is_own)
        for is_own in (True, False)
    ]
    assert found == [f"{own}.eml".encode(), f"{others}.eml".encode()]


@pytest.mark.parametrize(
    ("template", "sender", "subject", "name"),
    [
        ("{date} {subject}.{uid}", "", "", "2026-11-20.7"),
        ("{uid}.{from}_{subject}", "", "b", "7_b"),
        ("{uid}.{from}_{subject}", "a", "", "7.a"),
        ("{uid}.{from}_{subject}", "", "", "7"),
        ("mail-{from}_{subject}.{uid} in", "", "b", "mail-b.7 in"),
        ("{subject}.{uid}", "", "-rf", "rf.7"),
        ("{subject}.{uid}", "", "~/.ssh", "ssh.7"),
        ("{subject}.{uid}", "", "...", "7"),
        ("e{subject}.{uid}", "", "\u0301", "é.7"),
    ],
)
def test_templates(template: str, sender: str, subject: str, name: str) -> None:
    assert NameTemplate.parse(template).name(MINUTE, sender, "", subject, 7).decode() == f"{name}.eml"


@given(templates(), mails, uids, st.booleans(), st.integers(2, 99_999))
@example(SUBJECT, Mail(0, "\u0301" * 400, "", "\u0301" * 400), 1, False, 2)
@example(
    NameTemplate.parse("語語語語語語語語語語{date}{from}{to}{subject}.{uid}"),
    Mail(0, *"語語語"),
    2**64 - 1,
    True,
    2,
)
def test_names_are_short_printable_and_safe(
    template: NameTemplate, mail: Mail, uid: int, is_own: bool, n: int
) -> None:
    """Whatever strangers write: a name that is too long makes tools fail, one with a dot at its beginning is
    left out by backups of ``*.eml``, one with a dash is an option of ``rm *``."""
    first = template.name(*mail, uid, is_own=is_own)
    for name in (first, variant(first, n)):
        text = name.decode()
        assert len(name) <= MAX_LENGTH
        assert text.endswith(".eml")
        assert text.isprintable()
        assert unicodedata.is_normalized("NFC", text)
        assert text[0] not in ".-~_ "
        assert not set(text) & set('/:*?"<>|\\')
    assert first == template.name(*mail, uid, is_own=is_own)
    assert str(uid) in first.decode()


@given(mails, uids)
def test_default_names_have_no_white_space_and_end_with_the_uid(mail: Mail, uid: int) -> None:
    name = SUBJECT.name(*mail, uid).decode()
    assert name.endswith(f".{uid}.eml")
    assert not any(c.isspace() for c in name)
    assert "__" not in name


@given(templates(), mails, mails, uids, uids)
@example(NameTemplate.parse("{from}_{subject}.{uid}"), Mail(0, "", "", "a.1"), Mail(0, "", "", "a"), 2, 12)
def test_names_are_unique_through_the_uid(
    template: NameTemplate, one: Mail, other: Mail, uid: int, other_uid: int
) -> None:
    """A subject cannot imitate the name of another message, by whatever template."""
    assume(uid != other_uid)
    assert template.name(*one, uid) != template.name(*other, other_uid)


@given(mails, mails, uids, uids)
def test_names_sort_by_arrival(one: Mail, other: Mail, uid: int, other_uid: int) -> None:
    """To the minute, for all mail of the years 1 to 9999, as `ls` and backup programs sort: by bytes."""
    in_range = range(-62_135_596_800 // 60, 253_402_300_800 // 60)
    assume(one.date // 60 < other.date // 60)
    assume(one.date // 60 in in_range and other.date // 60 in in_range)
    assert SUBJECT.name(*one, uid) < SUBJECT.name(*other, other_uid)


@pytest.mark.parametrize("letter", ["a", "é", "語", "\U0001f48c", "q\u0323\u0308"])
def test_long_parts_are_cut_between_characters(letter: str) -> None:
    name = SUBJECT.name(0, letter * 99, "", letter * 999, 1).decode()
    _, _, sender, subject = name.removesuffix(".1.eml").split("_")
    size = len(letter.encode())
    assert sender == letter * (40 // size)
    assert subject == letter * ((144 - len("1970-01-01_0000__.1.eml") - len(sender.encode())) // size)


def test_a_part_of_combining_marks_alone_is_cut_too() -> None:
    name = SUBJECT.name(0, "\u0301" * 99, "", "", 1).decode()
    assert name == "1970-01-01_0000_" + "\u0301" * 20 + ".1.eml"


def test_names_use_the_room_that_there_is() -> None:
    lengths = [len(SUBJECT.name(0, "", "", "a" * n, 1)) for n in (119, 120, 121, 122, 999)]
    assert lengths == [141, 142, 143, 144, 144]
    assert len(variant(SUBJECT.name(0, "b", "", "a" * 999, 1), 99_999)) == MAX_LENGTH


# ---- Templates


@given(templates())
def test_the_long_form_is_the_same_template(template: NameTemplate) -> None:
    assert NameTemplate.parse(template.text) == template


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("date", 'must be "subject", "uid" or a template'),
        ("{date", "must be"),
        ("Subject", "must be"),
        ("{date}_{subject}", "must have the field {uid}"),
        (
            "{sender}.{uid}",
            "has an unknown field '{sender}'; known are {date} {time} {from} {to} {subject} {uid}",
        ),
        ("{\n\x1b}.{uid}", r"has an unknown field '{\n\x1b}'"),
        ("{}{uid}", "has an unknown field '{}'"),
        ("{uid!r}", "has an unknown field '{uid!r}'"),
        ("{uid}.{uid}", "has the field {uid} twice"),
        ("{{uid}}", "has a { that encloses no field"),
        ("{date}/{uid}", "must not contain '/'"),
        ("{date}:{uid}", "must not contain ':'"),
        ("{date}\n{uid}", r"must not contain '\n'"),
        ("{date}\udcff{uid}", r"must not contain '\udcff'"),
        (".{uid}", "must not begin with '.'"),
        ("-{uid}", "must not begin with '-'"),
        ("{uid}.eml", "must not end in .eml, which is added"),
        (f"{'é' * 17}{{uid}}", "must not have more than 32 bytes of text"),
        ("{subject}{uid}", "must separate {uid} from the other fields"),
        ("{subject}_1{uid}", "must separate {uid}"),
        ("{uid}{date}", "must separate {uid}"),
        ("{uid}_{from}1{subject}", "must separate {uid}"),
        ("{from}.{uid}.{subject}", "must have {from}, {to} and {subject} all on one side of {uid}"),
    ],
)
def test_bad_template_is_one_line_that_says_what_is_wrong(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(says)}") as caught:
        NameTemplate.parse(text)
    assert str(caught.value).isprintable()


@given(texts | literals.map(lambda text: f"{{date}}{text}{{uid}}"))
def test_any_text_is_a_template_or_an_error_on_one_line(text: str) -> None:
    try:
        NameTemplate.parse(text)
    except ValueError as error:
        assert str(error).isprintable()
