"""``imapfs mount`` and ``imapfs umount``: one account, or all of them with ``--all``."""

import contextlib
import functools
import shlex
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from imapfs import mountinfo
from imapfs.cli.parameters import DIRECTORY, LIVE_MOUNT, SOURCE, given_settings, setting_options
from imapfs.cli.uploads import WHY_SCRATCH, UploadProgress, counted, why_waiting
from imapfs.errors import ImapfsError, UsageError
from imapfs.log import one_line


@click.command()
@click.argument("source", type=SOURCE, required=False)
@click.argument("mountpoint", type=DIRECTORY, required=False)
@click.option(
    "--all", "directory", metavar="DIR", type=DIRECTORY, help="Mount every account NAME on DIR/NAME."
)
@setting_options
@click.option("-f", "--foreground", is_flag=True, help="Stay in the foreground; Ctrl-C unmounts.")
@click.option("-v", "--verbose", count=True, help="Log details; twice: log the protocol as well.")
def mount(
    source: str | None,
    mountpoint: Path | None,
    directory: Path | None,
    foreground: bool,
    verbose: int,
    options: tuple[str, ...],
    **settings: object,
) -> None:
    """Mount SOURCE on the empty directory MOUNTPOINT.

    SOURCE is imaps://user@host[:port][/Mailbox], imap:// for STARTTLS, or the name of an account in the
    configuration file. Without MOUNTPOINT, an account is mounted where its entry says, by default on
    ~/mail/NAME, which is made if it is missing.

    The command returns when the mount is live. The password or token comes from one of the options, the
    account's entry, a systemd credential, the keyring, or a prompt on the terminal.

    With --all DIR, every account in the configuration file is mounted on DIR/NAME, all at the same time. The
    other options then apply to each of them.
    """
    given = given_settings(settings)
    if directory is not None:
        if source is not None or foreground:
            raise click.UsageError("--all cannot be combined with SOURCE, MOUNTPOINT or --foreground")
        _mount_all(directory, given, verbose, options)
        return
    if source is None:
        raise click.UsageError("give SOURCE and perhaps MOUNTPOINT, or --all DIR")

    from imapfs.account import config, credentials
    from imapfs.account import source as sources
    from imapfs.daemon import background

    if mountpoint is None and sources.is_url(source):
        raise click.UsageError("give MOUNTPOINT, an empty directory: only an account of yours has its own")
    given["options"] = list(options)
    path = config.default_path()
    place = config.own_mountpoint(source, path) if mountpoint is None else mountpoint
    resolved = config.resolve(source, place, given, path)
    if mountpoint is None:
        _make_missing(place)
    # run() checks again; this check comes before a person has to type a password.
    background.preflight(resolved.mount, resolved.log_file)
    provider = credentials.resolve(resolved.mount.account, resolved.credentials)
    background.run(
        resolved.mount, provider, foreground=foreground, log_file=resolved.log_file, verbosity=verbose
    )


@click.command()
@click.argument("mountpoint", type=LIVE_MOUNT, required=False)
@click.option("--all", "directory", metavar="DIR", type=DIRECTORY, help="Unmount every mount below DIR.")
def umount(mountpoint: Path | None, directory: Path | None) -> None:
    """Upload what is waiting and unmount MOUNTPOINT.

    Returns when the daemon of the mount has ended. With --all DIR, does this for all mounts below DIR
    at the same time.
    """
    if directory is not None and mountpoint is None:
        _unmount_all(directory)
        return
    if directory is not None or mountpoint is None:
        raise click.UsageError("give either MOUNTPOINT or --all DIR")

    from imapfs.daemon import control

    progress = UploadProgress("Ctrl-C unmounts now; the next mount uploads them")
    waiting: list[dict[str, Any]] = []
    try:
        waiting = control.sync(mountpoint, progress.show)
        for one in waiting:
            click.echo(one_line(f"{one['path']}: {why_waiting(one)}"))
        for path in control.scratch(mountpoint):
            click.echo(one_line(f"{path}: {WHY_SCRATCH}"))
    except KeyboardInterrupt:
        progress.end()
    except ImapfsError:
        pass  # The daemon is dead or stuck; unmount() says so.
    control.unmount(mountpoint)
    if waiting:
        raise ImapfsError(
            f"unmounted; not on the server: {counted(len(waiting), 'file')}",
            remedy="safe on this computer; the next mount shows and uploads what is missing",
        )


def _make_missing(mountpoint: Path) -> None:
    """Make a directory for a mount if there is none. Raises UsageError."""
    # A system call on a mountpoint may never return. Whoever mounts knows how to refuse one.
    if mountinfo.mount_at(mountinfo.real_path(mountpoint)) is None:
        try:
            mountpoint.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"{mountpoint} cannot be created: {error.strerror}") from None


# ---- All accounts at once

_OnDone = Callable[[str, str | None], None]
"""Called with an account or a mountpoint and why it failed, or None; in the order in which they are done."""


def _mount_all(directory: Path, given: Mapping[str, object], verbose: int, options: Sequence[str]) -> None:
    """Mount each account on the directory of its name below ``directory``, all at the same time.

    Leaves existing mounts alone. Raises UsageError, and ImapfsError if an account is not mounted.
    """
    from imapfs.account import config, file
    from imapfs.daemon import control

    for key in (*config.SECRETS, "log-file"):
        if key in given:
            raise click.UsageError(f"--{key} is for one account: with --all, set it in each account's entry")
    path = config.default_path()
    accounts = file.accounts(path)
    if not accounts:
        raise UsageError(f"there is no account in {path}: add one with 'imapfs setup'")
    root = mountinfo.real_path(directory)
    if not root.is_dir():
        raise UsageError(f"{directory} is not a directory: create it with 'mkdir -p {directory}'")
    arguments = [f"--{key}" if value is True else f"--{key}={value}" for key, value in given.items()]
    arguments += ["-v"] * verbose + [f"-o{option}" for option in options]

    def mount_one(account: file.ListedAccount) -> None:
        file.check_name(path, account.name, replace=True)
        mountpoint = root / account.name
        if str(mountpoint) in account.mountpoints:
            with contextlib.suppress(control.DaemonDead):  # then it is mounted again
                control.read_status(mountpoint)
                return
        _make_missing(mountpoint)
        _run_imapfs("mount", *arguments, "--", account.name, str(mountpoint))

    def report(name: str, reason: str | None) -> None:
        retry = f"imapfs mount {shlex.quote(name)} {shlex.quote(str(directory / name))}"
        click.echo(one_line(f"{name}: mounted" if reason is None else f"{name}: {reason}; to retry: {retry}"))

    if not _all_at_once({one.name: functools.partial(mount_one, one) for one in accounts}, report):
        raise ImapfsError("not all accounts are mounted")


def _unmount_all(directory: Path) -> None:
    """Upload what is waiting and unmount, for every mount below ``directory`` at the same time.

    Raises UsageError if there is no mount, and ImapfsError if one remains.
    """
    root = mountinfo.real_path(directory)
    mountpoints = [str(one.mountpoint) for one in mountinfo.imapfs_mounts() if root in one.mountpoint.parents]
    if not mountpoints:
        raise UsageError(f"there is no imapfs mount below {directory}: 'imapfs status' lists all of them")

    def report(mountpoint: str, reason: str | None) -> None:
        click.echo(one_line(f"{mountpoint}: {reason or 'unmounted'}"))

    def unmount_one(mountpoint: str) -> None:
        for line in _run_imapfs("umount", "--", mountpoint).splitlines():
            click.echo(one_line(f"{mountpoint}/{line}"))

    tasks = {one: functools.partial(unmount_one, one) for one in mountpoints}
    if not _all_at_once(tasks, report):
        raise ImapfsError("not all mounts are unmounted")


def _all_at_once(tasks: Mapping[str, Callable[[], None]], report: _OnDone) -> bool:
    """Run each task in a thread and report it as soon as it is done. Return whether all succeeded."""
    lock = threading.Lock()
    failed: list[str] = []

    def work(name: str) -> None:
        reason = None
        try:
            tasks[name]()
        except ImapfsError as error:
            reason = str(error)
        with lock:
            if reason is not None:
                failed.append(name)
            report(name, reason)

    threads = [threading.Thread(target=work, args=(name,)) for name in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return not failed


def _run_imapfs(*arguments: str) -> str:
    """Run ``imapfs ARGUMENT...`` as a process, since a mount must fork before it has threads.

    Return its output. Raises ImapfsError with what the process says.
    """
    done = subprocess.run(
        # -P keeps modules in the current directory from being imported.
        [sys.executable, "-P", "-m", "imapfs", *arguments],
        # Several processes cannot ask questions at one terminal.
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode != 0:
        message = done.stderr.strip().rpartition("\n")[2].removeprefix("imapfs: ")
        raise ImapfsError(message or f"exit code {done.returncode}")
    return done.stdout
