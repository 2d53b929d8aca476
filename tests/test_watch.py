"""What other clients do is told to those who watch: by inotify, and by `imapfs watch`."""

import contextlib
import errno
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from imapfs import caller
from imapfs.events import SOCKET, Event, Place, Stream, address
from imapfs.feed import Feed
from imapfs.model import Ino, Uid
from tests.compare import contents, served
from tests.mail import plain
from tests.mailboxes import all_uids, file_of, settle
from tests.mounting import DEADLINE, ROOT, Mount, Mounter, wait_until
from tests.servers.dovecot import Account
from tests.watching import Watcher, imapfs_watch, inotifywait, wait_looking

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
        assert sorted(told(inotify, mounted)) == sorted(
            [
                f"ATTRIB {first}",
                f"DELETE {second}",
                f"MOVED_FROM {third}",
                f"MOVED_TO {there}",
                f"CREATE {new}",
                "CREATE,ISDIR New",
                "DELETE,ISDIR Gone",
                "MOVED_FROM,ISDIR Old",
                "MOVED_TO,ISDIR Older",
            ]
        )
        wait_until(lambda: len(text.lines) == len(lines.lines) == 7, "all is told in lines")
        assert {line.partition(" ")[2] for line in text.lines} == {
            f"flags {first} \\Flagged",
            f"expunged {second}",
            f"moved {third} -> {there}",
            f"arrived {new}",
            "created New/",
            "deleted Gone/",
            "renamed Old/ -> Older/",
        }
        by_kind = {record["event"]: record for record in map(json.loads, lines.lines)}
        assert by_kind["moved"] == {
            "time": by_kind["moved"]["time"],
            "event": "moved",
            "path": there,
            "from": third,
            "inode": moved,
            "uid": 1,
            "flags": [],
        }
        assert (by_kind["arrived"]["uid"], by_kind["arrived"]["flags"]) == (5, ["\\Seen"])
    assert mounted.status()["cache"]["bodies"] == 3, "what was moved is to be fetched again"
    assert contents(inbox) == served(user)
    assert contents(archive) == served(user, "Archive") == {1: plain(2)}
    assert (mounted.path / there).stat().st_ino == moved
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


def test_what_somebody_else_has_seen_already_is_told_too(user: Account, mount: Mounter) -> None:
    user.deliver("INBOX", [(plain(0), DATE, "")])
    mounted = mount(user)
    inbox = mounted.path / "INBOX"
    assert len(os.listdir(inbox)) == 1
    with inotifywait(inbox) as inotify:
        user.deliver("INBOX", ((plain(n), DATE, "") for n in range(1, 30)))
        wait_until(lambda: len(list(os.scandir(inbox))) == 30, "the messages")
        names = {path.name for path in inbox.iterdir() if path.stat().st_size}
        wait_until(lambda: len(inotify.lines) >= 29, "all is told")
        assert len(inotify.lines) == 29
        assert {line.removeprefix("CREATE INBOX/") for line in told(inotify, mounted)} < names
    assert contents(inbox) == served(user)


def test_thousands_at_once_are_told_in_their_order(user: Account, mount: Mounter) -> None:
    user.deliver("INBOX", [(plain(0), DATE, "")])
    mounted = mount(user, "--names", "uid")
    inbox = mounted.path / "INBOX"
    assert os.listdir(inbox) == ["1.eml"]
    with inotifywait(inbox) as inotify:
        user.deliver("INBOX", ((plain(n, 300), DATE, "") for n in range(2000)))
        wait_looking(lambda: len(inotify.lines) >= 2000, "all is told", inbox)
        assert told(inotify, mounted) == [f"CREATE INBOX/{uid}.eml" for uid in range(2, 2002)]
