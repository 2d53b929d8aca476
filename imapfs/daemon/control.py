"""Mounts as seen from outside: which there are, how they are, and how they end.

A daemon may be dead or stuck, and a system call on its mount then never returns, nor can the process that
made it be killed. So nothing here touches a mount from the calling process: what must be asked is asked by
a child that can be left behind.
"""

import contextlib
import errno
import json
import os
import select
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from imapfs import mountinfo
from imapfs.errors import ImapfsError, UsageError

STATUS_XATTR = "user.imapfs.status"
_BUSY_FOR_A_MOMENT = 1.0
"""Seconds after which a mount that is busy is so because of somebody."""

_PROBE = f"""
import os, sys
try:
    data = os.getxattr(sys.argv[1], {STATUS_XATTR!r})
except OSError as error:
    sys.exit(error.errno)
sys.stdout.buffer.write(data)
"""


def _imapfs_at(path: Path) -> mountinfo.Mount:
    mount = mountinfo.mount_at(path)
    if mount is None or mount.fstype != mountinfo.FSTYPE:
        raise UsageError(f"{path} is not an imapfs mount; see 'imapfs status' for those there are")
    return mount


def read_status(path: Path, timeout: float = 5.0) -> dict[str, Any]:
    """What the daemon of the mount at ``path`` says of itself.

    Raises UsageError if imapfs is not mounted there, and ImapfsError if the daemon does not answer within
    ``timeout`` seconds, has died, or answers only to the user who started it.
    """
    where = _imapfs_at(path).mountpoint
    probe = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _PROBE, where],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    try:
        data, _ = probe.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        probe.kill()
        # SIGKILL does not end a request that a stuck daemon has taken; the child ends with that daemon.
        threading.Thread(target=probe.communicate, daemon=True).start()
        raise ImapfsError(f"{where}: the daemon has not answered within {timeout:g} s; try again") from None
    if probe.returncode == errno.ENOTCONN:
        raise ImapfsError(f"{where}: the daemon has died; run 'fusermount3 -u {where}' and mount again")
    if probe.returncode in (errno.EACCES, errno.EPERM):
        raise ImapfsError(f"{where}: is another user's mount, and only that user can look into it")
    if probe.returncode != 0:
        raise ImapfsError(f"{where}: no status to be had: {os.strerror(probe.returncode)}")
    try:
        status = json.loads(data)
    except ValueError:
        status = None
    if not isinstance(status, dict):
        raise ImapfsError(f"{where}: the status is not a JSON object: daemon and command differ in version")
    return status


def sync(path: Path, on_progress: Callable[[int], None]) -> list[dict[str, Any]]:
    """Have the daemon send all it can, and return what is still waiting: as in the status.

    ``on_progress`` is called now and then with the number of files that are being sent. Returns early where
    the server is away. Raises as `read_status` does.
    """
    where = _imapfs_at(path).mountpoint
    while True:
        # fsync of the mountpoint returns when everything that can be sent is.
        flush = threading.Thread(target=_fsync, args=(where,), daemon=True)
        flush.start()
        while flush.is_alive():
            on_progress(len(_sending(read_status(where))))
            flush.join(0.3)
        status = read_status(where)
        if not _sending(status) or status.get("state") == "offline":
            return list(status.get("waiting", []))


def _sending(status: dict[str, Any]) -> list[dict[str, Any]]:
    return [one for one in status.get("waiting", []) if one.get("state") == "sending"]


def _fsync(directory: Path) -> None:
    # Whatever keeps it from being done is in the status afterwards.
    with contextlib.suppress(OSError):
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def retry(path: Path) -> int:
    """Have the daemon try again what the server refused: the number of files."""
    where = _imapfs_at(path).mountpoint
    unsent = [one for one in read_status(where).get("waiting", []) if one.get("state") == "unsent"]
    for one in unsent:
        with contextlib.suppress(FileNotFoundError):
            os.setxattr(where / one["path"], "user.imap.state", b"sending")
    return len(unsent)


def unmount(path: Path, timeout: float = 60.0) -> None:
    """Unmount imapfs from ``path`` and wait until its daemon has ended and so released the cache.

    A dead daemon's mount is cleaned up as well. Raises UsageError if imapfs is not mounted there, and
    ImapfsError if the mount is in use or the daemon still runs after ``timeout`` seconds.
    """
    where = _imapfs_at(path).mountpoint
    with contextlib.ExitStack() as stack:
        pidfd = None
        # Before the unmount: afterwards nobody can be asked for the process, and its id may be reused.
        try:
            pid = read_status(where).get("pid")
        except ImapfsError:
            pid = None
        if isinstance(pid, int) and pid > 0:
            with contextlib.suppress(ProcessLookupError):
                pidfd = os.pidfd_open(pid)
                stack.callback(os.close, pidfd)
        _fusermount_unmount(where, answers=pid is not None)
        if pidfd is not None and not _has_ended(pidfd, timeout):
            raise ImapfsError(
                f"{where} is unmounted, but its process {pid} still runs after {timeout:g} s: "
                "wait for it before mounting with the same cache"
            )


def _fusermount_unmount(where: Path, *, answers: bool) -> None:
    if shutil.which("fusermount3") is None:
        raise ImapfsError(f"{where}: fusermount3 is not installed: install the package fuse3")
    deadline = time.monotonic() + _BUSY_FOR_A_MOMENT
    while True:
        result = subprocess.run(
            ["fusermount3", "-u", where],
            env={**os.environ, "LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
        if result.returncode == 0:
            return
        if "busy" not in result.stderr or not answers or time.monotonic() > deadline:
            break
        # Perhaps the daemon itself uses it, which announces changes to who watches.
        time.sleep(0.01)
    said = result.stderr.strip().rpartition("\n")[2]
    if "busy" in said and not answers:
        raise ImapfsError(
            f"{where} is busy and its daemon does not answer: detach it with 'fusermount3 -u -z {where}', "
            "then end the daemon"
        )
    if "busy" in said:
        raise ImapfsError(
            f"{where} is busy: close the programs and leave the shells that use it "
            f"('fuser -vm {where}' lists them), then try again"
        )
    raise ImapfsError(f"{where}: cannot be unmounted: {said or f'exit code {result.returncode}'}")


def _has_ended(pidfd: int, timeout: float) -> bool:
    """Whether the process ends within ``timeout`` seconds; it need not be a child (pidfd_open(2))."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(timeout * 1000))
