"""What a mount requires of this machine: the kernel's FUSE, fusermount3, permission to use some options."""

import errno
import os
import shutil
from pathlib import Path
from typing import Final

from imapfs.errors import ImapfsError, UsageError

DEVICE: Final = Path("/dev/fuse")
FUSE_CONF: Final = Path("/etc/fuse.conf")


def check_device() -> None:
    """Raise ImapfsError unless the kernel's FUSE can be used."""
    try:
        os.close(os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC))
    except FileNotFoundError:
        raise ImapfsError(
            f"there is no {DEVICE}",
            remedy="run 'modprobe fuse' as root; a container must be started with --device /dev/fuse",
        ) from None
    except OSError as error:
        # The device node may remain when the module is unloaded.
        gone = error.errno in (errno.ENODEV, errno.ENXIO)
        raise ImapfsError(
            f"{DEVICE} cannot be opened: {error.strerror}",
            remedy="run 'modprobe fuse' as root" if gone else "ask the administrator for access",
        ) from None


def check_fusermount() -> None:
    """Raise ImapfsError unless the program that mounts on behalf of users is installed."""
    if shutil.which("fusermount3") is None:
        raise ImapfsError("fusermount3 is not installed", remedy="install the package fuse3")


def check_options(options: frozenset[str]) -> None:
    """Raise UsageError for mount options that this user may not use."""
    if os.geteuid() != 0 and options & {"allow_other", "allow_root"} and not user_allow_other():
        raise UsageError(f"-o allow_other and allow_root need the line user_allow_other in {FUSE_CONF}")


def user_allow_other() -> bool:
    """Return whether ordinary users may let others access their mounts."""
    try:
        lines = FUSE_CONF.read_text(errors="replace").splitlines()
    except OSError:
        return False
    return any(line.strip() == "user_allow_other" for line in lines)
