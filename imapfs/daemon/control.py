"""Controlling a mount from outside its daemon: its status, its uploads, its end.

A daemon may be dead or stuck. A system call on its mount then never returns, and the process that made it
cannot be killed. So this process makes none before the daemon has answered: the status is read by a child
process, which can be left behind.
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
from imapfs.daemon import status_port
from imapfs.errors import ImapfsError, UsageError

STATUS_XATTR = "user.imapfs.status"
_BUSY_TIMEOUT = 1.0
"""Seconds for which a mount may be busy because of its own daemon."""

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
        raise UsageError(f"{path} is not an imapfs mount: 'imapfs status' lists all of them")
    return mount


class DaemonDead(ImapfsError):
    """There is a mount, and its daemon has died."""


def read_status(path: Path, timeout: float = 5.0) -> dict[str, Any]:
    """Return the status that the daemon of the mount at ``path`` reports.

    It is short, without the files, if the daemon runs where its socket cannot be reached. Raises UsageError
    if imapfs is not mounted there, DaemonDead, and ImapfsError if the daemon does not answer within
    ``timeout`` seconds, or does not answer this user.
    """
    status = _read_attribute(path, timeout)
    socket = status.pop("socket", None)
    try:
        whole = status_port.read(socket, timeout) if isinstance(socket, str) and socket else None
    except (OSError, ValueError, RecursionError) as error:
        # Who asks would take the files that are not named for sent.
        raise ImapfsError(f"{path}: the daemon does not tell its status ({error}); try again") from None
    return status if whole is None or whole.get("pid") != status.get("pid") else whole


def _read_attribute(path: Path, timeout: float = 5.0) -> dict[str, Any]:
    """Return the short status, which has counts, and names no file. Raises as `read_status` does."""
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
        # SIGKILL does not interrupt a request that a stuck daemon has read; the child ends with the daemon.
        threading.Thread(target=probe.communicate, daemon=True).start()
        raise ImapfsError(f"{where}: the daemon has not answered within {timeout:g} s; try again") from None
    if probe.returncode == errno.ENOTCONN:
        raise DaemonDead(f"{where}: the daemon has died: run 'fusermount3 -u {where}' and mount again")
    if probe.returncode in (errno.EACCES, errno.EPERM):
        raise ImapfsError(f"{where}: the mount belongs to another user, and only that user can access it")
    if probe.returncode != 0:
        raise ImapfsError(f"{where}: the status cannot be read: {os.strerror(probe.returncode)}")
    try:
        status = json.loads(data)
    except (ValueError, RecursionError):
        status = None
    if not isinstance(status, dict):
        raise ImapfsError(
            f"{where}: the status is not a JSON object: the daemon has another version, so mount again"
        )
    return status


def sync(path: Path, on_progress: Callable[[int], None]) -> list[dict[str, Any]]:
    """Have the daemon upload all it can, and return what is still waiting, as in the status.

    ``on_progress`` is called now and then with the number of files that are being uploaded. Returns early if
    the server cannot be reached: if it is known to be away, or if the connection is lost and nothing has been
    uploaded for as long as the mount waits for the server (``--timeout``). Raises as `read_status` does.
    """
    where = _imapfs_at(path).mountpoint
    left, moved_on = -1, time.monotonic()
    while True:
        # fsync on the mountpoint returns when everything that can be uploaded has been.
        flush = threading.Thread(target=_fsync, args=(where,), daemon=True)
        flush.start()
        while flush.is_alive():
            on_progress(_uploading(_read_attribute(where)))
            flush.join(0.3)
        status = _read_attribute(where)
        uploading, state = _uploading(status), status.get("state")
        if uploading != left:
            left, moved_on = uploading, moved_on if left < 0 else time.monotonic()
        waited = time.monotonic() - moved_on
        is_lost = state == "connecting" and waited >= float(status.get("timeout", 0.0))
        if not uploading or state == "offline" or is_lost:
            return list(read_status(where).get("waiting", []))


def scratch(path: Path) -> list[str]:
    """Return the paths of the files in scratch directories, which are on this computer only.

    Raises as `read_status` does.
    """
    return [one["path"] for one in read_status(path).get("scratch", [])]


def _uploading(status: dict[str, Any]) -> int:
    return int(status.get("files", {}).get("sending", 0))


def _fsync(directory: Path) -> None:
    # The status says afterwards what prevented an upload.
    with contextlib.suppress(OSError):
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def retry(path: Path) -> int:
    """Have the daemon retry the uploads that the server refused, and return their number.

    A wait that the server has asked for ends as well.
    """
    where = _imapfs_at(path).mountpoint
    os.setxattr(where, "user.imap.state", b"sending")
    unsent = [one for one in read_status(where).get("waiting", []) if one.get("state") == "unsent"]
    for one in unsent:
        with contextlib.suppress(FileNotFoundError):
            os.setxattr(where / one["path"], "user.imap.state", b"sending")
    return len(unsent)


def unmount(path: Path, timeout: float = 60.0) -> None:
    """Unmount imapfs from ``path``, and wait until its daemon has ended and so released the cache.

    The mount of a dead daemon is removed as well. Raises UsageError if imapfs is not mounted there, and
    ImapfsError if the mount is in use or the daemon still runs after ``timeout`` seconds.
    """
    where = _imapfs_at(path).mountpoint
    with contextlib.ExitStack() as stack:
        pidfd = None
        # Before unmounting: afterwards the process cannot be determined, and its id may be reused.
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
                "wait for it before mounting with the same cache. A container or service that was started "
                "meanwhile may have it mounted too"
            )


def _fusermount_unmount(where: Path, *, answers: bool) -> None:
    if shutil.which("fusermount3") is None:
        raise ImapfsError(f"{where}: fusermount3 is not installed: install the package fuse3")
    deadline = time.monotonic() + _BUSY_TIMEOUT
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
        # The daemon itself may be using it, to announce changes to inotify.
        time.sleep(0.01)
    message = result.stderr.strip().rpartition("\n")[2]
    if "busy" in message and not answers:
        raise ImapfsError(
            f"{where} is busy and its daemon does not answer: detach it with 'fusermount3 -u -z {where}', "
            "then kill the daemon"
        )
    if "busy" in message:
        raise ImapfsError(
            f"{where} is busy: close the programs and leave the shells that use it "
            f"('fuser -vm {where}' lists them), then try again"
        )
    raise ImapfsError(f"{where} cannot be unmounted: {message or f'exit code {result.returncode}'}")


def _has_ended(pidfd: int, timeout: float) -> bool:
    """Return whether the process ends within ``timeout`` seconds; it need not be a child."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(timeout * 1000))
