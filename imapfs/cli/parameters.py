"""What the commands take: types of parameters, how a shell completes them, and the settings' options.

Everything heavy is imported inside the function that needs it, as in `imapfs.cli.main`.
"""

import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import click
from click.shell_completion import CompletionItem

from imapfs.account.settings import SETTINGS, Setting
from imapfs.errors import ImapfsError

_Command = TypeVar("_Command", bound=Callable[..., Any])

# What a shell would take for something else; click hands a completion to it as it is.
_NEEDS_QUOTES = re.compile(r"[^\w@%+=:,./~-]")


class _Path(click.ParamType[Path]):
    """A path that is not looked at: click's own type calls stat(), and a stuck mount never answers."""

    def __init__(self, name: str) -> None:
        self.name = name
        """``file`` or ``directory``."""

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        return Path(value)

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem[str]]:
        return [CompletionItem(incomplete, type="dir" if self.name == "directory" else "file")]


class _LiveMount(_Path):
    """A mountpoint of imapfs; any directory is offered where there is no mount that fits."""

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem[str]]:
        from imapfs import mountinfo

        places = [str(mount.mountpoint) for mount in mountinfo.imapfs_mounts()]
        return _completions(places, os.path.expanduser(incomplete)) or super().shell_complete(  # noqa: PTH111
            ctx, param, incomplete
        )


class _Source(click.ParamType[str]):
    """A URL or the name of an account; the names are completed."""

    name = "source"

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem[str]]:
        from imapfs.account import config

        try:
            names = config.load_accounts(config.default_path())
        except ImapfsError:
            return []
        return _completions(names, incomplete)


def _completions(words: Iterable[str], begin: str) -> list[CompletionItem[str]]:
    fit = sorted(word for word in words if word.startswith(begin) and not _NEEDS_QUOTES.search(word))
    return [CompletionItem(word) for word in fit]


FILE = _Path("file")
DIRECTORY = _Path("directory")
LIVE_MOUNT = _LiveMount("directory")
SOURCE = _Source()


class _Decorator(Protocol):
    def __call__(self, command: _Command, /) -> _Command: ...


def setting_options(command: _Command) -> _Command:
    """Give a command the option of every setting that has one; the values arrive as its keyword arguments."""
    return _with(command, SETTINGS)


def connection_options(command: _Command) -> _Command:
    """Give a command the options only of the settings that say how to reach an account."""
    return _with(command, [setting for setting in SETTINGS if setting.connects])


def setting_option(key: str, meaning: str = "") -> _Decorator:
    """Give a command the option of one setting, which may mean something of its own there.

    It is ``--KEY`` also where ``imapfs mount`` takes that from SOURCE.
    """
    (setting,) = [setting for setting in SETTINGS if setting.key == key]
    return _option(setting, meaning)


def _with(command: _Command, settings: Sequence[Setting]) -> _Command:
    for setting in reversed(settings):
        if setting.flag:
            command = _option(setting)(command)
    return command


def _option(setting: Setting, meaning: str = "") -> _Decorator:
    default = f"  [default: {setting.shown_default}]" if setting.shown_default else ""
    how: dict[str, Any] = {"help": meaning or setting.meaning + default}
    match setting.kind:
        case "flag":
            # Without a value of its own: what was not given leaves it to the configuration file.
            how |= {"is_flag": True, "default": None}
        case "choice":
            how["type"] = click.Choice(setting.choices)
        case "path":
            how["type"] = FILE
        case "directory":
            how["type"] = DIRECTORY
        case "integer":
            how["type"] = int
        case "number":
            how["type"] = float
        case "list":
            how["multiple"] = True
        case "text" | "size" | "table":
            how["type"] = str
    if setting.metavar:
        how["metavar"] = setting.metavar
    return click.option(setting.flag or f"--{setting.key}", setting.key.replace("-", "_"), **how)
