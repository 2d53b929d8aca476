"""The configuration file and the command line, merged and resolved into a ``MountConfig``."""

import dataclasses
import os
import re
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple, NoReturn

from imapfs import mountinfo
from imapfs.account import source as sources
from imapfs.account import values
from imapfs.account.credentials import FOUR_WAYS, CredentialSources
from imapfs.account.settings import BY_KEY, SETTINGS
from imapfs.errors import UsageError
from imapfs.model import DEFAULT_PORTS, Account, MountConfig

Options = Mapping[str, Any]
"""Settings by key, checked and converted; paths are absolute."""

_MAX_LINE: Final = 4096
"""Characters in a line of the file. The library's time grows with the square of the parts of a dotted key."""

SECRETS = ("password-command", "password-file", "token-command", "oauth")
"""The keys each of which says where the password or token comes from."""


class Located(NamedTuple):
    """What a SOURCE names, with everything that is needed to connect to it."""

    account: Account
    credentials: CredentialSources
    options: Options
    """The command line's options over the entry's over the defaults."""
    entry: Options
    """The account's entry in the configuration file alone; empty for a URL."""
    given: Options
    """The command line's options alone."""


class Resolved(NamedTuple):
    mount: MountConfig
    credentials: CredentialSources
    log_file: Path | None
    """None for the caller's default."""


# ---- The configuration file


def default_path() -> Path:
    """Return the path of the configuration file, whether or not it exists."""
    import platformdirs

    return platformdirs.user_config_path("imapfs") / "config.toml"


def load_accounts(path: Path) -> dict[str, Options]:
    """Return the accounts in the TOML file ``path``; none if the file does not exist.

    Relative paths in it start at its own directory. Raises UsageError that names file and key.
    """
    try:
        text = path.read_text(encoding="utf-8")
        for number, line in enumerate(text.split("\n"), 1):
            if len(line) > _MAX_LINE:
                raise UsageError(f"{path}:{number}: is longer than {_MAX_LINE} characters")
        document = tomllib.loads(text)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"{path}: is not UTF-8, as TOML must be") from None
    except RecursionError:
        raise UsageError(f"{path}: is nested too deeply") from None
    except ValueError as error:
        # TOMLDecodeError, or a number of thousands of digits.
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
    options = _convert(table, path.parent, lambda key: f"{where}.{key}")
    for key in ("host", "user"):
        if key not in options:
            raise UsageError(f"{where}: has no {key!r}")
    return options


def _convert(table: Mapping[str, object], base: Path, where: Callable[[str], str]) -> Options:
    """Convert ``table``, with relative paths starting at ``base``; ``where`` names a key in an error."""
    options: dict[str, object] = {}
    for key, raw in table.items():
        setting = BY_KEY.get(key)
        if setting is None:
            raise UsageError(f"{where(key)}: unknown key; known are {', '.join(BY_KEY)}")
        try:
            value = setting.convert(raw)
        except ValueError as error:
            raise UsageError(f"{where(key)}: {error}") from None
        if setting.is_path:
            value = base / os.path.expanduser(str(value))  # noqa: PTH111 - Path.expanduser raises without a home
        options[key] = value
    return options


def _account_entry(name: str, path: Path) -> Options:
    accounts = load_accounts(path)
    if name in accounts:
        return accounts[name]
    if "@" in name and ":" not in name:
        own = [account for account, entry in accounts.items() if entry["user"] == name]
        how = f"imapfs mount {own[0]}" if own else f"imapfs setup --address {name}"
        raise UsageError(f"{name} is an address, and no account: run '{how}'")
    # A mistyped URL ends up here as well, and it may contain a password.
    shown = "of that name" if ":" in name or "@" in name else repr(name)
    if not accounts:
        raise UsageError(f"no account {shown}: {path} has no accounts; write imaps://user@host instead")
    raise UsageError(f"no account {shown} in {path}, which has {', '.join(sorted(accounts))}")


def defaults() -> Options:
    """Return what holds for an account that sets nothing."""
    import platformdirs

    table = {setting.key: setting.default for setting in SETTINGS if setting.default is not None}
    table["cache-dir"] = str(platformdirs.user_cache_path("imapfs"))
    return _convert(table, Path("/"), lambda key: f"default of {key}")


# ---- The account


def locate(source: str, options: Mapping[str, object], config_path: Path) -> Located:
    """Return the account that ``source`` names, with the command line's ``options`` over its entry.

    ``options`` holds what was given, by key and as the configuration file would have it. Raises UsageError.
    """
    given = _convert(options, Path.cwd(), lambda key: "-o" if key == "options" else f"--{key}")
    is_url = sources.is_url(source)
    entry = {} if is_url else _account_entry(source, config_path)
    merged = {**defaults(), **entry, **given}
    account = sources.parse(source) if is_url else _entry_account(merged)
    account = dataclasses.replace(account, **_fields(Account, merged))
    _check_account(account)
    # A source of secrets on the command line replaces the entry's, even if it is of another kind.
    named = given if any(key in given for key in SECRETS) else entry
    credentials = CredentialSources(
        command=named.get("password-command"),
        file=named.get("password-file"),
        token_command=named.get("token-command"),
        oauth=named.get("oauth"),
        name=None if is_url else source,
    )
    _check_auth(account, credentials)
    return Located(account, credentials, merged, entry, given)


def _entry_account(options: Options) -> Account:
    """Return what a URL would say."""
    security = options["security"]
    return Account(
        host=options["host"],
        user=options["user"],
        port=options.get("port", DEFAULT_PORTS[security]),
        mailbox=options.get("mailbox"),
        security=security,
    )


def _fields(kind: type[Account | MountConfig], options: Options) -> dict[str, Any]:
    """Return the settings that are fields of ``kind``, but for those that SOURCE gives."""
    names = {field.name for field in dataclasses.fields(kind)}
    return {
        setting.field: options[setting.key]
        for setting in SETTINGS
        if setting.flag and setting.field in names and setting.key in options
    }


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
        raise UsageError("tls-fingerprint trusts one certificate, whoever issued it: leave out ca-file")
    if account.client_cert is None:
        if account.client_key is not None:
            raise UsageError("client-key is useless alone: name the certificate with client-cert")
        if account.auth == "external":
            raise UsageError("auth external logs in with a certificate: name it with client-cert")


def _check_auth(account: Account, credentials: CredentialSources) -> None:
    """Refuse to send a password as a token, or a token as a password. Raises UsageError."""
    tokens = credentials.token_command is not None or credentials.oauth is not None
    if account.auth in ("xoauth2", "oauthbearer") and not tokens:
        raise UsageError(
            f"auth {account.auth} takes an access token: use --token-command, or the account's table 'oauth'"
        )
    if tokens and account.auth in ("plain", "login", "scram-sha-256"):
        raise UsageError(
            f"auth {account.auth} takes a password, but an access token is configured: leave auth out, or use"
            " --password-command"
        )


# ---- The mount


def own_mountpoint(name: str, config_path: Path) -> Path:
    """Return where the account ``name`` is mounted if nobody says where. Raises UsageError."""
    entry = _account_entry(name, config_path)
    mountpoint: Path = entry.get("mountpoint", Path.home() / "mail" / name)
    return mountpoint


def resolve(source: str, mountpoint: Path, options: Mapping[str, object], config_path: Path) -> Resolved:
    """Return what to mount, from the command line's ``options`` over the account's entry over the defaults.

    ``options`` is as for `locate`; mount options (-o) add to the entry's. Raises UsageError.
    """
    located = locate(source, options, config_path)
    import platformdirs

    # A cache in another place has its spool beside it, so that both can be moved together.
    is_elsewhere = "cache-dir" in located.entry or "cache-dir" in located.given
    read_only, fuse_options = _read_only(located.entry, located.given)
    fields = {
        **_fields(MountConfig, located.options),
        "account": located.account,
        "mountpoint": mountinfo.real_path(mountpoint),
        "read_only": read_only,
        "fuse_options": fuse_options,
        "trash": located.options.get("trash"),
        "own_mail": {
            path: use
            for option, use in (("sent", "\\Sent"), ("drafts", "\\Drafts"))
            if (path := located.options.get(option))
        },
        "spool_dir": None if is_elsewhere else platformdirs.user_data_path("imapfs"),
    }
    return Resolved(MountConfig(**fields), located.credentials, located.options.get("log-file"))


def _read_only(entry: Options, given: Options) -> tuple[bool, frozenset[str]]:
    """Return whether the mount is read-only, and the other mount options of both places."""
    from_given, _ = values.sort_mount_options(given.get("options", []))
    from_entry, _ = values.sort_mount_options(entry.get("options", []))
    _, passed = values.sort_mount_options([*entry.get("options", []), *given.get("options", [])])
    if given.get("read-only"):
        return True, passed
    if from_given is not None:
        return from_given, passed
    return entry.get("read-only", False) or bool(from_entry), passed
