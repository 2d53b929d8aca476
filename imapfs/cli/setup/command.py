"""``imapfs setup``: the command and its options; `dialogue` asks the questions."""

from pathlib import Path

import click

from imapfs.cli.parameters import connection_options, given_settings, setting_option
from imapfs.model import Security


@click.command()
@click.option("--address", metavar="ADDRESS", help="Your e-mail address, from which the server is found.")
@click.option("--name", metavar="NAME", help="What to call the account.")
@setting_option("host", "The IMAP server; skips the search for it.")
@setting_option("port")
@setting_option("security")
@setting_option("user", "The user name on the server.  [default: as found, or the address]")
@click.option("--keyring", is_flag=True, help="Take the password from the keyring, or put it there.")
@click.option("--prompt", is_flag=True, help="Ask for the password at each mount.")
@connection_options
@click.option(
    "--no-lookup",
    is_flag=True,
    help="Search for the server only in the table that comes with imapfs, not on the network.",
)
@click.option("--no-test", is_flag=True, help="Do not test the login.")
@click.option("--replace", is_flag=True, help="Replace an account of the same name.")
@click.option("-y", "--yes", is_flag=True, help="Accept what is found or proposed without asking.")
def setup(
    address: str | None,
    name: str | None,
    host: str | None,
    port: int | None,
    security: Security | None,
    user: str | None,
    keyring: bool,
    prompt: bool,
    no_lookup: bool,
    no_test: bool,
    replace: bool,
    yes: bool,
    **settings: object,
) -> None:
    """Add an account to the configuration file.

    Finds the server from your e-mail address, tests the login, and asks at the terminal for everything that
    no option gives. There is no option for the password: it is
    typed, or comes from a command, a file or the keyring.
    """
    from imapfs.account import config
    from imapfs.account.discovery import Network
    from imapfs.cli.setup import dialogue

    options = given_settings(settings)
    ca_file = options.get("ca-file")
    given = dialogue.Given(
        options, name, address, host, port, security, user, keyring, prompt,
        lookup=not no_lookup, test=not no_test, replace=replace, yes=yes,
    )  # fmt: skip
    network = Network(ca_file=Path(str(ca_file)) if ca_file is not None else None)
    dialogue.run(given, config.default_path(), network)
