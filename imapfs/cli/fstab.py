"""``mount.imapfs``: the helper that mount(8) runs for ``mount -t imapfs`` and for lines of fstab(5).

It translates the options of mount(8) for ``imapfs mount``, and the exit codes back. A mount that root makes
for somebody else (``setuid=NAME``, as in mount.fuse3(8)) is made as that user, with that user's
configuration, keyring and cache.
"""

import os
import pwd
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Final, NamedTuple, NoReturn

import click

from imapfs.account import values
from imapfs.account.settings import SETTINGS
from imapfs.cli.main import run
from imapfs.cli.mount import mount
from imapfs.cli.parameters import DIRECTORY, SOURCE
from imapfs.errors import UsageError

_EXIT_CODES: Final = {0: 0, 1: 32, 2: 1, 3: 32, 130: 8}
"""mount(8): 1 is wrong usage, 8 an interruption by the user, 32 a failed mount."""
_KEPT: Final = frozenset({"LANG", "TERM", "TZ"})
"""Variables that a mount for another user keeps."""
_PATH: Final = "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"
_KEYS: Final = {setting.key: setting for setting in SETTINGS if setting.flag.startswith("--")}


class Translation(NamedTuple):
    arguments: list[str]
    """Options of ``imapfs mount``."""
    user: str | None
    """Name or number of the user whose mount it is; None for the user who runs the program."""


def translate(options: str, *, sloppy: bool = False) -> Translation:
    """Translate mount options: those of ``imapfs mount -o``, keys of the configuration file, and a user.

    A value with a comma is in double quotes, as in mount(8). Unknown options are ignored if ``sloppy``;
    otherwise they raise UsageError.
    """
    arguments: list[str] = []
    user = None
    for text in re.findall(r'(?:[^,"]|"[^"]*(?:"|$))+', options):
        name, equals, value = text.replace('"', "").partition("=")
        setting = _KEYS.get(name)
        if setting is not None:
            if bool(equals) == (setting.kind == "flag"):
                raise UsageError(f"mount option {name}: write {_written(name)}")
            arguments.append(f"--{name}={value}" if equals else f"--{name}")
        elif name in ("setuid", "uid") and value:
            user = value
        elif name == "remount":
            raise UsageError("a mount cannot be changed: unmount it, and mount it again with the new options")
        elif name != "user":  # mount(8) may write it as user=NAME
            try:
                values.sort_mount_options([text])
            except ValueError as error:
                if sloppy:
                    continue
                others = ", ".join(["setuid=USER", *(_written(key) for key in _KEYS)])
                raise UsageError(f"{error}, {others}") from None
            arguments += ["-o", text]
    return Translation(arguments, user)


def _written(key: str) -> str:
    setting = _KEYS[key]
    return key if setting.kind == "flag" else f"{key}={setting.shown_value}"


def become(name: str) -> None:
    """Continue as the user ``name`` (or number), in that user's environment. Raises UsageError."""
    try:
        user = pwd.getpwuid(int(name)) if name.isdecimal() else pwd.getpwnam(name)
    except KeyError:
        raise UsageError(f"mount option setuid={name}: there is no such user") from None
    if user.pw_uid == os.geteuid():
        return
    try:
        os.initgroups(user.pw_name, user.pw_gid)
        os.setgid(user.pw_gid)
        os.setuid(user.pw_uid)
    except PermissionError:
        raise UsageError(f"mount option setuid={name}: only root may mount for somebody else") from None
    # Nothing of root's: neither variables, of which some decide what a program loads, nor the directory.
    kept = {key: value for key, value in os.environ.items() if key in _KEPT or key.startswith("LC_")}
    os.environ.clear()
    os.environ |= kept | {
        "HOME": user.pw_dir, "USER": user.pw_name, "LOGNAME": user.pw_name, "SHELL": user.pw_shell,
        "PATH": _PATH,
    }  # fmt: skip
    os.umask(0o077)
    os.chdir("/")
    # The keyring is reached through the bus of that user's session, if there is a session.
    runtime = Path(f"/run/user/{user.pw_uid}")
    if runtime.is_dir():
        os.environ["XDG_RUNTIME_DIR"] = str(runtime)
        os.environ["DBUS_SESSION_BUS_ADDRESS"] = f"unix:path={runtime}/bus"


@click.command()
@click.argument("source", type=SOURCE)
@click.argument("mountpoint", type=DIRECTORY)
@click.option("-o", "options", metavar="OPTION,...", multiple=True, help="Mount options, see above.")
@click.option("-s", "sloppy", is_flag=True, help="Ignore unknown options.")
@click.option("-f", "fake", is_flag=True, help="Only check the options.")
@click.option("-n", "no_mtab", is_flag=True, help="Ignored: there is no /etc/mtab to write.")
@click.option("-v", "verbose", count=True, help="Log details.")
@click.option("-t", "fstype", metavar="TYPE", help="Ignored: there is only one type.")
@click.option("-N", "namespace", metavar="NAMESPACE", help="Refused: use nsenter(1) instead.")
def helper(
    source: str,
    mountpoint: Path,
    options: Iterable[str],
    sloppy: bool,
    fake: bool,
    verbose: int,
    namespace: str | None,
    **_: object,
) -> None:
    """Mount SOURCE on MOUNTPOINT as 'imapfs mount' does; mount(8) runs this program as /sbin/mount.imapfs.

    The mount options are those of 'imapfs mount -o', the keys of imapfs.toml(5), such as password-file=FILE,
    and for root setuid=USER, which makes the mount as that user. A value with a comma goes in double quotes.
    """
    if namespace is not None:
        raise UsageError(f"cannot mount in another namespace: use nsenter --mount={namespace}")
    if source.startswith("/"):
        # mount(8) turns an account's name into a path if the current directory has a file of that name.
        source = Path(source).name
    arguments, user = translate(",".join(options), sloppy=sloppy)
    if user is not None:
        become(user)
    if fake or _is_mounted(source, mountpoint):
        return
    arguments += ["-v"] * verbose
    try:
        mount.main([*arguments, "--", source, str(mountpoint)], standalone_mode=False)
    except click.UsageError as error:
        raise UsageError(error.format_message()) from None


def _is_mounted(source: str, mountpoint: Path) -> bool:
    """Return whether SOURCE is mounted there: ``mount -a`` does not recognize it, and mounts it again."""
    from imapfs import mountinfo
    from imapfs.account import config

    there = mountinfo.mount_at(mountpoint)
    if there is None or there.fstype != mountinfo.FSTYPE:
        return False
    account = config.resolve(source, mountpoint, {}, config.default_path()).mount.account
    return there.source == account.url


def main() -> NoReturn:
    """Run as ``mount.imapfs`` and exit."""
    sys.exit(_EXIT_CODES[run(helper, "mount.imapfs")])
