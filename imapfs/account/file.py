"""The accounts of the configuration file, taken together: adding one, listing them, mounting all of them."""

import contextlib
import json
import os
import re
import tempfile
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from imapfs import mountinfo
from imapfs.account import config
from imapfs.account.credentials import CredentialSources
from imapfs.errors import UsageError

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_TABLE = re.compile(r"[ \t]*\[")


class ListedAccount(NamedTuple):
    name: str
    url: str
    credential: str
    """Where the password or token comes from, for people; never itself."""
    mountpoints: list[str]


def accounts(path: Path) -> list[ListedAccount]:
    """The accounts in the configuration file ``path``, in its order. Raises UsageError."""
    found = []
    everything = mountinfo.imapfs_mounts()
    for name in config.load_accounts(path):
        located = config.locate(name, {}, path)
        url = located.account.url
        where = [str(mount.mountpoint) for mount in everything if mount.source == url]
        found.append(ListedAccount(name, url, _describe(located.credentials), where))
    return found


def _describe(sources: CredentialSources) -> str:
    if sources.token_command is not None:
        return f"token command: {sources.token_command}"
    if sources.oauth is not None:
        return "OAuth 2.0, the consent in the keyring"
    if sources.command is not None:
        return f"command: {sources.command}"
    if sources.file is not None:
        return f"file: {sources.file}"
    return "keyring, or the prompt"


# ---- Adding one


def check_name(path: Path, name: str, *, replace: bool) -> None:
    """Whether `add` would take ``name``. Raises UsageError."""
    if not name or name in (".", "..") or "/" in name or not name.isprintable() or name != name.strip():
        raise UsageError("the name of an account becomes a directory's: no slash, not empty, no line break")
    if "://" in name or name.startswith("-"):
        raise UsageError("the name of an account must not look like an option or a URL")
    if name in config.load_accounts(path) and not replace:
        raise UsageError(f"{path} has an account {name} already: choose another name, or give --replace")


def add(
    path: Path, name: str, entry: Mapping[str, object], comments: Sequence[str], *, replace: bool
) -> None:
    """Write ``entry`` into the configuration file as the account ``name``, below ``comments``.

    What else is in the file stays as it is, byte for byte; file and directory are made where they are
    missing, and are for their owner only. With ``replace`` an entry of that name is replaced, its comments
    with it. The file is replaced in one step, so that no program ever reads half of it. Raises UsageError.
    """
    check_name(path, name, replace=replace)
    try:
        before = path.read_bytes()
    except FileNotFoundError:
        before = b""
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from None
    text = before.decode()
    start, end = _place(text, name)
    head, tail = text[:start], text[end:]
    if head and not tail and start == end:
        head += "\n" * (2 - min(2, len(head) - len(head.rstrip("\n"))))
    after = head + _entry(name, entry, comments) + tail
    _check_edit(path, text, after, name, entry)
    try:
        _replace_file(path, after.encode())
    except UnicodeEncodeError:
        raise UsageError(f"{path} must be UTF-8, and what shall be put into it is not") from None
    except OSError as error:
        raise UsageError(f"{path}: cannot be written: {error.strerror}") from None


def _entry(name: str, entry: Mapping[str, object], comments: Sequence[str]) -> str:
    key = name if _BARE_KEY.fullmatch(name) else _toml(name)
    # Below the heading, so that they are the entry's and go with it.
    lines = [f"[accounts.{key}]", *(f"# {comment}" for comment in comments)]
    lines += [f"{setting} = {_toml(value)}" for setting, value in entry.items()]
    return "\n".join(lines) + "\n"


def _toml(value: object) -> str:
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{key} = {_toml(one)}" for key, one in value.items()) + " }"
    # JSON's strings, whole numbers and booleans are TOML's as well, but for DEL, which TOML wants escaped.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _place(text: str, name: str) -> tuple[int, int]:
    """From where to where ``text`` gives way to the entry ``name``: both its end where there is none yet."""
    lines = text.splitlines(keepends=True)
    start = next((at for at, line in enumerate(lines) if _heads(line, name)), None)
    if start is None:
        return len(text), len(text)
    end = start + 1
    # Tables within it, such as [accounts.NAME.oauth], are its own.
    while end < len(lines) and (not _TABLE.match(lines[end]) or _heads(lines[end], name)):
        end += 1
    # What stands right above the next table is most likely about that.
    while end < len(lines) and end > start + 1 and not lines[end - 1].partition("#")[0].strip():
        end -= 1
    return sum(map(len, lines[:start])), sum(map(len, lines[:end]))


def _heads(line: str, name: str) -> bool:
    """Whether ``line`` is the heading of the account's table or one within, however its name is quoted."""
    if not _TABLE.match(line):
        return False
    try:
        return list(tomllib.loads(line).get("accounts", {})) == [name]
    except tomllib.TOMLDecodeError:
        return False


def _check_edit(path: Path, before: str, after: str, name: str, entry: Mapping[str, object]) -> None:
    """Refuse an edit that would do anything else than meant: a file can be laid out in too many ways."""
    expected: dict[str, Any] = tomllib.loads(before)
    expected["accounts"] = {**expected.get("accounts", {}), name: dict(entry)}
    with contextlib.suppress(tomllib.TOMLDecodeError):
        if tomllib.loads(after) == expected:
            return
    raise UsageError(
        f"{path} is laid out so that the account {name} cannot be put into it: "
        f"write it there by hand, as a table [accounts.{name}]"
    )


def _replace_file(path: Path, data: bytes) -> None:
    # A symbolic link, as in a collection of dotfiles, goes on pointing where it does.
    target = Path(os.path.realpath(path))
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)  # of mode 0600
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(descriptor)
        Path(temporary).replace(target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
