"""``imapfs check``: the command, and how it prints findings."""

import contextlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import click

from imapfs import __version__
from imapfs.cli.parameters import SOURCE, connection_options, given_settings, setting_option
from imapfs.log import one_line

if TYPE_CHECKING:
    from imapfs.cli.check.finding import Finding


@click.command()
@click.argument("source", type=SOURCE)
@connection_options
@setting_option("cache-dir")
@setting_option("cache-size")
@setting_option("connections", "Number of connections to try.  [default: as for a mount]")
@setting_option("options")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object at the end.")
def check(source: str, as_json: bool, options: tuple[str, ...], **settings: object) -> None:
    """Check, step by step, whether SOURCE can be mounted.

    Changes nothing on the server. The output contains the host, the user and names of mailboxes, but no
    password. The exit code is 0 if a mount would work, even if not at its best.
    """
    from imapfs.account import config, credentials
    from imapfs.cli.check import steps

    given = given_settings(settings)
    given["options"] = list(options)
    # There is no mountpoint, and no step looks at it.
    resolved = config.resolve(source, Path("/"), given, config.default_path())
    account = resolved.mount.account
    if not as_json:
        click.echo(one_line(f"imapfs {__version__}, {account.url}"))
    found: list[Finding] = []
    printer = _Printer()
    findings = steps.run(resolved.mount, lambda: credentials.resolve(account, resolved.credentials))
    with contextlib.closing(findings):
        for finding in findings:
            found.append(finding)
            if not as_json:
                printer.show(finding)
    usable = all(finding.status in ("ok", "warning") for finding in found)
    if as_json:
        report = {
            "version": __version__,
            "source": account.url,
            "usable": usable,
            "steps": [finding._asdict() for finding in found],
        }
        click.echo(json.dumps(report, indent=2))
    else:
        printer.end()
        click.echo("A mount would work." if usable else "A mount would not work.")
    if not usable:
        raise click.exceptions.Exit(1)


class _Printer:
    """Prints findings for people; consecutive skipped steps share one line."""

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
        """Print the steps that were skipped last."""
        if self._skipped:
            click.echo(f"- {'not checked':<13} {', '.join(self._skipped)}")
            self._skipped.clear()
