"""Header fields of mail as it is in the wild."""

import base64
import email.charset
import email.header
import unicodedata

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from imapfs import headers
from imapfs.headers import Headers, parse_headers

BLOCK = (
    b"From: Alice Example <alice@example.com>\r\n"
    b"To: =?utf-8?q?B=C3=B6b?= <bob@example.com>, carol@example.com\r\n"
    b"Subject: Quarterly report\r\n"
    b"Date: Fri, 20 Nov 2026 10:02:00 +0100\r\n"
    b"Message-ID: <1@example.com>\r\n"
    b"\r\n"
)
PARSED = Headers(
    "Quarterly report", "Alice Example", "Alice Example <alice@example.com>", "<1@example.com>", "Böb"
)
# Dense in the syntax of header fields; purely random bytes would hardly ever hold an encoded word.
_PIECES = [
    b"Subject:",
    b"From:",
    b"Message-ID:",
    b"\r\n",
    b"\n",
    b"\r",
    b" ",
    b"\t",
    b"\0",
    b"\xff",
    b"\xc3\xa9",
]
_PIECES += [
    b"=?",
    b"?=",
    b"=?utf-8?q?",
    b"=?UTF-8*de?B?",
    b"=?utf-7?q?+2AA-?=",
    b"=?hex?b?",
    b"w6k=",
    b"=C3",
    b"=",
]
_PIECES += [b'"', b"\\", b"<", b">", b"(", b")", b",", b":", b";", b"a@b"]
wild = st.lists(st.one_of(st.sampled_from(_PIECES), st.binary(max_size=4)), max_size=30).map(b"".join)
lines = st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=200)


def subject(value: bytes) -> str:
    return parse_headers(b"Subject: " + value + b"\r\n\r\n").subject


def sender(value: bytes) -> str:
    return parse_headers(b"From: " + value + b"\r\n\r\n").sender


@pytest.mark.parametrize("end", [b"\r\n", b"\n", b"\r", b"\r\r\n"])
def test_any_line_end_will_do(end: bytes) -> None:
    assert parse_headers(BLOCK.replace(b"\r\n", end)) == PARSED
    assert parse_headers(b"Subject: a\r\n\r\nFrom: body\r\n".replace(b"\r\n", end)) == Headers(
        "a", "", "", ""
    )


def test_bare_carriage_returns_end_lines_also_where_the_server_adds_a_proper_end() -> None:
    assert parse_headers(BLOCK.replace(b"\r\n", b"\r") + b"\r\n") == PARSED


def test_a_bare_carriage_return_inside_a_field_is_whitespace() -> None:
    assert parse_headers(BLOCK.replace(b"Quarterly report", b"Quarterly\rFrom: report")).subject == (
        "Quarterly From: report"
    )


def test_names_of_fields_have_no_case_and_may_be_followed_by_space() -> None:
    assert parse_headers(BLOCK.replace(b"Subject:", b"sUBJECT \t:")) == PARSED


def test_the_first_of_duplicated_fields_counts() -> None:
    assert (
        parse_headers(BLOCK.replace(b"\r\n\r\n", b"\r\nSubject: b\r\nFrom: b\r\nMessage-ID: b\r\n\r\n"))
        == PARSED
    )


def test_other_fields_and_lines_that_are_none_are_ignored() -> None:
    noise = (
        b"From alice Fri Nov 20 10:02:00 2026\r\nsubject\r\nX-Subject: a\r\n: b\r\nSubject-X: c\r\n\0\xff\r\n"
    )
    assert parse_headers(noise + BLOCK) == PARSED


@pytest.mark.parametrize(
    "block", [b"", b"\r\n", b"\r", b"\r\nSubject: body\r\n", b"Date: x\r\n\r\nSubject: body"]
)
def test_missing_fields_are_empty(block: bytes) -> None:
    assert parse_headers(block) == Headers("", "", "", "")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (b"a\r\n b", "a b"),
        (b"a \r\n\t\t b", "a b"),
        (b"\r\n a\r\n \r\n b", "a b"),
        (b"a  b", "a  b"),
        (b"a\tb", "a b"),
        (b"a\0b\x1b[1m", "a b [1m"),
        ("a\x85b\u2028c\u200dd\u00a0e".encode(), "a b c\u200dd\u00a0e"),
        ("Übersicht".encode(), "Übersicht"),
        ("Übersicht".encode("latin-1"), "Übersicht"),
        (b"\x80 5 \x81", "€ 5 \ufffd"),
    ],
)
def test_raw_subjects(value: bytes, text: str) -> None:
    assert subject(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        pytest.param(b"=?utf-8?Q?caf=C3=A9_au_lait?=", "café au lait", id="Q"),
        pytest.param(b"=?UTF-8?b?Y2Fmw6k=?=", "café", id="B"),
        pytest.param(b"=?iso-8859-2*pl?q?=A3=F3d=BC?=", "Łódź", id="language"),
        pytest.param(b"Re: =?utf-8?q?=C3=A9?= b", "Re: é b", id="among text"),
        pytest.param(b"=?utf-8?q?a?= =?utf-8?q?b?= c", "ab c", id="space between words"),
        pytest.param(b"=?utf-8?q?a?=\r\n\t=?iso-8859-1?q?=E9?=", "aé", id="fold between words"),
        pytest.param(b"=?utf-8?q?caf=C3?= =?UTF-8?b?qQ==?=", "café", id="split character"),
        pytest.param(b"a=?utf-8?q?=C3=A9?=b", "aéb", id="no space around"),
        pytest.param(b"=?utf-8?q?really? yes?=", "really? yes", id="raw question mark and space"),
        pytest.param(b"=?utf-8?q?a=0D=0A_b=0Ac?=", "a b c", id="encoded newline"),
        pytest.param(b"=?utf-8?q?=ZZ=4?=", "=ZZ=4", id="bad Q"),
        pytest.param(b"=?utf-8?b?Y2Fmw6k?=", "café", id="B without padding"),
        pytest.param(b"=?utf-8?b?Y2 Fm!w6kxM?=", "café1", id="B with noise and a lone digit"),
        pytest.param(b"=?utf-8?q?=E9t=E9?=", "\ufffdt\ufffd", id="not in its charset"),
        pytest.param(b"=?x-none?q?=C3=A9?=", "é", id="unknown charset"),
        pytest.param(b"=?us-ascii?q?=E9?=", "é", id="8-bit ASCII"),
        pytest.param(b"=?iso-8859-1?q?=80?=", "€", id="windows-1252 as ISO 8859-1"),
        pytest.param(b"=?gb2312?b?6UY=?=", "镕", id="GBK as GB 2312"),
        pytest.param("=?utf-8?q?é?=".encode(), "é", id="raw 8-bit inside"),
        pytest.param(b"=?utf-7?q?+2AA-?=", "\ufffd", id="lone surrogate"),
        pytest.param(b"=?utf-8?q??=", "", id="empty"),
        pytest.param(b"=?utf-8?q?a", "=?utf-8?q?a", id="no end"),
        pytest.param(b"=?utf-8?x?a?= =??= =?", "=?utf-8?x?a?= =??= =?", id="no encoded word"),
    ],
)
def test_encoded_words(value: bytes, text: str) -> None:
    assert subject(value) == text


@pytest.mark.parametrize("charset", ["hex", "zip", "bz2", "base64", "uu", "quopri", "rot13", "rot_13"])
@pytest.mark.parametrize("word", [b"6869", b"uryyb"])
def test_codecs_that_are_no_charsets_are_not_used(charset: str, word: bytes) -> None:
    assert subject(b"=?" + charset.encode() + b"?q?" + word + b"?=") == word.decode()


@pytest.mark.parametrize("charset", ["idna", "punycode", "unicode_escape", "raw_unicode_escape", "undefined"])
def test_codecs_that_are_unfit_for_mail_are_not_used(charset: str) -> None:
    assert subject(b"=?" + charset.encode() + b"?b?XHgmAHhuLS1kbWE=?=") == "\\x& xn--dma"


def test_every_charset_decodes_any_bytes() -> None:
    every_byte = b"".join(b"=%02X" % n for n in range(256))
    for name in headers._CODECS:
        assert not subject(b"=?" + name.encode() + b"?q?" + every_byte + b"?=").isascii()


@pytest.mark.parametrize(
    ("charset", "codec", "text"),
    [
        ("ISO-8859-2", "iso8859_2", "Łódź"),
        ("iso-8859-8-i", "iso8859_8", "שלום"),
        ("iso-8859-15", "iso8859_15", "5 €"),
        ("windows-1251", "cp1251", "Привет"),
        ("windows-874", "cp874", "สวัสดี"),
        ("koi8-r", "koi8_r", "Привет"),
        ("koi8-u", "koi8_u", "Київ"),
        ("iso-2022-jp", "iso2022_jp", "日本語"),
        ("Shift_JIS", "cp932", "日本語①"),
        ("euc-jp", "euc_jp", "日本語"),
        ("ks_c_5601-1987", "cp949", "똠방각하"),
        ("gb18030", "gb18030", "你好\U0001f48c"),
        ("big5", "big5", "你好"),
        ("utf-16", "utf-16", "é\U0001f48c"),
        ("utf-7", "utf-7", "é\U0001f48c"),
    ],
)
def test_charsets_common_in_mail_are_known(charset: str, codec: str, text: str) -> None:
    word = base64.b64encode(text.encode(codec))
    assert subject(b"=?" + charset.encode() + b"?B?" + word + b"?=") == text


@given(lines, st.sampled_from([email.charset.BASE64, email.charset.QP]))
def test_what_the_standard_library_encodes_comes_back(text: str, encoding: int) -> None:
    charset = email.charset.Charset("utf-8")
    charset.header_encoding = encoding
    encoded = email.header.Header(text, charset, header_name="Subject").encode(linesep="\r\n")
    assert subject(encoded.encode("ascii")) == text


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (b"Alice Example <alice@example.com>", "Alice Example"),
        (b'"Example, Alice" <alice@example.com>', "Example, Alice"),
        (b'"Alice \\"Al\\" Example" <alice@example.com>', 'Alice "Al" Example'),
        (b"Example, Alice <alice@example.com>", "Example, Alice"),
        (b"alice@example.com", "alice@example.com"),
        (b"<alice@example.com>", "alice@example.com"),
        (b'"" <alice@example.com>', "alice@example.com"),
        (b"alice@example.com (Alice Example)", "Alice Example"),
        (b"Alice (at work (in town) today) Example <alice@example.com>", "Alice Example"),
        (b"Alice) Example <alice@example.com>", "Alice Example"),
        (b"<a@example.com> <b@example.com>", "a@example.com"),
        (b"Alice <a@example.com>, Bob <b@example.com>", "Alice"),
        (b"a@example.com, Bob <b@example.com>", "a@example.com"),
        (b"Team: Alice <a@example.com>, Bob <b@example.com>;", "Alice"),
        (b"undisclosed-recipients:;", ""),
        (b"=?utf-8?Q?Ren=C3=A9_(Doe)?= <r@example.com>", "René (Doe)"),
        (b"=?utf-8?Q?Ren=C3?=\r\n =?utf-8?Q?=A9?= Doe <r@example.com>", "René Doe"),
        (b'"=?utf-8?B?UmVuw6k=?=" <r@example.com>', "René"),
        ("René  Doe <r@example.com>".encode("latin-1"), "René Doe"),
        (b"=?utf-8?Q?a=0A=0Ab?= <r@example.com>", "a b"),
        (b"=?utf-8?Q??= <r@example.com>", "r@example.com"),
        (b"root", "root"),
        (b'"Alice <alice@example.com>', "Alice <alice@example.com>"),
        (b"Alice <alice@example.com", "Alice"),
        (b"<>", ""),
        (b"", ""),
    ],
)
def test_the_sender_is_the_name_of_the_first_mailbox_else_its_address(value: bytes, name: str) -> None:
    assert sender(value) == name
    assert sender(value + b" " * 600) == name


def test_the_from_field_is_decoded_whole() -> None:
    block = b"From: =?utf-8?Q?Ren=C3=A9?= <r@example.com>,\r\n\tBob <b@example.com>\r\n\r\n"
    assert parse_headers(block).from_ == "René <r@example.com>, Bob <b@example.com>"


def test_the_message_id_is_kept_as_it_stands() -> None:
    assert parse_headers(b"Message-Id:\r\n <=?utf-8?q?a?=@b>\r\n\r\n").message_id == "<=?utf-8?q?a?=@b>"


@given(wild)
@example(b'Subject: =?utf-8?b?\xff?=\nFrom: "\\')
def test_no_block_raises_or_lets_control_characters_through(block: bytes) -> None:
    for field in parse_headers(block):
        assert not {unicodedata.category(c) for c in field} & {"Cc", "Cs", "Zl", "Zp"}
        assert len(field) <= 2_000


@pytest.mark.parametrize(
    "flood",
    [
        *(
            b"=?",
            b"=?a?q?",
            b"=?a?q?b?= ",
            b"=?utf-8?q?=F0=9F=92=8C?= ",
            b'"',
            b'\\"',
            b"<",
            b"(",
            b",",
            b"a@",
        ),
        *(b"=", b" .", b"\r\n ", b"\r", b":", b"\xff", "é".encode(), "\u0301\u0316".encode()),
    ],
)
def test_fields_of_any_length_are_cut(flood: bytes) -> None:
    many = flood * (210_000 // len(flood))
    parsed = parse_headers(b"Subject: " + many + b"\r\nFrom: " + many + b"\r\n" + BLOCK)
    assert all(len(field) <= 2_000 for field in parsed)
    assert parsed.message_id == PARSED.message_id


@pytest.mark.parametrize("letter", ["a", "é", "語", "\U0001f48c"])
@pytest.mark.parametrize("shift", [0, 1, 2, 3])
def test_a_cut_field_keeps_its_characters(letter: str, shift: int) -> None:
    assert subject(b"a" * shift + (letter * 137_000).encode()) == ("a" * shift + letter * 2_000)[:2_000]
