"""``imapfs status``, ``sync`` and ``retry``: what a mount is doing, and what it has yet to upload."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from imapfs import mountinfo
from imapfs.cli.parameters import LIVE_MOUNT
from imapfs.cli.progress import UploadProgress
from imapfs.errors import ImapfsError
from imapfs.log import one_line


@click.command()
@click.argument("mountpoint", type=LIVE_MOUNT, required=False)
@click.option(
    "--json", "as_json", is_flag=True, help="Print JSON: an object for one MOUNTPOINT, else a list."
)
def status(mountpoint: Path | None, as_json: bool) -> None:
    """Show the status of one mount, or list all imapfs mounts."""
    from imapfs.daemon import control

    if mountpoint is not None:
        shown = control.read_status(mountpoint)
        if as_json:
            click.echo(json.dumps(shown, indent=2))
        else:
            _show(list(_rows(shown)))
        return
    mounts = [_status_or_reason(mount) for mount in mountinfo.imapfs_mounts()]
    if as_json:
        click.echo(json.dumps(mounts, indent=2))
        return
    for one in mounts:
        line = f"{one['mountpoint']}  {one['source']}  {one['state']}"
        click.echo(one_line(f"{line}: {one['reason']}" if one.get("reason") else line))


@click.command()
@click.argument("mountpoint", type=LIVE_MOUNT)
def sync(mountpoint: Path) -> None:
    """Wait until everything written below MOUNTPOINT is on the server.

    Lists the files that cannot be uploaded, and fails if there are any.
    """
    from imapfs.daemon import control

    waiting = control.sync(mountpoint, UploadProgress("Ctrl-C stops waiting, not uploading").show)
    for one in waiting:
        click.echo(one_line(f"{one['path']}: {one['state']}: {one['error'] or 'not uploaded yet'}"))
    if waiting:
        raise ImapfsError(
            f"{len(waiting)} files are not on the server: 'imapfs retry {mountpoint}' retries refused uploads"
        )


@click.command()
@click.argument("mountpoint", type=LIVE_MOUNT)
def retry(mountpoint: Path) -> None:
    """Upload again what the server refused."""
    from imapfs.daemon import control

    click.echo(f"{control.retry(mountpoint)} files are being uploaded again")


def _status_or_reason(mount: mountinfo.Mount) -> dict[str, Any]:
    """Return the status of ``mount``, or why its daemon does not give one."""
    from imapfs.daemon import control

    known = {"mountpoint": str(mount.mountpoint), "source": mount.source}
    try:
        return {**known, "state": "unknown", **control.read_status(mount.mountpoint)}
    except ImapfsError as error:
        return {**known, "state": "unavailable", "reason": str(error)}


def _rows(status: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield a name and a value for each field, including fields that only a newer daemon has."""
    for key, value in status.items():
        if isinstance(value, dict):
            yield from _rows(value, f"{prefix}{key} ")
            continue
        # A "limit" beside a number of bytes is one as well.
        in_bytes = key == "bytes" or (key == "limit" and "bytes" in status)
        yield f"{prefix}{key}".replace("_", " "), one_line(_readable(value, in_bytes))


def _readable(value: object, in_bytes: bool) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if in_bytes and isinstance(value, int):
        from imapfs.account.values import show_size

        return show_size(value)
    return value if isinstance(value, str) else json.dumps(value)


def _show(rows: list[tuple[str, str]]) -> None:
    if not sys.stdout.isatty():
        for name, value in rows:
            click.echo(f"{name}: {value}")
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=False, box=None)
    for name, value in rows:
        # A plain string would have "[...]" interpreted as markup.
        table.add_row(Text(name, style="bold"), Text(value))
    Console().print(table)
