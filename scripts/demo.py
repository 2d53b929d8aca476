"""The demo: a private Dovecot with sample mail, mounted by imapfs, until Ctrl-C or SIGTERM."""

import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from imapfs.mountinfo import mount_at
from tests.support.mail import sample_account
from tests.support.servers.account import DEADLINE
from tests.support.servers.dovecot import Dovecot
from tests.support.servers.tls import CertificateAuthority

IMAPFS = Path(sys.executable).with_name("imapfs")


def main() -> int:
    """Run until interrupted and return the exit status: 0, or 1 where something did not start or end."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    directory = Path(tempfile.mkdtemp(prefix="imapfs-demo-"))
    mountpoint = directory / "mail"
    mountpoint.mkdir()
    try:
        with Dovecot(CertificateAuthority(directory)) as server:
            try:
                return show(server, directory, mountpoint)
            finally:
                unmount(mountpoint)
    except KeyboardInterrupt:
        return 0
    except RuntimeError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    finally:
        # Through a mount that is still there, this would delete the mail instead.
        if mount_at(mountpoint) is None:
            shutil.rmtree(directory)


def show(server: Dovecot, directory: Path, mountpoint: Path) -> int:
    """Mount the sample account and wait; returns only where the mount fails."""
    account = server.account("demo")
    for mailbox, content, date, flags in sample_account():
        account.deliver(mailbox, [(content, date, flags)])
    password = directory / "password"
    password.touch(mode=0o600)
    password.write_text(account.password)
    log = directory / "log"
    mounted = subprocess.run(
        [
            *(IMAPFS, "mount", f"imaps://{account.name}@{server.host}:{server.port}", mountpoint),
            *("--ca-file", server.authority.certificate, "--password-file", password),
            *("--cache-dir", directory / "cache", "--log-file", log),
        ]
    )
    if mounted.returncode != 0:
        # It goes with the directory, and the line that imapfs has just printed may refer to it.
        sys.stderr.write(log.read_text() if log.exists() else "")
        return 1
    print(
        f"""
A sample mail account is mounted at {mountpoint}

Try in another terminal:
  ls -l {mountpoint}/INBOX
  grep -ril invoice {mountpoint}
  find {mountpoint} -name '*.eml' -newermt 2026-11-01
  tar -C {mountpoint} -czf mail.tar.gz .
  {IMAPFS} status {mountpoint}

Ctrl-C here ends the demo and removes everything.""",
        flush=True,
    )
    while True:
        signal.pause()


def unmount(mountpoint: Path) -> None:
    """Unmount what is mounted there, by force where it must be."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    for command in ([IMAPFS, "umount"], ["fusermount3", "-uz"]):
        if mount_at(mountpoint) is None:
            return
        try:
            subprocess.run([*command, mountpoint], timeout=DEADLINE)
        except subprocess.TimeoutExpired:
            continue
    if mount_at(mountpoint) is not None:
        raise RuntimeError(f"{mountpoint} is still mounted; unmount it (fusermount3 -uz), then remove it")


if __name__ == "__main__":
    sys.exit(main())
