"""Everything that can be set for a mount: the one table of settings.

The options of commands, the keys of the configuration file, their checks and defaults, the manual pages and
docs/options.md all follow from it. A new setting is a new entry here. If a mount needs the value, it is
also a field of that name in `model.MountConfig`, or in `model.Account` if it concerns the connection.

The module imports little, because ``--help`` and completion need it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, get_args

from imapfs.account import values
from imapfs.model import AuthMethod, DeletePolicy, Secret, Security

ValueKind = Literal[
    "text", "path", "directory", "size", "integer", "number", "flag", "choice", "list", "table"
]


@dataclass(frozen=True, slots=True)
class Setting:
    """A key of an account in the configuration file, and the option of ``imapfs mount`` of that name."""

    key: str
    meaning: str
    """A sentence or two for people, with the unit."""
    kind: ValueKind
    metavar: str = ""
    """Stands for the value in help texts; "" for flags and choices."""
    default: str | int | float | bool | None = None
    """As written in the file; None if there is none, or if it depends on the machine."""
    default_shown: str = ""
    """The default for people, if ``default`` does not say it."""
    choices: tuple[str, ...] = ()
    connects: bool = False
    """Whether it says how to reach the account; commands that only connect have the option as well."""
    option: str | None = ""
    """The option of the command line if it is not ``--KEY``; None for what SOURCE says there."""
    converter: values.Converter | None = None
    """Checks and converts a value; None for the usual converter of its kind."""

    @property
    def flag(self) -> str:
        """The option that sets it, or "" if there is none."""
        return f"--{self.key}" if self.option == "" else self.option or ""

    @property
    def field(self) -> str:
        """The key as a Python name: of keyword arguments and dataclass fields."""
        return self.key.replace("-", "_")

    @property
    def shown_default(self) -> str:
        return self.default_shown or ("" if self.default in (None, False) else str(self.default))

    @property
    def shown_value(self) -> str:
        return self.metavar or "|".join(self.choices)

    @property
    def is_path(self) -> bool:
        return self.kind in ("path", "directory")

    def convert(self, value: object) -> object:
        """Return ``value`` checked and converted. Raises ValueError with the end of a sentence."""
        if self.converter is not None:
            return self.converter(value)
        match self.kind:
            case "flag":
                return values.boolean(value)
            case "choice":
                return values.one_of(self.choices)(value)
            case "size":
                return values.size(value)
            case _:
                return values.text(value)


OAUTH_SETTINGS: Final = (
    Setting(
        "provider",
        "A known provider, whose addresses and scope need not be given; other keys override them.",
        "choice",
        choices=("google", "microsoft"),
        option=None,
    ),
    Setting(
        "client-id",
        "The client id that the provider assigned when you registered a client.",
        "text",
        option=None,
        converter=values.printable,
    ),
    Setting(
        "client-secret",
        "The client secret, which some providers issue and require.",
        "text",
        option=None,
        converter=lambda value: Secret(values.printable(value)),
    ),
    Setting(
        "authorize-url",
        "The https:// address for consent in a browser.",
        "text",
        option=None,
        converter=values.https_url,
    ),
    Setting(
        "device-url",
        "The https:// address for consent with a device code.",
        "text",
        option=None,
        converter=values.https_url,
    ),
    Setting(
        "token-url",
        "The https:// address that issues tokens.",
        "text",
        option=None,
        converter=values.https_url,
    ),
    Setting("scope", "What the consent covers.", "text", option=None, converter=values.printable),
)
"""The keys of the table ``oauth``; but for ``provider`` they are fields of `oauth.OAuthClient`."""


def _oauth_client(value: object) -> object:
    """Convert the table ``oauth``: what it says over what ``provider`` stands for."""
    # Loads the keyring's module, which --help does not need.
    from imapfs.account.oauth import PROVIDERS, OAuthClient

    if not isinstance(value, dict):
        raise ValueError("must be a table, [accounts.NAME.oauth]")
    settings = {setting.key: setting for setting in OAUTH_SETTINGS}
    for key in value:
        if key not in settings:
            raise ValueError(f"unknown key {key!r}; known are {', '.join(settings)}")
    given: dict[str, Any] = {}
    for key, raw in value.items():
        try:
            given[key] = settings[key].convert(raw)
        except ValueError as error:
            raise ValueError(f"{key} {error}") from None
    found = {**PROVIDERS.get(given.pop("provider", None), {}), **given}
    for key in ("client-id", "token-url", "scope"):
        if key not in found:
            raise ValueError(f"has no {key!r}")
    if "authorize-url" not in found and "device-url" not in found:
        raise ValueError("has neither 'authorize-url' nor 'device-url'")
    return OAuthClient(**{settings[key].field: one for key, one in found.items()})


def _name_template(value: object) -> str:
    """Check a template for the names of messages, or a short form of one."""
    from imapfs.message_names import NameTemplate

    template = values.text(value)
    NameTemplate.parse(template)
    return template


SETTINGS: Final = (
    Setting("host", "The server's name or address.", "text", "HOST", option=None, converter=values.host),
    Setting("user", "The name to log in with.", "text", "USER", option=None, converter=values.user),
    Setting(
        "port",
        "The server's port.",
        "integer",
        "N",
        default_shown="993, or 143 with starttls",
        option=None,
        converter=values.port,
    ),
    Setting(
        "security",
        "Use implicit TLS, or STARTTLS.",
        "choice",
        default="tls",
        choices=get_args(Security),
        option=None,
    ),
    Setting(
        "mailbox",
        "Mount only this mailbox and those below it.",
        "text",
        "PATH",
        default_shown="the whole account",
        option=None,
        converter=values.mailbox,
    ),
    Setting(
        "mountpoint",
        "Where 'imapfs mount NAME' mounts it.",
        "directory",
        "DIR",
        default_shown="~/mail/NAME",
        option=None,
    ),
    Setting(
        "password-command",
        "Run CMD with sh; the first line of its output is the password.",
        "text",
        "CMD",
        connects=True,
    ),
    Setting("password-file", "Read the password from the first line of FILE.", "path", "FILE", connects=True),
    Setting(
        "token-command",
        "Run CMD with sh; the first line of its output is an OAuth 2.0 access token.",
        "text",
        "CMD",
        connects=True,
    ),
    Setting(
        "oauth", "How to log in with OAuth 2.0: see below.", "table", option=None, converter=_oauth_client
    ),
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
        "Trust only the certificate with this SHA-256 fingerprint, with or without colons.",
        "text",
        "HEX",
        connects=True,
        converter=values.fingerprint,
    ),
    Setting(
        "client-cert", "Present the PEM certificate in FILE to the server.", "path", "FILE", connects=True
    ),
    Setting(
        "client-key",
        "The private key of the client certificate, in PEM and without a passphrase.",
        "path",
        "FILE",
        default_shown="in the same file",
        connects=True,
    ),
    Setting(
        "auth",
        "How to log in; auto uses the strongest mechanism that the server offers.",
        "choice",
        default="auto",
        choices=get_args(AuthMethod),
        connects=True,
    ),
    Setting(
        "insecure-plaintext",
        "If the server does not offer STARTTLS, send password and mail unencrypted.",
        "flag",
        default=False,
        connects=True,
    ),
    Setting(
        "timeout",
        "Maximum time in seconds that any operation waits for the server.",
        "number",
        "SECONDS",
        30,
        connects=True,
        converter=values.seconds(3600),
    ),
    Setting(
        "cache-dir",
        "Keep the cache and the spool in DIR.",
        "directory",
        "DIR",
        default_shown="~/.cache/imapfs",
    ),
    Setting("cache-size", "Maximum size of the cached messages, such as 500M.", "size", "SIZE", "10GiB"),
    Setting("read-only", "Refuse every change; reading is faster.", "flag", default=False),
    Setting(
        "fetch-ahead",
        "Maximum amount of mail to prefetch per day; 0 disables prefetching.",
        "size",
        "SIZE",
        "2GiB",
        converter=values.size_or_zero,
    ),
    Setting(
        "list-attributes",
        "List all extended attributes, not only those that can be set and copied.",
        "flag",
        default=False,
    ),
    Setting(
        "delete",
        "What rm does outside Trash: move to Trash, or delete permanently.",
        "choice",
        default="trash",
        choices=get_args(DeletePolicy),
    ),
    Setting(
        "trash",
        "The mailbox that rm moves to.",
        "text",
        "PATH",
        default_shown="the one that the server marks, or that is called Trash",
        converter=values.mailbox,
    ),
    Setting(
        "names",
        "How files are named: subject (2026-11-20_1432_Alice_Report.1234.eml), uid (1234.eml), or a template "
        "of {date} {time} {from} {to} {subject} {uid}.",
        "text",
        "subject|uid|TEMPLATE",
        "subject",
        converter=_name_template,
    ),
    Setting(
        "sent",
        "The mailbox of sent mail if the server marks none: files in it are named after the recipient.",
        "text",
        "PATH",
        converter=values.mailbox,
    ),
    Setting(
        "drafts",
        "The mailbox of drafts if the server marks none: files in it are named after the recipient.",
        "text",
        "PATH",
        converter=values.mailbox,
    ),
    Setting(
        "connections",
        "Maximum number of connections to the server.",
        "integer",
        "N",
        4,
        converter=values.integer(1, 50),
    ),
    Setting(
        "poll",
        "Maximum time in seconds between checks for changes that the server does not announce.",
        "number",
        "SECONDS",
        60,
        converter=values.seconds(86400),
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
        converter=values.mount_options,
    ),
)
"""In the order in which they are shown."""

BY_KEY: Final[Mapping[str, Setting]] = {setting.key: setting for setting in SETTINGS}


def convert(key: str, value: object) -> object:
    """Return ``value`` as the setting ``key`` means it. Raises ValueError with the end of a sentence."""
    return BY_KEY[key].convert(value)
