"""The manual pages and the shell completions, generated from the commands and the table of settings.

Runs when the package is built (``hatch_build.py``); the generated files are not part of the sources.
"""

import inspect
import re
from typing import Final

import click
from click.shell_completion import get_completion_class

from imapfs import __version__
from imapfs.account.settings import OAUTH_SETTINGS, SETTINGS, Setting
from imapfs.cli.fstab import helper
from imapfs.cli.main import all_commands, commands

_COMPLETIONS: Final = {
    "bash": "share/bash-completion/completions/imapfs",
    "zsh": "share/zsh/site-functions/_imapfs",
    "fish": "share/fish/vendor_completions.d/imapfs.fish",
}


def generated() -> dict[str, str]:
    """Return the text of each file, by its path below the prefix of an installation."""
    return {
        "share/man/man1/imapfs.1": imapfs_1(),
        "share/man/man5/imapfs.toml.5": imapfs_toml_5(),
        "share/man/man8/mount.imapfs.8": mount_imapfs_8(),
        **{path: completion(shell) for shell, path in _COMPLETIONS.items()},
    }


def completion(shell: str) -> str:
    """Return the script with which ``shell`` asks ``imapfs`` for completions."""
    found = get_completion_class(shell)
    if found is None:
        raise ValueError(f"click does not support {shell}")
    return found(commands, {}, "imapfs", "_IMAPFS_COMPLETE").source()


# ---- roff, as man(7) describes it


def _text(text: str) -> str:
    """Escape ``text`` so that roff prints it literally."""
    for char, escape in (
        ("\\", r"\e"),
        ("-", r"\-"),
        ("'", r"\(aq"),
        ("`", r"\(ga"),
        ("^", r"\(ha"),
        ("~", r"\(ti"),
    ):
        text = text.replace(char, escape)
    return "\n".join(rf"\&{line}" if line.startswith(".") else line for line in text.splitlines())


def _argument(text: str) -> str:
    """Return ``text`` as one argument of a macro."""
    return '"' + _text(text).replace('"', r"\(dq") + '"'


def _section(title: str, *parts: str) -> str:
    return "\n".join([f".SH {_argument(title)}", *parts])


def _paragraphs(text: str) -> str:
    """Format paragraphs. One that is indented, or begins with click's mark, keeps its line breaks."""
    blocks = []
    for block in re.split(r"\n\s*\n", inspect.cleandoc(text)):
        if block.startswith(("    ", "\b")):
            lines = inspect.cleandoc(block.removeprefix("\b\n")).splitlines()
            blocks.append("\n".join([".PP", ".RS 4", ".nf", *map(_text, lines), ".fi", ".RE"]))
        else:
            blocks.append(".PP\n" + _text(" ".join(block.split())))
    # The title before the first one already starts a paragraph.
    return "\n".join(blocks).removeprefix(".PP\n")


def _item(term: str, *paragraphs: str) -> str:
    first, *more = [_text(one) for one in paragraphs if one]
    return "\n".join([".TP", f".B {_argument(term)}", first, *(f".IP\n{one}" for one in more)])


def _page(name: str, section: int, brief: str, *sections: str) -> str:
    title = f'.TH {_argument(name.upper())} {section} "" {_argument(f"imapfs {__version__}")} "imapfs"'
    # Without hyphenation, option names are easier to read and to search for.
    return "\n".join(
        [title, ".nh", ".ad l", _section("NAME", rf"{_text(name)} \- {_text(brief)}"), *sections, ""]
    )


# ---- Commands


def _usage(command: click.Command, name: str) -> str:
    context = click.Context(command, info_name=name)
    return " ".join([name, *command.collect_usage_pieces(context)])


def _options(command: click.Command, name: str) -> str:
    context = click.Context(command, info_name=name)
    records = [param.get_help_record(context) for param in command.params]
    return "\n".join(
        _item(term, " ".join(meaning.split())) for term, meaning in filter(None, records) if meaning
    )


def _command(name: str, command: click.Command) -> str:
    return "\n".join(
        [f".SS {_argument(_usage(command, name))}", _paragraphs(command.help or ""), _options(command, name)]
    ).rstrip("\n")


def imapfs_1() -> str:
    pages = {f"imapfs {name}": command for name, command in all_commands().items()}
    usages = [_usage(command, name) for name, command in pages.items()]
    return _page(
        "imapfs",
        1,
        "mount an IMAP account as a directory",
        _section("SYNOPSIS", ".nf", *map(_text, usages), ".fi"),
        _section("DESCRIPTION", _paragraphs(f"{commands.help}\n\n{_DESCRIPTION}")),
        _section("COMMANDS", *(_command(name, command) for name, command in pages.items())),
        _section("EXIT STATUS", *(_item(code, meaning) for code, meaning in _EXIT_CODES)),
        _section("ENVIRONMENT", *(_item(name, meaning) for name, meaning in _ENVIRONMENT)),
        _section("FILES", *(_item(path, meaning) for path, meaning in _FILES)),
        _section("EXAMPLES", _paragraphs(_EXAMPLES)),
        _section("SEE ALSO", _text("imapfs.toml(5), mount.imapfs(8), fusermount3(1), getfattr(1)")),
    )


_DESCRIPTION: Final = """
Every program that can open a file can work with mail: ls, grep, find, rsync, an editor, a file manager.
Moving, deleting, tagging and saving files does the same to the messages on the server. Reading never changes
anything there.

A file is safe once it is closed: it is on the server, or in a spool on disk that survives crashes and is
uploaded later, exactly once.
"""
_EXIT_CODES: Final = (
    ("0", "Success."),
    ("1", "Failure; one line on standard error says what failed and what to do."),
    ("2", "Wrong usage."),
    (
        "3",
        "The server refused the login, or no password or token was found. A service manager should not "
        "retry automatically.",
    ),
    ("130", "Interrupted."),
)
_ENVIRONMENT: Final = (
    (
        "XDG_CONFIG_HOME, XDG_CACHE_HOME, XDG_DATA_HOME, XDG_STATE_HOME",
        "Replace ~/.config, ~/.cache, ~/.local/share and ~/.local/state in the paths below.",
    ),
    (
        "CREDENTIALS_DIRECTORY",
        "Set by systemd: a directory with the password in a file named like the account, or imapfs.",
    ),
    (
        "NOTIFY_SOCKET, JOURNAL_STREAM",
        "Set by systemd: with --foreground, the state of the mount is reported to it, and the log goes to "
        "the journal with priorities.",
    ),
)
_FILES: Final = (
    ("~/.config/imapfs/config.toml", "The accounts; see imapfs.toml(5)."),
    (
        "~/.cache/imapfs/",
        "The cache. It can be deleted while nothing is mounted.",
    ),
    (
        "~/.local/share/imapfs/",
        "What no server has yet: messages that wait for it, and local files. With --cache-dir, they are in "
        "that directory instead.",
    ),
    ("~/.local/state/imapfs/log/", "The log of each mount in the background."),
    ("~/.local/share/systemd/user/imapfs@.service", "Mounts an account when you log in."),
)
_EXAMPLES: Final = """
Mount an account, list its inbox, unmount it:

    imapfs mount imaps://alice%40example.org@imap.example.org ~/mail
    ls -l ~/mail/INBOX
    imapfs umount ~/mail

Set up an account with only its address, and check whether it can be mounted:

    imapfs setup --name work
    imapfs check work

Mount it on ~/mail/work, now and whenever you log in:

    systemctl --user enable --now imapfs@work
"""


# ---- Settings


_TYPES: Final = {
    "text": "string",
    "path": "path",
    "directory": "path",
    "size": 'string such as "500M" or "10GiB", or a number of bytes',
    "integer": "whole number",
    "number": "number",
    "flag": "true or false",
    "list": "string, or list of strings",
    "table": "table",
}


def _setting(setting: Setting) -> str:
    kind = " or ".join(f'"{choice}"' for choice in setting.choices) or _TYPES[setting.kind]
    facts = [f"Value: {kind}."]
    if setting.shown_default:
        facts.append(f"Default: {setting.shown_default}.")
    if setting.flag:
        facts.append(f"Option: {setting.flag}.")
    return _item(setting.key, setting.meaning, " ".join(facts))


def imapfs_toml_5() -> str:
    return _page(
        "imapfs.toml",
        5,
        "the configuration file of imapfs",
        _section("SYNOPSIS", _text("~/.config/imapfs/config.toml")),
        _section("DESCRIPTION", _paragraphs(_TOML)),
        _section("KEYS", *map(_setting, SETTINGS)),
        _section(
            "NAMES",
            _paragraphs(_NAMES),
            *(_item(*one) for one in _NAME_FIELDS),
            ".PP\n" + _paragraphs(_NAME_RULES),
        ),
        _section("OAUTH", _paragraphs(_OAUTH), *map(_setting, OAUTH_SETTINGS)),
        _section("EXAMPLE", _paragraphs(_TOML_EXAMPLE)),
        _section("SEE ALSO", _text("imapfs(1), mount.imapfs(8)")),
    )


_TOML: Final = """
A file in TOML (https://toml.io) with a table for each account, [accounts.NAME]. "imapfs mount NAME"
mounts that account. Options on the command line override the keys in the file.

The keys host and user are required. Relative paths start at the directory of the file. A password does not
belong in this file: it comes from a command, from a file that nobody else can read, from a systemd credential
named like the account or imapfs, from the keyring, or from a prompt on the terminal.

"imapfs setup" adds such tables, and "imapfs accounts" lists them.
"""
_NAMES: Final = """
The value of "names" is a template: text with fields in braces. The suffix .eml is added. "subject" is short
for {date}_{time}_{from}_{subject}.{uid}, and "uid" for {uid}.
"""
_NAME_FIELDS: Final = (
    ("{date}", "The day when the message arrived, in UTC: 2026-11-20."),
    ("{time}", "The time of day when it arrived, in UTC: 1432."),
    (
        "{from}",
        "The sender. In a mailbox that the server marks as Sent or Drafts, or that the keys sent and drafts "
        "name, it is the recipient instead, unless the template has {to} as well.",
    ),
    ("{to}", "The first recipient."),
    ("{subject}", "The subject."),
    ("{uid}", "The UID of the message (required)."),
)
_NAME_RULES: Final = """
Each field occurs at most once. A character that is not a digit separates {uid} from the other fields, and
{from}, {to} and {subject} are all on the same side of it, so that no subject can imitate the name of another
message. A template does not begin with a dot, dash, tilde, underscore or space, does not contain a backslash
or any of / : * ? " < > | and has at most 32 bytes of text outside its fields.

A field that is empty is left out with the text between it and its neighbour. Sender and recipient are cut
to 40 bytes each, and all is shortened, the subject first, until the name has at most 150 bytes.

The first mount after a change renames all messages, except those that you have named by mv. A backup by path
then copies every message again, under its new name.
"""
_OAUTH: Final = """
The keys of the table [accounts.NAME.oauth]. Required are client-id, and either provider, or token-url, scope
and at least one of authorize-url and device-url. "imapfs login NAME" asks for your consent and stores the
resulting token in the keyring.
"""
_TOML_EXAMPLE: Final = """
An account whose password another program stores:

    [accounts.work]
    host = "imap.example.org"
    user = "alice@example.org"
    password-command = "pass show mail/work"
    connections = 8
    options = "noatime"

An account with OAuth 2.0:

    [accounts.office]
    host = "outlook.office365.com"
    user = "alice@example.org"

    [accounts.office.oauth]
    provider = "microsoft"
    client-id = "00000000-0000-0000-0000-000000000000"
"""


# ---- mount(8)


def mount_imapfs_8() -> str:
    return _page(
        "mount.imapfs",
        8,
        "mount an IMAP account with mount(8) or fstab(5)",
        _section("SYNOPSIS", _text(_usage(helper, "mount.imapfs"))),
        _section("DESCRIPTION", _paragraphs(f"{inspect.cleandoc(helper.help or '')}\n\n{_MOUNT}")),
        _section("OPTIONS", _options(helper, "mount.imapfs")),
        _section("EXAMPLES", _paragraphs(_MOUNT_EXAMPLES)),
        _section("SEE ALSO", _text("imapfs(1), imapfs.toml(5), mount(8), fstab(5)")),
    )


_MOUNT: Final = """
A mount belongs to the user who makes it, and only that user can access it unless allow_other is given. With
"user" in fstab(5), that is the user who runs mount. At boot it is root, unless setuid=USER is given.

No password can be typed at boot: give a password-file, or an account whose entry says where its password
comes from. "imapfs umount" waits until everything is on the server; umount(8) does not.
"""
_MOUNT_EXAMPLES: Final = """
A line in /etc/fstab that lets alice run "mount ~/mail":

    work /home/alice/mail imapfs noauto,user 0 0

A line that mounts alice's mail at boot:

    work /home/alice/mail imapfs setuid=alice,_netdev,nofail 0 0
"""
