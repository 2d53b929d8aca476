"""The steps of ``imapfs check``, in order: everything a mount needs, each problem with a remedy.

Nothing is changed on the server: mailboxes are opened with EXAMINE, bodies requested with PEEK. Findings can
be shown to others: they contain host, user and names of mailboxes, but no password or token.

A step is a method that yields results; an exception that it raises is a result too. A step is skipped if one
that it needs has failed. Only failed steps make the whole check fail.
"""

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass

from imapfs.cli.check.account import AccountSteps
from imapfs.cli.check.connection import ConnectionSteps
from imapfs.cli.check.finding import Finding, Result
from imapfs.cli.check.machine import MachineSteps
from imapfs.errors import ImapfsError
from imapfs.model import CredentialProvider, MountConfig


def run(config: MountConfig, credentials: Callable[[], CredentialProvider]) -> Generator[Finding, None, None]:
    """Yield what the steps find, as they find it. ``credentials`` may ask a person.

    Takes at most a few times the account's timeout. Closing the generator ends it at once.
    """
    unusable: set[str] = set()
    with AccountSteps(config, credentials) as account:
        for step in _steps(ConnectionSteps(config), account, MachineSteps(config)):
            missing = next((name for name in step.needs if name in unusable), None)
            if missing is not None:
                unusable.add(step.name)
                yield Finding(step.name, "skipped", f"needs {missing}")
                continue
            for finding in step.perform():
                if finding.status == "failed":
                    unusable.add(step.name)
                yield finding


@dataclass(frozen=True, slots=True)
class _Step:
    name: str
    work: Callable[[], Iterator[Result]]
    needs: tuple[str, ...] = ()
    essential: bool = True
    """Whether no mount works if the step raises an exception."""

    def perform(self) -> Iterator[Finding]:
        try:
            for result in self.work():
                yield Finding(self.name, *result)
        except (ImapfsError, OSError) as error:
            problem = error.problem if isinstance(error, ImapfsError) else str(error)
            remedy = error.remedy if isinstance(error, ImapfsError) else ""
            yield Finding(self.name, "failed" if self.essential else "warning", problem, remedy)


def _steps(connection: ConnectionSteps, account: AccountSteps, machine: MachineSteps) -> tuple[_Step, ...]:
    return (
        _Step("resolution", connection.resolution),
        _Step("tcp", connection.tcp, ("resolution",)),
        _Step("protocol", connection.protocol, ("tcp",)),
        _Step("tls", connection.tls, ("protocol",)),
        _Step("certificate", connection.certificate, ("tls",)),
        _Step("greeting", connection.greeting, ("certificate",)),
        _Step("credentials", account.credentials, ("greeting",)),
        _Step("login", account.login, ("credentials",)),
        _Step("capabilities", account.capabilities, ("login",), essential=False),
        _Step("mailboxes", account.mailboxes, ("login",)),
        _Step("quota", account.quota, ("login",), essential=False),
        _Step("connections", account.connections, ("login",), essential=False),
        _Step("latency", account.latency, ("login",), essential=False),
        _Step("throughput", account.throughput, ("mailboxes",), essential=False),
        _Step("sizes", account.sizes, ("mailboxes",), essential=False),
        _Step("fuse-device", machine.device),
        _Step("fusermount3", machine.fusermount),
        _Step("pyfuse3", machine.pyfuse3),
        _Step("allow-other", machine.allow_other),
        _Step("cache", machine.cache),
    )
