"""What the command line and the configuration file mean, checked and resolved into a ``MountConfig``.

Nothing taken from a SOURCE is repeated in an error: a person may have typed a password into it.
"""

import dataclasses
import ipaddress
import math
import os
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple, NoReturn, TypedDict, cast, get_args
from urllib.parse import unquote

from imapfs import mountinfo
from imapfs.account.credentials import FOUR_WAYS, CredentialSources
from imapfs.account.oauth import PROVIDERS, OAuthClient
from imapfs.account.settings import SETTINGS
from imapfs.errors import UsageError
from imapfs.model import (
    DEFAULT_PORTS,
    Account,
    AuthMethod,
    DeletePolicy,
    MountConfig,
    NameScheme,
    Secret,
    Security,
)

MAX_CONNECTIONS = 50
MAX_TIMEOUT = 3600
MAX_POLL = 86400

Options = TypedDict(
    "Options",
    {
        "host": str,
        "user": str,
        "port": int,
        "security": Security,
        "insecure-plaintext": bool,
        "mailbox": str | None,
        "ca-file": Path,
        "tls-fingerprint": str,
        "client-cert": Path,
        "client-key": Path,
        "auth": AuthMethod,
        "cache-dir": Path,
        "cache-size": int,
        "read-only": bool,
        "fetch-ahead": int,
        "names": NameScheme,
        "delete": DeletePolicy,
        "connections": int,
        "timeout": float,
        "poll": float,
        "password-command": str,
        "password-file": Path,
        "token-command": str,
        "oauth": OAuthClient,
        "log-file": Path,
        "options": list[str],
    },
    total=False,
)
"""Settings by the name they have in the configuration file: checked and converted, paths absolute."""


class Located(NamedTuple):
    """What a SOURCE names, with everything that it takes to connect to it."""

    account: Account
    credentials: CredentialSources
    options: Options
    """The command line's over the entry's over the defaults."""
    entry: Options
    """The account's entry in the configuration file alone; empty for a URL."""
    given: Options
    """The command line's alone."""


class Resolved(NamedTuple):
    mount: MountConfig
    credentials: CredentialSources
    log_file: Path | None
    """None: the caller's default."""


# ---- SOURCE


def parse_source(source: str) -> Account:
    """The account that ``imaps://user@host[:port][/Mailbox]`` names (after RFC 5092, much reduced).

    ``imap://`` is for STARTTLS. User and mailbox are percent-decoded; the last "@" ends the user, so that an
    address can be typed as it is. Raises UsageError.
    """
    scheme, separator, rest = source.partition("://")
    if not separator:
        raise UsageError("the source is no URL: write imaps://user@host[:port][/Mailbox]")
    security = _SCHEMES.get(scheme.lower())
    if security is None:
        raise UsageError(
            "the source has an unknown scheme: write imaps://user@host[:port][/Mailbox], or imap://"
        )
    authority, _, path = rest.partition("/")
    userinfo, _, hostport = authority.rpartition("@")
    if ":" in userinfo:
        raise UsageError(
            "the source has a password in it, where other users and the shell's history show it "
            f'(a ":" in the user is written %3A): leave it out, use {FOUR_WAYS}'
        )
    try:
        user = _user(unquote(userinfo, errors="strict"))
        host, port = _host_and_port(hostport, DEFAULT_PORTS[security])
        mailbox = _mailbox(unquote(path, errors="strict"))
    except UnicodeDecodeError:
        raise UsageError("the source has percent escapes that are not UTF-8") from None
    except ValueError as error:
        raise UsageError(f"the source {error}: write imaps://user@host[:port][/Mailbox]") from None
    return Account(host=host, user=user, port=port, mailbox=mailbox, security=security)


_SCHEMES: Mapping[str, Security] = {"imaps": "tls", "imap": "starttls"}


def _host_and_port(text: str, usual: int) -> tuple[str, int]:
    match = re.fullmatch(r"(\[[^\]]*\]|[^:]*)(?::(.*))?", text, re.DOTALL)
    if match is None:
        raise ValueError("has no valid host name (an IPv6 address goes in brackets)")
    host, port = match[1], match[2]
    if host.startswith("["):
        host = host[1:-1]
        if ":" not in host:
            raise ValueError("has no valid IPv6 address in its brackets")
    if port is None:
        return _host(host), usual
    # int() takes signs, spaces and underscores as well; a port is digits.
    if not re.fullmatch(r"[0-9]{1,5}", port):
        raise ValueError("has no valid port, a number from 1 to 65535")
    return _host(host), _port(int(port))


# ---- Values: each function returns what was meant, or raises ValueError with the end of a sentence


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError("must be a string")
    if not value:
        raise ValueError("must not be empty")
    if "\0" in value:
        raise ValueError("must not contain NUL")
    return value


def _without_controls(value: object) -> str:
    text = _text(value)
    if any(ord(char) < 32 or ord(char) == 127 for char in text):
        raise ValueError("must not contain control characters")
    # Arguments that are not UTF-8 arrive as surrogates, which no IMAP command can carry.
    if any("\ud800" <= char <= "\udfff" for char in text):
        raise ValueError("must be UTF-8")
    return text


def _user(value: object) -> str:
    if value == "":
        raise ValueError("has no user")
    return _without_controls(value)


def _host(value: object) -> str:
    if value == "":
        raise ValueError("has no host")
    text = _text(value).lower()
    if ":" in text:
        try:
            return str(ipaddress.IPv6Address(text))
        except ValueError:
            raise ValueError("has no valid IPv6 address") from None
    if not re.fullmatch(r"[\w-]+(\.[\w-]+)*\.?", text):
        raise ValueError("has no valid host name")
    return text


def _mailbox(value: object) -> str | None:
    """A path without outer slashes; None for the whole account."""
    if not isinstance(value, str):
        raise ValueError("must be a string")
    path = value.strip("/")
    return _without_controls(path) if path else None


def _integer(low: int, high: int) -> Callable[[object], int]:
    def convert(value: object) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise ValueError(f"must be a whole number from {low} to {high}")
        return value

    return convert


_port = _integer(1, 65535)


def _seconds(most: int) -> Callable[[object], float]:
    def convert(value: object) -> float:
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise ValueError("must be a number of seconds")
        if not math.isfinite(value) or not 0 < value <= most:
            raise ValueError(f"must be more than 0 and at most {most} seconds")
        return float(value)

    return convert


def _boolean(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError("must be true or false")
    return value


def _one_of(choices: object) -> Callable[[object], str]:
    """For a Literal type."""
    values: tuple[str, ...] = get_args(choices)

    def convert(value: object) -> str:
        if value not in values:
            named = ", ".join(f'"{one}"' for one in values[:-1])
            raise ValueError(f'must be {named} or "{values[-1]}"')
        return str(value)

    return convert


def _fingerprint(value: object) -> str:
    digits = _text(value).replace(":", "").lower()
    if not re.fullmatch("[0-9a-f]{64}", digits):
        raise ValueError("must be a SHA-256 fingerprint: 64 hexadecimal digits, with or without colons")
    return digits


def _size(value: object) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    return parse_size(_text(value))


def _size_or_none(value: object) -> int:
    return 0 if value in ("0", 0) else _size(value)


def _fuse_options(value: object) -> list[str]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError("must be a string or a list of strings")
    names = [name for text in texts for name in text.split(",") if name]
    sort_fuse_options(names)
    return names


def _https(value: object) -> str:
    url = _without_controls(value)
    # What goes there is as good as a password.
    if not re.fullmatch(r"https://[^/?#@\s]+(/[^\s#]*)?", url):
        raise ValueError("must be an https:// address")
    return url


_OAUTH: Mapping[str, Callable[[object], str]] = {
    "client-id": _without_controls,
    "client-secret": _without_controls,
    "authorize-url": _https,
    "token-url": _https,
    "device-url": _https,
    "scope": _without_controls,
}


def _oauth(value: object) -> OAuthClient:
    """A table: keys of ``_OAUTH`` over those that ``provider`` stands for."""
    if not isinstance(value, dict):
        raise ValueError("must be a table, [accounts.NAME.oauth]")
    table = dict(value)
    provider = table.pop("provider", None)
    if provider is not None and provider not in tuple(PROVIDERS):
        raise ValueError(
            f"provider must be one of {', '.join(PROVIDERS)}, or left out for one's own addresses"
        )
    found: dict[str, str] = dict(PROVIDERS.get(provider, {}))
    for key, raw in table.items():
        if key not in _OAUTH:
            raise ValueError(f"unknown key {key!r}; known are provider, {', '.join(_OAUTH)}")
        try:
            found[key] = _OAUTH[key](raw)
        except ValueError as error:
            raise ValueError(f"{key} {error}") from None
    missing = [key for key in ("client-id", "token-url", "scope") if key not in found]
    if missing:
        raise ValueError(f"has no {missing[0]!r}")
    if "authorize-url" not in found and "device-url" not in found:
        raise ValueError("has neither 'authorize-url' nor 'device-url'")
    secret = found.get("client-secret")
    return OAuthClient(
        client_id=found["client-id"],
        token_url=found["token-url"],
        scope=found["scope"],
        authorize_url=found.get("authorize-url"),
        device_url=found.get("device-url"),
        client_secret=Secret(secret) if secret is not None else None,
    )


_CONVERT: Mapping[str, Callable[[object], object]] = {
    "host": _host,
    "user": _user,
    "port": _port,
    "security": _one_of(Security),
    "insecure-plaintext": _boolean,
    "mailbox": _mailbox,
    "ca-file": _text,
    "tls-fingerprint": _fingerprint,
    "client-cert": _text,
    "client-key": _text,
    "auth": _one_of(AuthMethod),
    "cache-dir": _text,
    "cache-size": _size,
    "read-only": _boolean,
    "fetch-ahead": _size_or_none,
    "names": _one_of(NameScheme),
    "delete": _one_of(DeletePolicy),
    "connections": _integer(1, MAX_CONNECTIONS),
    "timeout": _seconds(MAX_TIMEOUT),
    "poll": _seconds(MAX_POLL),
    "password-command": _text,
    "password-file": _text,
    "token-command": _text,
    "oauth": _oauth,
    "log-file": _text,
    "options": _fuse_options,
}


def convert(key: str, value: object) -> object:
    """``value`` as the setting ``key`` means it; raises ValueError with the end of a sentence."""
    try:
        return _CONVERT[key](value)
    except UsageError as error:
        raise ValueError(str(error)) from None


_PATHS = frozenset(setting.key for setting in SETTINGS if setting.kind in ("path", "directory"))
SECRETS = ("password-command", "password-file", "token-command", "oauth")
"""The keys of which each alone says where the secret comes from."""


def _checked(table: Mapping[str, object], base: Path, where: Callable[[str], str]) -> Options:
    """``table`` converted, relative paths taken from ``base``; ``where`` names a key in an error."""
    values: dict[str, object] = {}
    for key, raw in table.items():
        if key not in _CONVERT:
            raise UsageError(f"{where(key)}: unknown key; known are {', '.join(_CONVERT)}")
        try:
            value = _CONVERT[key](raw)
        except (ValueError, UsageError) as error:
            raise UsageError(f"{where(key)}: {error}") from None
        if key in _PATHS:
            value = base / os.path.expanduser(str(value))  # noqa: PTH111 - Path.expanduser raises without a home
        values[key] = value
    return cast(Options, values)


_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*(?:([KMGT])(I?B)?|B)?", re.IGNORECASE | re.ASCII)


def parse_size(text: str) -> int:
    """Bytes in ``text``: ``1073741824``, ``500M`` and ``10GiB`` (powers of 1024), ``500MB`` (of 1000).

    Raises UsageError, also for less than one byte.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None or len(text) > 30:
        raise UsageError("not a size: write for example 500M, 10GiB or a number of bytes")
    number, unit, suffix = match.groups()
    base = 1000 if suffix is not None and suffix.upper() == "B" else 1024
    factor = base ** ("KMGT".index(unit.upper()) + 1) if unit else 1
    size = int(number) * factor if number.isdecimal() else int(float(number) * factor)
    if not 1 <= size < 2**63:
        raise UsageError("not a usable size: at least one byte, and less than 8 EiB")
    return size


def show_size(count: float) -> str:
    """Bytes for people: ``1.5 GiB``, in powers of 1024."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} TiB"


# ---- -o

_OPPOSITES: Mapping[str, str] = {
    "atime": "noatime",
    "dev": "nodev",
    "exec": "noexec",
    "suid": "nosuid",
}
_OPPOSITE = {**_OPPOSITES, **{off: on for on, off in _OPPOSITES.items()}}
_PASSED = frozenset({"allow_other", "allow_root", *_OPPOSITE})
# What mount(8) and fstab(5) put on the line of every file system, and what is so in any case.
_IGNORED = frozenset(
    {"_netdev", "async", "auto", "default_permissions", "defaults", "group", "noauto", "nofail", "nouser"}
    | {"owner", "relatime", "user", "users"}
)


def sort_fuse_options(names: Iterable[str]) -> tuple[bool | None, frozenset[str]]:
    """Of mount options, whether they ask for read-only (None: they say nothing) and the rest.

    The rest is what fusermount3 and libfuse understand; of two that contradict each other the later one
    counts, as for mount(8). Options that only concern fstab(5) are dropped. Raises UsageError for unknown
    ones.
    """
    read_only: bool | None = None
    passed: set[str] = set()
    for name in names:
        if name in ("ro", "rw"):
            read_only = name == "ro"
        elif name in _PASSED:
            passed.discard(_OPPOSITE.get(name, ""))
            passed.add(name)
        elif name not in _IGNORED and not name.startswith(("x-", "comment=")):
            raise UsageError(f"unknown mount option {name!r}; known are ro, rw, {', '.join(sorted(_PASSED))}")
    return read_only, frozenset(passed)


# ---- The configuration file


def default_path() -> Path:
    """Where the configuration file is, or would be."""
    import platformdirs

    return platformdirs.user_config_path("imapfs") / "config.toml"


def load_accounts(path: Path) -> dict[str, Options]:
    """The accounts in the TOML file ``path``; none where there is no such file.

    Relative paths in it start at its own directory. Raises UsageError that names file and key.
    """
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"{path}: is not UTF-8, as TOML must be") from None
    except tomllib.TOMLDecodeError as error:
        _refuse_syntax(path, str(error))
    accounts = document.pop("accounts", {})
    if document:
        raise UsageError(f"{path}: unknown key {next(iter(document))!r}; only [accounts.NAME] is known")
    if not isinstance(accounts, dict):
        raise UsageError(f"{path}: accounts: must hold a table for each account, [accounts.NAME]")
    return {name: _load_account(path, name, table) for name, table in accounts.items()}


def _refuse_syntax(path: Path, message: str) -> NoReturn:
    what, _, position = message.partition(" (at ")
    line = re.match(r"line ([0-9]+)", position)
    raise UsageError(f"{path}:{line[1]}: {what}" if line else f"{path}: {message}") from None


def _load_account(path: Path, name: str, table: object) -> Options:
    where = f"{path}: accounts.{name}"
    if not isinstance(table, dict):
        raise UsageError(f"{where}: must be a table, [accounts.{name}]")
    if "password" in table:
        raise UsageError(f"{where}.password: a password does not belong in this file: use {FOUR_WAYS}")
    options = _checked(table, path.parent, lambda key: f"{where}.{key}")
    for key in ("host", "user"):
        if key not in options:
            raise UsageError(f"{where}: has no {key!r}")
    return options


def _account_options(name: str, path: Path) -> Options:
    accounts = load_accounts(path)
    if name in accounts:
        return accounts[name]
    # A mistyped URL arrives here as well, and it may hold a password.
    shown = "of that name" if ":" in name or "@" in name else repr(name)
    if not accounts:
        raise UsageError(f"no account {shown}: there is none in {path}; or write imaps://user@host")
    raise UsageError(f"no account {shown} in {path}, which has {', '.join(sorted(accounts))}")


# ---- Everything together


def locate(source: str, options: Mapping[str, object], config_path: Path) -> Located:
    """Which account ``source`` names, from the command line's ``options`` over the account's entry.

    ``options`` holds only what was given, under the names of the configuration file. Raises UsageError.
    """
    given = _checked(options, Path.cwd(), lambda key: "-o" if key == "options" else f"--{key}")
    entry = Options() if "://" in source else _account_options(source, config_path)
    merged: Options = {**defaults(), **entry, **given}
    if "://" in source:
        account = parse_source(source)
    else:
        security = merged["security"]
        account = Account(
            host=entry["host"],
            user=entry["user"],
            port=entry.get("port", DEFAULT_PORTS[security]),
            mailbox=entry.get("mailbox"),
            security=security,
        )
    account = dataclasses.replace(
        account,
        insecure_plaintext=merged["insecure-plaintext"],
        ca_file=merged.get("ca-file"),
        tls_fingerprint=merged.get("tls-fingerprint"),
        client_cert=merged.get("client-cert"),
        client_key=merged.get("client-key"),
        auth=merged["auth"],
    )
    _check_account(account)
    # A source of secrets on the command line replaces the entry's, whichever kind either is.
    named = given if any(key in given for key in SECRETS) else entry
    credentials = CredentialSources(
        command=named.get("password-command"),
        file=named.get("password-file"),
        token_command=named.get("token-command"),
        oauth=named.get("oauth"),
        name=None if "://" in source else source,
    )
    _check_auth(account, credentials)
    return Located(account, credentials, merged, entry, given)


def _check_account(account: Account) -> None:
    if account.insecure_plaintext and account.security == "tls":
        raise UsageError(
            'insecure-plaintext contradicts TLS: leave it out, or write imap:// (security = "starttls")'
        )
    if account.insecure_plaintext and account.names_certificates:
        raise UsageError(
            "insecure-plaintext contradicts ca-file, tls-fingerprint and client-cert, which are for TLS:"
            " leave one out"
        )
    if account.ca_file is not None and account.tls_fingerprint is not None:
        raise UsageError("tls-fingerprint trusts one certificate alone, whoever issued it: leave out ca-file")
    if account.client_cert is None:
        if account.client_key is not None:
            raise UsageError("client-key is of no use alone: name the certificate with client-cert")
        if account.auth == "external":
            raise UsageError("auth external is a login by certificate: name it with client-cert")


def _check_auth(account: Account, credentials: CredentialSources) -> None:
    """A password is not to be sent as a token, nor a token as a password."""
    tokens = credentials.token_command is not None or credentials.oauth is not None
    if account.auth in ("xoauth2", "oauthbearer") and not tokens:
        raise UsageError(
            f"auth {account.auth} takes an access token: use --token-command, or the account's table 'oauth'"
        )
    if tokens and account.auth in ("plain", "login", "scram-sha-256"):
        raise UsageError(
            f"auth {account.auth} takes a password, and there are access tokens: leave auth out, or use"
            " --password-command"
        )


def resolve(source: str, mountpoint: Path, options: Mapping[str, object], config_path: Path) -> Resolved:
    """What to mount, from the command line's ``options`` over the account's entry over the defaults.

    ``options`` holds only what was given, under the names of the configuration file; -o adds to the entry's
    options. Raises UsageError.
    """
    located = locate(source, options, config_path)
    merged = located.options
    read_only, fuse_options = _read_only(located.entry, located.given)
    mount = MountConfig(
        account=located.account,
        mountpoint=mountinfo.real_path(mountpoint),
        cache_dir=merged.get("cache-dir") or _default_cache_dir(),
        cache_size=merged["cache-size"],
        fetch_ahead=merged["fetch-ahead"],
        names=merged["names"],
        delete=merged["delete"],
        connections=merged["connections"],
        timeout=merged["timeout"],
        poll=merged["poll"],
        read_only=read_only,
        fuse_options=fuse_options,
    )
    return Resolved(mount, located.credentials, merged.get("log-file"))


def _read_only(entry: Options, given: Options) -> tuple[bool, frozenset[str]]:
    """Whether the mount is read-only, and the other mount options of both places."""
    from_given, _ = sort_fuse_options(given.get("options", []))
    from_entry, _ = sort_fuse_options(entry.get("options", []))
    _, passed = sort_fuse_options([*entry.get("options", []), *given.get("options", [])])
    if given.get("read-only"):
        return True, passed
    if from_given is not None:
        return from_given, passed
    return entry.get("read-only", False) or bool(from_entry), passed


def defaults() -> Options:
    """What holds for an account that says nothing."""
    table = {setting.key: setting.default for setting in SETTINGS if setting.default is not None}
    return _checked(table, Path("/"), lambda key: f"default of {key}")


def _default_cache_dir() -> Path:
    import platformdirs

    return platformdirs.user_cache_path("imapfs")
