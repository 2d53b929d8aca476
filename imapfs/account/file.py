"""The accounts of the configuration file, taken together: adding one, listing them, mounting all of them."""

import contextlib
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from imapfs import mounts
from imapfs.account import config
from imapfs.account.credentials import CredentialSources
from imapfs.errors import ImapfsError, UsageError

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_TABLE = re.compile(r"[ \t]*\[")


class Listed(NamedTuple):
    name: str
    url: str
    credential: str
    """Where the password or token comes from, for people; never itself."""
    mountpoints: list[str]


def accounts(path: Path) -> list[Listed]:
    """The accounts in the configuration file ``path``, in its order. Raises UsageError."""
    found = []
    everything = mounts.imapfs_mounts()
    for name in config.load_accounts(path):
        located = config.locate(name, {}, path)
        url = located.account.url
        where = [str(mount.mountpoint) for mount in everything if mount.source == url]
        found.append(Listed(name, url, _describe(located.credentials), where))
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


# ---- All at once

Report = Callable[[str, str | None], None]
"""Given an account or a mountpoint, and why it failed or None, in the order in which they are done."""


def mount_all(path: Path, directory: Path, arguments: Sequence[str], report: Report) -> bool:
    """Mount each account of the configuration file ``path`` on the directory of its name in ``directory``.

    Each with a command of its own, all at the same time, ``arguments`` added. One that is mounted there
    already is left as it is. Returns whether all are mounted. Raises UsageError.
    """
    listed = accounts(path)
    if not listed:
        raise UsageError(f"there is no account in {path}: 'imapfs setup' adds one")
    where = mounts.real_path(directory)
    if not where.is_dir():
        raise UsageError(f"{directory} is no directory: create it with 'mkdir -p {directory}'")

    def mount(account: Listed) -> None:
        check_name(path, account.name, replace=True)
        mountpoint = where / account.name
        if str(mountpoint) in account.mountpoints:
            mounts.read_status(mountpoint)
            return
        # What is a mountpoint already may hang whoever touches it; the command knows how to refuse it.
        if mounts.mount_at(mountpoint) is None:
            try:
                mountpoint.mkdir(mode=0o700, exist_ok=True)
            except OSError as error:
                raise UsageError(f"{mountpoint} cannot be created: {error.strerror}") from None
        _run("mount", *arguments, "--", account.name, str(mountpoint))

    return _all_at_once({account.name: functools.partial(mount, account) for account in listed}, report)


def unmount_all(directory: Path, report: Report) -> bool:
    """Send what is waiting and unmount, for every mount of imapfs below ``directory`` at the same time.

    Returns whether all are unmounted. Raises UsageError where there is none.
    """
    where = mounts.real_path(directory)
    found = [str(one.mountpoint) for one in mounts.imapfs_mounts() if where in one.mountpoint.parents]
    if not found:
        raise UsageError(f"nothing of imapfs is mounted below {directory}; see 'imapfs status'")
    return _all_at_once({one: functools.partial(_run, "umount", "--", one) for one in found}, report)


def _all_at_once(tasks: Mapping[str, Callable[[], None]], report: Report) -> bool:
    """Do each in a thread of its own, and report it as soon as it is done; whether none failed."""
    lock = threading.Lock()
    failed: list[str] = []

    def do(name: str) -> None:
        reason = None
        try:
            tasks[name]()
        except ImapfsError as error:
            reason = str(error)
        with lock:
            if reason is not None:
                failed.append(name)
            report(name, reason)

    threads = [threading.Thread(target=do, args=(name,)) for name in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return not failed


def _run(*arguments: str) -> None:
    """Run ``imapfs ARGUMENT...``, because a mount must fork before it has threads. Raises ImapfsError."""
    done = subprocess.run(
        # -P: the current directory is no place for the program's modules.
        [sys.executable, "-P", "-m", "imapfs", *arguments],
        # Several cannot ask at one terminal.
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode != 0:
        said = done.stderr.strip().rpartition("\n")[2].removeprefix("imapfs: ")
        raise ImapfsError(said or f"exit code {done.returncode}")
