"""The mail providers that imapfs knows without asking anybody: the table in ``providers.toml``."""

import functools
import tomllib
from dataclasses import dataclass
from importlib import resources
from typing import Any, Literal

SignIn = Literal["password", "app", "oauth"]


@dataclass(frozen=True, slots=True)
class Provider:
    """One entry of the table, whose first lines say what the fields mean."""

    name: str
    source: str
    domains: tuple[str, ...]
    mx: tuple[str, ...]
    host: str | None = None
    """None where there is no IMAP to be had from afar; ``hint`` says what there is."""
    user: Literal["address", "local"] = "address"
    sign_in: SignIn = "password"
    oauth: str | None = None
    hint: str | None = None
    page: str | None = None


@functools.cache
def table() -> tuple[Provider, ...]:
    """All providers, in the order of the file."""
    text = resources.files("imapfs.account").joinpath("providers.toml").read_text(encoding="utf-8")
    providers = []
    for entry in tomllib.loads(text)["provider"]:
        fields: dict[str, Any] = {key.replace("-", "_"): value for key, value in entry.items()}
        for key in ("domains", "mx"):
            fields[key] = tuple(fields.get(key, ()))
        providers.append(Provider(**fields))
    return tuple(providers)


def by_domain(domain: str) -> Provider | None:
    """Whose addresses end in ``@domain``; lower case."""
    return next((one for one in table() if domain in one.domains), None)


def by_mail_exchanger(host: str) -> Provider | None:
    """Whose servers take the mail of a domain that has ``host`` in an MX record; lower case."""
    return next((one for one in table() if any(within(host, end) for end in one.mx)), None)


def by_host(host: str) -> Provider | None:
    """Whose IMAP server ``host`` is; lower case."""
    return next((one for one in table() if host == one.host), None)


def within(name: str, domain: str) -> bool:
    """Whether the DNS name ``name`` is ``domain`` or below it."""
    return name == domain or name.endswith("." + domain)
