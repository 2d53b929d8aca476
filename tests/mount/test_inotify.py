"""What other clients do is told to those who watch: by inotify, and by `imapfs watch`."""

import contextlib
import errno
import json
import os
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from imapfs.fs.events import SOCKET
from imapfs.kernel import caller
from tests.support.compare import contents, served
from tests.support.mail import plain
from tests.support.mailboxes import all_uids, file_of, settle
from tests.support.mounting import DEADLINE, ROOT, Mount, Mounter, wait_until
from tests.support.servers.dovecot import Account
from tests.support.watching import Watcher, imapfs_watch, inotifywait, wait_looking

DATE = 1_700_000_000
CHANGES = (b"STORE", b"EXPUNGE", b"MOVE", b"COPY", b"APPEND", b"CREATE", b"DELETE", b"RENAME", b"SELECT")
"""Commands of which a mount that is only watched has no use."""


def doveadm(user: Account, *command: str) -> None:
    """Change something as another client would, beside the connections that are traced."""
    arguments = list(command)
    arguments[2 if command[0] in {"flags", "mailbox"} else 1 : 0] = ["-u", user.name]
    user.server.doveadm(*arguments)


def told(watcher: Watcher, mounted: Mount) -> list[str]:
    """The lines of a watcher, with paths from the mountpoint."""
    return [line.replace(f"{mounted.path}/", "") for line in watcher.lines]


def name_of(mounted: Mount, uid: int, mailbox: str = "INBOX") -> str:
    return f"{mailbox}/{file_of(mounted, uid, mailbox).name}"


# -- inotify


def test_what_another_client_does_is_told_once_and_changes_nothing(user: Account, mount: Mounter) -> None:
    user.deliver("INBOX", ((plain(n), DATE + n, "") for n in range(4)))
    for mailbox in ("Archive", "Old", "Gone"):
        doveadm(user, "mailbox", "create", mailbox)
    user.start_trace()
    mounted = mount(user)
    inbox, archive = mounted.path / "INBOX", mounted.path / "Archive"
    # What is looked at first is looked at again first: a move is seen as one by the mailbox that has got it.
    assert list(archive.iterdir()) == list((mounted.path / "Old").iterdir()) == []
    first, second, third, _ = (name_of(mounted, uid) for uid in range(1, 5))
    moved = (mounted.path / third).stat().st_ino
    assert contents(inbox)
    with (
        inotifywait(mounted.path, inbox, archive) as inotify,
        imapfs_watch(mounted) as text,
        imapfs_watch(mounted, "--json") as lines,
    ):
        doveadm(user, "flags", "add", "\\Flagged", "mailbox", "INBOX", "uid", "1")
        doveadm(user, "expunge", "mailbox", "INBOX", "uid", "2")
        doveadm(user, "move", "Archive", "mailbox", "INBOX", "uid", "3")
        user.deliver("INBOX", [(plain(7), DATE, "S")])
        doveadm(user, "mailbox", "create", "New")
        doveadm(user, "mailbox", "delete", "Gone")
        doveadm(user, "mailbox", "rename", "Old", "Older")
        wait_looking(lambda: len(inotify.lines) >= 9, "all is told", archive, inbox)
        new, there = name_of(mounted, 5), name_of(mounted, 1, "Archive")
        # Which of the two mailboxes the server tells of first is its own affair.
        as_one = any(line.startswith("MOVED_TO Archive/") for line in told(inotify, mounted))
        assert sorted(told(inotify, mounted)) == sorted(
            [
                f"ATTRIB {first}",
                f"DELETE {second}",
                f"{'MOVED_FROM' if as_one else 'DELETE'} {third}",
                f"{'MOVED_TO' if as_one else 'CREATE'} {there}",
                f"CREATE {new}",
                "CREATE,ISDIR New",
                "DELETE,ISDIR Gone",
                "MOVED_FROM,ISDIR Old",
                "MOVED_TO,ISDIR Older",
            ]
        )
        count = 7 if as_one else 8
        wait_until(lambda: len(text.lines) == len(lines.lines) == count, "all is told in lines")
        assert {line.partition(" ")[2] for line in text.lines} == {
            f"flags {first} \\Flagged",
            f"expunged {second}",
            *([f"moved {third} -> {there}"] if as_one else [f"expunged {third}", f"arrived {there}"]),
            f"arrived {new}",
            "created New/",
            "deleted Gone/",
            "renamed Old/ -> Older/",
        }
        by_path = {record["path"]: record for record in map(json.loads, lines.lines)}
        if as_one:
            assert by_path[there] == {
                "time": by_path[there]["time"],
                "event": "moved",
                "path": there,
                "from": third,
                "inode": moved,
                "uid": 1,
                "flags": [],
            }
        assert (by_path[new]["uid"], by_path[new]["flags"]) == (5, ["\\Seen"])
        # What another client has moved proves nothing about its bytes.
        assert mounted.status()["cache"]["bodies"] == 2
    assert contents(inbox) == served(user)
    assert contents(archive) == served(user, "Archive") == {1: plain(2)}
    assert ((mounted.path / there).stat().st_ino == moved) == as_one
    mounted.unmount()
    trace = user.protocol_trace()
    assert not [line for line in trace if any(word in line.split()[1:3] for word in CHANGES)]


def test_what_is_done_through_the_mount_is_told_by_the_kernel_only(user: Account, mount: Mounter) -> None:
    user.deliver("INBOX", ((plain(n), DATE + n, "") for n in range(4)))
    doveadm(user, "mailbox", "create", "Archive")
    mounted = mount(user)
    inbox, archive, top = mounted.path / "INBOX", mounted.path / "Archive", mounted.path
    a, b, c, _ = (name_of(mounted, uid) for uid in range(1, 5))
    assert list(archive.iterdir()) == []
    with inotifywait(top, inbox, archive) as inotify, imapfs_watch(mounted) as watch:
        (inbox / "new.eml").write_bytes(plain(8))
        settle(mounted)
        os.setxattr(top / a, "user.imap.flagged", b"1")
        os.unlink(top / b)
        os.rename(top / c, archive / "c.eml")
        os.rename(inbox / "new.eml", inbox / "newer.eml")
        os.mkdir(top / "made")
        os.rename(top / "made", top / "remade")
        os.rmdir(top / "remade")
        # The last of them is another client's, so that the others have been told.
        user.deliver("Archive", [(plain(9), DATE, "")])
        wait_looking(lambda: "arrived" in "".join(watch.lines), "news", inbox, archive, top)
        last = watch.lines[-1].rpartition(" ")[2]
        wait_until(lambda: f"CREATE {last}" in told(inotify, mounted), "the last one")
        assert told(inotify, mounted) == [
            "CREATE INBOX/new.eml",
            f"ATTRIB {a}",
            f"DELETE {b}",
            f"MOVED_FROM {c}",
            "MOVED_TO Archive/c.eml",
            "MOVED_FROM INBOX/new.eml",
            "MOVED_TO INBOX/newer.eml",
            "CREATE,ISDIR made",
            "MOVED_FROM,ISDIR made",
            "MOVED_TO,ISDIR remade",
            "DELETE,ISDIR remade",
            f"CREATE {last}",
        ]
        assert len(watch.lines) == 1
    assert {path.name for path in inbox.iterdir()} == {
        "newer.eml",
        Path(a).name,
        file_of(mounted, 4).name,
    }


def test_what_happens_before_it_is_told(user: Account, mount: Mounter) -> None:
    user.deliver("INBOX", ((plain(n), DATE, "") for n in range(2)))
    doveadm(user, "mailbox", "create", "Archive")
    mounted = mount(user, "--names", "uid", "--delete", "expunge")
    inbox, archive = mounted.path / "INBOX", mounted.path / "Archive"
    assert os.listdir(archive) == []
    assert len(os.listdir(inbox)) == 2
    with inotifywait(inbox, archive) as inotify:
        user.deliver("INBOX", [(plain(2), DATE, "")])
        wait_looking(lambda: inotify.lines == [f"CREATE {inbox}/3.eml"], "the first", inbox)
        (process,) = callers(mounted)
        os.kill(process, signal.SIGSTOP)
        try:
            # Somebody else sees all of it, and removes what is being announced.
            user.deliver("INBOX", ((plain(n), DATE, "") for n in range(3, 6)))
            seen = {f"{uid}.eml" for uid in range(1, 7)}
            wait_until(lambda: set(os.listdir(inbox)) == seen, "what was delivered")
            # It is seen as a move if INBOX is not looked at in between.
            doveadm(user, "move", "Archive", "mailbox", "INBOX", "uid", "1")
            wait_until(lambda: os.listdir(archive) == ["1.eml"], "what was moved")
            wait_until(lambda: set(os.listdir(inbox)) == seen - {"1.eml"}, "what is left")
            assert [path.stat().st_size for path in archive.iterdir()]
            os.unlink(inbox / "4.eml")
        finally:
            os.kill(process, signal.SIGCONT)
        wait_until(lambda: len(inotify.lines) >= 6, "all is told")
        assert sorted(told(inotify, mounted)[1:]) == [
            "CREATE INBOX/5.eml",
            "CREATE INBOX/6.eml",
            "DELETE INBOX/4.eml",
            "MOVED_FROM INBOX/1.eml",
            "MOVED_TO Archive/1.eml",
        ]
    assert contents(inbox) == served(user)
    assert sorted(contents(inbox)) == [2, 3, 5, 6]
    assert sorted(contents(archive)) == sorted(served(user, "Archive")) == [1]


def test_hundreds_at_once_are_told_in_their_order(user: Account, mount: Mounter) -> None:
    user.deliver("INBOX", [(plain(0), DATE, "")])
    mounted = mount(user, "--names", "uid")
    inbox = mounted.path / "INBOX"
    assert os.listdir(inbox) == ["1.eml"]
    with inotifywait(inbox) as inotify:
        user.deliver("INBOX", ((plain(n, 300), DATE, "") for n in range(500)))
        wait_looking(lambda: len(inotify.lines) >= 500, "all is told", inbox)
        assert told(inotify, mounted) == [f"CREATE INBOX/{uid}.eml" for uid in range(2, 502)]


def test_users_and_announcements_in_one_directory_do_not_block_each_other(
    user: Account, mount: Mounter
) -> None:
    user.deliver("INBOX", ((plain(n), DATE, "") for n in range(40)))
    doveadm(user, "mailbox", "create", "Other")
    mounted = mount(user, "--names", "uid", "--delete", "expunge")
    inbox, other = mounted.path / "INBOX", mounted.path / "Other"
    assert len(os.listdir(inbox)) == 40
    over = threading.Event()
    wrong: list[str] = []

    def until_over(work: Callable[[int], object]) -> None:
        n = 0
        while not over.is_set():
            n += 1
            try:
                work(n)
            except OSError as error:
                # What the other client takes away under one's hands is not there.
                if error.errno not in {errno.ENOENT, errno.ESTALE}:
                    wrong.append(repr(error))

    def write_and_remove(n: int) -> None:
        path = inbox / f"mine-{n}.eml"
        path.write_bytes(plain(1000 + n))
        path.rename(other / path.name)
        os.unlink(other / path.name)

    def rename_and_flag(n: int) -> None:
        path = inbox / f"{n % 40 + 1}.eml"
        os.setxattr(path, "user.imap.flagged", b"%d" % (n % 2))
        path.rename(inbox / "scratch.eml")
        (inbox / "scratch.eml").rename(path)

    works = (write_and_remove, rename_and_flag, lambda _: [path.stat() for path in inbox.iterdir()])
    threads = [threading.Thread(target=until_over, args=(work,)) for work in works]
    with inotifywait(inbox, other) as inotify:
        for thread in threads:
            thread.start()
        try:
            for uid in range(30, 41):
                doveadm(user, "expunge", "mailbox", "INBOX", "uid", str(uid))
            user.deliver("INBOX", ((plain(n), DATE, "") for n in range(100, 150)))
            last = user.append("INBOX", plain(200), DATE)
            wait_looking(lambda: f"CREATE INBOX/{last}.eml" in told(inotify, mounted), "news", inbox)
        finally:
            over.set()
            for thread in threads:
                thread.join(DEADLINE)
        assert not any(thread.is_alive() for thread in threads)
    assert wrong == []
    settle(mounted)
    mounted.unmount()
    again = mount(user, "--names", "uid")
    assert contents_by_uid(again.path / "INBOX") == sorted(all_uids(user)["INBOX"])


def contents_by_uid(directory: Path) -> list[int]:
    return sorted(int(os.getxattr(path, "user.imap.uid")) for path in directory.iterdir())


@pytest.fixture
def burst(user: Account, mount: Mounter) -> Mount:
    """A mount that has hundreds of changes to announce, and has begun to."""
    user.deliver("INBOX", [(plain(0), DATE, "")])
    mounted = mount(user, "--names", "uid")
    inbox = mounted.path / "INBOX"
    assert os.listdir(inbox) == ["1.eml"]
    with inotifywait(inbox) as inotify:
        user.deliver("INBOX", ((plain(n, 300), DATE, "") for n in range(600)))
        wait_looking(lambda: inotify.lines, "the first of many", inbox)
        assert len(inotify.lines) < 600
    return mounted


def callers(mounted: Mount) -> list[int]:
    """The processes that make the system calls for a mount."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            arguments = entry.read_bytes().split(b"\0")
            if os.fsencode(caller.__file__) in arguments and os.fsencode(mounted.path) in arguments:
                found.append(int(entry.parent.name))
    return found


def test_unmount_does_not_wait_for_announcements(burst: Mount) -> None:
    assert len(callers(burst)) == 1
    subprocess.run(
        [sys.executable, "-m", "imapfs", "umount", burst.path],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=True,
        timeout=DEADLINE,
    )
    assert callers(burst) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_daemon_that_is_ended_amid_announcements_ends(burst: Mount, number: signal.Signals) -> None:
    with imapfs_watch(burst) as watch:
        os.kill(burst.pid, number)
        if number == signal.SIGKILL:
            burst.kill()
        # Without a daemon the mount is dead, or gone.
        assert watch.wait() in {0, 1}
    wait_until(lambda: callers(burst) == [], "the end of the process that announces")


def test_nothing_is_announced_in_a_mount_that_is_detached(user: Account, mount: Mounter) -> None:
    """What is at the mountpoint then is not the mount, which a program keeps alive: that was a warning."""
    user.deliver("INBOX", [(plain(1), DATE, "")])
    mounted = mount(user)
    assert contents(mounted.path / "INBOX")
    inbox = os.open(mounted.path / "INBOX", os.O_RDONLY | os.O_DIRECTORY)
    try:
        subprocess.run(["fusermount3", "-u", "-z", mounted.path], check=True)
        user.deliver("INBOX", [(plain(2), DATE, "")])
        wait_until(lambda: len(os.listdir(inbox)) == 2, "the new message is shown")
        wait_until(lambda: "inotify reports nothing" in mounted.log_text(), "the announcement is given up")
    finally:
        os.close(inbox)
    mounted.wait_ended()


def test_announcements_go_on_with_another_process(user: Account, mount: Mounter) -> None:
    user.deliver("INBOX", [(plain(0), DATE, "")])
    mounted = mount(user, "--names", "uid")
    inbox = mounted.path / "INBOX"
    assert os.listdir(inbox) == ["1.eml"]
    with inotifywait(inbox) as inotify:
        user.deliver("INBOX", [(plain(1), DATE, "")])
        wait_looking(lambda: len(inotify.lines) == 1, "the first", inbox)
        (process,) = callers(mounted)
        os.kill(process, signal.SIGKILL)
        user.deliver("INBOX", [(plain(2), DATE, "")])
        wait_looking(lambda: len(inotify.lines) == 2, "the second", inbox)
        assert callers(mounted) != [process]
        assert told(inotify, mounted) == ["CREATE INBOX/2.eml", "CREATE INBOX/3.eml"]


def test_nobody_else_can_announce(user: Account, mount: Mounter) -> None:
    user.deliver("INBOX", [(plain(0), DATE, "")])
    mounted = mount(user, "--names", "uid")
    (message,) = (mounted.path / "INBOX").iterdir()
    with inotifywait(message.parent) as inotify:
        pretender = caller.Caller(os.fsencode(mounted.path))
        with pytest.raises(OSError) as refused:
            pretender.call("prove")
        assert refused.value.errno == errno.ENODATA
        directory = message.parent.stat().st_ino
        with pytest.raises(OSError) as refused:
            pretender.call("unlink", "INBOX", directory, message.name)
        assert refused.value.errno == errno.EXDEV
        with pytest.raises(PermissionError):
            os.mkfifo(message.parent / "new.eml")
        assert inotify.lines == []
    assert contents(message.parent) == {1: plain(0)}


# -- imapfs watch


def test_watch_ends_as_other_programs_do(user: Account, mount: Mounter) -> None:
    mounted = mount(user)
    with imapfs_watch(mounted) as interrupted, imapfs_watch(mounted) as closed, imapfs_watch(mounted) as last:
        interrupted.process.send_signal(signal.SIGINT)
        assert interrupted.wait() == 130
        assert closed.process.stdout is not None
        mounted.unmount()
        assert last.wait() == 0
        assert last.errors[-1] == f"{mounted.path} was unmounted"
        assert closed.wait() == 0
    assert not list(mounted.cache.glob(f"*/{SOCKET}"))


def test_watch_ends_when_nobody_reads_it_any_more(user: Account, mount: Mounter) -> None:
    mounted = mount(user)
    receiver, sender = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-m", "imapfs", "watch", mounted.path],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=sender,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(sender)
    assert process.stderr is not None
    with process.stderr:
        assert process.stderr.readline().startswith("watching")
        os.close(receiver)
        assert process.wait(DEADLINE) == 0
        assert process.stderr.read() == ""


def test_watch_says_when_the_daemon_is_killed(user: Account, mount: Mounter) -> None:
    mounted = mount(user)
    with imapfs_watch(mounted) as watch:
        os.kill(mounted.pid, signal.SIGKILL)
        assert watch.wait() == 1
        assert len(watch.errors) == 2
        assert "the daemon has died" in watch.errors[-1]


def test_socket_is_closed_to_others(user: Account, mount: Mounter) -> None:
    mounted = mount(user)
    (path,) = mounted.cache.glob(f"*/{SOCKET}")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
