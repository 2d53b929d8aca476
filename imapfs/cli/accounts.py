"""``imapfs accounts``: the accounts in the configuration file."""

import json

import click

from imapfs.log import one_line


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON: a list of objects.")
def accounts(as_json: bool) -> None:
    """List the configured accounts and where each is mounted."""
    from imapfs.account import config, file

    listed = file.accounts(config.default_path())
    if as_json:
        click.echo(json.dumps([one._asdict() for one in listed], indent=2))
        return
    if not listed:
        click.echo("no accounts yet: add one with 'imapfs setup'")
    for one in listed:
        where = ", ".join(one.mountpoints) or "not mounted"
        click.echo(one_line(f"{one.name}  {one.url}  ({one.credential})  {where}"))
