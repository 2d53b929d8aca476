"""Installs a package into an empty Debian 13, and mounts an account with it. See scripts/test-deb."""

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

from tests.support.mail import plain
from tests.support.mailboxes import everything
from tests.support.servers.dovecot import Dovecot
from tests.support.servers.tls import CertificateAuthority

_WITHIN = """\
root=$1; shift
mount --rbind /dev "$root/dev" && mount -t proc proc "$root/proc" && exec chroot "$root" "$@"
"""
_NAMESPACES: Final = ("unshare", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child")
"""No mount and no process is left when the program ends."""
_ENVIRONMENT: Final = {
    "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
    "LC_ALL": "C.UTF-8",
    "DEBIAN_FRONTEND": "noninteractive",
    "HOME": "/root",
}
_MOUNT = """\
set -e
mkdir -p /mail
imapfs check imaps://alice@localhost:$1 --ca-file /root/ca.pem --password-file /root/password
imapfs mount imaps://alice@localhost:$1 /mail --ca-file /root/ca.pem --password-file /root/password
ls /mail/INBOX
cat /mail/INBOX/*.eml > /root/read
cp /root/new.eml /mail/Sent/new.eml
imapfs sync /mail
imapfs status /mail
imapfs umount /mail
mount -t imapfs imaps://alice@localhost:$1 /mail -o ca-file=/root/ca.pem,password-file=/root/password
ls /mail/Sent
umount /mail
"""


def main(arguments: list[str]) -> int:
    """Print what was looked at. The exit code is 0 where all is as it should be."""
    (package,) = arguments
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="imapfs-deb-")))
        root = stack.enter_context(debian(directory / "root"))
        shutil.copy(package, root / "root/imapfs.deb")
        within(root, "apt-get", "-q", "-y", "--no-install-recommends", "install", "/root/imapfs.deb")
        version = Path(package).name.split("_")[1]
        expect(within(root, "imapfs", "--version").strip() == f"imapfs {version}", "the version is right")
        for path in (
            "usr/sbin/mount.imapfs",
            "usr/share/man/man1/imapfs.1.gz",
            "usr/share/man/man5/imapfs.toml.5.gz",
            "usr/share/man/man8/mount.imapfs.8.gz",
            "usr/share/bash-completion/completions/imapfs",
            "usr/share/systemd/user/imapfs@.service",
        ):
            expect((root / path).exists(), f"{path} is there")
        authority = CertificateAuthority(directory)
        server = stack.enter_context(Dovecot(authority))
        account = server.account("alice")
        account.deliver("INBOX", [(plain(1), 1_700_000_000, ""), (plain(2), 1_700_000_060, "")])
        shutil.copy(authority.certificate, root / "root/ca.pem")
        password = root / "root/password"
        password.touch(mode=0o600)
        password.write_text(account.password)
        (root / "root/new.eml").write_bytes(plain(3))
        sys.stdout.write(within(root, "sh", "-c", _MOUNT, "sh", str(server.port)))
        expect((root / "root/read").read_bytes() == plain(1) + plain(2), "the messages were read")
        sent = [message.content for message in everything(account)["Sent"]]
        expect(sent == [plain(3)], "the new message is on the server")
        within(root, "apt-get", "-q", "-y", "purge", "imapfs")
        left = [path for path in (root / "usr").rglob("*imapfs*") if "doc" not in path.parts]
        expect(not left, "nothing is left after a purge")
    return 0


@contextmanager
def debian(root: Path) -> Iterator[Path]:
    """Unpack an empty Debian 13."""
    say("unpacking Debian 13")
    subprocess.run(
        ["debootstrap", "--variant=minbase", "trixie", root], check=True, stdout=subprocess.DEVNULL
    )
    yield root


def within(root: Path, *command: str) -> str:
    """Run a program in that Debian and return what it says. Raises SystemExit with its last lines."""
    say(" ".join(command[:6]))
    done = subprocess.run(
        [*_NAMESPACES, "sh", "-c", _WITHIN, "sh", root, *command],
        env=_ENVIRONMENT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode != 0:
        sys.exit("\n".join(done.stdout.splitlines()[-20:]))
    return done.stdout


def expect(holds: bool, what: str) -> None:
    """End the program unless something is so."""
    if not holds:
        sys.exit(f"test-deb: not so: {what}")


def say(text: str) -> None:
    """Tell what is being done."""
    sys.stderr.write(f"test-deb: {text}\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
