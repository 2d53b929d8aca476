"""The command line: ``imapfs`` and its commands.

Exit codes: 0 done, 1 failed (one line on stderr), 2 wrong usage, 3 failed for want of the right password,
130 interrupted.
"""

# Everything heavy (rich, keyring, platformdirs, and behind daemon trio, pyfuse3 and IMAPClient) is imported
# inside the function that needs it: --help, completion and a mistyped command must answer at once.
import contextlib
import json
import logging
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

import click

from imapfs import __version__
from imapfs.cli.parameters import (
    DIRECTORY,
    LIVE_MOUNT,
    SOURCE,
    connection_options,
    setting_option,
    setting_options,
)
from imapfs.errors import AuthenticationFailed, CredentialError, ImapfsError, UsageError
from imapfs.log import one_line
from imapfs.model import Secret, Security

if TYPE_CHECKING:
    from imapfs.cli.check.steps import Finding
    from imapfs.mountinfo import Mount


@click.group(context_settings={"max_content_width": 100})
@click.version_option(__version__, prog_name="imapfs", message="%(prog)s %(version)s")
def commands() -> None:
    """Mount an IMAP account as a directory: mailboxes are directories, messages are .eml files."""


@commands.command()
@click.argument("source", type=SOURCE, required=False)
@click.argument("mountpoint", type=DIRECTORY, required=False)
@click.option(
    "--all", "everything", metavar="DIR", type=DIRECTORY, help="Mount each account NAME on DIR/NAME."
)
@setting_options
@click.option("-f", "--foreground", is_flag=True, help="Stay in the foreground; Ctrl-C unmounts.")
@click.option("-v", "--verbose", count=True, help="Log details; twice: also the protocol.")
def mount(
    source: str | None,
    mountpoint: Path | None,
    everything: Path | None,
    foreground: bool,
    verbose: int,
    options: tuple[str, ...],
    **settings: object,
) -> None:
    """Mount SOURCE on the empty directory MOUNTPOINT.

    SOURCE is imaps://user@host[:port][/Mailbox], imap:// for STARTTLS, or the name of an account in the
    configuration file. Returns when the mount is live. The password or token comes from one of the options,
    the account's entry, a systemd credential, the keyring, or a prompt on the terminal.

    With --all DIR, each account of the configuration file is mounted on the directory of its name in DIR, all
    at the same time; options are for each of them.
    """
    given = _given(settings)
    if everything is not None:
        if source is not None or foreground:
            raise click.UsageError("--all DIR stands alone: without SOURCE, MOUNTPOINT and --foreground")
        _mount_all(everything, given, verbose, options)
        return
    if source is None or mountpoint is None:
        raise click.UsageError("give SOURCE and MOUNTPOINT, or --all DIR")

    from imapfs.account import config, credentials
    from imapfs.daemon import background as daemon

    given["options"] = list(options)
    resolved = config.resolve(source, mountpoint, given, config.default_path())
    # Once more in run(), but nobody should type a password to learn that the directory is missing.
    daemon.preflight(resolved.mount, resolved.log_file)
    password = credentials.resolve(resolved.mount.account, resolved.credentials)
    daemon.run(resolved.mount, password, foreground=foreground, log_file=resolved.log_file, verbosity=verbose)


def _given(settings: Mapping[str, object]) -> dict[str, object]:
    """The options that were given, under their names in the configuration file and as it would have them."""
    return {
        name.replace("_", "-"): str(value) if isinstance(value, Path) else value
        for name, value in settings.items()
        if value is not None
    }


def _mount_all(directory: Path, given: Mapping[str, object], verbose: int, options: Sequence[str]) -> None:
    from imapfs.account import config
    from imapfs.cli.mount import mount_all

    for key in (*config.SECRETS, "log-file"):
        if key in given:
            raise click.UsageError(f"--{key} is for one account: with --all it comes from each one's entry")
    arguments = [f"--{key}" if value is True else f"--{key}={value}" for key, value in given.items()]
    arguments += ["-v"] * verbose + [f"-o{option}" for option in options]

    def report(name: str, reason: str | None) -> None:
        again = f"imapfs mount {shlex.quote(name)} {shlex.quote(str(directory / name))}"
        click.echo(one_line(f"{name}: mounted" if reason is None else f"{name}: {reason}; again: {again}"))

    if not mount_all(config.default_path(), directory, arguments, report):
        raise ImapfsError("not all accounts are mounted")


@commands.command()
@click.argument("account", type=SOURCE)
@click.option("--device", is_flag=True, help="By a code that is entered in a browser on any machine.")
def login(account: str, device: bool) -> None:
    """Consent to the use of ACCOUNT by OAuth 2.0, in a browser.

    ACCOUNT is the name of one in the configuration file that has an "oauth" table. What the provider gives is
    kept in the keyring, and mounts use it from then on.
    """
    from imapfs.account import config, consent
    from imapfs.imap.connect import tls_context
    from imapfs.imap.session import Session

    path = config.default_path()
    located = config.locate(account, {}, path)
    if located.credentials.oauth is None:
        raise UsageError(
            f"this account has no table 'oauth' in {path}, which says whom to ask: see the README"
        )
    timeout = located.options["timeout"]
    context = tls_context(located.account)

    def check(token: Secret) -> None:
        # Whoever consented as somebody else, or has no IMAP there, learns it now.
        Session.connect(located.account, token, context, timeout).close()

    consent.ask(located.credentials.oauth, located.account, click.echo, device=device, check=check)
    click.echo(f"logged in as {located.account.user}")


@commands.command()
@click.argument("source", type=SOURCE)
@connection_options
@setting_option("cache-dir")
@setting_option("cache-size")
@setting_option("connections", "How many connections to try.  [default: as for a mount]")
@setting_option("options")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object at the end.")
def check(source: str, as_json: bool, options: tuple[str, ...], **settings: object) -> None:
    """Find out what is in the way of mounting SOURCE, step by step.

    Changes nothing on the server. The output holds no password, but host, user and names of mailboxes. Exit
    code 0 if a mount would work, even if not at its best.
    """
    from imapfs.account import config, credentials
    from imapfs.cli.check import steps as checking

    given = _given(settings)
    given["options"] = list(options)
    # There is no mountpoint, and nothing here looks at it.
    resolved = config.resolve(source, Path("/"), given, config.default_path())
    account = resolved.mount.account
    if not as_json:
        click.echo(one_line(f"imapfs {__version__}, {account.url}"))
    found: list[Finding] = []
    printer = _Printer()
    findings = checking.run(resolved.mount, lambda: credentials.resolve(account, resolved.credentials))
    with contextlib.closing(findings):
        for finding in findings:
            found.append(finding)
            if not as_json:
                printer.show(finding)
    usable = all(finding.status in ("ok", "warning") for finding in found)
    if as_json:
        steps = [finding._asdict() for finding in found]
        shown = {"version": __version__, "source": account.url, "usable": usable, "steps": steps}
        click.echo(json.dumps(shown, indent=2))
    else:
        printer.end()
        click.echo("A mount would work." if usable else "A mount would not work.")
    if not usable:
        raise click.exceptions.Exit(1)


class _Printer:
    """Prints findings for people: steps that were skipped one after the other on one line."""

    _SIGNS: ClassVar = {
        "ok": ("\N{CHECK MARK}", "+", "green"),
        "warning": ("!", "!", "yellow"),
        "failed": ("\N{BALLOT X}", "x", "red"),
    }

    def __init__(self) -> None:
        self._step = ""
        self._skipped: list[str] = []
        encoding = sys.stdout.encoding or "ascii"
        self._ascii = "\N{CHECK MARK}".encode(encoding, "ignore") == b""

    def show(self, finding: "Finding") -> None:
        if finding.status == "skipped":
            self._skipped.append(finding.step)
            return
        self.end()
        sign, substitute, colour = self._SIGNS[finding.status]
        mark = click.style(substitute if self._ascii else sign, fg=colour)
        name = "" if finding.step == self._step else finding.step
        click.echo(f"{mark} {name:<13} {one_line(finding.detail)}")
        if finding.remedy:
            click.echo(f"{'':16}-> {one_line(finding.remedy)}")
        self._step = finding.step

    def end(self) -> None:
        if self._skipped:
            click.echo(f"- {'not checked':<13} {', '.join(self._skipped)}")
            self._skipped.clear()


@commands.command()
@click.argument("mountpoint", type=LIVE_MOUNT, required=False)
@click.option("--all", "everything", metavar="DIR", type=DIRECTORY, help="Unmount all there is below DIR.")
def umount(mountpoint: Path | None, everything: Path | None) -> None:
    """Send what is waiting, unmount MOUNTPOINT and wait until its daemon has ended.

    With --all DIR, do so with all mounts below DIR at the same time.
    """
    if (mountpoint is None) == (everything is None):
        raise click.UsageError("give MOUNTPOINT, or --all DIR")
    if everything is not None:
        _unmount_all(everything)
        return
    assert mountpoint is not None

    from imapfs.daemon import control

    try:
        control.sync(mountpoint, _progress("Ctrl-C unmounts now and leaves them to the next mount"))
    except KeyboardInterrupt:
        _end_progress()
    except ImapfsError:
        pass  # a daemon that is dead or stuck: what there is to say is said below
    control.unmount(mountpoint)


def _unmount_all(directory: Path) -> None:
    from imapfs.cli.mount import unmount_all

    def report(mountpoint: str, reason: str | None) -> None:
        click.echo(one_line(f"{mountpoint}: {reason or 'unmounted'}"))

    if not unmount_all(directory, report):
        raise ImapfsError("not all are unmounted")


@commands.command()
@click.option("--address", metavar="ADDRESS", help="Your e-mail address, from which the server is found.")
@click.option("--name", metavar="NAME", help="What to call the account.")
@setting_option("host", "The IMAP server, which is then not looked for.")
@setting_option("port")
@setting_option("security")
@setting_option("user", "The user name there.  [default: as found, or the address]")
@click.option("--keyring", is_flag=True, help="The password is in the keyring, or is put there.")
@click.option("--prompt", is_flag=True, help="The password is asked for at each mount.")
@connection_options
@click.option(
    "--no-lookup", is_flag=True, help="Ask nobody for the server; look only into imapfs's own table."
)
@click.option("--no-test", is_flag=True, help="Do not log in to see whether it works.")
@click.option("--replace", is_flag=True, help="Replace the account if there is one of that name.")
@click.option("-y", "--yes", is_flag=True, help="Take what is found or proposed without asking.")
def setup(
    address: str | None,
    name: str | None,
    host: str | None,
    port: int | None,
    security: Security | None,
    user: str | None,
    keyring: bool,
    prompt: bool,
    no_lookup: bool,
    no_test: bool,
    replace: bool,
    yes: bool,
    **settings: object,
) -> None:
    """Add an account to the configuration file, from your e-mail address to the first login.

    Asks at the terminal for what no option says. A password is never an option: it is typed, or comes from
    a command, a file or the keyring.
    """
    from imapfs.account import config
    from imapfs.account.discovery import Network
    from imapfs.cli import setup as walk

    options = _given(settings)
    ca_file = options.get("ca-file")
    walk.run(
        walk.Given(
            options, name, address, host, port, security, user, keyring, prompt,
            lookup=not no_lookup, test=not no_test, replace=replace, yes=yes,
        ),
        config.default_path(),
        Network(ca_file=Path(str(ca_file)) if ca_file is not None else None),
    )  # fmt: skip


@commands.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON: a list of objects.")
def accounts(as_json: bool) -> None:
    """List the accounts in the configuration file, and where each is mounted."""
    from imapfs.account import config
    from imapfs.account import file as module

    listed = module.accounts(config.default_path())
    if as_json:
        click.echo(json.dumps([one._asdict() for one in listed], indent=2))
        return
    if not listed:
        click.echo("no accounts yet: 'imapfs setup' adds one")
    for one in listed:
        where = ", ".join(one.mountpoints) or "not mounted"
        click.echo(one_line(f"{one.name}  {one.url}  ({one.credential})  {where}"))


@commands.command()
@click.argument("mountpoint", type=LIVE_MOUNT)
def sync(mountpoint: Path) -> None:
    """Wait until everything written below MOUNTPOINT is on the server.

    Lists what cannot be sent, and fails if there is any.
    """
    from imapfs.daemon import control

    waiting = control.sync(mountpoint, _progress("Ctrl-C stops waiting, not sending"))
    for one in waiting:
        click.echo(one_line(f"{one['path']}: {one['state']}: {one['error'] or 'not sent yet'}"))
    if waiting:
        raise ImapfsError(
            f"{len(waiting)} files are not on the server; 'imapfs retry {mountpoint}' tries refused ones"
        )


@commands.command()
@click.argument("directory", type=DIRECTORY)
def fetch(directory: Path) -> None:
    """Fetch all messages below DIRECTORY, which is in a mount, into the cache.

    Can be stopped at any time, and goes on there when it is run again.
    """
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.progress import TransferSpeedColumn as SpeedColumn

    from imapfs.cli import fetch as download

    console = Console(stderr=True)
    with console.status(f"looking what there is in {directory}"):
        messages = download.find(directory)
    failed: list[str] = []
    columns = TextColumn("Ctrl-C stops"), BarColumn(), DownloadColumn(), SpeedColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("fetch", total=messages.size)
        for outcome in download.read(messages.files):
            progress.advance(task, outcome.size)
            if outcome.error:
                failed.append(outcome.error)
    for line in failed[:10]:
        click.echo(one_line(line), err=True)
    if failed:
        raise ImapfsError(f"{len(failed)} of {len(messages.files)} messages were not fetched; run it again")
    click.echo(f"{len(messages.files)} messages are in the cache")


@commands.command()
@click.argument("mountpoint", type=LIVE_MOUNT)
@click.option("--json", "as_json", is_flag=True, help="Print JSON: an object a line.")
def watch(mountpoint: Path, as_json: bool) -> None:
    """Print what other clients change in the mount at MOUNTPOINT, as it happens.

    Ends when MOUNTPOINT is unmounted, or with Ctrl-C.
    """
    import os

    from imapfs.cli import watch as watching

    try:
        for event in watching.events(mountpoint, sys.stdout.fileno()):
            if event["event"] == "watching":
                click.echo(one_line(f"watching {mountpoint}: Ctrl-C ends it"), err=True)
            else:
                click.echo(json.dumps(event) if as_json else one_line(watching.as_text(event)))
    except (watching.Closed, BrokenPipeError):
        # What is in the buffer has nowhere to go, and would be tried again at the exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return
    click.echo(one_line(f"{mountpoint} was unmounted"), err=True)


@commands.command()
@click.argument("mountpoint", type=LIVE_MOUNT)
def retry(mountpoint: Path) -> None:
    """Send again what the server refused."""
    from imapfs.daemon import control

    click.echo(f"{control.retry(mountpoint)} files are sent again")


def _progress(how_to_stop: str) -> Callable[[int], None]:
    """Shows the number of files that wait, on a terminal, as long as there are any."""
    shown = False

    def show(count: int) -> None:
        nonlocal shown
        if sys.stderr.isatty() and (count or shown):
            shown = True
            click.echo(f"\r\x1b[K{count} files to send ({how_to_stop})", err=True, nl=not count)

    return show


def _end_progress() -> None:
    if sys.stderr.isatty():
        click.echo(err=True)


@commands.command()
@click.argument("mountpoint", type=LIVE_MOUNT, required=False)
@click.option(
    "--json", "as_json", is_flag=True, help="Print JSON: an object for one MOUNTPOINT, else a list."
)
def status(mountpoint: Path | None, as_json: bool) -> None:
    """Show how the mount at MOUNTPOINT is, or list all imapfs mounts."""
    from imapfs import mountinfo
    from imapfs.daemon import control

    if mountpoint is not None:
        shown = control.read_status(mountpoint)
        if as_json:
            click.echo(json.dumps(shown, indent=2))
        else:
            _show(list(_rows(shown)))
        return
    every = [_status_or_reason(mount) for mount in mountinfo.imapfs_mounts()]
    if as_json:
        click.echo(json.dumps(every, indent=2))
        return
    for one in every:
        line = f"{one['mountpoint']}  {one['source']}  {one['state']}"
        click.echo(one_line(f"{line}: {one['reason']}" if one.get("reason") else line))


def _status_or_reason(mount: "Mount") -> dict[str, Any]:
    """The status of ``mount``, or what can be said where its daemon does not answer."""
    from imapfs.daemon import control

    known = {"mountpoint": str(mount.mountpoint), "source": mount.source}
    try:
        return {**known, "state": "unknown", **control.read_status(mount.mountpoint)}
    except ImapfsError as error:
        return {**known, "state": "unavailable", "reason": str(error)}


def _rows(status: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Whatever fields there are, so that a newer daemon's are shown as well."""
    for key, value in status.items():
        if isinstance(value, dict):
            yield from _rows(value, f"{prefix}{key} ")
            continue
        # A "limit" is of bytes where bytes are counted beside it.
        in_bytes = key == "bytes" or (key == "limit" and "bytes" in status)
        yield f"{prefix}{key}".replace("_", " "), one_line(_readable(value, in_bytes))


def _readable(value: object, in_bytes: bool) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if in_bytes and isinstance(value, int):
        from imapfs.account.config import show_size

        return show_size(value)
    return value if isinstance(value, str) else json.dumps(value)


def _show(rows: list[tuple[str, str]]) -> None:
    if not sys.stdout.isatty():
        for name, value in rows:
            click.echo(f"{name}: {value}")
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=False, box=None)
    for name, value in rows:
        # As Text, because "[...]" in a string would be taken for markup.
        table.add_row(Text(name, style="bold"), Text(value))
    Console().print(table)


def main() -> NoReturn:
    """Run the command line and exit."""
    sys.exit(run(commands, "imapfs"))


def run(command: click.Command, name: str) -> int:
    """Run ``command`` with the arguments of the process and return its exit code; no exception gets out."""
    try:
        # None from a command that has ended by itself, a code from --help and the like.
        return int(command.main(prog_name=name, standalone_mode=False) or 0)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        return 130
    except (AuthenticationFailed, CredentialError) as error:
        # Told apart so that nothing tries again by itself: a few wrong passwords may lock an account.
        _fail(name, str(error))
        return 3
    except (ImapfsError, OSError) as error:
        return _fail(name, str(error))
    except Exception as error:
        return _fail(name, f"internal error: {type(error).__name__}: {error}")


def _fail(name: str, line: str) -> int:
    from imapfs.daemon import systemd

    prefix = systemd.priority(logging.ERROR) if systemd.is_journal(2) else ""
    click.echo(prefix + one_line(f"{name}: {line}"), err=True)
    return 1
