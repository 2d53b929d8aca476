"""Nothing is done on likeness: the smallest forms of what the stateful test and the replay have found."""

import contextlib
import itertools
import os
import signal
import subprocess
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import pytest

from tests.support.disk import Disk
from tests.support.mailboxes import everything, file_of, held, settle, waiting
from tests.support.mounting import MailAccount, Mount, RobustMount, wait_for_another_second, wait_until
from tests.support.servers.account import ImapAccount
from tests.support.servers.courier import Courier
from tests.support.servers.dovecot import Account, Dovecot
from tests.support.servers.proxy import Proxy
from tests.support.servers.tls import CertificateAuthority

DATE = 1_700_000_000


def mail(name: str, body: str = "text", header: bytes = b"") -> bytes:
    """Return a message; those of equally long arguments are equally long."""
    return (
        f"Message-ID: <{name}@example.org>\r\nSubject: {name}\r\n".encode()
        + header
        + f"\r\n{body}\r\n".encode()
    )


class Mounts(Protocol):
    """What the fixture `mount` is."""

    def __call__(
        self, account: MailAccount, *, cache: Path | None = None, environment: Mapping[str, str] | None = None
    ) -> Mount: ...


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Mounts]:
    """Return a function that mounts, whose log may say what it likes about connections and the disk."""
    with contextlib.ExitStack() as stack:
        numbers = itertools.count(1)

        def made(
            account: MailAccount, *, cache: Path | None = None, environment: Mapping[str, str] | None = None
        ) -> Mount:
            directory = tmp_path / f"mount-{next(numbers)}"
            return stack.enter_context(RobustMount(account, directory, cache=cache, environment=environment))

        yield made


def boot(mount: Mount) -> None:
    """Have the next mount believe that the machine was started anew."""
    for note in mount.cache.parent.rglob("boot"):
        note.write_text("0\n")


def on_server(user: ImapAccount, content: bytes) -> list[str]:
    """Return the mailboxes that have this message, one as often as it is in there."""
    return [place for place, ones in everything(user).items() for one in ones if one.content == content]


def in_spool(mount: Mount, content: bytes) -> bool:
    """Whether a file that waits has these bytes."""
    return any((mount.path / path).read_bytes() == content for path, _ in waiting(mount))


@pytest.fixture
def proxy(user: Account) -> Iterator[Proxy]:
    with Proxy(user.server) as made:
        yield made


@pytest.fixture
def own(ca: CertificateAuthority) -> Iterator[Account]:
    """An account on a server that nobody else uses, so that it can be stopped and restored."""
    with Dovecot(ca) as server:
        yield server.account("own")


def test_removing_a_local_copy_after_a_reboot_removes_nothing_else(user: Account, mount: Mounts) -> None:
    """cp mail.eml mail.bak, reboot, rm mail.bak: the message itself would go."""
    user.deliver("INBOX", [(mail("one"), DATE, "")])
    first = mount(user)
    message = file_of(first, 1)
    message.with_suffix(".bak").write_bytes(message.read_bytes())
    first.unmount()
    boot(first)
    second = mount(user, cache=first.cache)
    assert sorted(os.listdir(second.path / "INBOX")) == sorted([message.name, message.stem + ".bak"])
    (second.path / "INBOX" / f"{message.stem}.bak").unlink()
    settle(second)
    assert on_server(user, mail("one")) == ["INBOX"]


def test_a_file_that_waits_is_not_taken_for_a_message_of_its_size(
    user: Account, proxy: Proxy, mount: Mounts
) -> None:
    """The file would be dropped, though it is on no server."""
    user.deliver("Work", [])
    mounted = mount(proxy.account(user))
    os.listdir(mounted.path / "Work")
    mine = mail("mine", header=b"X-Pad: aou\r\n")
    fault = proxy.fault(rb"APPEND", "stall", at="command")
    (mounted.path / "Work" / "mine.eml").write_bytes(mine)
    fault.wait_hit()
    other = mail("them", header=b"X-Pad: \xe4\xf6\xfc\r\n")
    assert len(other) == len(mine)
    user.append("Work", other, DATE)
    proxy.cut_all()
    proxy.resume()
    settle(mounted)
    assert on_server(user, mine) == ["Work"] or in_spool(mounted, mine)


@pytest.mark.parametrize("target", ["Work", "INBOX"])
def test_what_another_client_has_edited_and_moved_is_shown_with_its_own_bytes(
    user: Account, mount: Mounts, target: str
) -> None:
    """Bytes of another message would be shown for good, and an edit of them would destroy the message."""
    user.deliver("Work", [])
    user.deliver("INBOX", [(mail("one", "before"), DATE, "")])
    mounted = mount(user)
    os.listdir(mounted.path / "Work")
    assert file_of(mounted, 1).read_bytes() == mail("one", "before")
    with user.client() as client:
        client.select("INBOX")
        client.uid("STORE", "1", "+FLAGS", "(\\Deleted)")
        client.literal = mail("one", "after.")  # type: ignore[assignment]  # typeshed: str
        assert client.xatom("APPEND", target, '"14-Nov-2023 22:13:20 +0000"')[0] == "OK"
        client.uid("EXPUNGE", "1")

    def is_shown() -> bool:
        names = os.listdir(mounted.path / target)
        return not any(path.stem.endswith(".1") for path in (mounted.path / "INBOX").iterdir()) or bool(
            target == "Work" and names
        )

    wait_until(is_shown, "the change is shown")
    (path,) = (mounted.path / target).iterdir()
    assert path.read_bytes() == mail("one", "after.")


@pytest.mark.parametrize("how", ["plain", "append", "rename"])
def test_a_program_that_fsyncs_and_writes_on_gets_its_bytes(user: Account, mount: Mounts, how: str) -> None:
    """With CRLF put in under the writer's offset, a part of the message would be overwritten."""
    mounted = mount(user)
    path = mounted.path / "INBOX" / "log.eml"
    first = path.with_name("log.part") if how == "rename" else path
    content = mail("log", "\n".join(f"line {n}" for n in range(50))).replace(b"\r\n", b"\n")
    flags = os.O_APPEND if how == "append" else 0
    descriptor = os.open(first, os.O_CREAT | os.O_WRONLY | flags, 0o600)
    os.write(descriptor, content[:100])
    if how == "rename":
        os.rename(first, path)
    else:
        os.fsync(descriptor)
    os.write(descriptor, content[100:])
    os.close(descriptor)
    settle(mounted)
    assert everything(user).keys() == {"INBOX"}
    assert [one.content for one in held(user).values()] == [content.replace(b"\n", b"\r\n")]


def test_an_edit_that_waits_removes_nothing_else_from_a_restored_server(
    own: Account, mount: Mounts, tmp_path: Path
) -> None:
    """The UID of the message that it replaces belongs to another one now, which would go to Trash."""
    held(own)  # so that it has its UIDVALIDITY
    own.back_up(tmp_path / "backup")
    own.deliver("INBOX", [(mail("one"), DATE, "")])
    with Proxy(own.server) as proxy:
        mounted = mount(proxy.account(own))
        path = file_of(mounted, 1)
        path.read_bytes()
        proxy.refuse()
        proxy.cut_all()
        edited = mail("one", "edited")
        path.write_bytes(edited)
        own.restart_from(tmp_path / "backup")
        own.append("INBOX", mail("innocent"), DATE + 1)
        proxy.accept()
        wait_until(lambda: not waiting(mounted), "the edit is sent")
        settle(mounted)
        assert on_server(own, mail("innocent")) == ["INBOX"]
        assert on_server(own, edited) == ["INBOX"]
        mounted.unmount()


def test_a_restored_server_gets_a_message_once(own: Account, mount: Mounts, tmp_path: Path) -> None:
    """What has a lower UID than it could have would be taken for unsent, and doubled by a retry."""
    everything(own)
    own.back_up(tmp_path / "backup")
    own.deliver("Sent", [(mail(f"m{n}"), DATE, "") for n in range(5)])
    with Proxy(own.server) as proxy:
        mounted = mount(proxy.account(own))
        os.listdir(mounted.path / "Sent")
        proxy.refuse()
        proxy.cut_all()
        (mounted.path / "Sent" / "new.eml").write_bytes(mail("new"))
        own.restart_from(tmp_path / "backup")
        proxy.accept()
        wait_until(lambda: on_server(own, mail("new")), "it is sent")
        settle(mounted)
        assert waiting(mounted) == []
        assert on_server(own, mail("new")) == ["Sent"]
        mounted.unmount()


def test_a_restored_server_gives_the_uid_of_a_moved_message_to_another(
    own: Account, mount: Mounts, tmp_path: Path
) -> None:
    """It would be shown with the bytes of the message that this mount had moved there, before the restore."""
    own.deliver("INBOX", [(mail("moved"), DATE, "")])
    own.deliver("Work", [(mail("first"), DATE, "")])
    everything(own)
    own.back_up(tmp_path / "backup")
    with Proxy(own.server) as proxy:
        mounted = mount(proxy.account(own))
        work = mounted.path / "Work"
        assert contents(work) == [mail("first")]
        file_of(mounted, 1).rename(work / "moved.eml")
        assert contents(work) == [mail("first"), mail("moved")]
        proxy.refuse()
        proxy.cut_all()
        own.restart_from(tmp_path / "backup")
        others = [mail(f"other {n}") for n in range(3)]
        for n, content in enumerate(others):
            own.append("Work", content, DATE + n)
        proxy.accept()
        wait_until(lambda: contents(work) == [mail("first"), *others], "what the server has is shown")
        mounted.unmount()


def test_a_move_that_is_cut_on_a_restored_server_is_found(
    own: Account, mount: Mounts, tmp_path: Path
) -> None:
    """The cache knew another message under the UID of the copy, which was then made again."""
    own.deliver("INBOX", [(mail("moved"), DATE, "")])
    own.deliver("Sent", [(mail("one"), DATE, "")])
    everything(own)
    own.back_up(tmp_path / "backup")
    own.deliver("Sent", [(mail("lost"), DATE, "")])
    with Proxy(own.server, hide=["MOVE"]) as proxy:
        mounted = mount(proxy.account(own))
        path = file_of(mounted, 1, "INBOX")
        assert contents(mounted.path / "Sent") == [mail("lost"), mail("one")]
        own.restart_from(tmp_path / "backup")
        # It is copied, and no answer says so.
        proxy.fault(rb"UID COPY", "cut", at="answer")
        wait_until(lambda: renamed(path, mounted.path / "Sent" / path.name), "it is moved")
        mounted.unmount()
    assert (on_server(own, mail("moved")), on_server(own, mail("one"))) == (["Sent"], ["Sent"])


def renamed(path: Path, target: Path) -> bool:
    """Rename a file, unless the server is away."""
    with contextlib.suppress(OSError):
        path.rename(target)
    return target.exists()


@pytest.mark.parametrize("together", [True, False], ids=["MULTIAPPEND", "without"])
def test_an_upload_that_is_cut_on_a_restored_server_is_found(
    own: Account, mount: Mounts, tmp_path: Path, together: bool
) -> None:
    """UIDNEXT went back, and is reached again by then: looked for beyond it, the uploads were doubled."""
    own.deliver("Sent", [(mail("one"), DATE, "")])
    everything(own)
    own.back_up(tmp_path / "backup")
    own.deliver("Sent", [(mail(f"m{n}"), DATE, "") for n in range(2)])
    with Proxy(own.server, hide=() if together else ("MULTIAPPEND",)) as proxy:
        mounted = mount(proxy.account(own))
        os.listdir(mounted.path / "Sent")
        proxy.refuse()
        proxy.cut_all()
        own.restart_from(tmp_path / "backup")
        new = [mail(f"new {n}") for n in range(3)]
        for n, content in enumerate(new):
            (mounted.path / "Sent" / f"new{n}.eml").write_bytes(content)
        # All are on the server, and no answer says so.
        fault = proxy.fault(rb"APPEND", "cut", at="answer", nth=1 if together else 3)
        not_listed = proxy.fault(rb'EXAMINE "Sent"', b"NO [INUSE] Later", times=1)
        proxy.accept()
        fault.wait_hit()
        not_listed.cancel()
        settle(mounted)
        wait_until(lambda: not waiting(mounted), "they are sent")
        assert [on_server(own, content) for content in new] == [["Sent"]] * 3
        mounted.unmount()


@pytest.mark.parametrize("full", [False, True], ids=["", "disk full"])
def test_an_upload_is_found_although_a_power_cut_took_what_the_cache_knew_of_a_restored_server(
    own: Account, mount: Mounts, tmp_path: Path, full: bool
) -> None:
    """The cache knew another message under the UID of the upload, which was then uploaded again."""
    disk = Disk(tmp_path / "small")
    own.deliver("Sent", [(mail("one"), DATE, "")])
    everything(own)
    own.back_up(tmp_path / "backup")
    with Proxy(own.server) as proxy:
        mounted = mount(proxy.account(own), cache=disk.root / "cache")
        (mounted.path / "Sent" / "lost.eml").write_bytes(mail("lost"))
        settle(mounted)
        assert contents(mounted.path / "Sent") == [mail("lost"), mail("one")]
        mounted.unmount()
        before = {path: path.read_bytes() for path in mounted.cache.glob("*/cache.db*")}
        own.restart_from(tmp_path / "backup")
        mounted = mount(proxy.account(own), cache=mounted.cache)
        wait_until(lambda: contents(mounted.path / "Sent") == [mail("one")], "what the server has is shown")
        # It is on the server, and no answer says so.
        fault = proxy.fault(rb"APPEND", "cut", at="answer")
        (mounted.path / "Sent" / "new.eml").write_bytes(mail("new"))
        fault.wait_hit()
        proxy.refuse()
        mounted.kill()
        for path in mounted.cache.glob("*/cache.db*"):
            path.unlink()
        for path, content in before.items():
            path.write_bytes(content)
        mounted = mount(proxy.account(own), cache=mounted.cache, environment=disk.environment())
        if full:
            disk.fill()
            proxy.forget_commands()
        proxy.accept()
        if full:
            proxy.wait_for_command(rb"EXAMINE .?Sent", 5)
            disk.free()
        settle(mounted)
        wait_until(lambda: not waiting(mounted), "it is sent")
        assert on_server(own, mail("new")) == ["Sent"]
        mounted.unmount()


def test_an_upload_is_found_although_uidvalidity_was_not_kept_yet(
    ca: CertificateAuthority, mount: Mounts
) -> None:
    """Courier names the time of each EXAMINE as UIDVALIDITY until a message is in the mailbox."""
    with Courier(ca) as courier, Proxy(courier) as proxy:
        user = courier.account("empty")
        mounted = mount(proxy.account(user))
        assert os.listdir(mounted.path / "Sent") == []
        wait_for_another_second()
        # It is on the server, and no answer says so.
        fault = proxy.fault(rb"APPEND", "cut", at="answer")
        (mounted.path / "Sent" / "new.eml").write_bytes(mail("new"))
        fault.wait_hit()
        wait_until(lambda: not waiting(mounted), "it is sent")
        assert on_server(user, mail("new")) == ["INBOX.Sent"]
        assert contents(mounted.path / "Sent") == [mail("new")]
        mounted.unmount()


def test_edits_replace_their_messages_on_a_restored_server(
    own: Account, mount: Mounts, tmp_path: Path
) -> None:
    """Both versions stayed, and the new ones were taken for messages that the server has changed."""
    before = [mail("one"), mail("two"), mail("three")]
    after = [mail(name, "edited") for name in ("one", "two", "three")]
    own.deliver("Sent", [(content, DATE, "") for content in before])
    everything(own)
    own.back_up(tmp_path / "backup")
    own.deliver("Sent", [(mail(f"m{n}"), DATE, "") for n in range(5)])
    with Proxy(own.server) as proxy:
        mounted = mount(proxy.account(own))
        paths = [file_of(mounted, uid, "Sent") for uid in (1, 2, 3)]
        for path in paths:
            path.read_bytes()
        proxy.refuse()
        proxy.cut_all()
        for path, content in zip(paths, after, strict=True):
            path.write_bytes(content)
        own.restart_from(tmp_path / "backup")
        proxy.accept()
        wait_until(
            lambda: all(on_server(own, content) == ["Trash"] for content in before),
            "the old versions are removed",
        )
        settle(mounted)
        assert waiting(mounted) == []
        assert all(on_server(own, content) == ["Sent"] for content in after)
        mounted.unmount()
        assert not list(mounted.cache.glob("*/kept/*"))


@pytest.mark.parametrize("is_mounted", [True, False], ids=["mounted", "unmounted"])
def test_a_restored_server_whose_numbers_are_as_before_shows_what_it_has(
    own: Account, mount: Mounts, tmp_path: Path, is_mounted: bool
) -> None:
    """UIDNEXT, HIGHESTMODSEQ and the number of messages are those of the last synchronisation."""
    own.deliver("Sent", [(mail("one"), DATE, "")])
    everything(own)
    own.back_up(tmp_path / "backup")
    own.append("Sent", mail("lost"), DATE)
    with Proxy(own.server) as proxy:
        mounted = mount(proxy.account(own))
        assert contents(mounted.path / "Sent") == [mail("lost"), mail("one")]
        if not is_mounted:
            mounted.unmount()
        proxy.refuse()
        proxy.cut_all()
        own.restart_from(tmp_path / "backup")
        own.append("Sent", mail("other"), DATE + 1)
        proxy.accept()
        if not is_mounted:
            mounted = mount(proxy.account(own), cache=mounted.cache)
        wait_until(
            lambda: contents(mounted.path / "Sent") == [mail("one"), mail("other")],
            "what the server has is shown",
        )
        mounted.unmount()


def contents(directory: Path) -> list[bytes]:
    """Return what is in the files of a directory; nothing if one goes meanwhile."""
    with contextlib.suppress(OSError):
        return sorted(path.read_bytes() for path in directory.iterdir())
    return []


def test_a_server_that_is_restored_to_what_was_last_listed_shows_what_it_has(
    own: Account, mount: Mounts, tmp_path: Path
) -> None:
    """Its UIDNEXT is that of the last synchronisation, but the cache has had higher UIDs since."""
    own.deliver("Sent", [(mail("one"), DATE, ""), (mail("two"), DATE, "")])
    everything(own)
    with Proxy(own.server) as proxy:
        mounted = mount(proxy.account(own))
        sent = mounted.path / "Sent"
        one = file_of(mounted, 1, "Sent")
        own.back_up(tmp_path / "backup")
        one.unlink()
        (sent / "new.eml").write_bytes(mail("new"))
        settle(mounted)
        assert on_server(own, mail("new")) == ["Sent"]
        own.restart_from(tmp_path / "backup")

        wait_until(lambda: contents(sent) == [mail("one"), mail("two")], "what the server has is shown")
        mounted.unmount()


def test_what_was_closed_before_an_unmount_is_sent_by_itself(
    user: Account, mount: Mounts, tmp_path: Path
) -> None:
    """close() promised that it would be sent; a RELEASE that is still queued must not be lost."""
    user.deliver("Work", [])
    sent: list[bytes] = []
    for turn in range(3):
        first = mount(user, cache=tmp_path / "cache")
        contents = {first.path / "Work" / f"{turn}-{n}.eml": mail(f"m{turn}-{n:02}") for n in range(24)}
        sent += contents.values()
        files = []
        for path, content in contents.items():
            files.append(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))
            os.write(files[-1], content)
        with ThreadPoolExecutor(8) as executor:
            list(executor.map(os.close, files))
            # So that requests are certainly queued; the kernel drops them with the mount.
            os.kill(first.pid, signal.SIGSTOP)
        try:
            subprocess.run(["fusermount3", "-u", first.path], check=True)
        finally:
            os.kill(first.pid, signal.SIGCONT)
        first.wait_ended()
        second = mount(user, cache=tmp_path / "cache")
        assert [path for path, state in waiting(second) if state == "unsent"] == []
        settle(second)
        second.unmount()
    assert sorted(one.content for one in held(user, "Work").values()) == sorted(sent)


@pytest.mark.parametrize(
    ("has_names", "has_bytes"), [(False, False), (True, False)], ids=["nothing", "only names"]
)
@pytest.mark.parametrize("touches", [False, True], ids=["closed", "closed and touched"])
def test_a_file_that_was_closed_survives_a_power_cut_and_is_sent(
    user: Account,
    proxy: Proxy,
    mount: Mounts,
    tmp_path: Path,
    has_names: bool,
    has_bytes: bool,
    touches: bool,
) -> None:
    """Safe from the moment close() returns: not half, not nothing, and not for a person to look at.

    Nor does a change of its description afterwards, such as `cp -p` makes, leave an empty one.
    """
    disk = Disk(tmp_path / "power")
    first = mount(proxy.account(user), cache=disk.root / "cache", environment=disk.environment())
    os.listdir(first.path / "INBOX")
    proxy.refuse()
    proxy.cut_all()
    (first.path / "INBOX" / "new.eml").write_bytes(mail("new"))
    if touches:
        os.utime(first.path / "INBOX" / "new.eml", (DATE, DATE))
    first.kill()
    disk.put(disk.after_power_cut(lambda: has_names, lambda: has_bytes))
    proxy.accept()
    second = mount(proxy.account(user), cache=disk.root / "cache", environment=disk.environment())
    settle(second)
    assert "unsent" not in dict(waiting(second)).values()
    assert on_server(user, mail("new")) == ["INBOX"]


@pytest.mark.parametrize("then", ["nothing", "moved", "removed", "edited"])
def test_a_power_cut_after_an_upload_doubles_nothing(
    user: Account, mount: Mounts, tmp_path: Path, then: str
) -> None:
    """That a file has left the spool may be undone, and it must not be uploaded again."""
    disk = Disk(tmp_path / "power")
    user.deliver("Work", [])
    first = mount(user, cache=disk.root / "cache", environment=disk.environment())
    new = first.path / "INBOX" / "new.eml"
    new.write_bytes(mail("new"))
    settle(first)
    match then:
        case "moved":
            new.rename(first.path / "Work" / "new.eml")
        case "removed":
            new.unlink()
        case "edited":
            new.write_bytes(mail("new", "edited"))
            settle(first)
    before = everything(user)
    first.kill()
    disk.put(disk.after_power_cut(lambda: False, lambda: False))
    second = mount(user, cache=disk.root / "cache", environment=disk.environment())
    settle(second)
    assert waiting(second) == []
    assert everything(user) == before


def test_a_local_file_that_was_closed_survives_a_power_cut(
    user: Account, mount: Mounts, tmp_path: Path
) -> None:
    """Safe from the moment close() returns, wherever it is: it is nowhere else."""
    disk = Disk(tmp_path / "power")
    first = mount(user, cache=disk.root / "cache", environment=disk.environment())
    (first.path / "INBOX" / "new.bak").write_bytes(b"local")
    first.kill()
    disk.put(disk.after_power_cut(lambda: False, lambda: False))
    second = mount(user, cache=disk.root / "cache", environment=disk.environment())
    assert (second.path / "INBOX" / "new.bak").read_bytes() == b"local"


def test_a_kill_at_any_moment_leaves_no_file_that_nobody_is_told_of(
    user: Account, mount: Mounts, tmp_path: Path
) -> None:
    """A file that is neither sent nor in a list waits for ever, and looks as if it were on its way."""
    lost = []
    user.deliver("Work", [])
    # From the write of the bytes on; scripts/replay knows all the others.
    for stop in itertools.count(4):
        disk = Disk(tmp_path / f"kill-{stop}")
        cache = disk.root / "cache"
        environment = disk.environment(stop=stop, only="/spool/", later=True)
        first = mount(user, cache=cache, environment=environment)
        mine = mail(f"m{stop:02}")
        disk.count()
        with contextlib.suppress(OSError):
            (first.path / "Work" / f"{stop}.eml").write_bytes(mine)
            settle(first)
            break  # it was never killed
        first.wait_ended()
        second = mount(user, cache=cache)
        settle(second)
        there = [path for path in (second.path / "Work").glob(f"{stop}*.eml") if path.read_bytes() == mine]
        if there and not on_server(user, mine) and not in_spool(second, mine):
            lost.append(stop)
        second.unmount()
    assert stop > 6
    assert not lost


def test_what_met_a_full_disk_is_sent_when_there_is_space_again(
    user: Account, proxy: Proxy, mount: Mounts, tmp_path: Path
) -> None:
    """A file that could not be made ready at close() would wait until somebody runs 'imapfs sync'."""
    disk = Disk(tmp_path / "full")
    mounted = mount(user, cache=disk.root / "cache", environment=disk.environment())
    # That close() says so is as good.
    with (
        contextlib.suppress(OSError),
        open(mounted.path / "INBOX" / "new.eml", "wb", buffering=0) as file,
    ):
        file.write(mail("new"))
        disk.fill()
    assert on_server(user, mail("new")) == []
    disk.free()
    wait_until(lambda: on_server(user, mail("new")), "it is sent by itself")


# Not strict: whether the rename or the upload comes first is a race.
def test_files_follow_a_mailbox_that_another_client_has_renamed(
    user: Account, proxy: Proxy, mount: Mounts
) -> None:
    """They would be unsent, although their mailbox is there under another name."""
    user.deliver("Work", [(mail("one"), DATE, "")])
    mounted = mount(proxy.account(user))
    os.listdir(mounted.path / "Work")
    proxy.refuse()
    proxy.cut_all()
    (mounted.path / "Work" / "new.eml").write_bytes(mail("new"))
    with user.client() as client:
        assert client.rename("Work", "Business")[0] == "OK"
    proxy.accept()
    wait_until(lambda: not waiting(mounted) or "unsent" in dict(waiting(mounted)).values(), "an end")
    assert on_server(user, mail("new")) == ["Business"]


def test_an_old_version_is_removed_also_when_the_cache_is_an_older_one(
    user: Account, proxy: Proxy, mount: Mounts
) -> None:
    """After a power cut the cache is as it was; a local copy would be made of what was edited."""
    first = mount(proxy.account(user))
    new = first.path / "INBOX" / "new.eml"
    new.write_bytes(mail("new"))
    settle(first)
    first.unmount()
    (cache,) = first.cache.glob("*/cache.db")
    before = cache.read_bytes()
    second = mount(proxy.account(user), cache=first.cache)
    fault = proxy.fault(rb"UID (MOVE|COPY)", "cut", times=None)
    (second.path / "INBOX" / "new.eml").write_bytes(mail("new", "edited"))
    fault.wait_hit()
    second.kill()
    fault.cancel()
    for path in first.cache.rglob("cache.db-*"):
        path.unlink()
    cache.write_bytes(before)
    third = mount(proxy.account(user), cache=first.cache)
    settle(third)
    wait_until(lambda: on_server(user, mail("new")) == ["Trash"], "the old version is removed")
    settle(third)
    shown = [path.read_bytes() for path in (third.path / "INBOX").iterdir()]
    assert shown == [mail("new", "edited")]
