"""mount -t imapfs, and what mount.imapfs makes of options and users."""

import os
import pwd
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from imapfs import mountinfo
from imapfs.cli.fstab import become, translate
from imapfs.errors import UsageError
from tests.support.mounting import DEADLINE, ROOT, Mount, Mounter, wait_until
from tests.support.servers.dovecot import Account

HELPER = Path("/sbin/mount.imapfs")
SOURCE = "imaps://alice@mail.example.org"


@pytest.mark.parametrize(
    ("options", "arguments"),
    [
        ("", []),
        (
            "rw,noexec,nosuid,nodev,user,_netdev",
            ["-o", "rw", "-o", "noexec", "-o", "nosuid", "-o", "nodev", "-o", "_netdev"],
        ),
        (
            "ro,user=alice,allow_other,x-systemd.automount",
            ["-o", "ro", "-o", "allow_other", "-o", "x-systemd.automount"],
        ),
        ("connections=2,read-only,ca-file=/x=y", ["--connections=2", "--read-only", "--ca-file=/x=y"]),
        ('password-command="echo a,b",ro', ["--password-command=echo a,b", "-o", "ro"]),
        (",,ro,,", ["-o", "ro"]),
    ],
)
def test_options_are_those_of_imapfs_mount(options: str, arguments: list[str]) -> None:
    assert translate(options) == (arguments, None)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("ro,colour=red", r"'colour=red'; known are .*allow_other.*setuid=USER.*connections=N"),
        ("host=h", "unknown mount option"),
        ("read-only=yes", "write read-only$"),
        ("connections", "write connections=N"),
        ("names", r"write names=subject\|uid\|TEMPLATE"),
        ("remount,ro", "unmount it, and mount it again"),
    ],
)
def test_what_nobody_knows_is_refused_on_one_line(options: str, says: str) -> None:
    with pytest.raises(UsageError, match=says) as caught:
        translate(options)
    assert "\n" not in str(caught.value)


def test_sloppy_drops_only_what_nobody_knows() -> None:
    assert translate("colour=red,ro,timeout=5", sloppy=True) == (["-o", "ro", "--timeout=5"], None)


def test_user_whose_mount_it_is() -> None:
    assert translate("ro,setuid=bob").user == translate("uid=bob").user == "bob"


def mount_imapfs(*arguments: str, home: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "from imapfs.cli.fstab import main; main()", *arguments],
        env={"PYTHONPATH": str(ROOT), "HOME": str(home), "PATH": os.environ["PATH"]},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )


def test_exit_codes_are_those_of_mount(tmp_path: Path) -> None:
    (tmp_path / "mnt").mkdir()
    place = str(tmp_path / "mnt")
    assert mount_imapfs(SOURCE, home=tmp_path).returncode == 1
    assert mount_imapfs(SOURCE, place, "-sfnv", "-o", "ro,colour", home=tmp_path).returncode == 0
    for options, says in [
        ("connections=many", "'many' is not a valid integer"),
        ("setuid=nobody-of-this-name", "no such user"),
        ("password-file=/nonexistent", "cannot be read"),
    ]:
        result = mount_imapfs(SOURCE, place, "-o", options, home=tmp_path)
        assert result.returncode == 32
        assert says in result.stderr
        assert result.stderr.startswith("mount.imapfs: ")
        assert result.stderr.count("\n") == 1


def test_name_that_mount_took_for_a_path_is_a_name(tmp_path: Path) -> None:
    (tmp_path / "mnt").mkdir()
    result = mount_imapfs("/srv/work", str(tmp_path / "mnt"), home=tmp_path)
    assert "no account 'work'" in result.stderr


# ---- Through mount(8), which looks for its helpers in directories of the system's only

by_root = pytest.mark.skipif(
    os.geteuid() != 0 or HELPER.exists(), reason="would have to change /sbin: root and no mount.imapfs there"
)


@contextmanager
def helper_in_place() -> Iterator[None]:
    # mount(8) hands its environment to a helper as it is.
    command = f'{sys.executable} -c "from imapfs.cli.fstab import main; main()" "$@"'
    HELPER.write_text(f"#!/bin/sh\nPYTHONPATH={ROOT} exec {command}\n")
    try:
        HELPER.chmod(0o755)
        yield
    finally:
        HELPER.unlink()


def options_of(made: Mount) -> str:
    """The settings of a mount that was prepared, as mount options."""
    arguments = iter(made.command[made.command.index(str(made.path)) + 1 :])
    return ",".join(
        f"{key.removeprefix('--')}={value}" for key, value in zip(arguments, arguments, strict=True)
    )


def run(*command: str, made: Mount) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        env=made.environment,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        stdin=subprocess.DEVNULL,
    )


@contextmanager
def detached_at_the_end(path: Path) -> Iterator[None]:
    try:
        yield
    finally:
        subprocess.run(["fusermount3", "-u", "-z", "-q", path], check=False, capture_output=True)


@by_root
def test_line_of_fstab_mounts_and_mount_all_twice_is_fine(
    user: Account, mount: Mounter, tmp_path: Path
) -> None:
    made = mount.prepare(user)
    source = made.command[4].replace("imaps://", "IMAPS://")
    table = tmp_path / "fstab"
    table.write_text(f"{source} {made.path} imapfs ro,_netdev,nofail,connections=2,{options_of(made)} 0 0\n")
    with helper_in_place(), detached_at_the_end(made.path):
        for _ in range(2):
            done = run("mount", "-a", "-T", str(table), made=made)
            assert (done.returncode, done.stderr) == (0, "")
        assert len([one for one in mountinfo.imapfs_mounts() if one.mountpoint == made.path]) == 1
        status = made.status()
        assert status["read_only"] is True
        assert status["connections"]["limit"] == 2
        assert run("umount", str(made.path), made=made).returncode == 0
        wait_until(lambda: not Path(f"/proc/{status['pid']}").exists(), "the daemon ended")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become somebody else")
def test_root_mounts_as_the_user_whose_mount_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", "/root/.config")
    nobody = pwd.getpwnam("nobody")
    receiver, sender = os.pipe()
    if os.fork() == 0:
        with os.fdopen(sender, "w") as pipe:
            become("nobody")
            print(os.getresuid(), os.getresgid(), os.getgroups(), file=pipe)
            print(os.environ["HOME"], os.environ["USER"], os.environ.get("XDG_CONFIG_HOME"), file=pipe)
        os._exit(0)
    os.close(sender)
    with os.fdopen(receiver) as pipe:
        ids, environment = pipe.read().splitlines()
    os.wait()
    uid, gid = nobody.pw_uid, nobody.pw_gid
    assert ids == f"{(uid, uid, uid)} {(gid, gid, gid)} [{gid}]"
    assert environment == f"{nobody.pw_dir} nobody None"


def test_user_may_name_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "initgroups", refuse)
    with pytest.raises(UsageError, match="only root"):
        become("nobody" if os.geteuid() == 0 else "root")
    become(str(os.geteuid()))
