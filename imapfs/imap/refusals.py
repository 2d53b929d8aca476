"""What servers say when they refuse a login, and what a person can do about it: one table, pure.

A server says NO, perhaps with a response code (RFC 5530), and words of its own. The codes are few and many
servers leave them out, so that the words of the large providers are known here as well; where the words say
nothing, the provider's host often does, because some take no ordinary password at all.
"""

import re
from typing import Final, NamedTuple


class Refusal(NamedTuple):
    """What a refused login means."""

    transient: bool
    """Whether the credentials were not judged, so that the same ones may be accepted later."""
    remedy: str
    """What to do, as the end of a sentence."""


_GOOGLE: Final = r"(?:^|\.)(?:gmail|googlemail|google)\.com$"
_MICROSOFT: Final = r"(?:^|\.)(?:outlook|office365|office|hotmail|live)\.(?:com|cn|de)$"
_YAHOO: Final = r"(?:^|\.)(?:yahoo\.(?:com|co\.jp)|aol\.com|ymail\.com)$"
_APPLE: Final = r"(?:^|\.)(?:me|icloud|mac)\.com$"
_FASTMAIL: Final = r"(?:^|\.)(?:fastmail\.com|messagingengine\.com)$"
_GMX: Final = r"(?:^|\.)(?:gmx\.(?:net|com|de|at|ch)|web\.de)$"

_BY_WORDS: Final = (
    # (pattern of the host or "", pattern of "[CODE] words", transient, remedy); the first that fits counts.
    # Wrongly transient means that a wrong password is sent again and again, until the account is locked:
    # that is only for what no server says of a wrong password.
    (
        "",
        r"too many (?:\w+ )?(?:login|log-in|authentication|auth)\w* (?:attempts|failures|errors)"
        r"|too many (?:failed|bad|invalid|unsuccessful)"
        r"|account (?:\w+ ){0,2}(?:locked|blocked|suspended|disabled)|user is disabled|login blocked"
        r"|temporarily (?:locked|blocked|suspended|disabled)",
        False,
        "the account is locked: sign in at the provider's web site to unlock it, and wait before another try",
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
        "the provider's limit a day is used up: wait up to 24 hours, and lower --fetch-ahead",
    ),
    (
        _GOOGLE,
        r"application-specific password|app password",
        False,
        "make an app password at https://myaccount.google.com/apppasswords (which needs 2-step verification),"
        " or use OAuth",
    ),
    (
        "",
        r"app(?:lication)?[- ](?:specific )?password|authorization code",
        False,
        "make an app password in the security settings of the account, and use it here",
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
        "the server takes no passwords: use OAuth ('imapfs login', see the README)",
    ),
    ("", r"\[EXPIRED\]|password (?:has |is )?expired", False, "set a new password at the provider"),
    (
        "",
        r"\[AUTHORIZATIONFAILED\]",
        False,
        "the password is right but does not open this user's mail: check the user name",
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
        "try again in some minutes",
    ),
)
_BY_HOST: Final = (
    # (pattern of the host, remedy), where the words do not tell it apart from a wrong password.
    (
        _GOOGLE,
        "Google takes no ordinary password: make an app password at"
        " https://myaccount.google.com/apppasswords (which needs 2-step verification), or use OAuth",
    ),
    (_MICROSOFT, "Microsoft takes no password for IMAP: use OAuth ('imapfs login', see the README)"),
    (
        _YAHOO,
        "Yahoo and AOL take no ordinary password: make an app password in the account's security settings",
    ),
    (
        _APPLE,
        "iCloud takes no ordinary password: make an app-specific one at https://account.apple.com; the user"
        " is the part of the address before the @",
    ),
    (
        _FASTMAIL,
        "Fastmail takes no ordinary password: make an app password for IMAP in its privacy and security"
        " settings; the user is the whole address",
    ),
    (_GMX, "switch IMAP on in the settings of the web mail; then check user and password"),
    (
        "",
        "check the password and the user name, which often is the whole address; some providers want an app"
        " password",
    ),
)
_FOR_TOKENS: Final = (
    "sign in anew with 'imapfs login' as this very user, or mend the token command;"
    " the token must be for IMAP"
)

_WORDS: Final = tuple(
    (re.compile(host, re.I), re.compile(words, re.I), Refusal(transient, remedy))
    for host, words, transient, remedy in _BY_WORDS
)
_HOSTS: Final = tuple((re.compile(host, re.I), Refusal(False, remedy)) for host, remedy in _BY_HOST)
_NOT_CONNECTED: Final = "user is authenticated but not connected"
"""Microsoft's words, to any command, for a login that opens no mailbox."""


def explain(host: str, code: str, words: str, *, of_token: bool = False) -> Refusal:
    """What it means that ``host`` refused a login with this response code (or "") and these words.

    ``of_token`` says that the login was by an OAuth token, not by a password.
    """
    host = host.rstrip(".")
    said = f"[{code}] {words}" if code else words
    for of_host, of_words, refusal in _WORDS:
        if of_host.search(host) and of_words.search(said):
            return refusal
    if of_token:
        return Refusal(False, _FOR_TOKENS)
    return next(refusal for of_host, refusal in _HOSTS if of_host.search(host))


def explain_later(words: str) -> str:
    """What to do where these words refuse another command after the login was accepted; "" for nothing."""
    if _NOT_CONNECTED not in words.lower():
        return ""
    return (
        "the login opens no mailbox: check that the user is the mailbox's own address, that IMAP is switched"
        " on for it, and that the token is for IMAP (scope IMAP.AccessAsUser.All)"
    )
