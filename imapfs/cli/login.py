"""``imapfs login``: OAuth 2.0 consent for an account."""

import click

from imapfs.cli.parameters import SOURCE
from imapfs.errors import UsageError
from imapfs.model import AccessToken


@click.command()
@click.argument("account", type=SOURCE)
@click.option("--device", is_flag=True, help="Show a code to enter in a browser on any machine.")
def login(account: str, device: bool) -> None:
    """Consent to the use of ACCOUNT with OAuth 2.0, in a browser.

    ACCOUNT is the name of an account in the configuration file that has an "oauth" table. The token that the
    provider issues is stored in the keyring, where mounts find it.
    """
    from imapfs.account import config, consent
    from imapfs.imap.connect import tls_context
    from imapfs.imap.session import Session

    path = config.default_path()
    located = config.locate(account, {}, path)
    client = located.credentials.oauth
    if client is None:
        raise UsageError(
            f"this account has no table 'oauth' in {path} that names its provider: see imapfs.toml(5)"
        )
    context = tls_context(located.account)

    def check(token: AccessToken) -> None:
        # Consent given as another user, or for an account without IMAP, fails here.
        Session.connect(located.account, token, context, located.options["timeout"]).close()

    consent.ask(client, located.account, click.echo, device=device, check=check)
    click.echo(f"logged in as {located.account.user}")
