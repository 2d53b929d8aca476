"""What the words of servers mean: a remedy for each, and no wrong password sent twice for a guess."""

import pytest

from imapfs.imap.refusals import explain

GMAIL = "imap.gmail.com"
OUTLOOK = "outlook.office365.com"
ELSEWHERE = "mail.example.org"


@pytest.mark.parametrize(
    ("host", "code", "words", "remedy"),
    [
        # As these servers are reported to say it.
        (GMAIL, "AUTHENTICATIONFAILED", "Invalid credentials (Failure)", "apppasswords"),
        (
            GMAIL,
            "ALERT",
            "Application-specific password required: https://support.google.com/accounts/ (Failure)",
            "apppasswords",
        ),
        (
            GMAIL,
            "ALERT",
            "Please log in via your web browser: https://support.google.com/mail/ (Failure)",
            "with a web browser",
        ),
        (GMAIL, "WEBALERT", "Web login required.", "with a web browser"),
        (
            GMAIL,
            "ALERT",
            "Your account is not enabled for IMAP use. Please visit your Gmail settings page. (Failure)",
            "switch IMAP on",
        ),
        (GMAIL, "ALERT", "IMAP access is disabled for your domain. (Failure)", "administrator"),
        (OUTLOOK, "", "LOGIN failed.", "use OAuth"),
        (OUTLOOK, "", "AUTHENTICATE failed.", "use OAuth"),
        ("imap.mail.yahoo.com", "AUTHENTICATIONFAILED", "LOGIN Invalid credentials", "app password"),
        ("imap.mail.yahoo.com", "", "Too many bad login attempts.", "locked"),
        ("imap.mail.me.com", "AUTHENTICATIONFAILED", "Authentication failed", "account.apple.com"),
        ("imap.fastmail.com", "", "Incorrect username or password.", "app password for IMAP"),
        (
            "imap.fastmail.com",
            "",
            "Sorry, you need to create an app password to use this service",
            "app password",
        ),
        ("127.0.0.1", "", "no such user", "Bridge"),
        ("imap.zoho.com", "ALERT", "You are yet to enable IMAP for your account.", "switch IMAP on"),
        (
            "imap.yandex.com",
            "AUTHENTICATIONFAILED",
            "LOGIN Invalid credentials or IMAP is disabled sc=x_1",
            "switch IMAP on",
        ),
        ("imap.mail.ru", "AUTHENTICATIONFAILED", "Application password is REQUIRED", "app password"),
        (
            "imap.qq.com",
            "",
            "Login fail. Account is abnormal, service is not open, password is incorrect",
            "switch IMAP on",
        ),
        ("imap.gmx.net", "AUTHENTICATIONFAILED", "authentication failed", "switch IMAP on"),
        (ELSEWHERE, "AUTHENTICATIONFAILED", "Authentication failed.", "check the password"),
        (ELSEWHERE, "AUTHORIZATIONFAILED", "Authorization failed", "user name"),
        (ELSEWHERE, "EXPIRED", "Password expired", "new password"),
        (ELSEWHERE, "CONTACTADMIN", "Login disabled", "administrator"),
        (
            ELSEWHERE,
            "PRIVACYREQUIRED",
            "Plaintext authentication disallowed on non-secure (SSL/TLS) connections.",
            "imaps://",
        ),
        (ELSEWHERE, "", "Account is temporarily locked, try again later", "locked"),
    ],
)
def test_refused_credentials_are_not_sent_again_and_have_a_remedy(
    host: str, code: str, words: str, remedy: str
) -> None:
    refusal = explain(host, code, words)
    assert remedy in refusal.remedy
    assert not refusal.transient


@pytest.mark.parametrize(
    ("code", "words", "remedy"),
    [
        ("ALERT", "Too many simultaneous connections. (Failure)", "--connections"),
        ("", "Maximum number of connections from user+IP exceeded", "--connections"),
        ("LIMIT", "no more", "--connections"),
        ("ALERT", "Account exceeded command or bandwidth limits. (Failure)", "--fetch-ahead"),
        ("THROTTLED", "slow down", "--fetch-ahead"),
        ("UNAVAILABLE", "Temporary authentication failure. [mail:2026-11-20]", "few minutes"),
        ("INUSE", "", "few minutes"),
        ("SERVERBUG", "", "few minutes"),
    ],
)
def test_what_passes_may_be_tried_again(code: str, words: str, remedy: str) -> None:
    refusal = explain(GMAIL, code, words)
    assert remedy in refusal.remedy
    assert refusal.transient


def test_for_a_token_nobody_is_told_to_change_a_password() -> None:
    refusal = explain(GMAIL, "AUTHENTICATIONFAILED", "Invalid credentials (Failure)", of_token=True)
    assert "imapfs login" in refusal.remedy
    assert "password" not in refusal.remedy


def test_host_of_somebody_else_is_not_taken_for_a_provider() -> None:
    assert "Google" not in explain("imap.notgmail.com", "", "no").remedy
    assert "Google" in explain("IMAP.GMAIL.COM.", "", "no").remedy
