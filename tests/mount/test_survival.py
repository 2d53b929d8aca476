"""What the daemon lives through: crowds, quitters, a full disk, a cache that is deleted under it."""

import contextlib
import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from imapfs.model import ROOT, Ino
from imapfs.store.spool import Spool
from tests.support.compare import contents, served, shown
from tests.support.mail import plain
from tests.support.mounting import DEADLINE, Mount, Mounter, wait_until
from tests.support.servers.dovecot import Account
from tests.support.servers.proxy import Proxy

DATE = 1_700_000_000


def descriptors(mount: Mount) -> int:
    return len(os.listdir(f"/proc/{mount.pid}/fd"))


def test_thousands_of_open_files(user: Account, mount: Mounter) -> None:
    """More than the 1024 descriptors that a process usually may have, of drafts and of messages."""
    user.deliver("INBOX", ((plain(n), DATE, "") for n in range(100)))
    soft, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, most))
    try:
        inbox = mount(user).path / "INBOX"
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, most))
    command = [sys.executable, "-c", MANY, str(inbox)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3 * DEADLINE)
    assert done.stdout == "100 1030\n", done.stderr


MANY = """
import os, resource, sys
_, most = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
directory = sys.argv[1]
files = [open(os.path.join(directory, name), "rb", buffering=0) for name in sorted(os.listdir(directory))]
drafts = [open(os.path.join(directory, f".draft{n}"), "w+b", buffering=0) for n in range(1030)]
for draft in drafts:
    draft.write(b"x")
assert all(os.pread(file.fileno(), 10, 0) for file in files)
print(len(files), sum(os.pread(draft.fileno(), 9, 0) == b"x" for draft in drafts))
"""


def test_a_hundred_readers_at_once(user: Account, mount: Mounter) -> None:
    user.deliver("INBOX", ((plain(n, 20_000), DATE, "") for n in range(30)))
    mounted = mount(user)
    there = served(user)
    files = shown(mounted.path / "INBOX")
    with ThreadPoolExecutor(100) as executor:
        found = list(
            executor.map(lambda _: {uid: path.read_bytes() for uid, path in files.items()}, range(100))
        )
    assert all(one == there for one in found)


def test_a_reader_that_is_killed_leaves_nothing_behind(user: Account, mount: Mounter) -> None:
    user.deliver("INBOX", [(plain(n, 3_000_000), DATE, "") for n in range(4)])
    with Proxy(user.server) as proxy:
        mounted = mount(proxy.account(user), "--fetch-ahead", "0")
        *killed, last = [path for _, path in sorted(shown(mounted.path / "INBOX").items())]
        for path in killed:
            fault = proxy.fault(rb"UID FETCH .*BODY.PEEK\[\]", "stall", at="literal", after=100_000)
            reader = subprocess.Popen(["cat", path], stdout=subprocess.DEVNULL)
            fault.wait_hit()
            reader.kill()
            proxy.resume()
            reader.wait(DEADLINE)
        assert last.read_bytes() == plain(3, 3_000_000)
        before = descriptors(mounted)
        assert contents(mounted.path / "INBOX") == served(user)
        wait_until(lambda: descriptors(mounted) <= before, "no descriptor is left open")
        mounted.unmount()


def test_umount_under_load_waits_for_what_was_written(user: Account, mount: Mounter) -> None:
    user.deliver("INBOX", ((plain(n, 50_000), DATE, "") for n in range(50)))
    mounted = mount(user)
    inbox = mounted.path / "INBOX"
    files = list(inbox.iterdir())
    with ThreadPoolExecutor(10) as executor:
        list(executor.map(Path.read_bytes, files[:20]))
        list(executor.map(lambda n: (inbox / f"new{n}.eml").write_bytes(plain(n)), range(100, 140)))
    mounted.unmount()
    assert sorted(served(user).values()) == sorted(
        [*(plain(n, 50_000) for n in range(50)), *(plain(n) for n in range(100, 140))]
    )
    assert not list(mounted.cache.glob("*/spool/*.json"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Return a directory on a disk of 4 MiB."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small disk")
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", disk], check=True)
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def test_full_disk(user: Account, mount: Mounter, small_disk: Path) -> None:
    user.deliver("INBOX", ((plain(n, 100_000), DATE, "") for n in range(20)))
    mounted = mount(user, cache=small_disk / "cache", expected_log=["free or repair that disk|disk full"])
    inbox = mounted.path / "INBOX"
    assert len(os.listdir(inbox)) == 20
    filling = small_disk / "filling"
    with filling.open("wb", buffering=0) as file, pytest.raises(OSError):
        while True:
            file.write(bytes(4096))
    # Messages are read without being cached.
    assert contents(inbox) == served(user)
    with pytest.raises(OSError) as raised:
        (inbox / "new.eml").write_bytes(plain(30, 100_000))
    assert raised.value.errno == errno.ENOSPC
    filling.unlink()
    (inbox / "newer.eml").write_bytes(plain(31))
    wait_until(lambda: plain(31) in served(user).values(), "what is written then is sent")
    assert sorted(path.read_bytes() for path in inbox.iterdir()) == sorted(served(user).values())
    assert mounted.log_text().count(" WARNING ") < 5
    mounted.unmount()


@pytest.mark.parametrize("end", ["kill", "umount"])
def test_mount_after_a_reboot_with_a_full_disk(
    user: Account, mount: Mounter, small_disk: Path, end: str
) -> None:
    """There was no mount at all, so that neither the mail nor what waits in the spool could be read."""
    user.deliver("INBOX", [(plain(n), DATE, "") for n in range(3)])
    with Proxy(user.server) as proxy:
        first = mount(
            proxy.account(user), cache=small_disk / "cache", expected_log=["offline: |not on the server"]
        )
        inbox = first.path / "INBOX"
        before = {path.name: path.read_bytes() for path in inbox.iterdir()}
        proxy.refuse()
        proxy.cut_all()
        wait_until(lambda: first.status()["state"] == "offline", "offline")
        for n in (10, 11):
            (inbox / f"new{n}.eml").write_bytes(plain(n, 9000 * n))
        for name in (".x.swp", ".y.swp"):
            (inbox / name).write_bytes(b"local")
        getattr(first, {"kill": "kill", "umount": "unmount"}[end])()
        (spool,) = first.cache.glob("*/spool")
        (spool / "boot").write_text("another boot")
        filling = small_disk / "filling"
        with filling.open("wb", buffering=0) as file, pytest.raises(OSError):
            while True:
                file.write(bytes(4096))
        second = mount(
            proxy.account(user),
            cache=first.cache,
            expected_log=[
                "free or repair that disk|disk full|disk is full",
                "offline: |mounted from the cache",
            ],
        )
        inbox = second.path / "INBOX"
        waiting = {"new10.eml": plain(10, 90_000), "new11.eml": plain(11, 99_000)}
        local = {".x.swp": b"local", ".y.swp": b"local"}
        assert {path.name: path.read_bytes() for path in inbox.iterdir()} == before | waiting | local
        with pytest.raises(OSError) as raised:
            (inbox / "new12.eml").write_bytes(plain(12))
        assert raised.value.errno == errno.ENOSPC
        # Nothing of this needs the server, which is away.
        (inbox / ".x.swp").unlink()
        filling.unlink()
        (inbox / ".y.swp").rename(inbox / ".z.swp")
        proxy.accept()
        wait_until(
            lambda: {plain(10, 90_000), plain(11, 99_000)} <= {*served(user).values()}, "what waited is sent"
        )
        second.unmount()
    assert len(served(user)) == 5


def test_messages_are_read_where_nothing_can_be_cached(user: Account, mount: Mounter) -> None:
    user.deliver("INBOX", [(plain(n), DATE, "") for n in range(3)])
    mounted = mount(user, expected_log=["was not cached"])
    files = shown(mounted.path / "INBOX")
    (bodies,) = mounted.cache.glob("*/bodies")
    shutil.rmtree(bodies)
    assert {uid: path.read_bytes() for uid, path in files.items()} == served(user)


def test_cache_deleted_under_the_mount(user: Account, mount: Mounter) -> None:
    """What is on the server can be used on; what was not sent yet is lost, and that is said."""
    user.deliver("INBOX", [(plain(n), DATE, "") for n in range(4)])
    with Proxy(user.server) as proxy:
        mounted = mount(
            proxy.account(user),
            expected_log=[
                "offline: .* refuses connections",
                "it was deleted by another program: unmount",
                "bytes are lost",
            ],
        )
        inbox = mounted.path / "INBOX"
        paths = shown(inbox)
        files = [path for _, path in sorted(paths.items())]
        assert files[0].read_bytes() == plain(0)
        proxy.refuse()
        proxy.cut_all()
        wait_until(lambda: mounted.status()["state"] == "offline", "offline")
        (inbox / "lost.eml").write_bytes(plain(9))
        assert not mounted.status()["cache"]["deleted"]
        shutil.rmtree(mounted.cache)
        assert mounted.status()["cache"]["deleted"]
        proxy.accept()
        wait_until(lambda: mounted.status()["state"] == "online", "online again")
        assert {path.name for path in inbox.iterdir()} == {*(path.name for path in files), "lost.eml"}
        assert {uid: path.read_bytes() for uid, path in paths.items()} == served(user)
        with pytest.raises(OSError) as raised:
            (inbox / "lost.eml").read_bytes()
        assert raised.value.errno == errno.EIO
        with pytest.raises(OSError) as raised:
            (inbox / "new.eml").write_bytes(plain(10))
        assert raised.value.errno == errno.EIO
        files[3].rename(mounted.path / "Trash" / "moved.eml")
        wait_until(
            lambda: [one["state"] for one in mounted.status()["waiting"]] == ["unsent"],
            "it is said in the status",
        )
        assert "bytes are lost" in mounted.status()["waiting"][0]["error"]
        mounted.unmount()
        again = mount(user, cache=mounted.cache)
        assert contents(again.path / "INBOX") == served(user)
        assert mounted.log_text().count(" WARNING ") < 8


def test_what_waits_survives_the_deletion_of_the_cache(user: Account, mount: Mounter, tmp_path: Path) -> None:
    """XDG lets everybody delete ~/.cache. The spool of an earlier version is moved out of it."""
    caches = tmp_path / "caches"
    environment = {"XDG_CACHE_HOME": str(caches), "XDG_DATA_HOME": str(tmp_path / "data")}
    log = ["offline: |mounted from the cache|not on the server"]
    user.deliver("INBOX", [(plain(1), DATE, "")])

    def usual(log: list[str]) -> Mount:
        made = mount.prepare(proxy.account(user), environment=environment, expected_log=log)
        at = made.command.index("--cache-dir")
        del made.command[at : at + 2]
        return made

    with Proxy(user.server) as proxy:
        with mount.prepare(proxy.account(user), cache=caches / "imapfs", expected_log=log) as first:
            os.listdir(first.path / "INBOX")
            proxy.refuse()
            proxy.cut_all()
            wait_until(lambda: first.status()["state"] == "offline", "offline")
            (first.path / "INBOX" / "new.eml").write_bytes(plain(9))
        with usual(log) as second:
            assert second.status()["spool"].startswith(str(tmp_path / "data" / "imapfs"))
            assert [one["path"] for one in second.status()["waiting"]] == ["INBOX/new.eml"]
            assert not list(caches.glob("*/*/spool/*.json"))
        shutil.rmtree(caches)
        proxy.accept()
        with usual([]) as third:
            wait_until(lambda: plain(9) in served(user).values(), "it is sent")
            assert (third.path / "INBOX" / "new.eml").read_bytes() == plain(9)
    assert sorted(served(user).values()) == sorted([plain(1), plain(9)])


FLOOD = """
import os, sys
try:
    while True:
        for name in sys.argv[1:]:
            os.close(os.open(name, os.O_RDONLY))
except OSError:
    pass  # unmounted
"""


def test_a_flood_of_requests_holds_up_nothing_else(user: Account, mount: Mounter) -> None:
    """Uploads, and what another client does, come through; and the mount can be ended."""
    user.deliver("INBOX", ((plain(n), DATE, "") for n in range(3)))
    mounted = mount(user)
    inbox = mounted.path / "INBOX"
    first = contents(inbox)
    with contextlib.ExitStack() as stack:
        for _ in range(3):
            flood = stack.enter_context(subprocess.Popen([sys.executable, "-c", FLOOD, *inbox.iterdir()]))
            stack.callback(flood.kill)
        (inbox / "new.eml").write_bytes(plain(10))
        wait_until(lambda: plain(10) in served(user).values(), "uploaded")
        user.deliver("INBOX", [(plain(11), DATE, "")])
        wait_until(lambda: len(list(inbox.iterdir())) == len(first) + 2, "seen")
        os.kill(mounted.pid, signal.SIGTERM)
        mounted.wait_ended()
    assert sorted(served(user).values()) == sorted(plain(n) for n in (0, 1, 2, 10, 11))


def test_status_lists_ten_thousand_files_that_were_refused(user: Account, mount: Mounter) -> None:
    """350 were too many for one extended attribute: status, sync and retry failed when it mattered."""
    first = mount(user)
    first.unmount()
    (place,) = first.cache.glob("*/spool")
    spool = Spool(place)
    for number in range(10_000):
        name = b"file-%05d.eml" % number
        draft = spool.create(Ino(1 << 40 | number), ROOT, name, (b"INBOX",), 0o600)
        draft.file.write_bytes(b"Subject: x\r\n\r\n")
        draft.state, draft.error = "unsent", "the server refuses it: " + "x" * 100
        draft.save()
    again = mount(user, cache=first.cache)
    assert len(os.getxattr(again.path, "user.imapfs.status")) <= 4096
    assert again.status()["files"] == {"sending": 0, "unsent": 10_000}
    assert len(again.status()["waiting"]) == 10_000

    def run(command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "imapfs", command, again.path],
            env=again.environment, capture_output=True, text=True, timeout=DEADLINE,
        )  # fmt: skip

    done = run("sync")
    assert (done.returncode, done.stdout.count("INBOX/file-")) == (1, 10_000)
    done = run("status")
    assert (done.returncode, done.stderr) == (0, "")
    again.unmount()
