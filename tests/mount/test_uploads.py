"""No upload is inferred: what is not proven to be on the server stays here, and nothing else is touched."""

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.mount.test_write_faults import arm, drain, kill_within, put, spool_of
from tests.support.mail import plain
from tests.support.mailboxes import Held, everything, file_of, settle, waiting
from tests.support.mounting import DEADLINE, Mount, Mounter, wait_until
from tests.support.servers.dovecot import Account, Dovecot
from tests.support.servers.proxy import Point, Proxy
from tests.support.servers.scripted import Scripted
from tests.support.servers.tls import CertificateAuthority

DATE = 1_700_000_000
LATER = 1_750_000_000
NEW = Held(plain(9), LATER, frozenset())


@pytest.fixture
def proxy(user: Account) -> Iterator[Proxy]:
    with Proxy(user.server) as proxy:
        yield proxy


def as_after_reboot(mount: Mount) -> None:
    """Have the next mount of an earlier version find that the machine was restarted."""
    (spool_of(mount) / "boot").write_text("another time")


def eight_bit(size: int) -> bytes:
    head = b"From: J\xf6rg <j@example.org>\r\nSubject: old\r\n\r\n"
    return head + b"y" * (size - len(head) - 2) + b"\r\n"


def test_a_file_is_not_taken_for_a_message_of_equal_size(user: Account, mount: Mounter, proxy: Proxy) -> None:
    """It was dropped: on no server, not in the spool, and the other message showed its bytes."""
    mounted = mount(proxy.account(user))
    fault = arm(proxy, b"APPEND", "command", "stall", 1)
    put(mounted.path / "INBOX" / "new.eml", NEW)
    fault.wait_hit()
    other = Held(eight_bit(len(NEW.content)), DATE, frozenset())
    user.append("INBOX", other.content, DATE)
    proxy.cut_all()
    proxy.resume()
    drain(mounted)
    for path in (mounted.path / "INBOX").iterdir():
        assert path.read_bytes() == (NEW if path.name == "new.eml" else other).content
    mounted.unmount()
    assert sorted(everything(user)["INBOX"]) == sorted([NEW, other])


def test_what_may_be_the_upload_or_not_is_left_to_a_person(
    user: Account, mount: Mounter, proxy: Proxy
) -> None:
    """Another client adds a message with the same Message-ID: neither of the two may be dropped."""
    mounted = mount(proxy.account(user), expected_log=["is not uploaded: it may be the message with UID 1"])
    fault = arm(proxy, b"APPEND", "command", "stall", 1)
    path = mounted.path / "INBOX" / "new.eml"
    put(path, NEW)
    fault.wait_hit()
    other = NEW.content[:-20] + b"z" * 18 + b"\r\n"
    user.append("INBOX", other, DATE)
    proxy.cut_all()
    proxy.resume()
    settle(mounted)
    wait_until(lambda: waiting(mounted) == [("INBOX/new.eml", "unsent")], "nobody knows")
    assert b"UID 1 in INBOX" in os.getxattr(path, "user.imap.error")
    assert path.read_bytes() == NEW.content
    wait_until(lambda: len(os.listdir(mounted.path / "INBOX")) == 2, "the other one is shown as well")
    assert [message.content for message in everything(user)["INBOX"]] == [other]
    # The person says that it is another one.
    os.setxattr(path, "user.imap.state", b"sending")
    drain(mounted)
    mounted.unmount()
    assert sorted(message.content for message in everything(user)["INBOX"]) == sorted([other, NEW.content])


def test_after_a_reboot_files_that_were_not_uploaded_are_no_messages(
    user: Account, mount: Mounter, proxy: Proxy
) -> None:
    """``rm`` of a local copy deleted the message, others vanished from ``ls``, and each file was searched for
    in the whole mailbox under its lock: 64 MB for 60 files and 3,000 messages."""
    messages = [Held(plain(n), DATE + n, frozenset({"\\Seen"})) for n in range(1, 5)]
    user.deliver("INBOX", [(one.content, one.date, "S") for one in messages])
    first = mount(proxy.account(user), expected_log=["offline"])
    inbox = first.path / "INBOX"
    names = sorted(os.listdir(inbox))
    (inbox / "copy.bak").write_bytes(messages[0].content)
    proxy.refuse()
    proxy.cut_all()
    put(inbox / "new.eml", Held(plain(9), LATER, frozenset()))
    first.kill()
    as_after_reboot(first)
    user.start_trace()
    mounted = mount(
        proxy.account(user), cache=first.cache, expected_log=["mounted from the cache", "offline"]
    )
    inbox = mounted.path / "INBOX"
    # Without the server, too: nobody has to be asked.
    (inbox / "copy.bak").unlink()
    assert sorted(os.listdir(inbox)) == sorted([*names, "new.eml"])
    proxy.accept()
    drain(mounted)
    assert sorted(os.listdir(inbox)) == sorted([*names, "new.eml"])
    mounted.unmount()
    assert not [line for line in user.protocol_trace() if b"BODY.PEEK[])" in line], "no candidate is fetched"
    assert everything(user) == {"INBOX": [*messages, NEW]}


def test_the_search_for_an_upload_keeps_nobody_waiting(user: Account, mount: Mounter, proxy: Proxy) -> None:
    """It was made under the lock of the mailbox: a flag waited 22 s."""
    user.deliver("INBOX", [(plain(1), DATE, "")])
    killed = mount(proxy.account(user))
    assert len(os.listdir(killed.path / "INBOX")) == 1
    fault = proxy.fault(b"APPEND", "stall", at="answer")
    kill_within(fault, proxy, lambda m: put(m.path / "INBOX" / "new.eml", NEW), killed)
    note = json.loads((spool_of(killed).parent / "journal.json").read_text())["add"]["upload"]
    assert (note["size"], note["uidnext"]) == (len(NEW.content), 2)
    looked = proxy.fault(rb"UID FETCH \d+ \(UID BODY", "stall")
    mounted = mount(proxy.account(user), cache=killed.cache)
    looked.wait_hit()
    os.setxattr(file_of(mounted, 1), "user.imap.flagged", b"1")
    proxy.resume()
    drain(mounted)
    mounted.unmount()
    assert everything(user) == {"INBOX": [Held(plain(1), DATE, frozenset({"\\Flagged"})), NEW]}


def test_files_that_are_closed_before_the_unmount_are_uploaded(user: Account, mount: Mounter) -> None:
    """Files that threads had closed before ``fusermount3 -u`` became ``unsent`` now and then."""
    mounted = mount(user)

    def copy(number: int) -> None:
        (mounted.path / "INBOX" / f"{number}.eml").write_bytes(plain(number))

    with ThreadPoolExecutor(16) as threads:
        list(threads.map(copy, range(48)))
    mounted.unmount()
    assert len(everything(user)["INBOX"]) == 48
    assert not list(spool_of(mounted).glob("[0-9]*"))


def test_a_flag_that_is_set_during_the_upload_is_not_lost(
    user: Account, mount: Mounter, proxy: Proxy
) -> None:
    """The file had left the spool before the flag was on the server."""
    killed = mount(proxy.account(user))
    appended = proxy.fault(b"APPEND", "stall", at="answer")
    path = killed.path / "INBOX" / "new.eml"
    put(path, NEW)
    appended.wait_hit()
    os.setxattr(path, "user.imap.flagged", b"1")
    stored = proxy.fault(b"UID STORE", "stall")
    proxy.resume()
    stored.wait_hit()
    killed.kill()
    proxy.cut_all()
    proxy.resume()
    mounted = mount(proxy.account(user), cache=killed.cache)
    drain(mounted)
    mounted.unmount()
    assert everything(user) == {"INBOX": [NEW._replace(flags=frozenset({"\\Flagged"}))]}


# -- a server that does not answer, or does not tell


def test_an_upload_that_the_server_never_answers_is_refused_with_its_words(
    ca: CertificateAuthority, mount: Mounter, tmp_path: Path
) -> None:
    """It was sent again every 30 s, for ever, and whoever unmounted waited in silence."""
    attempts = 0

    def script(tag: bytes, command: bytes) -> Iterable[bytes] | None:
        nonlocal attempts
        if not command.startswith(b"APPEND") or b"too large" not in command:
            return None
        attempts += 1
        return [b"* BAD command line limit exceeded\r\n"]

    with Scripted(ca, [plain(1)], script=script) as server:
        mounted = mount(server, "--timeout", "2", expected_log=["command line limit exceeded"])
        inbox = mounted.path / "INBOX"
        os.listdir(inbox)
        large = b"Subject: too large\r\n\r\nx\r\n"
        for number, content in enumerate([plain(2), large, plain(3)]):
            (inbox / f"{number}.eml").write_bytes(content)
        wait_until(lambda: waiting(mounted) == [("INBOX/1.eml", "unsent")], "it is refused")
        assert attempts <= 4
        assert b"command line limit exceeded" in os.getxattr(inbox / "1.eml", "user.imap.error")
        assert (inbox / "1.eml").read_bytes() == large
        assert server.messages == [plain(1), plain(2), plain(3)]
        mounted.unmount()


def test_a_connection_that_ends_under_a_full_batch_delays_no_other_file(
    user: Account, mount: Mounter, proxy: Proxy
) -> None:
    """The daemon went round and round: all files at the head of the queue were to be sent alone."""
    mounted = mount(proxy.account(user), expected_log=["offline: .* refuses"])
    held = proxy.fault(b"APPEND", "stall")
    closed = proxy.fault(b"APPEND", "close", nth=2)
    away = proxy.fault(b"APPEND", "cut", nth=3, times=None)
    for number in range(300):
        (mounted.path / "INBOX" / f"{number}.eml").write_bytes(plain(number))
    held.wait_hit()
    proxy.refuse()
    proxy.resume()
    closed.wait_hit()
    wait_until(lambda: mounted.status()["state"] == "offline", "it is offline")
    away.cancel()
    proxy.accept()
    drain(mounted)
    mounted.unmount()
    assert sorted(m.content for m in everything(user)["INBOX"]) == sorted(map(plain, range(300)))


def test_what_the_server_took_and_changed_is_never_sent_again(
    ca: CertificateAuthority, mount: Mounter, tmp_path: Path
) -> None:
    """Without APPENDUID. Each retry added a copy, and an edit was doubled."""

    def store(content: bytes) -> bytes:
        return content.replace(b"version", b"VERSION").replace(b"Subject", b"X-Scanned: yes\r\nSubject")

    with Scripted(ca, [plain(1)], store=store) as server:
        mounted = mount(server, expected_log=["which has changed it"])
        inbox = mounted.path / "INBOX"
        os.listdir(inbox)
        new = b"From: a@example.org\r\nSubject: new\r\n\r\nfirst version\r\n"
        (inbox / "new.eml").write_bytes(new)
        wait_until(lambda: len(server.messages) == 2 and not waiting(mounted), "it is uploaded")
        wait_until(
            lambda: sorted(p.read_bytes() for p in inbox.iterdir()) == sorted(server.messages), "shown"
        )
        assert server.messages[1:] == [store(new)]
        (kept,) = mounted.cache.glob("*/kept/*")
        assert kept.read_bytes() == new
        mounted.unmount()
        assert server.messages[1:] == [store(new)]


def test_umount_names_what_is_not_on_the_server(user: Account, mount: Mounter, proxy: Proxy) -> None:
    """It ended with 0, and said nothing without a terminal."""
    mounted = mount(proxy.account(user), expected_log=["is not uploaded: .*full"])
    proxy.fault(b"APPEND", b"NO [OVERQUOTA] full", at="command", times=None)
    path = mounted.path / "INBOX" / "new.eml"
    put(path, NEW)
    wait_until(lambda: waiting(mounted) == [("INBOX/new.eml", "unsent")], "it is refused")
    done = subprocess.run(
        [sys.executable, "-m", "imapfs", "umount", mounted.path],
        env=mounted.environment, capture_output=True, text=True, timeout=DEADLINE,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stdout.startswith("INBOX/new.eml: unsent: ")
    assert done.stderr.count("\n") == 1
    assert "unmounted; not on the server: 1 file" in done.stderr
    again = mount(proxy.account(user), cache=mounted.cache)
    assert (again.path / "INBOX" / "new.eml").read_bytes() == NEW.content
    again.unmount()


# ---- several at once


def put_together(mounted: Mount, proxy: Proxy, sizes: Sequence[int]) -> dict[str, bytes]:
    """Write files that are sent together, as they wait for another; return their bytes by name."""
    first = proxy.fault(b"APPEND", "stall")
    put(mounted.path / "INBOX" / "first.eml", NEW)
    first.wait_hit()
    contents = {f"{number}.eml": plain(20 + number, size) for number, size in enumerate(sizes)}
    for name, content in contents.items():
        put(mounted.path / "INBOX" / name, Held(content, LATER, frozenset()))
    return contents


def assert_has(user: Account, contents: Sequence[bytes]) -> None:
    assert sorted(held.content for held in everything(user)["INBOX"]) == sorted(contents)


def appends(proxy: Proxy) -> list[bytes]:
    return [command for command in proxy.commands() if command.startswith(b"APPEND")]


@pytest.mark.parametrize("lacks", ["nothing", "MULTIAPPEND", "UIDPLUS", "LITERAL+"])
def test_files_that_wait_together_are_sent_together(user: Account, mount: Mounter, lacks: str) -> None:
    with Proxy(user.server, hide=() if lacks == "nothing" else (lacks,)) as proxy:
        mounted = mount(proxy.account(user))
        contents = put_together(mounted, proxy, [900, 1500, 700, 3000, 800])
        proxy.resume()
        drain(mounted)
        assert len(appends(proxy)) == (6 if lacks == "MULTIAPPEND" else 2)
        with user.client() as client:
            client.select("INBOX")
            for name, content in contents.items():
                path = mounted.path / "INBOX" / name
                uid = os.getxattr(path, "user.imap.uid").decode()
                assert client.uid("FETCH", uid, "BODY.PEEK[]")[1][0][1] == path.read_bytes() == content
        mounted.unmount()
    assert sorted(held.content for held in everything(user)["INBOX"]) == sorted(
        [NEW.content, *contents.values()]
    )


def test_of_files_that_are_sent_together_only_the_one_that_is_refused_stays(
    ca: CertificateAuthority, mount: Mounter
) -> None:
    """APPEND of several takes all or none."""
    with Dovecot(ca, quota="16k") as server, Proxy(server) as proxy:
        user = server.account("small")
        user.deliver("INBOX", [])
        mounted = mount(proxy.account(user), expected_log=[r"INBOX/2\.eml is not uploaded: .*[Qq]uota"])
        contents = put_together(mounted, proxy, [900, 1500, 30_000, 800])
        proxy.resume()
        settle(mounted)
        assert waiting(mounted) == [("INBOX/2.eml", "unsent")]
        assert len(appends(proxy)) == 6
        (mounted.path / "INBOX" / "2.eml").unlink()
        mounted.unmount()
        sent = [content for name, content in contents.items() if name != "2.eml"]
        assert_has(user, [NEW.content, *sent])


@pytest.mark.parametrize("point", ["command", "upload", "answer"])
def test_files_that_are_cut_off_together_are_sent_once(
    user: Account, mount: Mounter, proxy: Proxy, point: Point
) -> None:
    mounted = mount(proxy.account(user))
    contents = put_together(mounted, proxy, [900, 1500, 700, 3000])
    cut = proxy.fault(b"APPEND", "cut", at=point, after=500 if point == "upload" else 0)
    proxy.resume()
    cut.wait_hit()
    drain(mounted)
    for name, content in contents.items():
        assert (mounted.path / "INBOX" / name).read_bytes() == content
    mounted.unmount()
    assert sorted(held.content for held in everything(user)["INBOX"]) == sorted(
        [NEW.content, *contents.values()]
    )
