"""Mail providers that imapfs knows without asking anybody: the table in ``providers.toml``."""

import functools
import tomllib
from dataclasses import dataclass
from importlib import resources
from typing import Any, Literal

SignIn = Literal["password", "app", "oauth"]


@dataclass(frozen=True, slots=True)
class Provider:
    """One entry of the table. The comment at the top of the file explains the fields."""

    name: str
    source: str
    domains: tuple[str, ...]
    mx: tuple[str, ...]
    host: str | None = None
    """None if the provider offers no IMAP server; ``hint`` says what it offers."""
    user: Literal["address", "local"] = "address"
    sign_in: SignIn = "password"
    oauth: str | None = None
    hint: str | None = None
    page: str | None = None


@functools.cache
def table() -> tuple[Provider, ...]:
    """Return all providers, in the order of the file."""
    text = resources.files("imapfs.account").joinpath("providers.toml").read_text(encoding="utf-8")
    providers = []
    for entry in tomllib.loads(text)["provider"]:
        fields: dict[str, Any] = {key.replace("-", "_"): value for key, value in entry.items()}
        for key in ("domains", "mx"):
            fields[key] = tuple(fields.get(key, ()))
        providers.append(Provider(**fields))
    return tuple(providers)


def by_domain(domain: str) -> Provider | None:
    """Return the provider whose addresses end in ``@domain``; lower case."""
    return next((one for one in table() if domain in one.domains), None)


def by_mail_exchanger(host: str) -> Provider | None:
    """Return the provider that receives mail for domains with ``host`` as an MX record; lower case."""
    return next((one for one in table() if any(within(host, end) for end in one.mx)), None)


def by_host(host: str) -> Provider | None:
    """Return the provider whose IMAP server is ``host``; lower case."""
    return next((one for one in table() if host == one.host), None)


def within(name: str, domain: str) -> bool:
    """Return whether the DNS name ``name`` is ``domain`` or below it."""
    return name == domain or name.endswith("." + domain)
