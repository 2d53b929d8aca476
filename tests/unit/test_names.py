"""Mailbox names to directory entries and back."""

import unicodedata

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from imapfs.encoding import encode_utf7
from imapfs.names import decode_mailbox, entry_name, server_component

names = st.text(st.characters(exclude_categories=["Cs"]))
# Dense in what escaping is about; purely random bytes would hardly ever hold a valid shift or escape.
_PIECES = [
    b"&",
    b"-",
    b"&-",
    b"&AOk-",
    b"&AAE-",
    b"&2AA-",
    b"%",
    b"~",
    b"2E",
    b"26",
    b"a",
    b".",
    b"/",
    b".eml",
    b"\x01",
]
_PIECES += ["é".encode(), "\x85".encode(), b"\xff", b"\xc3", b"\0", b" "]
components = st.lists(st.one_of(st.sampled_from(_PIECES), st.binary(max_size=3)), max_size=9).map(b"".join)


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (b"", ""),
        (b"INBOX", "INBOX"),
        (b"Entw&APw-rfe", "Entwürfe"),
        (b"R&-D", "R&D"),
        (b"~peter/mail/&U,BTFw-/&ZeVnLIqe-", "~peter/mail/台北/日本語"),
        (b"&2D3cjA-", "\U0001f48c"),
        ("Entwürfe & R&D".encode(), "Entwürfe & R&D"),
    ],
)
def test_mailbox_names_are_decoded(raw: bytes, text: str) -> None:
    assert decode_mailbox(raw) == text


@pytest.mark.parametrize(
    "raw",
    [
        pytest.param(b"R&D", id="bare ampersand"),
        pytest.param(b"&AOk", id="shift without end"),
        pytest.param(b"&AGE-", id="ASCII in base64"),
        pytest.param(b"&AOk-&AOk-", id="two shifts for one"),
        pytest.param(b"&AOl-", id="leftover bits not zero"),
        pytest.param(b"&AO-", id="half a code unit"),
        pytest.param(b"&2AA-", id="lone surrogate"),
        pytest.param(b"&/w-", id="slash for comma"),
        pytest.param(b"&\xc3-", id="8-bit, not UTF-8"),
        pytest.param(b"tab\there", id="raw control"),
    ],
)
def test_what_is_not_canonical_is_rejected(raw: bytes) -> None:
    assert decode_mailbox(raw) is None


@given(names)
def test_encoded_mailbox_names_decode_again(name: str) -> None:
    assert decode_mailbox(encode_utf7(name)) == name


@given(st.text(st.characters(min_codepoint=128, exclude_categories=["Cs"]), min_size=1))
def test_shifts_are_those_of_utf_7_but_for_the_alphabet(name: str) -> None:
    assert encode_utf7(name) == b"&" + name.encode("utf-7")[1:].replace(b"/", b",")


@given(components)
def test_decoding_gives_the_only_text_of_a_name_or_nothing(raw: bytes) -> None:
    text = decode_mailbox(raw)
    assert text is None or raw in (encode_utf7(text), text.encode())


@pytest.mark.parametrize(
    ("component", "entry"),
    [
        (encode_utf7("a\u202egpj.exe"), "a%E2%80%AEgpj.exe"),
        (encode_utf7("a\u2066b\u2029c"), "a%E2%81%A6b%E2%80%A9c"),
        (b"INBOX", "INBOX"),
        (b"Entw&APw-rfe", "Entwürfe"),
        (b"R&-D", "R&D"),
        (b"a/b", "a%2Fb"),
        (b"&AAA-", "%00"),
        (b"a&AAo-b", "a%0Ab"),
        (b"&AJs-", "%C2%9B"),
        (b".", "%2E"),
        (b"..", "%2E%2E"),
        (b"...", "..."),
        (b".hidden", ".hidden"),
        (b"offer.EmL", "offer%2EEmL"),
        (b"100%", "100%"),
        (b"100%25", "100%2525"),
        (b"50%~60%", "50%25~60%"),
        (b"", "%~"),
        ("Entwürfe".encode(), "%~Entwürfe"),
        (b"tab\there", "%~tab%09here"),
        (b"R&D", "R%26D"),
        (b"R%26D", "R%2526D"),
        (b"caf\xe9", "caf%E9"),
        (b"&.eml", "%26%2Eeml"),
    ],
)
def test_components_are_shown(component: bytes, entry: str) -> None:
    assert entry_name(component) == entry.encode()


@given(components)
def test_entries_are_valid_file_names_and_never_those_of_messages(component: bytes) -> None:
    entry = entry_name(component)
    assert 0 < len(entry) <= 255
    assert not any(unicodedata.category(c) == "Cc" or c == "/" for c in entry.decode())
    assert entry not in (b".", b"..")
    assert not entry.lower().endswith(b".eml")


@given(components, components)
@example(b"a\x01", b"a&AAE-")
@example("é".encode(), b"&AOk-")
@example(b"&%26", b"&&")
@example("\x85".encode(), b"&AIU-")
@example(b"a" * 240 + b"%", b"a" * 240 + b"%~0123456789abcdef")
def test_distinct_components_have_distinct_entries(one: bytes, other: bytes) -> None:
    assert (entry_name(one) == entry_name(other)) == (one == other)


def _readings(component: bytes) -> list[bytes]:
    """Other components that a careless mapping would show in the same way."""
    shown = entry_name(component)
    text = shown.decode()
    return [
        shown,
        encode_utf7(text),
        shown.removeprefix(b"%~"),
        text.encode("utf-16-be"),
        component + b"-",
    ]


@given(components)
def test_no_component_takes_the_entry_of_another(component: bytes) -> None:
    for other in _readings(component):
        assert other == component or entry_name(other) != entry_name(component)


@given(st.one_of(components, names.map(encode_utf7)))
def test_a_well_formed_component_comes_back_from_its_entry(component: bytes) -> None:
    well_formed = component != b"" and decode_mailbox(component) is not None
    fits = len(entry_name(component)) < 255
    if fits:
        assert server_component(entry_name(component)) == (component if well_formed else None)


@given(st.one_of(components, names.map(str.encode)))
def test_a_chosen_name_is_shown_as_chosen_or_refused(entry: bytes) -> None:
    component = server_component(entry)
    assert component is None or entry_name(component) == entry


@pytest.mark.parametrize("entry", ["Entwürfe", "R&D", "%2E%2E", "100%", "a%2Fb", ".Trash-1000"])
def test_ordinary_names_can_be_chosen(entry: str) -> None:
    assert server_component(entry.encode()) is not None


@pytest.mark.parametrize(
    "entry",
    [
        *(b"", b".", b"..", b"a.eml", b"a.EML", b"a/b", b"a\0", b"\xff", b"%2f", b"%41", b"%~", b"%~abc"),
        *(b"R%26D", b"%~tab%09here", b"caf%E9", b"%~caf%E9", b"a" * 256, b"a" * 237 + b"%~0123456789abcdef"),
    ],
)
def test_names_without_a_component_are_refused(entry: bytes) -> None:
    assert server_component(entry) is None


def test_long_components_are_cut_between_characters_and_kept_apart() -> None:
    one, other = encode_utf7("é" * 300), encode_utf7("é" * 301)
    assert entry_name(one).decode() == "é" * 118 + "%~63b209d002cb91a0"
    assert entry_name(one)[:236] == entry_name(other)[:236]
    assert entry_name(one) != entry_name(other)
    assert server_component(entry_name(one)) is None
    assert entry_name(b"a" * 255) == b"a" * 255
