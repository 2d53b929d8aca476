"""The old version of an edited message leaves the server, whatever has become of its mailbox meanwhile."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from imapfs.model import Ino, MessageRef
from tests.conftest import ExpectedLog
from tests.support.filetree import ModelTree
from tests.support.mail import plain
from tests.support.mailboxes import everything
from tests.support.mounting import MailAccount, wait_until
from tests.support.servers.dovecot import Account, Dovecot
from tests.support.servers.proxy import Proxy
from tests.support.servers.tls import CertificateAuthority

DATE = 1_700_000_000

Model = Callable[[MailAccount], ModelTree]


@pytest.fixture
def model(tmp_path: Path) -> Iterator[Model]:
    """Return a function that starts a mount without a kernel; it ends with the test."""
    made: list[ModelTree] = []

    def start(account: MailAccount) -> ModelTree:
        made.append(ModelTree(account, tmp_path / "cache", delete="trash"))
        return made[-1]

    yield start
    for one in made:
        one.end()


def listed(files: ModelTree, mailbox: str, uid: int) -> MessageRef:
    """List a mailbox, and hide a message in it, as an edit does; return its identity."""
    (name,) = [name for name in files.listdir(mailbox) if name.endswith(f".{uid}.eml")]
    ino = Ino(files.stat(f"{mailbox}/{name}").ino)

    async def hide() -> MessageRef:
        cache = files.model.cache
        node, place = cache.node(ino), cache.mailbox_named(mailbox.encode())
        assert node is not None and node.uid is not None and place is not None
        cache.hide(ino)
        return MessageRef(mailbox.encode(), place.uidvalidity, node.uid, node.date, node.announced)

    return files.run(hide)


def places(account: Account, number: int) -> list[str]:
    found = everything(account).items()
    return [place for place, ones in found for one in ones if one.content == plain(number)]


def test_it_is_removed_from_a_mailbox_that_another_client_has_renamed(user: Account, model: Model) -> None:
    """Both versions stayed on the server, and the old one was not shown until the next mount."""
    user.deliver("Work", [(plain(1), DATE, "")])
    files = model(user)
    ref = listed(files, "Work", 1)
    with user.client() as client:
        client.rename("Work", "Elsewhere")
    files.run(files.model.replaced.discard, ref)
    wait_until(lambda: places(user, 1) == ["Trash"], "it is removed")


def test_it_is_removed_from_a_restored_server(
    ca: CertificateAuthority, model: Model, tmp_path: Path, expected_log: ExpectedLog
) -> None:
    """After a new listing, UID, date and size prove that it is the same message."""
    expected_log("offline: .* refuses connections")
    with Dovecot(ca) as server:
        own = server.account("own")
        own.deliver("Work", [(plain(1), DATE, "")])
        everything(own)
        own.back_up(tmp_path / "backup")
        own.deliver("Work", [(plain(2), DATE, "")])
        with Proxy(server) as proxy:
            files = model(proxy.account(own))
            ref = listed(files, "Work", 1)
            proxy.refuse()
            proxy.cut_all()
            server.stop()
            wait_until(lambda: files.model.pool.reason, "it is offline")
            own.restore(tmp_path / "backup")
            server.start_again()
            not_listed = proxy.fault(b'EXAMINE "Work"', b"NO [INUSE] Later", times=None)
            proxy.forget_commands()
            proxy.accept()
            files.run(files.model.replaced.discard, ref)
            proxy.wait_for_command(b'SELECT "Work"')
            not_listed.cancel()
            wait_until(lambda: places(own, 1) == ["Trash"], "it is removed")
            files.end()


def test_it_stays_in_what_is_only_called_a_trash_and_is_shown(
    user: Account, model: Model, expected_log: ExpectedLog
) -> None:
    """`rm` may not delete there for good. The removal was tried for ever, and the message never shown."""
    expected_log("both stay: Trash is taken for the Trash because of its name")
    user.deliver("Trash", [(plain(1), DATE, "")])
    with Proxy(user.server, hide=["SPECIAL-USE"]) as proxy:
        files = model(proxy.account(user))
        ref = listed(files, "Trash", 1)
        assert files.listdir("Trash") == []
        files.run(files.model.replaced.discard, ref)
        wait_until(lambda: files.listdir("Trash"), "it is shown again")
        assert places(user, 1) == ["Trash"]
        files.end()
