"""The dialogue of ``imapfs setup``: from an e-mail address to an account in the configuration file.

What the command line does not say is asked at the terminal. Without a terminal, or with --yes, the proposed
answer is taken; if there is none, setup fails and names the option to give. A server is shown and confirmed
before a password is sent there, every login is one that the person asked for, and the configuration file is
written only at the end.
"""

import getpass
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import cast
from urllib.parse import quote

import click

from imapfs.account import config, consent, credentials, discovery, file, keyring
from imapfs.account.config import Located
from imapfs.account.credentials import CredentialSources
from imapfs.account.discovery import EmailAddress, MailServer, Network
from imapfs.account.oauth import OAuthClient
from imapfs.account.providers import Provider
from imapfs.account.settings import convert
from imapfs.cli.check import probe
from imapfs.errors import (
    AuthenticationFailed,
    CertificateRejected,
    CredentialError,
    ImapfsError,
    UsageError,
)
from imapfs.imap.connect import tls_context
from imapfs.imap.session import Session
from imapfs.log import one_line
from imapfs.model import DEFAULT_PORTS, AccessToken, Account, CredentialProvider, Secret, Security


@dataclass(frozen=True, slots=True)
class Given:
    """What the command line says; None for what it does not say."""

    options: Mapping[str, object]
    """Settings for the entry, by key, such as ``password-command``."""
    name: str | None = None
    address: str | None = None
    host: str | None = None
    port: int | None = None
    security: Security | None = None
    user: str | None = None
    keyring: bool = False
    """The password is in the keyring, or will be stored there."""
    prompt: bool = False
    """The password is asked for at each mount."""
    lookup: bool = True
    test: bool = True
    replace: bool = False
    yes: bool = False


def run(given: Given, path: Path, network: Network) -> None:
    """Add an account to the configuration file ``path``. Raises ImapfsError, or click.Abort to stop."""
    person = _Person(yes=given.yes)
    address = _address(given, person)
    name = _name(given, address, path, person)
    server = _server(given, address, network, person)
    credential: _Credential | None = None
    while True:
        located = config.locate(_url(server), given.options, path)
        try:
            if credential is None:
                credential = _credential(given, path, name, located, server, person)
            if given.test:
                person.say(_try_out(located, credential.provider))
            credential.keep(located.account)
            break
        except ImapfsError as error:
            if not person.present:
                raise
            person.say(str(error))
            if isinstance(error, AuthenticationFailed) and _hint(server.provider):
                person.say(_hint(server.provider))
            failure = error
        choices = dict(_AFTER_FAILURE)
        other = _other_user(server, address)
        if isinstance(failure, AuthenticationFailed) and other:
            choices = {"u": f"log in as {other} instead of {server.user}", **choices}
        if isinstance(failure, CertificateRejected):
            choices = {"c": "look at the certificate, and perhaps trust it", **choices}
        match person.choose("What now", choices, "p"):
            case "u":
                server = replace(server, user=other)
            case "c":
                if pinned := _pinned(located, person):
                    options = {key: value for key, value in given.options.items() if key != "ca-file"}
                    given = replace(given, options={**options, "tls-fingerprint": pinned})
            case "p":
                credential = None
                given = replace(given, options=_without_source(given.options), keyring=False, prompt=False)
            case "s":
                server = _edited(server, person)
            case "w":
                given = replace(given, test=False)
            case "q":
                raise click.Abort
    file.add(
        path,
        name,
        _entry(located, credential),
        _comments(address, located.account, server, credential),
        replace=given.replace,
    )
    person.say(f"added the account {name} to {path}")
    _offer_mount(name, config.own_mountpoint(name, path), person)


_AFTER_FAILURE = {
    "p": "try another password, or the same one again",
    "s": "change the settings",
    "w": "add the account without a test",
    "q": "quit without adding the account",
}


# ---- The person


class _Person:
    """The person at the terminal, if there is one."""

    def __init__(self, *, yes: bool) -> None:
        self.present = sys.stdin.isatty() and sys.stdout.isatty()
        self.asks = self.present and not yes
        """Whether to ask even if there is an answer to propose."""
        self._yes = yes

    def say(self, text: str) -> None:
        click.echo(one_line(text))

    def ask(
        self,
        question: str,
        option: str,
        default: str | None,
        check: Callable[[str], object] = str,
        *,
        insist: bool = False,
    ) -> str:
        """Return an answer that ``check`` does not refuse with ValueError or ImapfsError.

        With ``insist`` the question is asked even with --yes, since the default has not worked so far. Raises
        UsageError that names ``option`` if nobody can be asked.
        """

        def refuse_or_take(text: str) -> str:
            try:
                check(text)
            except (ValueError, ImapfsError) as error:
                raise click.UsageError(one_line(str(error))) from None
            return text

        if self._yes and default is not None and not insist:
            return default
        if not self.present:
            otherwise = "" if default is None else f", or --yes for {default!r}"
            raise UsageError(f"{question} is missing, and there is no terminal: give {option}{otherwise}")
        answer: str = click.prompt(question, default=default, value_proc=refuse_or_take)
        return answer

    def choose(self, question: str, choices: Mapping[str, str], default: str) -> str:
        """Return the key of one of ``choices``. The person must be present."""
        for key, meaning in choices.items():
            self.say(f"  {key}  {meaning}")
        answer: str = click.prompt(
            question, default=default, type=click.Choice(list(choices)), show_choices=False
        )
        return answer

    def agrees(self, question: str, *, default: bool = True) -> bool:
        """Return the answer to a yes/no question; the default if nobody is to be asked."""
        return click.confirm(question, default=default) if self.asks else default

    def password(self, account: Account) -> Secret:
        if not self.present:
            raise UsageError(
                "the password can only be typed at a terminal: give --password-command, --password-file or "
                "--no-test"
            )
        while True:
            try:
                typed = getpass.getpass(f"Password for {account.url} (not shown): ")
            except EOFError:
                raise click.Abort from None
            if typed:
                return Secret(typed)


# ---- The address, the name and the server


def _address(given: Given, person: _Person) -> EmailAddress | None:
    """Return the e-mail address; None if it is not needed, as the command line names server and user."""
    text = given.address
    if text is None:
        if given.host is not None and given.user is not None:
            return None
        text = person.ask("E-mail address", "--address", None, discovery.parse_address)
    return discovery.parse_address(text)


def _name(given: Given, address: EmailAddress | None, path: Path, person: _Person) -> str:
    if given.name is not None:
        file.check_name(path, given.name, replace=given.replace)
        return given.name

    def check(text: str) -> None:
        file.check_name(path, text, replace=given.replace)

    proposed = address.domain.partition(".")[0] if address is not None else None
    if proposed is not None:
        try:
            check(proposed)
        except UsageError:
            proposed = None
    return person.ask("Name of the account", "--name", proposed, check)


def _other_user(server: MailServer, address: EmailAddress | None) -> str:
    """Return the other form of user name that servers want, address or local part; "" if there is none."""
    if address is None:
        return ""
    forms = [str(address), str(address).rpartition("@")[0]]
    return forms[1 - forms.index(server.user)] if server.user in forms else ""


def _server(given: Given, address: EmailAddress | None, network: Network, person: _Person) -> MailServer:
    """Return the server that the command line names, or one that is found and confirmed."""
    if given.host is None:
        assert address is not None
        found = _found(given, address, network, person)
    else:
        security = given.security or "tls"
        port = given.port or DEFAULT_PORTS[security]
        user = given.user or str(address)
        found = discovery.with_provider(MailServer(given.host, port, security, user, "the command line"))
    for key, value in (("host", found.host), ("user", found.user), ("port", found.port)):
        try:
            convert(key, value)
        except ValueError as error:
            raise UsageError(f"--{key}: {error}") from None
    return found


def _found(given: Given, address: EmailAddress, network: Network, person: _Person) -> MailServer:
    found = discovery.discover(address, None)
    if found.provider is None and given.lookup:
        person.say(f"searching for the server of {address.domain} (--no-lookup does without)")
        found = discovery.discover(address, network)
    servers = [_overridden(given, one) for one in found.servers]
    if servers:
        return _chosen(servers, person) if person.asks else _accepted(given, servers[0])
    hint = _hint(found.provider)
    if not person.present:
        raise UsageError(
            f"no server was found for {address.domain}: {f'{hint}; ' if hint else ''}give --host"
        )
    person.say(f"no server was found for {address.domain}: {hint or 'ask your provider for its IMAP server'}")
    return _edited(MailServer("", 993, "tls", given.user or str(address), "your answers"), person)


def _hint(provider: Provider | None) -> str:
    """Return what the provider asks of its users, and the page that says so; "" for nothing."""
    if provider is None or provider.hint is None:
        return ""
    return f"{provider.hint} ({provider.page})" if provider.page else provider.hint


def _overridden(given: Given, server: MailServer) -> MailServer:
    security = given.security or server.security
    port = server.port if security == server.security else DEFAULT_PORTS[security]
    return replace(server, security=security, port=given.port or port, user=given.user or server.user)


def _accepted(given: Given, server: MailServer) -> MailServer:
    """Return ``server`` if it may be used without asking. Raises UsageError."""
    if not given.yes:
        raise UsageError(
            f"{server.host} was found (from {server.found}), and must be confirmed at a terminal: "
            "give --yes or --host"
        )
    if server.doubt is not None:
        raise UsageError(f"{server.doubt}; if it is right, give --host {server.host}")
    return server


def _chosen(found: list[MailServer], person: _Person) -> MailServer:
    choices = {}
    for number, one in enumerate(found, 1):
        choices[str(number)] = f"{_shown(one)} (from {one.found})"
    choices["e"] = "another server"
    answer = person.choose("Server", choices, "1")
    server = found[0 if answer == "e" else int(answer) - 1]
    if answer == "e":
        return _edited(server, person)
    if server.doubt is not None:
        person.say(server.doubt)
        if not person.agrees(f"Is {server.host} the right place for your password?", default=False):
            return _edited(replace(server, host=""), person)
    if _hint(server.provider):
        person.say(_hint(server.provider))
    return server


def _shown(server: MailServer) -> str:
    how = "TLS" if server.security == "tls" else "STARTTLS"
    return f"{server.host}, port {server.port}, {how}, user {server.user}"


def _edited(server: MailServer, person: _Person) -> MailServer:
    """Return the server that the person types, starting from ``server``."""

    def checked(key: str, text: str) -> object:
        return convert(key, int(text) if key == "port" and text.isdecimal() else text)

    def ask(question: str, key: str, default: str) -> str:
        def check(text: str) -> object:
            return checked(key, text)

        return person.ask(question, f"--{key}", default or None, check, insist=True)

    def check_place(text: str) -> None:
        for key, value in zip(("host", "port"), _place(text), strict=False):
            checked(key, value)

    host, *ports = _place(person.ask("Server", "--host", server.host or None, check_place, insist=True))
    kinds: dict[str, Security] = {"tls": "tls", "starttls": "starttls"}
    security = kinds[ask("Encryption (tls or starttls)", "security", server.security)]
    usual = server.port if security == server.security else DEFAULT_PORTS[security]
    port = int(ask("Port", "port", str(ports[0] if ports else usual)))
    user = ask("User", "user", server.user)
    typed = MailServer(str(convert("host", host)), port, security, user, "your answers")
    return discovery.with_provider(typed)


def _place(text: str) -> list[str]:
    """Return host and port of ``HOST:PORT``, and the host alone if there is no port."""
    host, colon, port = text.strip().rpartition(":")
    # An IPv6 address has colons of its own.
    return [host, port] if colon and ":" not in host else [text.strip()]


def _url(server: MailServer) -> str:
    scheme = "imaps" if server.security == "tls" else "imap"
    host = f"[{server.host}]" if ":" in server.host else server.host
    return f"{scheme}://{quote(server.user, safe='')}@{host}:{server.port}"


# ---- The certificate


def _pinned(located: Located, person: _Person) -> str:
    """Show the server's certificate; return its fingerprint if the person trusts it, else "".

    Raises ImapfsError.
    """
    account, timeout = located.account, located.options["timeout"]
    try:
        shown = probe.certificate(account, timeout)
    except (OSError, ValueError) as error:
        raise ImapfsError(f"the certificate of {account.host} cannot be read: {error}") from None
    person.say(f"  for         {', '.join(shown.names[:5]) or shown.subject}")
    person.say(f"  issued by   {'itself' if shown.self_signed else shown.issuer}")
    person.say(f"  valid       {shown.begins:%Y-%m-%d} to {shown.expires:%Y-%m-%d}")
    person.say(f"  SHA-256     {shown.fingerprint}")
    trusted = person.agrees(
        "Did the server's owner tell you this fingerprint, and shall only this certificate be trusted?",
        default=False,
    )
    return shown.fingerprint if trusted else ""


# ---- The password or token


@dataclass(frozen=True, slots=True)
class _Credential:
    provider: CredentialProvider | None
    """None if the password is not known here, so that no login is tried."""
    entry: Mapping[str, object] = field(default_factory=dict)
    """The settings that say where it comes from."""
    comment: str = ""
    """For the entry; ``{url}`` stands for the account's URL."""
    keep: Callable[[Account], None] = lambda _: None
    """Stores it where it comes from, if it is not there yet. Raises CredentialError."""


def _without_source(options: Mapping[str, object]) -> dict[str, object]:
    return {key: value for key, value in options.items() if key not in config.SECRETS}


def _credential(
    given: Given, path: Path, name: str, located: Located, server: MailServer, person: _Person
) -> _Credential:
    account = located.account
    if any(key in given.options for key in config.SECRETS):
        # These options go into the entry with all others.
        return _Credential(credentials.resolve(account, located.credentials))
    if account.auth == "external":
        return _Credential(credentials.resolve(account, CredentialSources()))
    if given.keyring:
        return _from_keyring(account, person)
    if given.prompt:
        return _asked_each_time(given, account, person)
    if not person.present:
        raise UsageError(
            "the source of the password can only be chosen at a terminal: give --password-command, "
            "--password-file, --token-command, --keyring or --prompt"
        )
    choices = {
        "k": "from the keyring (Secret Service), where it will be stored",
        "c": "from the output of a command, such as 'pass show mail'",
        "f": "from a file that only you can read",
        "a": "from you, at each mount",
        "o": "no password: OAuth 2.0, with your consent in a browser",
        "t": "no password: OAuth 2.0, with an access token from the output of a command",
    }
    oauth = server.provider.oauth if server.provider is not None else None
    if not keyring.works():
        person.say("there is no keyring in this session (no Secret Service): nothing can be stored in one")
        del choices["k"], choices["o"]
    elif oauth is None:
        del choices["o"]
    person.say("Where does the password come from?")
    usual = next(iter(choices)) if server.sign_in != "oauth" else "o" if "o" in choices else "t"
    match person.choose("Password", choices, usual):
        case "k":
            return _from_keyring(account, person)
        case "c":
            command = person.ask("Command", "--password-command", None)
            provider = credentials.resolve(account, CredentialSources(command=command))
            return _Credential(provider, {"password-command": command})
        case "f":
            proposed = path.with_name(f"{name}.password")
            return _from_file(person.ask("File", "--password-file", str(proposed)), account, person)
        case "o":
            assert oauth is not None
            return _by_consent(oauth, name, account, person)
        case "t":
            command = person.ask("Command", "--token-command", None)
            provider = credentials.resolve(account, CredentialSources(token_command=command))
            return _Credential(provider, {"token-command": command})
    return _asked_each_time(given, account, person)


def _by_consent(provider: str, name: str, account: Account, person: _Person) -> _Credential:
    """Ask for consent, which puts the refresh token into the keyring at once.

    The client secret, if there is one, goes into the entry: it is not confidential in a program that runs on
    its users' machines (RFC 8252 section 8.5).
    """
    person.say("imapfs has no client id of its own: register one with the provider (see docs/accounts.md)")
    table = {"provider": provider, "client-id": person.ask("Client id", "--token-command", None)}
    secret = person.ask("Client secret (empty for none)", "--token-command", "")
    if secret:
        table["client-secret"] = secret
    client = cast(OAuthClient, convert("oauth", table))
    here = client.device_url is None or person.agrees("Is there a browser on this machine?")

    def check(token: AccessToken) -> None:
        Session.connect(account, token, tls_context(account), config.defaults()["timeout"]).close()

    consent.ask(client, account, person.say, device=not here, check=check)
    sources = CredentialSources(oauth=client, name=name)
    comment = f"To renew the consent: imapfs login {name}"
    return _Credential(credentials.resolve(account, sources), {"oauth": table}, comment)


def _from_file(name: str, account: Account, person: _Person) -> _Credential:
    path = Path.cwd() / Path(name).expanduser()
    entry = {"password-file": str(path)}
    if path.exists():
        return _Credential(credentials.resolve(account, CredentialSources(file=path)), entry)
    secret = person.password(account)
    return _Credential(secret, entry, keep=lambda _: credentials.to_file(path, secret))


def _from_keyring(account: Account, person: _Person) -> _Credential:
    comment = f"The password is in the keyring; to change it: keyring set {keyring.PASSWORDS} {{url}}"
    found = keyring.load(keyring.PASSWORDS, account.url)
    if found is not None and person.agrees("Use the password that the keyring has for this account?"):
        return _Credential(found, comment=comment)
    if not person.present:
        raise CredentialError(
            f"the keyring has no password for {account.url}: store it with "
            f"'keyring set {keyring.PASSWORDS} {account.url}'"
        )
    secret = person.password(account)
    return _Credential(
        secret, comment=comment, keep=lambda account: keyring.save(keyring.PASSWORDS, account.url, secret)
    )


def _asked_each_time(given: Given, account: Account, person: _Person) -> _Credential:
    secret = person.password(account) if given.test else None
    return _Credential(secret, comment="The password is asked for at each mount.")


def _try_out(located: Located, provider: CredentialProvider | None) -> str:
    """Log in once, list the mailboxes and return a line about it. Raises ImapfsError."""
    assert provider is not None
    account = located.account
    timeout = located.options["timeout"]
    session = Session.connect(account, provider, tls_context(account), timeout)
    try:
        count = len(session.list_mailboxes())
    finally:
        session.close()
    return f"logged in at {account.host} as {account.user}: {count} mailbox{'' if count == 1 else 'es'}"


# ---- The entry


def _entry(located: Located, credential: _Credential) -> dict[str, object]:
    account = located.account
    entry: dict[str, object] = {"host": account.host, "user": account.user}
    if account.security != "tls":
        entry["security"] = account.security
    if account.port != DEFAULT_PORTS[account.security]:
        entry["port"] = account.port
    for key, value in {**located.given, **credential.entry}.items():
        entry[key] = str(value) if isinstance(value, Path) else value
    return entry


def _comments(
    address: EmailAddress | None, account: Account, server: MailServer, credential: _Credential
) -> list[str]:
    today = date.today().isoformat()
    comments = [
        f"{address or server.user}; added by 'imapfs setup' on {today}, settings from {server.found}."
    ]
    if _hint(server.provider):
        comments.append(_hint(server.provider))
    if credential.comment:
        comments.append(credential.comment.replace("{url}", account.url))
    return [one_line(comment) for comment in comments]


# ---- The mount


def _offer_mount(name: str, mountpoint: Path, person: _Person) -> None:
    """Mount the new account if the person wants that. Raises ImapfsError."""
    how = f"imapfs mount {shlex.quote(name)}"
    if not person.asks or not person.agrees(f"Mount it now on {mountpoint}?"):
        person.say(f"mount it on {mountpoint}: {how}")
        return
    # A process of its own, with this terminal, as the password may have to be typed.
    command = [sys.executable, "-P", "-m", "imapfs", "mount", "--", name]
    if subprocess.run(command, check=False).returncode != 0:
        raise ImapfsError("the account was added, and is not mounted", remedy=f"try again with '{how}'")
    person.say(f"mounted on {mountpoint}; to end it: imapfs umount {shlex.quote(str(mountpoint))}")
