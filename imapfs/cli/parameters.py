"""What commands take: parameter types with shell completion, and the options that set a setting.

Heavy modules are imported inside functions, as in all modules of commands.
"""

# For CompletionItem, which is not generic in click 8.1 either.
from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import click
from click.shell_completion import CompletionItem

from imapfs.account.settings import BY_KEY, SETTINGS, Setting
from imapfs.errors import ImapfsError

if TYPE_CHECKING:
    _PathType = click.ParamType[Path]
    _StringType = click.ParamType[str]
else:
    # Not generic in click 8.1, which Debian 13 has.
    _PathType = _StringType = click.ParamType

_Function = TypeVar("_Function", bound=Callable[..., Any])

# A shell would interpret these characters, and click passes a completion on without quotes.
_NEEDS_QUOTES = re.compile(r"[^\w@%+=:,./~-]")


class _Path(_PathType):
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
    """The mountpoint of an imapfs mount; completes to any directory if no mount matches."""

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem[str]]:
        from imapfs import mountinfo

        mountpoints = [str(mount.mountpoint) for mount in mountinfo.imapfs_mounts()]
        return _completions(mountpoints, os.path.expanduser(incomplete)) or super().shell_complete(  # noqa: PTH111
            ctx, param, incomplete
        )


class _Source(_StringType):
    """A URL or the name of an account; names are completed."""

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


def _completions(words: Iterable[str], incomplete: str) -> list[CompletionItem[str]]:
    matches = (word for word in words if word.startswith(incomplete) and not _NEEDS_QUOTES.search(word))
    return [CompletionItem(word) for word in sorted(matches)]


FILE = _Path("file")
DIRECTORY = _Path("directory")
LIVE_MOUNT = _LiveMount("directory")
SOURCE = _Source()


# ---- Options of settings


class _Decorator(Protocol):
    def __call__(self, command: _Function, /) -> _Function: ...


def setting_options(command: _Function) -> _Function:
    """Give a command an option for every setting that has one; the values arrive as keyword arguments."""
    return _with_options(command, SETTINGS)


def connection_options(command: _Function) -> _Function:
    """Give a command only the options of settings that say how to reach an account."""
    return _with_options(command, [setting for setting in SETTINGS if setting.connects])


def setting_option(key: str, meaning: str = "") -> _Decorator:
    """Give a command the option of one setting, with a help text of its own if ``meaning`` is given.

    The option is ``--KEY``, even if ``imapfs mount`` takes the setting from SOURCE.
    """
    return _option(BY_KEY[key], meaning)


def given_settings(values: Mapping[str, object]) -> dict[str, object]:
    """Return the settings that the command line gives: by key, as the configuration file would have them."""
    return {
        name.replace("_", "-"): str(value) if isinstance(value, Path) else value
        for name, value in values.items()
        if value is not None
    }


def _with_options(command: _Function, settings: Sequence[Setting]) -> _Function:
    for setting in reversed(settings):
        if setting.flag:
            command = _option(setting)(command)
    return command


def _option(setting: Setting, meaning: str = "") -> _Decorator:
    default = f"  [default: {setting.shown_default}]" if setting.shown_default else ""
    attributes: dict[str, Any] = {"help": meaning or setting.meaning + default}
    match setting.kind:
        case "flag":
            # None, not False: a flag that is not given leaves the decision to the configuration file.
            attributes |= {"is_flag": True, "default": None}
        case "choice":
            attributes["type"] = click.Choice(setting.choices)
        case "path":
            attributes["type"] = FILE
        case "directory":
            attributes["type"] = DIRECTORY
        case "integer":
            attributes["type"] = int
        case "number":
            attributes["type"] = float
        case "list":
            attributes["multiple"] = True
        case "text" | "size" | "table":
            attributes["type"] = str
    if setting.metavar:
        attributes["metavar"] = setting.metavar
    return click.option(setting.flag or f"--{setting.key}", setting.field, **attributes)
