"""Writing to servers that lack what makes it easy: extensions refused by a proxy, and Courier as it is."""

import errno
import os
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.mail import plain
from tests.support.mailboxes import Held, everything, in_order, mailboxes, settle, waiting
from tests.support.mounting import Mount, Mounter, wait_for_another_second, wait_until
from tests.support.servers.account import ImapAccount
from tests.support.servers.courier import Courier
from tests.support.servers.dovecot import Account
from tests.support.servers.proxy import ProxiedAccount, Proxy
from tests.support.servers.tls import CertificateAuthority

DATE = 1_700_000_000
LATER = 1_750_000_000
LACKING = {
    "MOVE": ("MOVE",),
    "UIDPLUS": ("UIDPLUS",),
    "MOVE-UIDPLUS": ("MOVE", "UIDPLUS"),
    "CONDSTORE": ("CONDSTORE",),
    "QRESYNC": ("QRESYNC",),
    "LITERAL+": ("LITERAL+", "LITERAL-"),
    "SPECIAL-USE": ("SPECIAL-USE",),
    "all": (
        "MOVE", "UIDPLUS", "CONDSTORE", "LITERAL+", "LITERAL-", "SPECIAL-USE", "LIST-EXTENDED", "ENABLE",
        "UNSELECT", "NAMESPACE", "MULTIAPPEND",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """A server for a test, by what it is able to do."""

    account: ImapAccount
    mounted_as: ImapAccount | ProxiedAccount
    moves: bool
    expunges: bool
    """Whether it can expunge one message alone."""
    marks_trash: bool
    """Whether it says which mailbox is Trash. If not, one is known by its name, or made."""

    def deleted(self, message: Held) -> list[Held]:
        """What is left of a message that was deleted for good."""
        return [] if self.expunges else [message._replace(flags=message.flags | {"\\Deleted"})]

    def moved(self, message: Held) -> list[Held]:
        """What is left of a message that was moved away."""
        return [] if self.moves else self.deleted(message)


@pytest.fixture(scope="module")
def courier(ca: CertificateAuthority) -> Iterator[Courier]:
    with Courier(ca) as server:
        yield server


@pytest.fixture(params=[*LACKING, "Courier"])
def kind(request: pytest.FixtureRequest, user: Account) -> Iterator[Kind]:
    with ExitStack() as stack:
        if request.param == "Courier":
            account = request.getfixturevalue("courier").account(user.name)
            yield Kind(account, account, False, True, False)
            return
        hidden = LACKING[request.param]
        proxy = stack.enter_context(Proxy(user.server, hide=hidden))
        yield Kind(
            user,
            proxy.account(user),
            "MOVE" not in hidden,
            "UIDPLUS" not in hidden,
            "SPECIAL-USE" not in hidden,
        )


def flags(*names: str) -> frozenset[str]:
    return frozenset(names)


def message(number: int, date: int = DATE, *names: str) -> Held:
    return Held(plain(number), date, flags(*names))


def put(path: Path, held: Held) -> None:
    path.write_bytes(held.content)
    os.utime(path, (held.date, held.date))


def the_file(directory: Path, held: Held) -> Path:
    (found,) = [path for path in directory.iterdir() if path.read_bytes() == held.content]
    return found


def drain(mounted: Mount) -> None:
    def done() -> bool:
        settle(mounted)
        left = waiting(mounted)
        assert not [one for one in left if one[1] == "unsent"], left
        return not left

    wait_until(done, "everything is sent")


def contents(kind: Kind, **held: list[Held]) -> dict[str, list[Held]]:
    return {
        kind.account.server_name(name): in_order(*messages) for name, messages in held.items() if messages
    }


def visible(mounted: Mount, directory: str) -> list[bytes]:
    return sorted(path.read_bytes() for path in (mounted.path / directory).iterdir())


@pytest.fixture
def start(kind: Kind, mount: Mounter) -> Callable[..., Mount]:
    """Mount with the messages 1 and 2 in INBOX and an empty Work."""

    def mounted(*arguments: str, cache: Path | None = None) -> Mount:
        if cache is None:
            kind.account.deliver("INBOX", [(plain(1), DATE, "S"), (plain(2), DATE, "S")])
            kind.account.deliver("Work", [])
        return mount(kind.mounted_as, *arguments, cache=cache)

    return mounted


ONE = message(1, DATE, "\\Seen")
TWO = message(2, DATE, "\\Seen")


def test_mv_to_another_directory(kind: Kind, start: Callable[..., Mount]) -> None:
    mounted = start()
    path = the_file(mounted.path / "INBOX", ONE)
    inode = path.stat().st_ino
    target = mounted.path / "Work" / "moved.eml"
    os.rename(path, target)
    assert (target.stat().st_ino, target.read_bytes()) == (inode, ONE.content)
    assert visible(mounted, "INBOX") == [TWO.content]
    mounted.unmount()
    assert everything(kind.account) == contents(kind, INBOX=[TWO, *kind.moved(ONE)], Work=[ONE])
    again = start(cache=mounted.cache)
    assert visible(again, "INBOX") == [TWO.content]
    assert os.listdir(again.path / "Work") == ["moved.eml"]


def test_rm_moves_to_trash(kind: Kind, start: Callable[..., Mount]) -> None:
    mounted = start()
    the_file(mounted.path / "INBOX", ONE).unlink()
    assert visible(mounted, "INBOX") == [TWO.content]
    assert visible(mounted, "Trash") == [ONE.content]
    mounted.unmount()
    assert everything(kind.account) == contents(kind, INBOX=[TWO, *kind.moved(ONE)], Trash=[ONE])


def test_rm_for_good_leaves_what_others_marked_as_deleted(kind: Kind, start: Callable[..., Mount]) -> None:
    mounted = start("--delete", "expunge")
    first = the_file(mounted.path / "INBOX", ONE)
    with kind.account.client() as client:
        client.select("INBOX")
        client.store("2", "+FLAGS", "\\Deleted")
    first.unlink()
    assert ONE.content not in visible(mounted, "INBOX")
    mounted.unmount()
    marked = TWO._replace(flags=TWO.flags | {"\\Deleted"})
    assert everything(kind.account) == contents(kind, INBOX=[marked, *kind.deleted(ONE)])


def test_cp_keeps_date_flags_and_name(kind: Kind, start: Callable[..., Mount]) -> None:
    mounted = start()
    new = message(3, LATER, "\\Flagged", "$Work")
    for number in range(3):
        path = mounted.path / "Work" / f"new {number}.eml"
        put(path, new)
        os.setxattr(path, "user.imap.flags", b"\\Flagged $Work")
    drain(mounted)
    assert sorted(os.listdir(mounted.path / "Work")) == [f"new {number}.eml" for number in range(3)]
    assert visible(mounted, "Work") == [new.content] * 3
    mounted.unmount()
    assert everything(kind.account) == contents(kind, INBOX=[ONE, TWO], Work=[new] * 3)


def start_beside_empty(start: Callable[..., Mount]) -> Mount:
    """Mount, list the empty Work, and let a second pass: Courier names another UIDVALIDITY now."""
    mounted = start()
    assert os.listdir(mounted.path / "Work") == []
    wait_for_another_second()
    return mounted


def test_cp_keeps_the_name_although_uidvalidity_is_not_kept_yet(
    kind: Kind, start: Callable[..., Mount]
) -> None:
    """Courier names the time of each EXAMINE as UIDVALIDITY, until a message is in the mailbox."""
    mounted = start_beside_empty(start)
    put(mounted.path / "Work" / "new.eml", message(3, LATER))
    drain(mounted)
    wait_until(lambda: visible(mounted, "Work") == [plain(3)], "it is listed")
    assert os.listdir(mounted.path / "Work") == ["new.eml"]
    mounted.unmount()
    again = start(cache=mounted.cache)
    assert os.listdir(again.path / "Work") == ["new.eml"]
    again.unmount()


def test_mv_keeps_the_name_although_uidvalidity_is_not_kept_yet(
    kind: Kind, start: Callable[..., Mount]
) -> None:
    """See above: what was moved to an empty mailbox got another name and inode at the next look."""
    mounted = start_beside_empty(start)
    path, moved = the_file(mounted.path / "INBOX", ONE), mounted.path / "Work" / "moved.eml"
    inode = path.stat().st_ino
    path.rename(moved)
    drain(mounted)
    wait_until(lambda: visible(mounted, "Work") == [ONE.content], "it is listed")
    assert (os.listdir(mounted.path / "Work"), moved.stat().st_ino) == (["moved.eml"], inode)
    mounted.unmount()
    again = start(cache=mounted.cache)
    assert (os.listdir(again.path / "Work"), (again.path / "Work" / "moved.eml").stat().st_ino) == (
        ["moved.eml"],
        inode,
    )
    again.unmount()


def test_edit_replaces_the_message(kind: Kind, start: Callable[..., Mount]) -> None:
    mounted = start("--delete", "expunge")
    path = the_file(mounted.path / "INBOX", ONE)
    inode = path.stat().st_ino
    with open(path, "ab") as file:
        file.write(b"edited\n")
    drain(mounted)
    edited = ONE._replace(content=ONE.content + b"edited\r\n")
    assert (path.stat().st_ino, path.read_bytes()) == (inode, edited.content)
    assert visible(mounted, "INBOX") == sorted([edited.content, TWO.content])
    mounted.unmount()
    assert everything(kind.account) == contents(kind, INBOX=[edited, TWO, *kind.deleted(ONE)])


def test_saving_over_a_message_replaces_it(kind: Kind, start: Callable[..., Mount]) -> None:
    mounted = start()
    path = the_file(mounted.path / "INBOX", ONE)
    temporary = mounted.path / "INBOX" / "tmp42"
    temporary.write_bytes(plain(4))
    os.rename(temporary, path)
    drain(mounted)
    assert visible(mounted, "INBOX") == sorted([plain(4), TWO.content])
    mounted.unmount()
    saved = ONE._replace(content=plain(4))
    assert everything(kind.account) == contents(kind, INBOX=[saved, TWO, *kind.moved(ONE)], Trash=[ONE])


def test_flags(kind: Kind, start: Callable[..., Mount]) -> None:
    mounted = start()
    path = the_file(mounted.path / "INBOX", ONE)
    os.setxattr(path, "user.imap.flagged", b"1")
    os.setxattr(path, "user.xdg.tags", b"Work,Later")
    os.setxattr(path, "user.imap.seen", b"0")
    with kind.account.client() as client:
        client.select("INBOX")
        client.store("1", "+FLAGS", "\\Answered")
    os.setxattr(path, "user.xdg.tags", b"Work")
    mounted.unmount()
    changed = ONE._replace(flags=flags("\\Flagged", "\\Answered", "Work"))
    assert everything(kind.account) == contents(kind, INBOX=[changed, TWO])


def test_directories(kind: Kind, start: Callable[..., Mount]) -> None:
    mounted = start()
    before = set(mailboxes(kind.account))
    os.mkdir(mounted.path / "New")
    os.mkdir(mounted.path / "New" / "Sub & Söhne")
    put(mounted.path / "New" / "Sub & Söhne" / "new.eml", message(5, LATER))
    drain(mounted)
    os.rename(mounted.path / "New", mounted.path / "Old")
    assert visible(mounted, "Old/Sub & Söhne") == [plain(5)]
    with pytest.raises(OSError, match="not empty"):
        os.rmdir(mounted.path / "Old" / "Sub & Söhne")
    os.rmdir(mounted.path / "Work")
    mounted.unmount()
    name = kind.account.server_name
    gone = {name("Work")}
    assert set(mailboxes(kind.account)) == before - gone | {name("Old"), name("Old/Sub & Söhne")}
    assert everything(kind.account) == contents(
        kind, INBOX=[ONE, TWO], **{"Old/Sub & Söhne": [message(5, LATER)]}
    )


# ---- which mailbox is the Trash


def test_a_trash_that_is_known_by_its_name_only_takes_mail_in(user: Account, mount: Mounter) -> None:
    user.deliver("INBOX", [(plain(1), LATER, ""), (plain(2), LATER, "")])
    with Proxy(user.server, hide=["SPECIAL-USE"]) as proxy:
        mounted = mount(proxy.account(user))
        for path in sorted((mounted.path / "INBOX").iterdir()):
            path.unlink()
        first, second = sorted((mounted.path / "Trash").iterdir())
        with pytest.raises(OSError) as raised:
            first.unlink()
        assert raised.value.errno == errno.EPERM
        mounted.unmount()
        named = mount(proxy.account(user), "--trash", "Trash", cache=mounted.cache)
        (named.path / "Trash" / first.name).unlink()
        assert os.listdir(named.path / "Trash") == [second.name]
        named.unmount()
        other = mount(proxy.account(user), "--trash", "Nowhere", cache=mounted.cache)
        with pytest.raises(OSError) as raised:
            (other.path / "Trash" / second.name).unlink()
        assert raised.value.errno == errno.EPERM
        other.unmount()


def test_a_trash_is_made_where_there_is_none(user: Account, mount: Mounter) -> None:
    """Dovecot has one, which is not shown before it is made."""

    def without(line: bytes) -> bytes:
        is_made = any(command.startswith(b"CREATE") for command in proxy.commands())
        return b"" if line.startswith(b"* LIST") and b"Trash" in line and not is_made else line

    user.deliver("INBOX", [(plain(1), LATER, ""), (plain(2), LATER, "")])
    with Proxy(user.server, hide=["SPECIAL-USE"], edits=[without]) as proxy:
        mounted = mount(proxy.account(user))
        assert "Trash" not in os.listdir(mounted.path)
        proxy.fault(b"CREATE", b"NO Not allowed", at="command")
        first, second = sorted((mounted.path / "INBOX").iterdir())
        with pytest.raises(OSError) as raised:
            second.unlink()
        assert raised.value.errno == errno.EPERM
        proxy.fault(b"CREATE", b"OK Made", at="command")
        first.unlink()
        (trashed,) = (mounted.path / "Trash").iterdir()
        assert trashed.read_bytes() == plain(1)
        # It is no guess that this is the Trash.
        trashed.unlink()
        assert os.listdir(mounted.path / "Trash") == []
        mounted.unmount()


def test_the_size_of_an_upload_is_true_where_the_server_announces_another_one(
    user: Account, mount: Mounter
) -> None:
    """Exchange: a second rsync sent each file again. The search for the upload has compared all bytes."""

    def announce(line: bytes) -> bytes:
        return re.sub(rb"(?<=RFC822\.SIZE )\d+", lambda found: b"%d" % (int(found[0]) * 3 // 4), line)

    with Proxy(user.server, hide=["UIDPLUS"], edits=[announce]) as proxy:
        mounted = mount(proxy.account(user))
        path = mounted.path / "Sent" / "new.eml"
        path.write_bytes(plain(1))
        drain(mounted)
        assert path.stat().st_size == len(plain(1))
        mounted.unmount()
        again = mount(proxy.account(user), cache=mounted.cache)
        assert (again.path / "Sent" / "new.eml").stat().st_size == len(plain(1))
        again.unmount()
