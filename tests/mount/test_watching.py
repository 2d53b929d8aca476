"""What others change shows up by itself, through a real mount, however the server tells of it or does not.

The kernel keeps attributes for a day, so that a `stat` shows only what the daemon had it forget.
"""

import contextlib
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.mail import plain
from tests.support.mailboxes import file_of, settle
from tests.support.mounting import DEADLINE, Mount, Mounter, wait_for_another_second, wait_until
from tests.support.servers.account import ImapAccount
from tests.support.servers.courier import Courier
from tests.support.servers.dovecot import Account
from tests.support.servers.proxy import Proxy
from tests.support.servers.tls import CertificateAuthority

DATE = 1_700_000_000
WAYS = {"notify": ((), ()), "idle": (("NOTIFY",), ()), "poll": (("NOTIFY", "IDLE"), ("--poll", "0.3"))}
"""Way to learn of changes -> what the server lacks, and what is said on the command line."""
SYNC = re.compile(rb"EXAMINE .*QRESYNC")


def seen(path: Path) -> int:
    """Return what the kernel thinks when a directory was changed."""
    return path.stat().st_mtime_ns


def wait_for_change(path: Path, change: Callable[[], object]) -> None:
    """Make ``change`` and wait until the kernel was told of it."""
    before = seen(path)
    change()
    wait_until(lambda: seen(path) != before, f"a change of {path.name}")


def push(mount: Mount) -> dict[str, object]:
    found = mount.status()["push"]
    assert isinstance(found, dict)
    return found


def wait_for_watch(mount: Mount, *mailboxes: str) -> None:
    """Wait until exactly these are watched by IDLE."""
    wait_until(lambda: sorted(push(mount)["idle"]) == sorted(mailboxes), f"a watch of {mailboxes}")  # type: ignore[call-overload]


@contextlib.contextmanager
def hiding(user: ImapAccount, *capabilities: str) -> Iterator[Proxy]:
    with Proxy(user.server, hide=capabilities) as proxy:
        yield proxy


def fill(user: ImapAccount, *mailboxes: str) -> None:
    """Put three messages into each."""
    for mailbox in mailboxes:
        user.deliver(mailbox, ((plain(n), DATE, "") for n in range(3)))


def flag(user: ImapAccount, mailbox: str, uid: int, flags: str) -> None:
    with user.client() as client:
        client.select(user.server_name(mailbox))
        client.uid("STORE", str(uid), "+FLAGS", f"({flags})")


def expunge(user: ImapAccount, mailbox: str, uid: int) -> None:
    with user.client() as client:
        client.select(user.server_name(mailbox))
        client.uid("STORE", str(uid), "+FLAGS", "(\\Deleted)")
        client.expunge()


# -- whatever changes


@pytest.mark.parametrize("way", WAYS)
def test_changes_show_up_by_themselves(user: Account, mount: Mounter, way: str) -> None:
    fill(user, "INBOX", "Lists/a")
    hidden, options = WAYS[way]
    with hiding(user, *hidden) as proxy:
        mounted = mount(proxy.account(user), *options)
        for mailbox in ("INBOX", "Lists/a"):
            directory = mounted.path / mailbox
            opened = os.open(directory, os.O_RDONLY)
            try:
                first, second, _ = [file_of(mounted, uid, mailbox) for uid in (1, 2, 3)]
                assert second.stat().st_size == len(plain(1))
                wait_until(lambda: push(mounted)["by"] == way, f"changes come by {way}")
                if way == "idle":
                    wait_until(lambda: mailbox in push(mounted)["idle"], "a watch")  # type: ignore[operator]  # noqa: B023
                wait_for_change(directory, lambda: user.append(mailbox, plain(3), DATE))  # noqa: B023
                assert len(os.listdir(opened)) == 4
                flag(user, mailbox, 2, "\\Flagged $Work")
                wait_until(
                    lambda: os.getxattr(second, "user.imap.flags") == b"\\Flagged $Work",  # noqa: B023
                    "the flags are seen",
                )
                wait_for_change(directory, lambda: expunge(user, mailbox, 1))  # noqa: B023
                assert not first.exists()
                assert file_of(mounted, 4, mailbox).read_bytes() == plain(3)
            finally:
                os.close(opened)


@pytest.mark.parametrize("way", ["notify", "poll"])
def test_mailboxes_come_and_go_by_themselves(user: Account, mount: Mounter, way: str) -> None:
    fill(user, "Old", "Gone")
    hidden, options = WAYS[way]
    with hiding(user, *hidden) as proxy, user.client() as client:
        mounted = mount(proxy.account(user), *options)
        assert len(os.listdir(mounted.path / "Old")) == 3
        wait_until(lambda: push(mounted)["by"] == way, f"changes come by {way}")
        wait_for_change(mounted.path, lambda: client.create("New"))
        assert (mounted.path / "New").is_dir()
        wait_for_another_second()
        wait_for_change(mounted.path, lambda: client.rename("Old", "Older"))
        assert not (mounted.path / "Old").exists()
        assert len(os.listdir(mounted.path / "Older")) == 3
        wait_for_another_second()
        # Not the renamed one: Dovecot's list goes on to have it, on a connection that knew the old name.
        wait_for_change(mounted.path, lambda: client.delete("Gone"))
        assert not (mounted.path / "Gone").exists()
        assert "Gone" not in os.listdir(mounted.path)


def test_burst_is_one_change(user: Account, mount: Mounter) -> None:
    fill(user, "INBOX")
    with hiding(user, "NOTIFY") as proxy:
        mounted = mount(proxy.account(user))
        inbox = mounted.path / "INBOX"
        assert len(os.listdir(inbox)) == 3
        wait_for_watch(mounted, "INBOX")
        proxy.forget_commands()
        for n in range(20):
            user.append("INBOX", plain(n), DATE)
        wait_until(lambda: len(os.listdir(inbox)) == 23, "all messages")
        assert len([command for command in proxy.commands() if SYNC.match(command)]) <= 4


def test_what_was_done_here_comes_back_and_is_not_asked_for(user: Account, mount: Mounter) -> None:
    fill(user, "INBOX", "Other")
    told: list[bytes] = []

    def listen(line: bytes) -> bytes:
        told.append(line)
        return line

    with Proxy(user.server, hide=["NOTIFY"], edits=[listen]) as proxy:
        mounted = mount(proxy.account(user))
        file = file_of(mounted, 1)
        assert len(os.listdir(mounted.path / "Other")) == 3
        wait_for_watch(mounted, "INBOX", "Other")
        proxy.forget_commands()
        before = seen(mounted.path / "INBOX")

        def after(line: bytes, answers: int, act: Callable[[], object]) -> None:
            """Wait until ``line`` came once more than in the answers to our own commands."""
            told.clear()
            act()
            came = re.compile(line)
            wait_until(
                lambda: len([one for one in told if came.match(one)]) > answers, f"{line!r} comes back"
            )

        after(rb"\* 1 FETCH .*UID 1 .*Flagged", 2, lambda: os.setxattr(file, "user.imap.flagged", b"1"))
        assert seen(mounted.path / "INBOX") == before
        after(rb"\* VANISHED 1\r", 1, lambda: file.rename(mounted.path / "Other" / "moved.eml"))
        after(rb"\* 3 EXISTS", 1, lambda: (mounted.path / "INBOX" / "new.eml").write_bytes(plain(8)))
        settle(mounted)
        # A change of somebody else's proves that those before it have been dealt with.
        wait_for_change(mounted.path / "INBOX", lambda: user.append("INBOX", plain(9), DATE))
        assert len([command for command in proxy.commands() if SYNC.match(command)]) == 1
        assert len(os.listdir(mounted.path / "INBOX")) == 4
        assert (mounted.path / "INBOX" / "new.eml").read_bytes() == plain(8)


def test_moves_are_not_held_up_by_what_the_server_tells_of_them(user: Account, mount: Mounter) -> None:
    user.deliver("INBOX", ((plain(n), DATE + n, "") for n in range(6)))
    user.deliver("Other", [])
    with Proxy(user.server) as proxy:
        mounted = mount(proxy.account(user))
        files = sorted((mounted.path / "INBOX").iterdir())
        assert os.listdir(mounted.path / "Other") == []
        wait_until(lambda: push(mounted)["by"] == "notify", "all is watched")
        proxy.forget_commands()
        # So that the server tells of the first before the last.
        proxy.latency = 0.1
        subprocess.run(["mv", *files, mounted.path / "Other"], check=True, timeout=DEADLINE)
        proxy.latency = 0.0
        commands = proxy.commands()
        first, *_, last = (n for n, command in enumerate(commands) if command.startswith(b"UID MOVE"))
        assert not [command for command in commands[first:last] if SYNC.match(command)]
        wait_until(lambda: len(os.listdir(mounted.path / "Other")) == 6, "all of it is there")


def test_subtree_is_watched_without_the_rest(user: Account, mount: Mounter) -> None:
    fill(user, "INBOX", "Lists/a")
    with hiding(user, "NOTIFY") as proxy:
        mounted = mount(proxy.account(user), mailbox="Lists")
        assert len(os.listdir(mounted.path / "a")) == 3
        wait_for_watch(mounted, "Lists/a")
        wait_for_change(mounted.path / "a", lambda: user.append("Lists/a", plain(3), DATE))


# -- how


@pytest.mark.parametrize(
    ("refused", "way"), [(rb"NOTIFY", "idle"), (rb"NOTIFY|IDLE", "poll")], ids=["no NOTIFY", "nor IDLE"]
)
def test_refused_commands_are_done_without(user: Account, mount: Mounter, refused: bytes, way: str) -> None:
    fill(user, "INBOX")
    with hiding(user) as proxy:
        proxy.fault(refused, b"NO not here", times=None)
        mounted = mount(proxy.account(user), "--poll", "0.3")
        inbox = mounted.path / "INBOX"
        assert len(os.listdir(inbox)) == 3
        wait_until(lambda: push(mounted)["by"] == way, f"changes come by {way}")
        wait_for_change(inbox, lambda: user.append("INBOX", plain(3), DATE))


def test_a_mailbox_whose_status_cannot_be_read_is_polled_all_the_same(user: Account, mount: Mounter) -> None:
    """What nobody can read says nothing about changes: while the mailbox is in use it is looked at."""
    fill(user, "INBOX", "Lists")
    with hiding(user, "NOTIFY", "IDLE") as proxy:
        proxy.edits.append(lambda line: re.sub(rb"\A\* STATUS .*\(", b"* STATUS (", line))
        mounted = mount(proxy.account(user), "--poll", "0.3")
        for mailbox in ("INBOX", "Lists"):
            directory = mounted.path / mailbox
            assert len(os.listdir(directory)) == 3
            wait_for_change(directory, lambda: user.append(mailbox, plain(3), DATE))  # noqa: B023
            wait_for_change(directory, lambda: expunge(user, mailbox, 1))  # noqa: B023
            assert len(os.listdir(directory)) == 3


def test_most_recently_used_mailboxes_are_watched_within_the_budget(user: Account, mount: Mounter) -> None:
    fill(user, "INBOX", "a", "b", "c")
    with hiding(user, "NOTIFY") as proxy:
        mounted = mount(proxy.account(user), "--connections", "5")
        opened = os.open(mounted.path / "a", os.O_RDONLY)
        try:
            for mailbox in ("INBOX", "a", "b"):
                assert len(os.listdir(mounted.path / mailbox)) == 3
            wait_for_watch(mounted, "INBOX", "a", "b")
            assert len(os.listdir(mounted.path / "c")) == 3
            wait_for_watch(mounted, "INBOX", "a", "c")
            wait_for_change(mounted.path / "c", lambda: user.append("c", plain(3), DATE))
        finally:
            os.close(opened)
        assert file_of(mounted, 1, "b").read_bytes() == plain(0)
        wait_for_watch(mounted, "INBOX", "b", "c")
        assert mounted.status()["connections"]["open"] <= 5


def test_one_connection_is_enough(user: Account, mount: Mounter) -> None:
    fill(user, "INBOX")
    with hiding(user) as proxy:
        mounted = mount(proxy.account(user), "--connections", "1")
        assert len(os.listdir(mounted.path / "INBOX")) == 3
        wait_until(lambda: push(mounted)["by"] == "notify", "a watch of all")
        wait_for_change(mounted.path / "INBOX", lambda: user.append("INBOX", plain(3), DATE))
        assert file_of(mounted, 1).read_bytes() == plain(0)
        assert mounted.status()["connections"]["open"] == 1
        assert proxy.connections() == 1


def test_courier_tells_of_changes_too(ca: CertificateAuthority, mount: Mounter) -> None:
    with Courier(ca) as server:
        account = server.account("push")
        account.append("INBOX", plain(1), DATE)
        mounted = mount(account)
        file = file_of(mounted, 1)
        wait_for_watch(mounted, "INBOX")
        wait_for_change(mounted.path / "INBOX", lambda: account.append("INBOX", plain(2), DATE))
        flag(account, "INBOX", 1, "\\Flagged")
        wait_until(lambda: os.getxattr(file, "user.imap.flagged") == b"1", "the flag is seen")


# -- what goes wrong


@pytest.mark.parametrize("way", ["notify", "idle"])
def test_what_happens_while_the_server_is_away_is_seen_afterwards(
    user: Account, mount: Mounter, way: str
) -> None:
    fill(user, "INBOX", "Other")
    with hiding(user, *WAYS[way][0]) as proxy:
        mounted = mount(proxy.account(user), expected_log=["offline"])
        for mailbox in ("INBOX", "Other"):
            assert len(os.listdir(mounted.path / mailbox)) == 3
        wait_until(lambda: push(mounted)["by"] == way, f"changes come by {way}")
        proxy.refuse()
        proxy.cut_all()
        wait_until(lambda: mounted.status()["state"] == "offline", "the loss is noticed")
        user.append("INBOX", plain(3), DATE)
        wait_for_change(mounted.path / "INBOX", proxy.accept)
        assert len(os.listdir(mounted.path / "INBOX")) == 4
        wait_until(lambda: push(mounted)["by"] == way, f"changes come by {way} again")


def test_watch_on_a_network_that_stands_still_is_begun_anew(user: Account, mount: Mounter) -> None:
    fill(user, "INBOX")
    with hiding(user) as proxy:
        mounted = mount(proxy.account(user), "--poll", "0.3", "--timeout", "1", expected_log=["offline"])
        assert len(os.listdir(mounted.path / "INBOX")) == 3
        wait_until(lambda: push(mounted)["by"] == "notify", "a watch of all")
        proxy.stall()
        wait_until(lambda: mounted.status()["state"] == "offline", "the loss is noticed")
        wait_until(lambda: push(mounted)["by"] == "poll", "the watch has ended")
        user.append("INBOX", plain(3), DATE)
        wait_for_change(mounted.path / "INBOX", proxy.resume)
        wait_until(lambda: push(mounted)["by"] == "notify", "a watch of all again")


def test_watched_mailbox_that_is_deleted_disappears(user: Account, mount: Mounter) -> None:
    fill(user, "INBOX", "gone")
    with hiding(user, "NOTIFY") as proxy, user.client() as client:
        mounted = mount(proxy.account(user))
        for mailbox in ("INBOX", "gone"):
            assert len(os.listdir(mounted.path / mailbox)) == 3
        wait_for_watch(mounted, "INBOX", "gone")
        wait_for_change(mounted.path, lambda: client.delete("gone"))
        assert not (mounted.path / "gone").exists()
        wait_for_watch(mounted, "INBOX")
