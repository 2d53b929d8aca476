"""The configuration file as a place to write to, and all of its accounts mounted at once."""

import errno
import os
import stat
import tomllib
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from imapfs.account import config
from imapfs.account.file import add, check_name
from imapfs.errors import UsageError

ENTRY = {"host": "imap.example.org", "user": "alice"}
OLD = """# My accounts; do not touch.\r

accounts.dotted.host = "h"   # odd, but TOML
accounts.dotted.user = "u"

[accounts.first]
host = "one.example.org"
user = "alice"
options = [
  "noatime",
]

# About the second:
[accounts."second one"]
host = "two.example.org"
user = "alice"

[accounts."second one".oauth]
provider = "google"
client-id = "id"

# The last:
[accounts.last]
host = "three.example.org"
user = "alice"
"""
MISLEADING = """[accounts.other]
host = "h"
user = "u"
password-command = '''
[accounts.first]
'''
"""
SCATTERED = """[accounts.x]
host = "h"
user = "u"
# About y:
[accounts.y]
host = "h"
user = "u"
[accounts.x.oauth]
provider = "google"
client-id = "id"
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "imapfs" / "config.toml"


def written(path: Path, text: str) -> Path:
    path.parent.mkdir()
    path.write_bytes(text.encode())
    return path


def test_file_and_directory_are_made_for_the_owner_only(path: Path) -> None:
    add(path, "work", ENTRY, ["a comment"], replace=False)
    assert config.load_accounts(path) == {"work": ENTRY}
    assert path.read_text() == ('[accounts.work]\n# a comment\nhost = "imap.example.org"\nuser = "alice"\n')
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


@pytest.mark.parametrize("end", ["", "\n", "\n\n", "# without a line end"])
def test_what_was_there_stays_byte_for_byte(path: Path, end: str) -> None:
    old = OLD + end
    add(written(path, old), "work", ENTRY, [], replace=False)
    assert path.read_bytes().startswith(old.encode())
    assert config.load_accounts(path)["work"] == ENTRY
    assert len(config.load_accounts(path)) == 5


def test_name_that_exists_is_refused_and_nothing_changes(path: Path) -> None:
    written(path, OLD)
    with pytest.raises(UsageError, match=r"already has an account first.*--replace"):
        add(path, "first", ENTRY, [], replace=False)
    assert path.read_bytes() == OLD.encode()


@pytest.mark.parametrize("name", ["first", "second one"])
def test_replacing_changes_only_that_entry(path: Path, name: str) -> None:
    before = config.load_accounts(written(path, OLD))
    add(path, name, ENTRY, ["new"], replace=True)
    assert config.load_accounts(path) == {**before, name: ENTRY}
    for kept in ("# My accounts; do not touch.\r\n", "# odd, but TOML", "# About the second:", "# The last:"):
        assert kept in path.read_bytes().decode()


@pytest.mark.parametrize(
    ("name", "begin", "end"),
    [
        ("first", "[accounts.first]", "\n# About the second:"),
        ("second one", '[accounts."second one"]', "\n# The last:"),
        ("last", "[accounts.last]", ""),
    ],
)
def test_replacing_keeps_the_bytes_before_and_after_the_entry(
    path: Path, name: str, begin: str, end: str
) -> None:
    add(written(path, OLD), name, ENTRY, ["new"], replace=True)
    before, _, rest = OLD.partition(begin)
    entry = f'{begin}\n# new\nhost = "imap.example.org"\nuser = "alice"\n'
    assert path.read_bytes().decode() == before + entry + (end and rest[rest.index(end) :])


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ('[accounts]\nx = { host = "h", user = "u" }\ny = { host = "h", user = "u" }\n', "x"),
        (MISLEADING + OLD.partition("\n\n")[2].partition("\n\n")[2], "first"),
        ('[accounts]\n# Mine:\nx = { host = "h", user = "u" }\n', "x"),
    ],
)
def test_unusual_layouts_are_edited(path: Path, text: str, name: str) -> None:
    before = config.load_accounts(written(path, text))
    add(path, name, ENTRY, [], replace=True)
    assert config.load_accounts(path) == {**before, name: ENTRY}
    assert all(line in path.read_text() for line in text.splitlines() if line.startswith("#"))


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ('accounts = { x = { host = "h", user = "u" } }\n', "work"),
        ('accounts = { x = { host = "h", user = "u" } }\n', "x"),
        ('accounts.dotted.host = "h"\naccounts.dotted.user = "u"\n', "dotted"),
        (SCATTERED, "x"),
    ],
)
def test_file_that_cannot_be_edited_safely_is_left_alone(path: Path, text: str, name: str) -> None:
    written(path, text)
    with pytest.raises(UsageError, match="by hand"):
        add(path, name, ENTRY, [], replace=True)
    assert path.read_text() == text
    assert list(path.parent.iterdir()) == [path]


def test_file_that_is_no_toml_is_left_alone(path: Path) -> None:
    with pytest.raises(UsageError, match=r"config\.toml:1"):
        add(written(path, "[accounts\n"), "work", ENTRY, [], replace=False)
    assert path.read_text() == "[accounts\n"


def test_symbolic_link_stays_one(path: Path, tmp_path: Path) -> None:
    kept = tmp_path / "dotfiles.toml"
    kept.write_text("# mine\n")
    path.parent.mkdir()
    path.symlink_to(kept)
    add(path, "work", ENTRY, [], replace=False)
    assert path.is_symlink()
    assert kept.read_text().startswith("# mine\n\n[accounts.work]\n")


def test_full_disk_leaves_the_file_and_nothing_beside_it(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    written(path, OLD)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UsageError, match="cannot be written: No space left"):
        add(path, "work", ENTRY, [], replace=False)
    assert path.read_bytes() == OLD.encode()
    assert list(path.parent.iterdir()) == [path]


def test_value_that_is_not_utf8_is_refused(path: Path) -> None:
    with pytest.raises(UsageError, match="UTF-8"):
        add(path, "work", {**ENTRY, "password-command": "cat \udcff"}, [], replace=False)
    assert not path.exists()


def test_directory_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be"):
        add(tmp_path / "file" / "config.toml", "work", ENTRY, [], replace=False)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "-o", "imaps://a@b", " a", "a\n", "a\x07"])
def test_name_that_can_be_no_directory_is_refused(path: Path, name: str) -> None:
    with pytest.raises(UsageError):
        check_name(path, name, replace=False)


@example(name='a"b', user='"\\', command="\x7f\n[accounts.x]\n#")
@given(
    name=st.text(
        st.characters(exclude_categories=["C", "Z"], exclude_characters="/"), min_size=1, max_size=20
    ),
    user=st.text(st.characters(exclude_categories=["C"]), min_size=1, max_size=20),
    command=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1),
)
def test_every_value_comes_back_as_it_was(
    tmp_path_factory: pytest.TempPathFactory, name: str, user: str, command: str
) -> None:
    path = tmp_path_factory.mktemp("config") / "config.toml"
    if name.startswith(("-", ".")):
        name = f"a{name}"
    entry: dict[str, object] = {
        "host": "h",
        "user": user,
        "port": 143,
        "read-only": True,
        "password-command": command,
    }
    entry["oauth"] = {"provider": "google", "client-id": user}
    add(path, name, entry, ["comment"], replace=False)
    assert tomllib.loads(path.read_text()) == {"accounts": {name: entry}}
    assert config.load_accounts(path)[name]["user"] == user
