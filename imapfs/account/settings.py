"""What can be set for a mount: the one table behind ``--help``, the configuration file and the manual pages.

How a value is checked and converted is decided in `account.config`; a person reads this. Light
on purpose, because ``--help`` and completion need it.
"""

from dataclasses import dataclass
from typing import Literal, get_args

from imapfs.model import AuthMethod, DeletePolicy, NameScheme, Security

Kind = Literal["text", "path", "directory", "size", "integer", "number", "flag", "choice", "list", "table"]


@dataclass(frozen=True, slots=True)
class Setting:
    """A key of an account in the configuration file, and the option of ``imapfs mount`` of that name."""

    key: str
    meaning: str
    """A sentence or two for people, with the unit."""
    kind: Kind
    metavar: str = ""
    """Stands for the value; "" for a flag and for choices, which stand for themselves."""
    default: str | int | float | bool | None = None
    """As it would be written in the file; None where there is none, or where it depends on the machine."""
    default_shown: str = ""
    """For people, where ``default`` cannot say it."""
    choices: tuple[str, ...] = ()
    connects: bool = False
    """Whether it says how to reach the account: what only connects has the option as well."""
    option: str | None = ""
    """The option of the command line if it is not ``--KEY``; None for what SOURCE says there."""

    @property
    def flag(self) -> str:
        """The option that sets it, or "" where none does."""
        return f"--{self.key}" if self.option == "" else self.option or ""

    @property
    def shown_default(self) -> str:
        return self.default_shown or ("" if self.default in (None, False) else str(self.default))

    @property
    def shown_value(self) -> str:
        return self.metavar or "|".join(self.choices)


SETTINGS = (
    Setting("host", "The server's name or address.", "text", "HOST", option=None),
    Setting("user", "The name to log in with.", "text", "USER", option=None),
    Setting(
        "port", "The server's port.", "integer", "N", default_shown="993, or 143 with starttls", option=None
    ),
    Setting(
        "security",
        "TLS from the first byte, or STARTTLS.",
        "choice",
        default="tls",
        choices=get_args(Security),
        option=None,
    ),
    Setting(
        "mailbox",
        "Mount only this mailbox and what is below it.",
        "text",
        "PATH",
        default_shown="the whole account",
        option=None,
    ),
    Setting(
        "password-command",
        "Run CMD with sh; the first line that it prints is the password.",
        "text",
        "CMD",
        connects=True,
    ),
    Setting("password-file", "The first line of FILE is the password.", "path", "FILE", connects=True),
    Setting(
        "token-command",
        "Run CMD with sh; the first line that it prints is an OAuth 2.0 access token.",
        "text",
        "CMD",
        connects=True,
    ),
    Setting("oauth", "How to log in by OAuth 2.0: see below.", "table", option=None),
    Setting(
        "ca-file",
        "Trust the PEM certificates in FILE.",
        "path",
        "FILE",
        default_shown="the system's",
        connects=True,
    ),
    Setting(
        "tls-fingerprint",
        "Trust the one certificate with this SHA-256 fingerprint, with or without colons, and no other.",
        "text",
        "HEX",
        connects=True,
    ),
    Setting("client-cert", "Show the server the PEM certificate in FILE.", "path", "FILE", connects=True),
    Setting(
        "client-key",
        "The private key of that certificate, in PEM and without a passphrase.",
        "path",
        "FILE",
        default_shown="in the same file",
        connects=True,
    ),
    Setting(
        "auth",
        "How to log in; auto is the strongest way that the server has.",
        "choice",
        default="auto",
        choices=get_args(AuthMethod),
        connects=True,
    ),
    Setting(
        "insecure-plaintext",
        "With STARTTLS: send password and mail unencrypted if the server does not have it.",
        "flag",
        default=False,
        connects=True,
    ),
    Setting(
        "timeout",
        "Most seconds that any operation waits for the server.",
        "number",
        "SECONDS",
        30,
        connects=True,
    ),
    Setting(
        "cache-dir",
        "Cache in DIR.",
        "directory",
        "DIR",
        default_shown="~/.cache/imapfs",
    ),
    Setting("cache-size", "Keep at most SIZE of messages, such as 500M.", "size", "SIZE", "10GiB"),
    Setting("read-only", "Refuse every change; reading is faster.", "flag", default=False),
    Setting(
        "fetch-ahead",
        "Most that is fetched a day before it is wanted; 0 for nothing.",
        "size",
        "SIZE",
        "2GiB",
    ),
    Setting(
        "delete",
        "What rm does outside Trash: move there, or delete for good.",
        "choice",
        default="trash",
        choices=get_args(DeletePolicy),
    ),
    Setting(
        "names",
        "How files are named: 2026-11-20_Alice_Report.1234.eml, or 1234.eml.",
        "choice",
        default="subject",
        choices=get_args(NameScheme),
    ),
    Setting("connections", "Most connections to the server at once.", "integer", "N", 4),
    Setting(
        "poll",
        "Most seconds between looks for changes that the server does not tell.",
        "number",
        "SECONDS",
        60,
    ),
    Setting(
        "log-file",
        "Log to FILE.",
        "path",
        "FILE",
        default_shown="in ~/.local/state/imapfs/log",
    ),
    Setting(
        "options",
        "Mount options: ro, allow_other, noatime, noexec ...",
        "list",
        "OPTION,...",
        option="-o",
    ),
)
"""In the order in which they are shown."""

OAUTH_SETTINGS = (
    Setting(
        "provider",
        "What gives the addresses and the scope; keys beside it replace them.",
        "choice",
        choices=("google", "microsoft"),
        option=None,
    ),
    Setting("client-id", "What the provider knows your program by: register one there.", "text", option=None),
    Setting("client-secret", "What some providers give to clients, and want back.", "text", option=None),
    Setting("authorize-url", "The https:// address for a consent in the browser.", "text", option=None),
    Setting("device-url", "The https:// address for a consent by a code.", "text", option=None),
    Setting("token-url", "The https:// address that gives tokens.", "text", option=None),
    Setting("scope", "What the consent is for.", "text", option=None),
)
"""The keys of the table ``oauth``."""
