"""The steps of ``imapfs check`` that log in: what the server offers, and how fast it is."""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Final, Self

from imapfs.account.values import show_size
from imapfs.cli.check.connection import milliseconds
from imapfs.cli.check.finding import Result
from imapfs.cli.check.sample import NotListed, Sample
from imapfs.errors import ImapfsError
from imapfs.imap.connect import tls_context
from imapfs.imap.grammar import ListEntry
from imapfs.imap.session import Session
from imapfs.log import shown_path
from imapfs.model import CredentialProvider, MountConfig
from imapfs.store.rows import Directory
from imapfs.sync.mailbox_list import display_name, plan_tree
from imapfs.sync.trash import known_by_name

_MAX_SPEND_SECONDS: Final = 15.0
"""Maximum time for opening connections, and for fetching the sample."""
_ROUND_TRIPS: Final = 5

_COSTS: Final = (
    ("UIDPLUS", "deleted messages stay on the server, marked as deleted, and uploads must be searched for"),
    ("MOVE", "a message is moved by copying it and deleting the original"),
    ("ENABLE", "CONDSTORE and QRESYNC are hardly usable"),
    ("CONDSTORE", "refreshing a mailbox compares all flags, which is slow if it holds many messages"),
    ("QRESYNC", "refreshing a mailbox compares all UIDs to find deleted messages, which takes longer"),
    ("IDLE", "the server cannot announce changes: mailboxes are checked when opened, and now and then"),
    ("NOTIFY", "each mailbox in use is watched with its own connection, the others are checked now and then"),
    ("LIST-STATUS", "checking for changes takes a command for each mailbox"),
    ("LITERAL+/LITERAL-", "each upload takes one more round trip"),
    ("SPECIAL-USE", "Trash is known only if the server marks it anyway"),
    ("NAMESPACE", "a common prefix of all mailboxes, such as INBOX., is shown as a directory"),
    ("QUOTA", "df does not show how full the account is"),
)
"""What imapfs uses, most important first, and the cost of its absence; one of several alternatives is
enough."""
_IMPORTANT: Final = frozenset({"UIDPLUS", "CONDSTORE", "IDLE"})
"""Capabilities whose absence is a warning."""


class AccountSteps:
    """The session of the login, and what the steps found with it; a context manager that closes the
    session."""

    def __init__(self, config: MountConfig, credentials: Callable[[], CredentialProvider]) -> None:
        self._config = config
        self._account = config.account
        self._ask = credentials
        self._credentials: CredentialProvider | None = None
        self._session: Session | None = None
        self._entries: list[ListEntry] = []
        self._sample = Sample()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._session is not None:
            if kind is not None:
                self._session.abort()
            self._session.close()

    def credentials(self) -> Iterator[Result]:
        self._credentials = self._ask()
        yield Result("ok", f"found for {self._account.user}")

    def login(self) -> Iterator[Result]:
        self._session = self._log_in()
        yield Result("ok", f"{self._account.user} is logged in")

    def _log_in(self) -> Session:
        assert self._credentials is not None
        context = tls_context(self._account)
        return Session.connect(self._account, self._credentials, context, self._config.timeout)

    def _live(self) -> Session:
        """Return the session, or a new one if an earlier step has lost it."""
        if self._session is None or not self._session.alive:
            if self._session is not None:
                self._session.close()
            self._session = self._log_in()
        return self._session

    def capabilities(self) -> Iterator[Result]:
        session = self._live()
        present = [one for names, _ in _COSTS for one in names.split("/") if session.has(one)]
        yield Result("ok", " ".join(present) or "none that imapfs can use")
        for names, cost in _COSTS:
            # ENABLE is needed only for the other two.
            matters = names != "ENABLE" or session.has("CONDSTORE") or session.has("QRESYNC")
            if matters and not any(one in present for one in names.split("/")):
                yield Result("warning" if names in _IMPORTANT else "ok", f"no {names}: {cost}")

    def mailboxes(self) -> Iterator[Result]:
        session = self._live()
        prefix = session.personal_prefix
        self._entries = session.list_mailboxes()
        tree = plan_tree(self._entries, prefix)
        delimiters = {entry.delimiter.decode("ascii", "replace") for entry in self._entries}
        yield Result(
            "ok",
            f"{sum(directory.selectable for directory in tree)} mailboxes,"
            f" personal namespace {_quoted(prefix)}, delimiter {' '.join(map(repr, sorted(delimiters)))}",
        )
        wanted = self._account.mailbox
        if wanted is not None and not any(directory.path == _path(wanted) for directory in tree):
            top = ", ".join(d.path[0].decode("utf-8", "replace") for d in tree if len(d.path) == 1)
            yield Result(
                "failed", f"there is no mailbox {wanted}", f"choose another; those at the top are: {top}"
            )
        uses = {
            use: shown_path(directory.path)
            for directory in reversed(tree)
            if (use := directory.special_use) and directory.selectable
        }
        yield Result(
            "ok", ", ".join(f"{use} is {uses[use]}" for use in sorted(uses)) or "no special-use mailboxes"
        )
        if self._config.delete == "trash" and not self._config.read_only:
            yield self._trash(tree, marked="\\Trash" in uses)

    def _trash(self, tree: Sequence[Directory], *, marked: bool) -> Result:
        """Say where rm moves messages to, and why."""
        named = self._config.trash
        if named is not None:
            if any(directory.path == _path(named) for directory in tree):
                return Result("ok", f"rm moves to {named}, as configured")
            return Result("warning", f"there is no mailbox {named}: rm is refused", "correct trash")
        if marked:
            return Result("ok", "rm moves to the mailbox that the server marks as \\Trash")
        found = known_by_name(directory.path for directory in tree if directory.selectable)
        if found is None:
            return Result("ok", "the server has no Trash: the first rm makes one")
        path = shown_path(found)
        return Result(
            "warning",
            f"no mailbox is marked as \\Trash: rm moves to {path}, because of its name",
            f'to delete in it as well, set trash = "{path}"',
        )

    def quota(self) -> Iterator[Result]:
        found = self._live().quota(b"INBOX")
        if found is None:
            yield Result("ok", "the server reports none: df shows the disk of the cache")
            return
        detail = f"{show_size(found.used)} of {show_size(found.limit)} used"
        if found.used >= 0.95 * found.limit:
            yield Result("warning", detail, "uploads may be refused: delete messages, or get more space")
        else:
            yield Result("ok", detail)

    def connections(self) -> Iterator[Result]:
        """Count how many connections can be open at once, up to what a mount would use."""
        self._live()
        wanted, count = self._config.connections, 1
        end = time.monotonic() + _MAX_SPEND_SECONDS
        with _Sessions() as others:
            while count < wanted and time.monotonic() < end:
                try:
                    others.append(self._log_in())
                except ImapfsError as error:
                    yield Result(
                        "warning",
                        f"{count} of {wanted} can be open at once: {error.problem}",
                        f"close other mail programs and mounts, or use --connections {count}",
                    )
                    return
                count += 1
        untried = f" (the rest of {wanted} were not tried, for lack of time)" if count < wanted else ""
        yield Result("ok", f"{count} can be open at once{untried or ', as configured'}")

    def latency(self) -> Iterator[Result]:
        session, took = self._live(), []
        for _ in range(_ROUND_TRIPS):
            begin = time.monotonic()
            session.noop()
            took.append(time.monotonic() - begin)
        yield Result("ok", f"{milliseconds(statistics.median(took))} per round trip")

    def throughput(self) -> Iterator[Result]:
        try:
            self._sample.take(self._live(), self._entries, _MAX_SPEND_SECONDS)
        except NotListed as error:
            yield Result("failed", str(error), "ask the administrator of the server")
            return
        sample = self._sample
        if not sample.bytes:
            yield Result("ok", "no message to measure with")
            return
        rate = sample.bytes / max(sample.seconds, 1e-6)
        count = len(sample.exact)
        yield Result(
            "ok",
            f"{show_size(rate)} per second ({show_size(sample.bytes)} in {sample.seconds:.2g} s,"
            f" {count} {'message' if count == 1 else 'messages'})",
        )

    def sizes(self) -> Iterator[Result]:
        """Compare RFC822.SIZE with the size of BODY[] (RFC 9051 section 7.5.2)."""
        sample = self._sample
        pairs = [
            (sample.announced[uid], exact) for uid, exact in sample.exact.items() if uid in sample.announced
        ]
        wrong = [abs(announced - exact) for announced, exact in pairs if announced != exact]
        if wrong:
            yield Result(
                "warning",
                f"the server states a wrong size for {len(wrong)} of {len(pairs)} messages, by up to"
                f" {show_size(max(wrong))}",
                "ls shows the right size once a message was read; run 'imapfs fetch' before rsync, tar or a"
                " backup",
            )
        else:
            yield Result("ok", f"exact for {len(pairs)} messages" if pairs else "no message to compare")


class _Sessions(list[Session]):
    """Sessions that are closed at the end of the block; after an exception without waiting for the server."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for session in self:
            if kind is not None:
                session.abort()
            session.close()


def _quoted(name: bytes) -> str:
    return repr(display_name(name)) if name else "without a prefix"


def _path(mailbox: str) -> tuple[bytes, ...]:
    return tuple(mailbox.strip("/").encode().split(b"/"))
