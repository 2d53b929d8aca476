"""What outlives a mount: bodies are fetched once, and nothing that happens to a cache gives wrong bytes."""

import contextlib
import os
import re
import resource
import sqlite3
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from imapfs.imap.grammar import parse_sequence_set
from tests.support.acceptance.providers import GmailPeer
from tests.support.compare import contents, served, shown
from tests.support.mail import plain, wild
from tests.support.mounting import DEADLINE, Mounter, MountFailed, wait_until
from tests.support.servers.dovecot import Account
from tests.support.servers.tls import CertificateAuthority

DATE = 1_700_000_000


def rsync(source: Path, target: Path) -> list[str]:
    """Return the files that were transferred."""
    done = subprocess.run(
        ["rsync", "-a", "--out-format=%n", f"{source}/", f"{target}/"],
        capture_output=True,
        text=True,
        check=True,
        timeout=DEADLINE,
    )
    return [name for name in done.stdout.splitlines() if not name.endswith("/")]


def body_files(cache: Path) -> list[Path]:
    return [*cache.glob("*/bodies/packs/*"), *cache.glob("*/bodies/large/*")]


def bodies_known(cache: Path) -> int:
    """How many bodies the database of a cache that is not mounted says are there."""
    with contextlib.closing(sqlite3.connect(database(cache))) as db:
        (known,) = db.execute("SELECT count(*) FROM node WHERE crc IS NOT NULL").fetchone()
    return int(known)


def database(cache: Path) -> Path:
    (path,) = cache.glob("*/cache.db")
    return path


# -- fetched once


def test_rsync_of_1000_messages_is_equal_and_the_second_transfers_nothing(
    user: Account, mount: Mounter, tmp_path: Path
) -> None:
    user.deliver("INBOX", ((plain(n, 1000 + 37 * n), DATE + n, "S") for n in range(1000)))
    copy = tmp_path / "copy"
    copy.mkdir()
    first = mount(user)
    assert len(rsync(first.path / "INBOX", copy)) == 1000
    there = served(user)
    assert contents(copy) == there == {n + 1: plain(n, 1000 + 37 * n) for n in range(1000)}
    assert {uid: path.stat().st_mtime for uid, path in shown(copy).items()} == {
        n + 1: DATE + n for n in range(1000)
    }
    assert rsync(first.path / "INBOX", copy) == []
    first.unmount()

    user.start_trace()
    second = mount(user, cache=first.cache)
    assert rsync(second.path / "INBOX", copy) == []
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    assert len(rsync(second.path / "INBOX", fresh)) == 1000
    second.unmount()
    assert contents(fresh) == there
    commands = user.protocol_trace()
    assert any(b"EXAMINE INBOX" in line.replace(b'"', b"") for line in commands)
    assert not any(b"BODY.PEEK[]" in line for line in commands)


def test_changed_uidvalidity_drops_that_mailbox_only(user: Account, mount: Mounter) -> None:
    for mailbox in ("kept", "changed"):
        user.deliver(mailbox, ((plain(n, 5000), DATE, "") for n in range(4)))
    first = mount(user)
    for mailbox in ("kept", "changed"):
        assert len(contents(first.path / mailbox)) == 4
    inodes = {path.stat().st_ino for path in (first.path / "changed").iterdir()}
    first.unmount()
    user.server.doveadm("mailbox", "update", "-u", user.name, "--uid-validity", "4711", "changed")
    user.start_trace()
    second = mount(user, cache=first.cache)
    found = {mailbox: contents(second.path / mailbox) for mailbox in ("kept", "changed")}
    assert os.getxattr(second.path / "changed", "user.imap.uidvalidity") == b"4711"
    assert not inodes & {path.stat().st_ino for path in (second.path / "changed").iterdir()}
    assert second.status()["cache"]["bodies"] == 8
    second.unmount()
    asked_in = set()
    for line in user.protocol_trace():
        command = line.partition(b" ")[2]
        if command.startswith(b"EXAMINE"):
            selected = command.split()[1].strip(b'"')
        if b"BODY.PEEK[]" in command:
            asked_in.add(selected)
    assert asked_in == {b"changed"}
    assert found == {mailbox: served(user, mailbox) for mailbox in ("kept", "changed")}


def test_cache_is_closed_to_others(user: Account, mount: Mounter) -> None:
    user.deliver("INBOX", [(plain(1), DATE, ""), (plain(2, 400_000), DATE, "")])
    mounted = mount(user)
    assert len(contents(mounted.path / "INBOX")) == 2
    # The last bytes of a large body are read before its file is put in its place.
    wait_until(lambda: len(body_files(mounted.cache)) == 2, "both bodies are cached")
    below = [mounted.cache / found.relative_to(mounted.cache) for found in mounted.cache.rglob("*")]
    assert {stat.S_IMODE(path.stat().st_mode) for path in below if path.is_dir()} == {0o700}
    assert {stat.S_IMODE(path.stat().st_mode) for path in below if path.is_file()} == {0o600}


def test_cache_stays_within_its_size(user: Account, mount: Mounter) -> None:
    user.deliver("INBOX", ((plain(n, 20_000), DATE, "") for n in range(30)))
    mounted = mount(user, "--cache-size", "100K")
    assert contents(mounted.path / "INBOX") == {n + 1: plain(n, 20_000) for n in range(30)}
    cache = mounted.status()["cache"]
    assert 20_000 <= cache["bytes"] <= 100_000 < cache["limit"]
    assert cache["bytes"] == 20_000 * cache["bodies"]
    blocks = sum(path.stat().st_blocks for path in body_files(mounted.cache))
    assert cache["bytes"] <= blocks * 512 <= cache["bytes"] + 4096 * cache["bodies"]
    mounted.unmount()
    smaller = mount(user, "--cache-size", "50K", cache=mounted.cache)
    assert contents(smaller.path / "INBOX") == {n + 1: plain(n, 20_000) for n in range(30)}
    assert smaller.status()["cache"]["bytes"] <= 50_000


def test_cache_serves_one_mount_at_a_time(user: Account, mount: Mounter) -> None:
    user.deliver("INBOX", [(plain(1), DATE, "")])
    first = mount(user)
    with pytest.raises(MountFailed) as failed:
        mount(user, cache=first.cache)
    assert failed.value.code == 1
    assert failed.value.stderr.count("\n") == 1
    assert f"another mount (process {first.pid}) uses the cache" in failed.value.stderr
    assert contents(first.path / "INBOX") == {1: plain(1)}
    first.unmount()
    assert contents(mount(user, cache=first.cache).path / "INBOX") == {1: plain(1)}


# -- killed


@pytest.mark.parametrize("bodies", [1, 150])
def test_daemon_killed_while_it_fetches_leaves_no_wrong_byte(
    user: Account, mount: Mounter, bodies: int
) -> None:
    user.deliver("INBOX", ((plain(n, 3000 + 3001 * (n % 40)), DATE + n, "") for n in range(400)))
    first = mount(user)
    reader = subprocess.Popen(
        ["grep", "-rc", "Subject", first.path], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        wait_until(lambda: first.status()["cache"]["bodies"] >= bodies, f"{bodies} bodies in the cache")
        first.kill()
    finally:
        reader.wait(DEADLINE)
    second = mount(user, cache=first.cache)
    assert contents(second.path / "INBOX") == served(user)
    second.unmount()
    assert not list(second.cache.glob("*/bodies/tmp/*"))
    assert bodies_known(second.cache) == 400


def test_daemon_killed_while_a_large_message_comes_in_leaves_no_wrong_byte(
    user: Account, mount: Mounter
) -> None:
    message = plain(1, 30_000_000)
    user.deliver("INBOX", [(message, DATE, "")])
    first = mount(user)
    (path,) = (first.path / "INBOX").iterdir()
    file = os.open(path, os.O_RDONLY)
    assert os.read(file, 100) == message[:100]
    first.kill()
    with pytest.raises(OSError):
        os.close(file)
    second = mount(user, cache=first.cache)
    assert (second.path / "INBOX" / path.name).read_bytes() == message
    second.unmount()
    assert not list(second.cache.glob("*/bodies/tmp/*"))


def test_daemon_killed_while_it_lists_goes_on_with_the_right_list(user: Account, mount: Mounter) -> None:
    user.deliver("INBOX", ((plain(n, 700), DATE + n, "") for n in range(3000)))
    first = mount(user)
    with os.scandir(first.path / "INBOX") as entries:
        next(entries)
        first.kill()
    second = mount(user, cache=first.cache)
    assert set(shown(second.path / "INBOX")) == set(range(1, 3001))
    assert {path.stat().st_size for path in (second.path / "INBOX").iterdir()} == {700}


# -- damaged


def garbage(path: Path) -> None:
    path.write_bytes(b"\0garbage" * 4096)


def damage_in_the_middle(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(b"\xff" * (path.stat().st_size - 4096))


def newer_version(path: Path) -> None:
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 999")
    db.close()


@pytest.mark.parametrize("spoil", [garbage, damage_in_the_middle, newer_version])
def test_database_that_cannot_be_trusted_is_built_anew(
    user: Account, mount: Mounter, spoil: Callable[[Path], None]
) -> None:
    user.deliver("INBOX", ((content, DATE, "") for content in wild().values()))
    first = mount(user)
    there = served(user)
    assert contents(first.path / "INBOX") == there
    inodes = {path.stat().st_ino for path in (first.path / "INBOX").iterdir()}
    first.unmount()
    spoil(database(first.cache))
    second = mount(user, cache=first.cache, expected_log=[r"cache\.db is not usable .*rebuilt"])
    assert contents(second.path / "INBOX") == there
    # A program that remembers an inode must not find another message under it.
    assert not inodes & {path.stat().st_ino for path in (second.path / "INBOX").iterdir()}
    second.unmount()
    assert bodies_known(second.cache) == len(there)


def test_database_cut_short_is_never_trusted(user: Account, mount: Mounter) -> None:
    user.deliver("INBOX", ((plain(n), DATE, "") for n in range(50)))
    first = mount(user)
    assert len(contents(first.path / "INBOX")) == 50
    first.unmount()
    path = database(first.cache)
    os.truncate(path, path.stat().st_size // 2)
    second = mount(user, cache=first.cache, expected_log=["not usable .*rebuilt"])
    assert contents(second.path / "INBOX") == {n + 1: plain(n) for n in range(50)}


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


@pytest.mark.parametrize(("spoil", "size"), [(flip, 2_000), (cut, 400_000), (Path.unlink, 2_000)])
def test_damaged_body_is_fetched_again(
    user: Account, mount: Mounter, spoil: Callable[[Path], None], size: int
) -> None:
    user.deliver("INBOX", [(plain(1, size), DATE, "")])
    first = mount(user)
    assert contents(first.path / "INBOX") == {1: plain(1, size)}
    first.unmount()
    (path,) = body_files(first.cache)
    spoil(path)
    second = mount(user, cache=first.cache, expected_log=["the cached body of file .* is damaged or gone"])
    (message,) = (second.path / "INBOX").iterdir()
    assert message.stat().st_size == size
    assert message.read_bytes() == plain(1, size)
    second.unmount()
    assert bodies_known(second.cache) == 1


def test_file_that_no_message_has_is_removed(user: Account, mount: Mounter) -> None:
    user.deliver("INBOX", [(plain(1), DATE, "")])
    first = mount(user)
    assert contents(first.path / "INBOX") == {1: plain(1)}
    first.unmount()
    (path,) = body_files(first.cache)
    stray = path.parent.parent / "large" / "1000"
    stray.write_bytes(b"stray")
    half_written = path.parent.parent / "tmp" / "0"
    half_written.write_bytes(b"half")
    second = mount(user, cache=first.cache)
    wait_until(lambda: not stray.exists() and not half_written.exists(), "the stray files are gone")
    assert path.exists()
    assert contents(second.path / "INBOX") == {1: plain(1)}


# -- full


def limit_files(pid: int, size: int) -> None:
    """Let no file grow beyond ``size`` bytes: like a full disk, but for this process only."""
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def test_disk_that_takes_nothing_more_never_gives_wrong_bytes(user: Account, mount: Mounter) -> None:
    user.deliver("INBOX", ((plain(n, 5_000), DATE, "") for n in range(5)))
    user.deliver("INBOX", [(plain(9, 1_000_000), DATE, "")])
    there = served(user)
    mounted = mount(user, expected_log=["cannot be written|cannot write", "not cached"])
    files = shown(mounted.path / "INBOX")
    limit_files(mounted.pid, 4096)
    for uid, path in files.items():
        try:
            content = path.read_bytes()
        except OSError:
            continue
        assert content == there[uid]
    with pytest.raises(OSError):
        files[6].read_bytes()
    limit_files(mounted.pid, resource.RLIM_INFINITY)
    assert contents(mounted.path / "INBOX") == there
    mounted.unmount()
    again = mount(user, cache=mounted.cache)
    assert contents(again.path / "INBOX") == there


def test_disk_full_in_the_middle_of_a_message_fails_that_read_only(user: Account, mount: Mounter) -> None:
    user.deliver("INBOX", [(plain(1, 10_000_000), DATE, ""), (plain(2), DATE, "")])
    mounted = mount(user, expected_log=["cannot write to the cache"])
    files = shown(mounted.path / "INBOX")
    limit_files(mounted.pid, 8_000_000)
    with pytest.raises(OSError):
        files[1].read_bytes()
    assert files[2].read_bytes() == plain(2)
    assert not list(mounted.cache.glob("*/bodies/tmp/*"))
    limit_files(mounted.pid, resource.RLIM_INFINITY)
    assert files[1].read_bytes() == plain(1, 10_000_000)


def bodies_fetched(peer: GmailPeer) -> int:
    """Count the messages whose bodies were asked for."""
    asked = [command for command in peer.proxy.commands() if b"BODY.PEEK[])" in command]
    ranges = [found for command in asked for found in parse_sequence_set(command.split()[2])]
    return sum(last - first + 1 for first, last in ranges)


LARGE = plain(9, 600_000)


@pytest.mark.parametrize("lies", [False, True], ids=["", "the server lies"])
def test_a_body_serves_all_messages_that_the_server_calls_the_same(
    ca: CertificateAuthority, mount: Mounter, lies: bool
) -> None:
    """Gmail has each message in several mailboxes. Not before two of them were compared is it believed."""
    with GmailPeer(ca) as peer:
        account = peer.dovecot.account(peer.name)
        account.deliver("INBOX", [*((plain(n), DATE + n, "") for n in range(6)), (LARGE, DATE, "")])
        account.deliver("All", [])
        with account.client() as client:
            client.select("INBOX")
            client.uid("COPY", "1:7", "All")
        if lies:
            # Messages of the same size and date that are not the same.
            account.deliver("Other", [(plain(n + 10), DATE + n, "") for n in range(6)])
            peer.proxy.edits.append(lambda line: re.sub(rb"X-GM-MSGID \d+", rb"X-GM-MSGID 7", line))
        mounted = mount(peer, "--fetch-ahead", "0")
        first = {path.name: path.read_bytes() for path in (mounted.path / "INBOX").iterdir()}
        assert sorted(first.values()) == sorted([*(plain(n) for n in range(6)), LARGE])
        before = bodies_fetched(peer)
        shown = "Other" if lies else "All"
        second = sorted(path.read_bytes() for path in (mounted.path / shown).iterdir())
        if lies:
            assert second == sorted(plain(n + 10) for n in range(6))
            assert bodies_fetched(peer) - before == 6
        else:
            assert second == sorted(first.values())
            assert bodies_fetched(peer) - before == 1
        mounted.unmount()
        again = mount(peer, "--fetch-ahead", "0", cache=mounted.cache)
        assert sorted(path.read_bytes() for path in (again.path / shown).iterdir()) == second
        again.unmount()
