"""The accounts in the configuration file: listing them, and adding or replacing one."""

import os
import tempfile
import tomllib
from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from imapfs import mountinfo
from imapfs.account import config
from imapfs.account.credentials import CredentialSources
from imapfs.errors import UsageError

if TYPE_CHECKING:
    # Imported where it is used: most commands only read the file.
    from tomlkit.items import Item, Table


class ListedAccount(NamedTuple):
    name: str
    url: str
    credential: str
    """Where the password or token comes from, for people; never the secret itself."""
    mountpoints: list[str]


def accounts(path: Path) -> list[ListedAccount]:
    """Return the accounts in the configuration file ``path``, in its order. Raises UsageError."""
    mounts = mountinfo.imapfs_mounts()
    found = []
    for name in config.load_accounts(path):
        located = config.locate(name, {}, path)
        url = located.account.url
        mountpoints = [str(mount.mountpoint) for mount in mounts if mount.source == url]
        found.append(ListedAccount(name, url, _describe(located.credentials), mountpoints))
    return found


def _describe(sources: CredentialSources) -> str:
    if sources.token_command is not None:
        return f"token command: {sources.token_command}"
    if sources.oauth is not None:
        return "OAuth 2.0, with the consent in the keyring"
    if sources.command is not None:
        return f"command: {sources.command}"
    if sources.file is not None:
        return f"file: {sources.file}"
    return "keyring or prompt"


# ---- Adding an account


def check_name(path: Path, name: str, *, replace: bool) -> None:
    """Check that `add` would accept ``name``. Raises UsageError."""
    if not name or name in (".", "..") or "/" in name or not name.isprintable() or name != name.strip():
        raise UsageError(
            "the name of an account becomes a directory name: it must not be empty or contain a slash or a"
            " line break"
        )
    if "://" in name or name.startswith("-"):
        raise UsageError("the name of an account must not look like an option or a URL")
    if name in config.load_accounts(path) and not replace:
        raise UsageError(f"{path} already has an account {name}: choose another name, or give --replace")


def add(
    path: Path, name: str, entry: Mapping[str, object], comments: Sequence[str], *, replace: bool
) -> None:
    """Write ``entry`` into the configuration file as the account ``name``, with ``comments`` at its top.

    The rest of the file keeps its exact bytes. With ``replace`` an entry of that name is replaced, including
    the comments within it. File and directory are created if missing, readable by their owner only. The file
    is replaced atomically, so that no program reads half of it. Raises UsageError.
    """
    check_name(path, name, replace=replace)
    try:
        before = path.read_bytes().decode()
    except FileNotFoundError:
        before = ""
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from None
    after = _edited(path, before, name, entry, comments)
    try:
        _replace_file(path, after.encode())
    except UnicodeEncodeError:
        raise UsageError(f"{path} must be UTF-8, but the new entry is not") from None
    except OSError as error:
        raise UsageError(f"{path}: cannot be written: {error.strerror}") from None


def _edited(path: Path, before: str, name: str, entry: Mapping[str, object], comments: Sequence[str]) -> str:
    """Return the text of the file with the entry. Raises UsageError if its layout does not permit that."""
    import tomlkit
    from tomlkit.exceptions import TOMLKitError

    expected = tomllib.loads(before)
    is_new = name not in expected.get("accounts", {})
    expected["accounts"] = {**expected.get("accounts", {}), name: dict(entry)}
    try:
        table = _table(entry, comments)
        if is_new:
            # At the end: tomlkit would put it between other accounts and comments on what follows them.
            document = tomlkit.document()
            document["accounts"] = tomlkit.table(is_super_table=True).append(name, table)
            line_ends = len(before) - len(before.rstrip("\n"))
            after = before + "\n" * (2 - min(2, line_ends) if before else 0) + document.as_string()
        else:
            after = _replaced(before, name, table)
        # tomlkit supports nearly every layout of TOML. The result is checked, as the file is the user's.
        if tomllib.loads(after) == expected:
            return after
    except (TOMLKitError, tomllib.TOMLDecodeError, ValueError, TypeError):
        pass
    raise UsageError(
        f"{path} has a layout in which the account {name} cannot be edited: "
        f"write it by hand, as a table [accounts.{name}]"
    )


def _table(entry: Mapping[str, object], comments: Sequence[str]) -> "Table":
    import tomlkit

    table = tomlkit.table()
    for comment in comments:
        table.add(tomlkit.comment(comment))
    for key, value in entry.items():
        if isinstance(value, Mapping):
            inner = tomlkit.inline_table()
            inner.update(value)
            table.add(key, inner)
        else:
            table.add(key, value)
    return table


def _replaced(text: str, name: str, table: "Table") -> str:
    import tomlkit
    from tomlkit.container import OutOfOrderTableProxy
    from tomlkit.items import Table

    document = tomlkit.parse(text)
    accounts: MutableMapping[str, object] = document["accounts"]
    old = accounts[name]
    if isinstance(old, OutOfOrderTableProxy):
        raise TypeError("the entry is scattered, and what is between its parts would be lost")
    following = _following(old) if isinstance(old, Table) else []
    accounts[name] = table
    if following:
        _following(table)
        table.value.body.extend((None, item) for item in following)
    return document.as_string()


def _following(table: "Table") -> "list[Item]":
    """Remove and return blank lines and comments at the end of ``table``: they are about what comes next."""
    from tomlkit.items import Table

    body = table.value.body
    last = next((item for key, item in reversed(body) if key is not None), None)
    if isinstance(last, Table):
        return _following(last)
    items: list[Item] = []
    while body and body[-1][0] is None:
        items.insert(0, body.pop()[1])
    return items


def _replace_file(path: Path, data: bytes) -> None:
    # Not `atomic.replace_file`: a file with its fixed temporary name might belong to the user here.
    # A symbolic link, as in a collection of dotfiles, remains one.
    target = Path(os.path.realpath(path))
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)  # mode 0600
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(descriptor)
        Path(temporary).replace(target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
