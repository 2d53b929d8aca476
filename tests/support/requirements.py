"""What tests need of the machine. Where it is missing, they fail and say so: they are never skipped."""

import os
import shutil

SBIN = ":/usr/sbin:/sbin"
"""The programs of a server are not in the PATH of an ordinary user."""
_FUSE = os.makedev(10, 229)


class Missing(RuntimeError):
    """This machine lacks something that a test needs."""


def demand_dovecot() -> None:
    """Raise Missing unless Dovecot is installed."""
    if shutil.which("dovecot", path=os.environ.get("PATH", "") + SBIN) is None:
        raise Missing("this test needs dovecot: apt-get install dovecot-imapd, or run scripts/test")


def demand_fuse() -> None:
    """Raise Missing unless this user can mount with FUSE."""
    if shutil.which("fusermount3") is None:
        raise Missing("this test needs fusermount3: apt-get install fuse3, or run scripts/test")
    try:
        is_fuse = os.stat("/dev/fuse").st_rdev == _FUSE
    except FileNotFoundError:
        is_fuse = False
    if not is_fuse or not os.access("/dev/fuse", os.R_OK | os.W_OK):
        raise Missing(
            "this test needs read and write access to /dev/fuse: as root, modprobe fuse; "
            "in a container, --device /dev/fuse --cap-add SYS_ADMIN"
        )
