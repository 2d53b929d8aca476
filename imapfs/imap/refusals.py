"""What a refused login means, and what a person can do about it: one table, pure.

A server sends NO, perhaps with a response code (RFC 5530), and text. There are few codes, and many servers
send none, so the table also knows the texts of large providers. Where the text explains nothing, the
provider's host name often does, because some providers accept no ordinary password.
"""

import re
from typing import Final, NamedTuple


class Refusal(NamedTuple):
    """The meaning of a refused login."""

    transient: bool
    """Whether the server has not judged the credentials, so that it may accept the same ones later."""
    remedy: str
    """What to do, as the end of a sentence."""


_GOOGLE: Final = r"(?:^|\.)(?:gmail|googlemail|google)\.com$"
_MICROSOFT: Final = r"(?:^|\.)(?:outlook|office365|office|hotmail|live)\.(?:com|cn|de)$"
_YAHOO: Final = r"(?:^|\.)(?:yahoo\.(?:com|co\.jp)|aol\.com|ymail\.com)$"
_APPLE: Final = r"(?:^|\.)(?:me|icloud|mac)\.com$"
_FASTMAIL: Final = r"(?:^|\.)(?:fastmail\.com|messagingengine\.com)$"
_GMX: Final = r"(?:^|\.)(?:gmx\.(?:net|com|de|at|ch)|web\.de)$"

_BY_WORDS: Final = (
    # (pattern of the host or "", pattern of "[CODE] words", transient, remedy); the first match counts. If an
    # entry is wrongly transient, a wrong password is sent again and again until the account is locked. So
    # only what no server says about a wrong password is transient.
    (
        "",
        r"too many (?:\w+ )?(?:login|log-in|authentication|auth)\w* (?:attempts|failures|errors)"
        r"|too many (?:failed|bad|invalid|unsuccessful)"
        r"|account (?:\w+ ){0,2}(?:locked|blocked|suspended|disabled)|user is disabled|login blocked"
        r"|temporarily (?:locked|blocked|suspended|disabled)",
        False,
        "the account is locked: sign in at the provider's website to unlock it, and wait before another try",
    ),
    (
        "",
        r"too many (?:\w+ )?(?:connections|sessions)|maximum number of connections|connection limit"
        r"|\[LIMIT\]",
        True,
        "close other mail programs, or lower --connections",
    ),
    (
        "",
        r"bandwidth limit|\[(?:OVERQUOTA|THROTTLED)\]",
        True,
        "the provider's daily limit is used up: wait up to 24 hours, and lower --fetch-ahead",
    ),
    (
        _GOOGLE,
        r"application-specific password|app password",
        False,
        "create an app password at https://myaccount.google.com/apppasswords (needs 2-step verification),"
        " or use OAuth",
    ),
    (
        "",
        r"app(?:lication)?[- ](?:specific )?password|authorization code",
        False,
        "create an app password in the security settings of the account, and use it here",
    ),
    (
        "",
        r"via your web browser|web login required|\[WEBALERT",
        False,
        "sign in with a web browser once and confirm that it was you, then use an app password or OAuth",
    ),
    (
        "",
        r"\bimap\b.{0,40}\b(?:disabled|deactivated|off|blocked|not (?:enabled|allowed|permitted|activated))\b"
        r"|(?:not|yet to) (?:be )?enabled? (?:for )?imap\b|enable imap\b|service is not open",
        False,
        "switch IMAP on in the settings of the account (web mail, forwarding and POP/IMAP), or ask the"
        " administrator; if it is on, check user and password",
    ),
    (
        "",
        r"\[PRIVACYREQUIRED\]|(?:plain|clear)text auth\w* (?:is )?(?:disallowed|disabled|not allowed)",
        False,
        "use a connection with TLS, imaps:// (port 993)",
    ),
    (
        "",
        r"basic auth\w* (?:is )?(?:disabled|blocked|not)",
        False,
        "the server accepts no passwords: use OAuth ('imapfs login', see docs/accounts.md)",
    ),
    ("", r"\[EXPIRED\]|password (?:has |is )?expired", False, "set a new password at the provider"),
    (
        "",
        r"\[AUTHORIZATIONFAILED\]",
        False,
        "the password is right, but not for this user's mail: check the user name",
    ),
    ("", r"\[CONTACTADMIN\]", False, "ask the administrator of the server"),
    (
        "",
        r"no such user",
        False,
        "check the user name; for Proton Mail use the user and password that the Bridge shows, not your own",
    ),
    (
        "",
        r"\[(?:UNAVAILABLE|INUSE|SERVERBUG)\]|temporar(?:y|ily)|try (?:again )?later"
        r"|\btry again (?:soon|in|after)\b|\bthrottl|\brate.?limit"
        r"|\bserver (?:is )?(?:too )?(?:busy|unavailable)\b",
        True,
        "try again in a few minutes",
    ),
)
_BY_HOST: Final = (
    # (pattern of the host, remedy), if the words could also mean a wrong password.
    (
        _GOOGLE,
        "Google accepts no ordinary password: create an app password at"
        " https://myaccount.google.com/apppasswords (needs 2-step verification), or use OAuth",
    ),
    (_MICROSOFT, "Microsoft accepts no password for IMAP: use OAuth ('imapfs login', see docs/accounts.md)"),
    (
        _YAHOO,
        "Yahoo and AOL accept no ordinary password: create an app password in the account's security"
        " settings",
    ),
    (
        _APPLE,
        "iCloud accepts no ordinary password: create an app-specific one at https://account.apple.com; the"
        " user is the part of the address before the @",
    ),
    (
        _FASTMAIL,
        "Fastmail accepts no ordinary password: create an app password for IMAP in its privacy and security"
        " settings; the user is the whole address",
    ),
    (_GMX, "switch IMAP on in the settings of the web mail; then check user and password"),
    (
        "",
        "check the password and the user name, which often is the whole address; some providers require an"
        " app password",
    ),
)
_FOR_TOKENS: Final = (
    "sign in again with 'imapfs login' as this user, or correct the token command; the token must be for IMAP"
)

_WORDS: Final = tuple(
    (re.compile(host, re.I), re.compile(words, re.I), Refusal(transient, remedy))
    for host, words, transient, remedy in _BY_WORDS
)
_HOSTS: Final = tuple((re.compile(host, re.I), Refusal(False, remedy)) for host, remedy in _BY_HOST)
_NOT_CONNECTED: Final = "user is authenticated but not connected"
"""Microsoft's response to any command after a login that opens no mailbox."""


def explain(host: str, code: str, words: str, *, of_token: bool = False) -> Refusal:
    """Return what it means that ``host`` refused a login with response code ``code`` (or "") and ``words``.

    ``of_token``: the login used an OAuth token, not a password.
    """
    host = host.rstrip(".")
    response = f"[{code}] {words}" if code else words
    for of_host, of_words, refusal in _WORDS:
        if of_host.search(host) and of_words.search(response):
            return refusal
    if of_token:
        return Refusal(False, _FOR_TOKENS)
    return next(refusal for of_host, refusal in _HOSTS if of_host.search(host))


def explain_later(words: str) -> str:
    """Return what to do if ``words`` refuse a command after an accepted login; "" if the table knows
    nothing."""
    if _NOT_CONNECTED not in words.lower():
        return ""
    return (
        "the login opens no mailbox: check that the user is the mailbox's own address, that IMAP is switched"
        " on for it, and that the token is for IMAP (scope IMAP.AccessAsUser.All)"
    )
