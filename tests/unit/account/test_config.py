import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imapfs.account import config, values
from imapfs.account import source as sources
from imapfs.account.oauth import PROVIDERS, OAuthClient
from imapfs.account.settings import OAUTH_SETTINGS, SETTINGS
from imapfs.errors import UsageError
from imapfs.model import Account


@pytest.mark.parametrize(
    ("source", "account"),
    [
        ("imaps://alice@mail.example.org", Account("mail.example.org", "alice")),
        ("IMAPS://alice@Mail.Example.ORG:1993/", Account("mail.example.org", "alice", 1993)),
        ("imaps://alice%40example.org@h", Account("h", "alice@example.org")),
        ("imaps://alice@example.org@h", Account("h", "alice@example.org")),
        ("imaps://a%3Ab@h", Account("h", "a:b")),
        ("imap://alice@h", Account("h", "alice", 143, security="starttls")),
        ("imap://alice@h:1143", Account("h", "alice", 1143, security="starttls")),
        ("imaps://alice@[::1]:993", Account("::1", "alice")),
        ("imaps://alice@[2001:DB8::1]", Account("2001:db8::1", "alice")),
        ("imaps://alice@h/Archive/2026%20Q1/", Account("h", "alice", mailbox="Archive/2026 Q1")),
        ("imaps://alice@h/Entw%C3%BCrfe@home#1?", Account("h", "alice", mailbox="Entwürfe@home#1?")),
    ],
)
def test_source_names_an_account(source: str, account: Account) -> None:
    assert sources.parse(source) == account


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("imaps://alice:hunter2@h", "password"),
        ("imaps://alice:hun@ter2@h", "password"),
        ("imap://alice:hunter2@h", "password"),
        ("pop3://alice:hunter2@h", "imap://"),
        ("https://alice:hunter2@h", "scheme"),
        ("alice:hunter2", "URL"),
        ("imaps://alice:hun/ter2@h", "no user"),
        ("imaps://h", "no user"),
        ("imaps://@h", "no user"),
        ("imaps://alice@", "no host"),
        ("imaps://alice@h:", "port"),
        ("imaps://alice@h:0", "port"),
        ("imaps://alice@h:65536", "port"),
        ("imaps://alice@h:hunter2", "port"),
        ("imaps://alice@h:+1", "port"),
        ("imaps://alice@::1", "host"),
        ("imaps://alice@[::1", "host"),
        ("imaps://alice@[h]", "IPv6"),
        ("imaps://alice@[::zz]", "IPv6"),
        ("imaps://alice@h h", "host"),
        ("imaps://a%0Ab@h", "control"),
        ("imaps://alice@h/a%00b", "NUL"),
        ("imaps://%ff@h", "UTF-8"),
        ("imaps://\udcff@h", "UTF-8"),
    ],
)
def test_bad_source_is_refused_on_one_line_that_repeats_nothing_secret(source: str, says: str) -> None:
    with pytest.raises(UsageError, match=says) as caught:
        sources.parse(source)
    assert "\n" not in str(caught.value)
    assert "hunter2" not in str(caught.value)
    assert "ter2" not in str(caught.value)


@given(st.text())
def test_any_source_is_parsed_or_refused(text: str) -> None:
    try:
        account = sources.parse(f"imaps://{text}")
    except UsageError as error:
        assert "\n" not in str(error)
    else:
        assert account.user
        assert account.host


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1073741824", 2**30),
        ("10GiB", 10 * 2**30),
        ("500M", 500 * 2**20),
        ("500 mib", 500 * 2**20),
        ("500MB", 500_000_000),
        ("1.5K", 1536),
        ("7B", 7),
    ],
)
def test_size(text: str, size: int) -> None:
    assert values.parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "0", "-1", "10X", "GiB", "1e9", "nan", "0.1", "9" * 25, "8388608T", "\u0661"]
)
def test_bad_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="size"):
        values.parse_size(text)


@pytest.mark.parametrize(
    ("text", "read_only", "passed"),
    [
        ("", None, set()),
        ("ro,allow_other,noatime", True, {"allow_other", "noatime"}),
        ("ro,rw", False, set()),
        ("nodev,dev", None, {"dev"}),
        ("dev,nodev,,", None, {"nodev"}),
        ("defaults,_netdev,noauto,user,x-systemd.automount,default_permissions", None, set()),
    ],
)
def test_mount_options(text: str, read_only: bool | None, passed: set[str]) -> None:
    assert values.sort_mount_options(filter(None, text.split(","))) == (read_only, frozenset(passed))


@pytest.mark.parametrize("name", ["allow_others", "fsname=x", "RO", "max_read=1", "subtype=x"])
def test_unknown_mount_option_is_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match=repr(name)):
        values.sort_mount_options(["ro", name])


def write(directory: Path, text: str) -> Path:
    path = directory / "config.toml"
    path.write_text(text)
    return path


def test_accounts_are_loaded_with_paths_relative_to_the_file(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        """
        [accounts.work]
        host = "mail.example.org"
        user = "alice"
        port = 1993
        mailbox = "/Archive/"
        ca-file = "ca.pem"
        cache-dir = "/var/cache/x"
        cache-size = "1GiB"
        read-only = true
        names = "uid"
        connections = 2
        timeout = 5
        password-command = "pass show mail"
        options = ["nodev", "noexec,ro"]
        [accounts.home]
        host = "h"
        user = "u"
        cache-size = 1000
        options = "ro"
        """,
    )
    assert config.load_accounts(path) == {
        "work": {
            "host": "mail.example.org",
            "user": "alice",
            "port": 1993,
            "mailbox": "Archive",
            "ca-file": tmp_path / "ca.pem",
            "cache-dir": Path("/var/cache/x"),
            "cache-size": 2**30,
            "read-only": True,
            "names": "uid",
            "connections": 2,
            "timeout": 5.0,
            "password-command": "pass show mail",
            "options": ["nodev", "noexec", "ro"],
        },
        "home": {"host": "h", "user": "u", "cache-size": 1000, "options": ["ro"]},
    }


def located(directory: Path, lines: str, **given: object) -> config.Located:
    """Return what an account called "a" with these ``lines`` is; ``given`` is from the command line."""
    path = write(directory, f"[accounts.a]\nhost = 'h'\nuser = 'u'\n{lines}\n")
    return config.locate("a", {key.replace("_", "-"): value for key, value in given.items()}, path)


def test_entry_says_how_to_connect(tmp_path: Path) -> None:
    digits = "0123456789ABCDEF" * 4
    colons = ":".join(digits[i : i + 2] for i in range(0, 64, 2))
    account = located(
        tmp_path, f"security = 'starttls'\ntls-fingerprint = '{colons}'\nauth = 'plain'"
    ).account
    assert account == Account(
        "h", "u", 143, security="starttls", tls_fingerprint=digits.lower(), auth="plain"
    )
    assert located(tmp_path, "security = 'starttls'\nport = 1143").account.port == 1143
    assert located(tmp_path, "").account == Account("h", "u")
    cert = located(tmp_path, "client-cert = 'me.pem'", auth="external").account
    assert (cert.client_cert, cert.client_key) == (tmp_path / "me.pem", None)


def test_provider_stands_for_addresses_that_can_be_replaced(tmp_path: Path) -> None:
    client = located(
        tmp_path, "oauth = {provider = 'microsoft', client-id = 'x', scope = 'y'}"
    ).credentials.oauth
    assert client is not None
    assert client.token_url == "https://login.microsoftonline.com/common/oauth2/v2.0/token"
    assert (client.client_id, client.scope, client.client_secret) == ("x", "y", None)
    google = located(tmp_path, "oauth = {provider = 'google', client-id = 'x', client-secret = 'z'}")
    assert google.credentials.oauth is not None
    assert google.credentials.oauth.device_url is None
    assert google.credentials.oauth.client_secret is not None
    assert "'z'" not in repr(google)


def test_secret_named_on_the_command_line_replaces_every_other(tmp_path: Path) -> None:
    lines = "oauth = {provider = 'google', client-id = 'x'}\ntoken-command = 'one'"
    sources = located(tmp_path, lines, password_command="two").credentials
    assert (sources.command, sources.token_command, sources.oauth, sources.name) == ("two", None, None, "a")


def test_no_file_means_no_accounts(tmp_path: Path) -> None:
    assert config.load_accounts(tmp_path / "none.toml") == {}


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("colour = 'red'", "accounts.a.colour: unknown key"),
        ("ca_file = 'x'", "accounts.a.ca_file: unknown key"),
        ("port = '993'", "accounts.a.port: must be a whole number"),
        ("port = true", "accounts.a.port: must be a whole number"),
        ("connections = 51", "accounts.a.connections: must be a whole number from 1 to 50"),
        ("connections = 0", "accounts.a.connections"),
        ("timeout = 0", "accounts.a.timeout"),
        ("timeout = inf", "accounts.a.timeout"),
        ("timeout = nan", "accounts.a.timeout"),
        ("timeout = true", "accounts.a.timeout: must be a number"),
        ("read-only = 'yes'", "accounts.a.read-only: must be true or false"),
        ("names = 'date'", 'accounts.a.names: must be "subject", "uid" or a template'),
        ('names = "date\\n{uid}"', r"accounts.a.names: must not contain '\n'"),
        ("names = '{date}'", "accounts.a.names: must have the field {uid}"),
        ("names = 1", "accounts.a.names: must be a string"),
        ("sent = 1", "accounts.a.sent: must be a string"),
        ("cache-size = 'huge'", "accounts.a.cache-size: not a size"),
        ("cache-size = true", "accounts.a.cache-size"),
        ("mailbox = 1", "accounts.a.mailbox: must be a string"),
        ("options = 'ro,colour'", "accounts.a.options: unknown mount option 'colour'"),
        ("options = [1]", "accounts.a.options"),
        ("log-file = ''", "accounts.a.log-file: must not be empty"),
        ('log-file = "a\\u0000b"', "accounts.a.log-file: must not contain NUL"),
        ("password = 'hunter2'", "accounts.a.password"),
        ("security = 'ssl'", 'accounts.a.security: must be "tls" or "starttls"'),
        ("insecure-plaintext = 'no'", "accounts.a.insecure-plaintext: must be true or false"),
        ("auth = 'PLAIN'", 'accounts.a.auth: must be "auto", "plain", '),
        ("tls-fingerprint = 'ab:cd'", "accounts.a.tls-fingerprint: must be a SHA-256 fingerprint"),
        (f"tls-fingerprint = '{'g' * 64}'", "accounts.a.tls-fingerprint: must be a SHA-256 fingerprint"),
        ("oauth = 'google'", "accounts.a.oauth: must be a table"),
        ("oauth = {provider = 'gmail'}", 'accounts.a.oauth: provider must be "google" or "microsoft"'),
        ("oauth = {provider = 'google'}", "accounts.a.oauth: has no 'client-id'"),
        ("oauth = {provider = ['google']}", "accounts.a.oauth: provider must be"),
        ("oauth = {client-id = 'x', scope = 'y'}", "accounts.a.oauth: has no 'token-url'"),
        ("oauth = {token-url = 'http://h/t'}", "accounts.a.oauth: token-url must be an https:// address"),
        ("oauth = {token-url = 'https://u@h/'}", "accounts.a.oauth: token-url must be an https:// address"),
        ("oauth = {tenant = 'x'}", "accounts.a.oauth: unknown key 'tenant'"),
        (
            "oauth = {client-id = 'x', scope = 'y', token-url = 'https://h/t'}",
            "accounts.a.oauth: has neither 'authorize-url' nor 'device-url'",
        ),
    ],
)
def test_bad_entry_is_named_with_file_and_key(tmp_path: Path, line: str, says: str) -> None:
    path = write(tmp_path, f"[accounts.a]\nhost = 'h'\nuser = 'u'\n{line}\n")
    with pytest.raises(UsageError) as caught:
        config.load_accounts(path)
    assert str(caught.value).startswith(f"{path}: {says}")
    assert "hunter2" not in str(caught.value)


def test_password_in_the_file_is_refused_with_the_four_ways(tmp_path: Path) -> None:
    path = write(tmp_path, "[accounts.a]\nhost = 'h'\nuser = 'u'\npassword = 'hunter2'\n")
    with pytest.raises(UsageError, match=r"--password-command.*--password-file.*keyring.*prompt"):
        config.load_accounts(path)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[accounts.a]\nhost = \n", ":2: "),
        ("[accounts.a", ": "),
        ("accounts = 3\n", "accounts: must hold a table"),
        ("[accounts]\na = 3\n", "accounts.a: must be a table"),
        ("[account.a]\nhost = 'h'\n", "unknown key 'account'"),
        ("[accounts.a]\nhost = 'h'\n", "accounts.a: has no 'user'"),
        ("[accounts.a]\nuser = 'u'\n", "accounts.a: has no 'host'"),
    ],
)
def test_bad_file_is_one_line_that_names_it(tmp_path: Path, text: str, says: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(UsageError) as caught:
        config.load_accounts(path)
    assert str(caught.value).startswith(str(path))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="Is a directory"):
        config.load_accounts(tmp_path)
    path = tmp_path / "config.toml"
    path.write_bytes(b"# \xff\n")
    with pytest.raises(UsageError, match="UTF-8"):
        config.load_accounts(path)


def test_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    resolved = config.resolve("imaps://u@h", tmp_path / "mnt", {}, tmp_path / "config.toml")
    mount = resolved.mount
    assert mount.account == Account("h", "u")
    assert mount.mountpoint == tmp_path / "mnt"
    assert mount.cache_dir == tmp_path / "caches" / "imapfs"
    assert mount.spool_dir == tmp_path / "data" / "imapfs"
    assert (mount.cache_size, mount.names, mount.connections, mount.timeout) == (
        10 * 2**30,
        "subject",
        4,
        30.0,
    )
    assert (mount.read_only, mount.fuse_options, mount.own_mail) == (False, frozenset(), {})
    assert (resolved.credentials.command, resolved.credentials.file, resolved.log_file) == (None, None, None)


def test_command_line_wins_over_the_entry_and_adds_mount_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = write(
        tmp_path,
        """
        [accounts.a]
        host = "h"
        user = "u"
        mailbox = "INBOX"
        names = "uid"
        sent = "Sent Items"
        drafts = "/Entwürfe/"
        timeout = 5
        ca-file = "ca.pem"
        cache-dir = "~/cache"
        password-command = "false"
        options = "nodev,noatime"
        """,
    )
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    given = {"names": "subject", "password-file": "pw", "log-file": "log", "options": ["dev,ro", "noexec"]}
    given["sent"] = "a/Gesendet"
    resolved = config.resolve("a", Path("mnt"), given, path)
    assert resolved.mount.account == Account("h", "u", mailbox="INBOX", ca_file=tmp_path / "ca.pem")
    assert resolved.mount.mountpoint == tmp_path / "mnt"
    assert resolved.mount.cache_dir == tmp_path / "home" / "cache"
    assert resolved.mount.spool_dir is None, "beside that cache"
    assert (resolved.mount.names, resolved.mount.timeout, resolved.mount.read_only) == ("subject", 5.0, True)
    assert resolved.mount.fuse_options == {"dev", "noatime", "noexec"}
    assert resolved.mount.own_mail == {"a/Gesendet": "\\Sent", "Entwürfe": "\\Drafts"}
    assert (resolved.credentials.command, resolved.credentials.file) == (None, tmp_path / "pw")
    assert resolved.log_file == tmp_path / "log"


@pytest.mark.parametrize(
    ("entry", "given", "read_only"),
    [
        ("", {}, False),
        ("read-only = true", {}, True),
        ("options = 'ro'", {}, True),
        ("read-only = true", {"options": ["rw"]}, False),
        ("options = 'ro'", {"options": ["rw"]}, False),
        ("options = 'rw'", {"read-only": True}, True),
        ("", {"read-only": True, "options": ["rw"]}, True),
        ("read-only = true\noptions = 'rw'", {}, True),
    ],
)
def test_read_only_from_all_places(
    tmp_path: Path, entry: str, given: dict[str, object], read_only: bool
) -> None:
    path = write(tmp_path, f"[accounts.a]\nhost = 'h'\nuser = 'u'\n{entry}\n")
    assert config.resolve("a", tmp_path, given, path).mount.read_only is read_only


def test_bad_value_on_the_command_line_is_named_by_its_option(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"^--connections: must be"):
        config.resolve("imaps://u@h", tmp_path, {"connections": 99}, tmp_path / "c")
    with pytest.raises(UsageError, match=r"^-o: unknown mount option 'x'"):
        config.resolve("imaps://u@h", tmp_path, {"options": ["x"]}, tmp_path / "c")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"insecure-plaintext": True, "ca-file": "x"}, "insecure-plaintext contradicts"),
        ({"insecure-plaintext": True, "tls-fingerprint": "0" * 64}, "insecure-plaintext contradicts"),
        ({"insecure-plaintext": True, "client-cert": "x"}, "insecure-plaintext contradicts"),
        ({"ca-file": "x", "tls-fingerprint": "0" * 64}, "leave out ca-file"),
        ({"client-key": "x"}, "name the certificate with client-cert"),
        ({"auth": "external"}, "name it with client-cert"),
        ({"auth": "xoauth2"}, "auth xoauth2 takes an access token: use --token-command"),
        ({"auth": "oauthbearer", "password-command": "x"}, "takes an access token"),
        ({"auth": "plain", "token-command": "x"}, "auth plain takes a password"),
        ({"auth": "scram-sha-256", "token-command": "x"}, "takes a password"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    tmp_path: Path, given: dict[str, object], says: str
) -> None:
    with pytest.raises(UsageError, match=says):
        config.resolve("imap://u@h", tmp_path, given, tmp_path / "c")


def test_unknown_account_lists_the_known_ones_and_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, "[accounts.b]\nhost='h'\nuser='u'\n[accounts.a]\nhost='h'\nuser='u'\n")
    with pytest.raises(UsageError) as caught:
        config.resolve("c", tmp_path, {}, path)
    assert "'c'" in str(caught.value)
    assert str(path) in str(caught.value)
    assert "a, b" in str(caught.value)
    with pytest.raises(UsageError) as caught:
        config.resolve("imaps:/u:hunter2@h", tmp_path, {}, path)
    assert "hunter2" not in str(caught.value)


def test_mountpoint_behind_a_symbolic_link_is_resolved(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    os.symlink("real", tmp_path / "link")
    resolved = config.resolve("imaps://u@h", tmp_path / "link", {}, tmp_path / "c")
    assert resolved.mount.mountpoint == tmp_path / "real"


def test_every_key_is_told_of_in_the_table_of_settings_once() -> None:
    keys = [setting.key for setting in SETTINGS]
    assert keys == list(dict.fromkeys(keys))
    for setting in SETTINGS:
        if setting.default is not None:
            config.resolve("imaps://a@h", Path("/mnt"), {setting.key: setting.default}, Path("/none"))


def test_every_key_of_the_oauth_table_is_told_of_once() -> None:
    provider, *others = OAUTH_SETTINGS
    assert provider.choices == tuple(PROVIDERS)
    assert {setting.field for setting in others} == {field.name for field in fields(OAuthClient)}


_NEW_SETTING = """
import dataclasses, sys
from pathlib import Path
from imapfs.account import settings

new = settings.Setting(
    "colour-depth", "Bits of a colour.", "integer", "BITS", 8, converter=settings.values.integer(1, 16)
)
settings.SETTINGS += (new,)
settings.BY_KEY[new.key] = new

import imapfs.model
imapfs.model.MountConfig = dataclasses.make_dataclass(
    "MountConfig", [("colour_depth", int)], bases=(imapfs.model.MountConfig,), frozen=True
)
from imapfs.account import config
from imapfs.cli.main import all_commands, commands
from imapfs.cli.manual import generated

def depth(source, given):
    return config.resolve(source, Path("/mnt"), given, Path(sys.argv[1])).mount.colour_depth

assert depth("imaps://u@h", {}) == 8
assert depth("a", {}) == 3
assert depth("a", {"colour-depth": 4}) == 4
try:
    depth("a", {"colour-depth": 17})
except config.UsageError as error:
    assert str(error) == "--colour-depth: must be a whole number from 1 to 16", error
assert "--colour-depth BITS" in all_commands()["mount"].get_help(commands.make_context("imapfs", ["mount"]))
assert "colour\\\\-depth" in generated()["share/man/man1/imapfs.1"]
assert "colour\\\\-depth" in generated()["share/man/man5/imapfs.toml.5"]
print("as it should be")
"""


def test_a_new_setting_is_an_entry_of_the_table_and_a_field_of_the_mount_only(tmp_path: Path) -> None:
    path = write(tmp_path, "[accounts.a]\nhost = 'h'\nuser = 'u'\ncolour-depth = 3\n")
    done = subprocess.run(
        [sys.executable, "-c", _NEW_SETTING, path], capture_output=True, text=True, check=False
    )
    assert (done.stderr, done.stdout) == ("", "as it should be\n")
