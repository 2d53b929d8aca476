"""What the server leaves out of an answer is not taken for deleted, and is shown if it can be."""

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pytest

from tests.conftest import ExpectedLog
from tests.support.mail import plain
from tests.support.mirror import mirror
from tests.support.servers.scripted import Scripted
from tests.support.servers.tls import CertificateAuthority

MESSAGES = [plain(n) for n in range(1, 9)]


class LeavingOut:
    """A server that ends FETCH with OK although it has left out some messages.

    ``says`` decides from a command whether it tells of the messages in `silent`.
    """

    def __init__(self, ca: CertificateAuthority, says: Callable[[bytes], bool]) -> None:
        self.silent: Sequence[int] = ()
        self._says = says
        self.server = Scripted(ca, MESSAGES, script=self._script)

    def _script(self, tag: bytes, command: bytes) -> Iterable[bytes] | None:
        if not command.startswith(b"UID FETCH") or self._says(command):
            return None
        _, _, uids, items = command.split(b" ", 3)
        told = [uid for uid in self.server.uids(uids) if uid not in self.silent]
        return [*(self.server.fetch(uid, items) for uid in told), tag + b" OK done\r\n"]


@pytest.mark.parametrize(
    "says",
    [
        pytest.param(lambda command: b"1:*" not in command, id="in a list of all"),
        pytest.param(lambda command: b"HEADER" not in command, id="with header fields"),
        pytest.param(
            lambda command: re.match(rb"UID FETCH \d+ \([^[]*\)$", command) is not None, id="among others"
        ),
    ],
)
@pytest.mark.trio
async def test_what_an_answer_leaves_out_is_asked_for_in_other_words(
    ca: CertificateAuthority, tmp_path: Path, says: Callable[[bytes], bool]
) -> None:
    """Such messages were never shown, and nothing was said."""
    made = LeavingOut(ca, says)
    made.silent = [3, 4, 8]
    with made.server:
        async with mirror(made.server, tmp_path) as here:
            await here.refresh()
            assert {uid: size for uid, (_, size, _) in here.messages().items()} == {
                uid: len(content) for uid, content in enumerate(MESSAGES, 1)
            }


@pytest.mark.trio
async def test_a_message_of_which_the_server_says_nothing_is_shown(
    ca: CertificateAuthority, tmp_path: Path, expected_log: ExpectedLog
) -> None:
    expected_log("the server says nothing about 1 messages .* UID 8")
    made = LeavingOut(ca, lambda command: False)
    made.silent = [8]
    with made.server:
        async with mirror(made.server, tmp_path) as here:
            await here.refresh()
            shown = here.messages()
            assert set(shown) == set(range(1, 9))
            made.silent = []
            await here.refresh()
            assert here.messages() == shown and not here.gone()


@pytest.mark.trio
async def test_what_an_answer_leaves_out_is_not_taken_for_deleted(
    ca: CertificateAuthority, tmp_path: Path
) -> None:
    """A mirror with ``--delete`` follows what is shown here."""
    made = LeavingOut(ca, lambda command: False)
    with made.server:
        async with mirror(made.server, tmp_path) as here:
            await here.refresh()
            shown = here.messages()
            made.silent = [2, 5]
            await here.refresh()
            assert here.messages() == shown and not here.gone()


@pytest.mark.trio
async def test_vanished_is_believed_only_if_search_agrees(ca: CertificateAuthority, tmp_path: Path) -> None:
    """iCloud reports messages as vanished that are there."""
    there = [1, 2, 3, 4, 6, 7, 8]
    server = Scripted(ca, MESSAGES, capabilities=b"IMAP4rev1 AUTH=PLAIN ENABLE CONDSTORE QRESYNC")

    def selected(tag: bytes, verb: bytes, vanished: bytes) -> Iterable[bytes]:
        yield b"* 8 EXISTS\r\n" if not vanished else b"* 7 EXISTS\r\n"
        yield b"* OK [UIDVALIDITY 7] valid\r\n* OK [UIDNEXT 9] next\r\n* OK [HIGHESTMODSEQ 5] highest\r\n"
        if vanished:
            yield b"* VANISHED (EARLIER) " + vanished + b"\r\n"
        yield tag + b" OK selected\r\n"

    def script(tag: bytes, command: bytes) -> Iterable[bytes] | None:
        if command.startswith((b"EXAMINE", b"SELECT")):
            return selected(tag, command, b"4:5" if b"QRESYNC" in command else b"")
        if command.startswith(b"UID SEARCH"):
            found = [uid for uid in server.uids(command.split(b" ")[-1]) if uid in there]
            return [b"* SEARCH" + b"".join(b" %d" % uid for uid in found) + b"\r\n", tag + b" OK done\r\n"]
        return None

    server.script = script
    with server:
        async with mirror(server, tmp_path) as here:
            await here.refresh()
            five = here.messages()[5][0]
            await here.refresh()
            assert set(here.messages()) == set(there)
            assert here.gone() == [five]
