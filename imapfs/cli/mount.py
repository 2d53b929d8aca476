"""All accounts of the configuration file, mounted or unmounted at once."""

import functools
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from imapfs import mountinfo
from imapfs.account import file
from imapfs.daemon import control
from imapfs.errors import ImapfsError, UsageError

Report = Callable[[str, str | None], None]
"""Given an account or a mountpoint, and why it failed or None, in the order in which they are done."""


def mount_all(path: Path, directory: Path, arguments: Sequence[str], report: Report) -> bool:
    """Mount each account of the configuration file ``path`` on the directory of its name in ``directory``.

    Each with a command of its own, all at the same time, ``arguments`` added. One that is mounted there
    already is left as it is. Returns whether all are mounted. Raises UsageError.
    """
    listed = file.accounts(path)
    if not listed:
        raise UsageError(f"there is no account in {path}: 'imapfs setup' adds one")
    where = mountinfo.real_path(directory)
    if not where.is_dir():
        raise UsageError(f"{directory} is no directory: create it with 'mkdir -p {directory}'")

    def mount(account: file.Listed) -> None:
        file.check_name(path, account.name, replace=True)
        mountpoint = where / account.name
        if str(mountpoint) in account.mountpoints:
            control.read_status(mountpoint)
            return
        # What is a mountpoint already may hang whoever touches it; the command knows how to refuse it.
        if mountinfo.mount_at(mountpoint) is None:
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
    where = mountinfo.real_path(directory)
    found = [str(one.mountpoint) for one in mountinfo.imapfs_mounts() if where in one.mountpoint.parents]
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
