"""SOURCE on the command line: the URL of an account.

No error repeats any part of a SOURCE: a person may have typed a password into it.
"""

import re
from collections.abc import Mapping
from typing import Final
from urllib.parse import unquote

from imapfs.account import values
from imapfs.account.credentials import FOUR_WAYS
from imapfs.errors import UsageError
from imapfs.model import DEFAULT_PORTS, Account, Security

_SCHEMES: Final[Mapping[str, Security]] = {"imaps": "tls", "imap": "starttls"}


def is_url(source: str) -> bool:
    """Return whether ``source`` is a URL and not the name of an account."""
    return "://" in source


def parse(source: str) -> Account:
    """Return the account of ``imaps://user@host[:port][/Mailbox]`` (RFC 5092, much reduced).

    ``imap://`` is for STARTTLS. User and mailbox are percent-decoded. The last "@" ends the user, so that an
    address can be typed as it is. Raises UsageError.
    """
    scheme, separator, rest = source.partition("://")
    if not separator:
        raise UsageError("the source is not a URL: write imaps://user@host[:port][/Mailbox]")
    security = _SCHEMES.get(scheme.lower())
    if security is None:
        raise UsageError(
            "the source has an unknown scheme: write imaps://user@host[:port][/Mailbox], or imap://"
        )
    authority, _, path = rest.partition("/")
    userinfo, _, hostport = authority.rpartition("@")
    if ":" in userinfo:
        raise UsageError(
            "the source contains a password, which other users and the shell's history can see "
            f'(a ":" in the user name is written %3A): remove it and use {FOUR_WAYS}'
        )
    try:
        user = values.user(unquote(userinfo, errors="strict"))
        host, port = _host_and_port(hostport, DEFAULT_PORTS[security])
        mailbox = values.mailbox(unquote(path, errors="strict"))
    except UnicodeDecodeError:
        raise UsageError("the source has percent escapes that are not UTF-8") from None
    except ValueError as error:
        raise UsageError(f"the source {error}: write imaps://user@host[:port][/Mailbox]") from None
    return Account(host=host, user=user, port=port, mailbox=mailbox, security=security)


def _host_and_port(text: str, default: int) -> tuple[str, int]:
    match = re.fullmatch(r"(\[[^\]]*\]|[^:]*)(?::(.*))?", text, re.DOTALL)
    if match is None:
        raise ValueError("has no valid host name (an IPv6 address goes in brackets)")
    host, port = match[1], match[2]
    if host.startswith("["):
        host = host[1:-1]
        if ":" not in host:
            raise ValueError("has no valid IPv6 address in its brackets")
    if port is None:
        return values.host(host), default
    # int() also accepts signs, spaces and underscores; a port consists of digits.
    if not re.fullmatch(r"[0-9]{1,5}", port):
        raise ValueError("has no valid port, a number from 1 to 65535")
    return values.host(host), values.port(int(port))
