"""The command line: ``imapfs`` and the table of its commands.

Exit codes: 0 success, 1 failure (one line on stderr), 2 wrong usage, 3 the login was refused or no password
was found, 130 interrupted.
"""

import logging
import sys
from collections.abc import Mapping
from importlib import import_module
from typing import Final, NoReturn

import click

from imapfs import __version__
from imapfs.errors import AuthenticationFailed, CredentialError, ImapfsError
from imapfs.log import one_line

_SECTIONS: Final[Mapping[str, Mapping[str, str]]] = {
    "To begin": {
        "setup": "imapfs.cli.setup.command",
        "check": "imapfs.cli.check.command",
        "login": "imapfs.cli.login",
        "accounts": "imapfs.cli.accounts",
    },
    "To mount": {"mount": "imapfs.cli.mount", "umount": "imapfs.cli.mount"},
    "While mounted": {
        "status": "imapfs.cli.status",
        "sync": "imapfs.cli.status",
        "retry": "imapfs.cli.status",
        "fetch": "imapfs.cli.fetch",
        "watch": "imapfs.cli.watch",
    },
}
"""The module of each command, which has the command's name there; in the order of ``--help``.

These modules import what is heavy (rich, keyring, and with the daemon trio, pyfuse3 and IMAPClient) inside
functions: --help, completion and a mistyped command must answer at once.
"""
_COMMANDS: Final = {name: module for section in _SECTIONS.values() for name, module in section.items()}


class _Commands(click.Group):
    """A group that imports a command's module when the command is needed."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's interface
        return list(_COMMANDS)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands, grouped by their use."""
        for title, names in _SECTIONS.items():
            rows = [(name, self.get_command(ctx, name)) for name in names]
            with formatter.section(title):
                formatter.write_dl([(n, c.get_short_help_str(formatter.width)) for n, c in rows if c])

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name == "help":
            return show_help
        if cmd_name not in _COMMANDS:
            return None
        command = getattr(import_module(_COMMANDS[cmd_name]), cmd_name)
        assert isinstance(command, click.Command)
        return command


@click.group(cls=_Commands, context_settings={"max_content_width": 100})
@click.version_option(__version__, prog_name="imapfs", message="%(prog)s %(version)s")
def commands() -> None:
    """Mount an IMAP account as a directory: mailboxes are directories, messages are .eml files."""


@click.command("help")
@click.argument("command", required=False)
@click.pass_context
def show_help(ctx: click.Context, command: str | None) -> None:
    """Do what --help does, of COMMAND if that is given."""
    group = ctx.parent
    assert group is not None
    if command is None:
        click.echo(group.get_help())
        return
    found = commands.get_command(group, command)
    if found is None:
        raise click.UsageError(f"no such command: {command}", group)
    with click.Context(found, info_name=command, parent=group) as context:
        click.echo(found.get_help(context))


def all_commands() -> dict[str, click.Command]:
    """Return every command by its name, in the order of ``--help``."""
    context = click.Context(commands)
    found = {name: commands.get_command(context, name) for name in commands.list_commands(context)}
    return {name: command for name, command in found.items() if command is not None}


def main() -> NoReturn:
    """Run the command line and exit."""
    sys.exit(run(commands, "imapfs"))


def run(command: click.Command, name: str) -> int:
    """Run ``command`` with the arguments of the process and return the exit code. Never raises."""
    try:
        # A command that returns gives None; --help and the like give their exit code.
        return int(command.main(prog_name=name, standalone_mode=False) or 0)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        return 130
    except (AuthenticationFailed, CredentialError) as error:
        # Service managers must not retry on this code: repeated wrong passwords may lock an account.
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
