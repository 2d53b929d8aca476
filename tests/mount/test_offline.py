"""Without a server, with one that asks for patience, and with one that comes back as another."""

import errno
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from tests.support.compare import contents, served, shown
from tests.support.mail import plain
from tests.support.mounting import DEADLINE, Mount, Mounter, wait_until
from tests.support.servers.dovecot import Account
from tests.support.servers.proxy import Proxy
from tests.support.servers.scripted import Scripted
from tests.support.servers.tls import CertificateAuthority

DATE = 1_700_000_000
REFUSED = 15
"""Seconds from the first refused login to the next attempt."""


def filled(user: Account, mount: Mounter, proxy: Proxy) -> Path:
    """Return the cache of a mount of two messages, one of which is cached."""
    user.deliver("INBOX", [(plain(n), DATE, "") for n in range(2)])
    first = mount(proxy.account(user), "--fetch-ahead", "0")
    assert shown(first.path / "INBOX")[1].read_bytes() == plain(0)
    first.unmount()
    return first.cache


def seen_offline(mounted: Mount) -> dict[str, Any]:
    """Check that the cached is served, and the other is not; return the status."""
    files = shown(mounted.path / "INBOX")
    assert files[1].read_bytes() == plain(0)
    with pytest.raises(OSError) as raised:
        files[2].read_bytes()
    assert raised.value.errno == errno.EHOSTUNREACH
    wait_until(lambda: mounted.status()["state"] == "offline", "offline")
    return mounted.status()


def test_mount_while_the_server_is_down(user: Account, mount: Mounter) -> None:
    with Proxy(user.server) as proxy:
        cache = filled(user, mount, proxy)
        proxy.refuse()
        mounted = mount(
            proxy.account(user), cache=cache, expected_log=["mounted from the cache", "offline: "]
        )
        status = seen_offline(mounted)
        assert "refuses connections" in status["reason"]
        assert datetime.fromisoformat(status["since"]) <= datetime.now(UTC)
        wait_until(lambda: mounted.status()["retry_at"] is not None, "it is said when it is tried again")
        done = subprocess.run(
            [sys.executable, "-m", "imapfs", "status", mounted.path],
            env=mounted.environment, capture_output=True, text=True, timeout=DEADLINE,
        )  # fmt: skip
        assert re.search(r"^server: offline for \d+ .*refuses connections", done.stdout, re.M)
        proxy.accept()
        wait_until(lambda: mounted.status()["state"] == "online", "online by itself, though nobody asks")
        assert contents(mounted.path / "INBOX") == served(user)


def test_mount_while_the_name_cannot_be_resolved(user: Account, mount: Mounter) -> None:
    with Proxy(user.server) as proxy:
        cache = filled(user, mount, proxy)
        nowhere = cache / f"{user.name}@mail.invalid_{proxy.port}"
        (cache / f"{user.name}@localhost_{proxy.port}").rename(nowhere)
        made = mount.prepare(
            proxy.account(user), cache=cache, expected_log=["mounted from the cache", "offline: .*resolved"]
        )
        made.command[:] = [word.replace("@localhost:", "@mail.invalid:") for word in made.command]
        with made as mounted:
            assert "cannot be resolved" in seen_offline(mounted)["reason"]


def test_mount_while_the_server_is_silent(user: Account, mount: Mounter) -> None:
    with Proxy(user.server) as proxy:
        cache = filled(user, mount, proxy)
        proxy.stall()
        mounted = mount(
            proxy.account(user),
            "--timeout",
            "1",
            cache=cache,
            expected_log=["mounted from the cache", "offline: "],
        )
        assert "did not" in seen_offline(mounted)["reason"]
        proxy.resume()
        wait_until(lambda: mounted.status()["state"] == "online", "online again")


# -- a server that asks to slow down


def test_a_server_that_asks_to_wait_is_waited_for(user: Account, mount: Mounter) -> None:
    user.deliver("INBOX", [(plain(n), DATE, "") for n in range(3)])
    with Proxy(user.server) as proxy:
        mounted = mount(proxy.account(user), "--fetch-ahead", "0", expected_log=["slowing down for [01] s"])
        first, second, third = [path for _, path in sorted(shown(mounted.path / "INBOX").items())]
        proxy.fault(b"UID FETCH", b"BAD Request is throttled. Suggested Backoff Time: 900 milliseconds")
        assert first.read_bytes() == plain(0)
        proxy.fault(b"UID MOVE", b"NO [UNAVAILABLE] Try again in 1 second")
        second.rename(mounted.path / "Trash" / "moved.eml")
        proxy.fault(b"APPEND", b"NO Request is throttled. Suggested Backoff Time: 500 milliseconds")
        (mounted.path / "INBOX" / "new.eml").write_bytes(plain(9))
        wait_until(lambda: sorted(served(user).values()) == sorted(plain(n) for n in (0, 2, 9)), "it is sent")
        # The code of a full mailbox, which it is not.
        proxy.fault(
            b"UID FETCH", b"NO [OVERQUOTA] Account exceeded command or bandwidth limits, wait 1 second"
        )
        assert third.read_bytes() == plain(2)
        connections = mounted.status()["connections"]
        assert connections["most"] < connections["limit"]
        mounted.unmount()


def test_a_wait_beyond_the_timeout_is_an_error_that_says_so(user: Account, mount: Mounter) -> None:
    user.deliver("INBOX", [(plain(n), DATE, "") for n in range(3)])
    with Proxy(user.server) as proxy:
        mounted = mount(
            proxy.account(user), "--timeout", "1", "--fetch-ahead", "0",
            expected_log=["slowing down for 600 s", "no answer from", "files not on the server yet: 1"],
        )  # fmt: skip
        first, second, _ = [path for _, path in sorted(shown(mounted.path / "INBOX").items())]
        assert first.read_bytes() == plain(0)
        proxy.fault(b"UID FETCH", b"NO [THROTTLED] Try again in 10 minutes")
        with pytest.raises(OSError) as raised:
            second.read_bytes()
        assert raised.value.errno == errno.EBUSY
        assert first.read_bytes() == plain(0)
        assert len(os.listdir(mounted.path / "INBOX")) == 3
        status = mounted.status()
        assert (status["state"], 500 < status["retry_in"] <= 600) == ("throttled", True)
        assert "Try again in 10 minutes" in status["reason"]
        (mounted.path / "INBOX" / "new.eml").write_bytes(plain(9))
        assert [one["state"] for one in mounted.status()["waiting"]] == ["sending"]


def test_a_farewell_that_asks_to_wait_is_obeyed(ca: CertificateAuthority, mount: Mounter) -> None:
    told: list[bytes] = []

    def script(tag: bytes, command: bytes) -> Iterable[bytes] | None:
        if b"BODY.PEEK[]" in command and not told:
            told.append(command)
            return server.then_hang_up(b"* BYE [UNAVAILABLE] Server Unavailable, try again in 1 second\r\n")
        return None

    with Scripted(ca, [plain(1)], script=script) as server:
        mounted = mount(server, expected_log=["slowing down for 1 s.*Server Unavailable"])
        (path,) = (mounted.path / "INBOX").iterdir()
        assert path.read_bytes() == plain(1)
        mounted.unmount()


# -- a server that has changed


def test_mailbox_renamed_elsewhere_is_found_at_the_next_read(user: Account, mount: Mounter) -> None:
    """The read of a file below the old name fails, and has the tree listed again at once."""
    user.deliver("Old", [(plain(n), DATE, "") for n in range(2)])
    with Proxy(user.server) as proxy:
        mounted = mount(proxy.account(user), "--fetch-ahead", "0")
        _, unread = [path for _, path in sorted(shown(mounted.path / "Old").items())]
        with user.client() as client:
            assert client.rename("Old", "New")[0] == "OK"
        proxy.forget_commands()
        with pytest.raises(OSError) as raised:
            unread.read_bytes()
        assert raised.value.errno in {errno.ENOENT, errno.ESTALE}
        proxy.wait_for_command(b"LIST")
        wait_until((mounted.path / "New").exists, "the new name is there")
        assert contents(mounted.path / "New") == {1: plain(0), 2: plain(1)}
        assert not (mounted.path / "Old").exists()


def test_uidvalidity_changed_in_mid_session(user: Account, mount: Mounter) -> None:
    user.deliver("Box", [(plain(n), DATE, "") for n in range(2)])
    mounted = mount(user, "--fetch-ahead", "0")
    first, second = [path for _, path in sorted(shown(mounted.path / "Box").items())]
    assert first.read_bytes() == plain(0)
    user.server.doveadm("mailbox", "update", "-u", user.name, "--uid-validity", "12345", "Box")
    user.server.doveadm("kick", user.name)
    # Either it is found by the read that the mailbox is another one, or it was listed again before.
    try:
        assert second.read_bytes() == plain(1)
    except OSError as error:
        assert error.errno in {errno.ENOENT, errno.ESTALE}
    wait_until(
        lambda: os.getxattr(mounted.path / "Box", "user.imap.uidvalidity") == b"12345", "it is listed again"
    )
    assert contents(mounted.path / "Box") == {1: plain(0), 2: plain(1)}


def move_when_online(source: Path, target: Path) -> None:
    """Move a message, if not at once: a connection that is being made may have been cut as well."""

    def is_moved() -> bool:
        try:
            source.rename(target)
        except OSError as error:
            assert error.errno == errno.EHOSTUNREACH
            return False
        return True

    wait_until(is_moved, "it is moved")


def test_capabilities_are_those_of_the_connection(user: Account, mount: Mounter) -> None:
    """After a reconnect the server has neither QRESYNC nor MOVE any more, and then has them again."""
    user.deliver("INBOX", [(plain(n), DATE, "") for n in range(3)])
    gone = ("QRESYNC", "CONDSTORE", "MOVE", "UIDPLUS", "ENABLE")
    with Proxy(user.server) as rich, Proxy(user.server, hide=gone) as poor:
        mounted = mount(rich.account(user))
        inbox, trash = mounted.path / "INBOX", mounted.path / "Trash"
        paths = shown(inbox)
        rich_hidden, rich.hidden = rich.hidden, poor.hidden
        rich.cut_all(forget=True)
        move_when_online(paths[1], trash / "one.eml")
        user.deliver("INBOX", [(plain(9), DATE, "")])
        wait_until(lambda: 4 in shown(inbox), "what is new is listed")
        said = b"\n".join(rich.commands())
        assert not re.search(rb"QRESYNC|CHANGEDSINCE|MOVE|UID EXPUNGE", said)
        rich.hidden = rich_hidden
        rich.cut_all(forget=True)
        move_when_online(paths[2], trash / "two.eml")
        assert re.search(rb"ENABLE QRESYNC", b"\n".join(rich.commands()))
        assert re.search(rb"UID MOVE", b"\n".join(rich.commands()))
        assert sorted(path.read_bytes() for path in trash.iterdir()) == sorted([plain(0), plain(1)])


def test_a_revoked_password_is_not_tried_over_and_over(ca: CertificateAuthority, mount: Mounter) -> None:
    revoked: list[bytes] = []

    def script(tag: bytes, command: bytes) -> Iterable[bytes] | None:
        if revoked and command.startswith(b"AUTHENTICATE"):
            revoked.append(command)
            return [tag + b" NO [AUTHENTICATIONFAILED] revoked\r\n"]
        return server.then_hang_up(b"") if revoked and command.startswith((b"EXAMINE", b"UID")) else None

    with Scripted(ca, [plain(1), plain(2)], script=script) as server:
        mounted = mount(
            server, "--fetch-ahead", "0", expected_log=["offline: localhost refused the password"]
        )
        first, second = [path for _, path in sorted(shown(mounted.path / "INBOX").items())]
        assert first.read_bytes() == plain(1)
        revoked.append(b"")
        began = time.monotonic()

        def read_in_vain() -> None:
            with pytest.raises(OSError) as raised:
                second.read_bytes()
            assert raised.value.errno == errno.EACCES
            assert first.read_bytes() == plain(1)

        read_in_vain()
        status = mounted.status()
        assert (status["state"], status["retry_in"] > 5) == ("offline", True)
        assert "refused the password of alice" in status["reason"]
        # Of two connections that end at once each may be replaced once.
        attempts = len(revoked) - 1
        assert attempts <= status["connections"]["limit"]
        for _ in range(50):
            read_in_vain()
        assert len(revoked) - 1 - attempts <= (time.monotonic() - began) // REFUSED
