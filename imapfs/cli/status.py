"""``imapfs status``, ``sync`` and ``retry``: what a mount is doing, and what it has yet to upload."""

import json
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import click

from imapfs import mountinfo
from imapfs.cli.parameters import LIVE_MOUNT
from imapfs.cli.uploads import WHY_SCRATCH, UploadProgress, counted, why_waiting
from imapfs.errors import ImapfsError
from imapfs.log import one_line

_MAX_MAILBOXES: Final = 10


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
        click.echo(one_line(f"{one['path']}: {why_waiting(one)}"))
    if waiting:
        raise ImapfsError(
            f"not on the server: {counted(len(waiting), 'file')}",
            remedy=f"'imapfs retry {mountpoint}' tries refused uploads again",
        )


@click.command()
@click.argument("mountpoint", type=LIVE_MOUNT)
def retry(mountpoint: Path) -> None:
    """Upload again what the server refused."""
    from imapfs.daemon import control

    number = control.retry(mountpoint)
    click.echo(f"uploaded again: {counted(number, 'file')}" if number else "there is no refused upload")


def _status_or_reason(mount: mountinfo.Mount) -> dict[str, Any]:
    """Return the status of ``mount``, or why its daemon does not give one."""
    from imapfs.daemon import control

    known = {"mountpoint": str(mount.mountpoint), "source": mount.source}
    try:
        return {**known, "state": "unknown", **control.read_status(mount.mountpoint)}
    except ImapfsError as error:
        return {**known, "state": "unavailable", "reason": str(error)}


def _rows(status: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield a label and a text for each line. A daemon of another version may know less."""
    yield "account", str(status.get("source", "unknown"))
    mounted = f"{status.get('mountpoint', '')} (process {status.get('pid', 'unknown')}"
    yield "mounted on", mounted + (", read-only)" if status.get("read_only") else ")")
    yield "server", _server(status)
    yield "new mail", _push(status.get("push") or {})
    connections = status.get("connections") or {}
    yield "connections", f"{connections.get('open', 0)} of {connections.get('limit', 0)}"
    for box in status.get("mailboxes", [])[:_MAX_MAILBOXES]:
        yield f"  {box['path']}", f"{box['unseen']} unread of {box['messages']}"
    yield "cache", _cache(status.get("cache") or {})
    files = status.get("files") or {}
    waiting = status.get("waiting", [])
    number = max(len(waiting), sum(files.values()))
    yield "not sent", counted(number, "file") if number else "nothing"
    for one in waiting:
        yield f"  {one['path']}", why_waiting(one)
    for one in status.get("scratch", []):
        yield f"  {one['path']}", WHY_SCRATCH
    for path in status.get("kept", []):
        yield f"  {path}", "is on the server, which has changed it: compare, then delete this copy"
    yield "spool", str(status.get("spool", ""))


def _server(status: dict[str, Any]) -> str:
    state = str(status.get("state", "unknown"))
    text = state + _since(status.get("since"))
    if status.get("reason"):
        text += f": {status['reason']}"
    wait = status.get("retry_in")
    return text if wait is None else f"{text}; next attempt in {_duration(float(wait))}"


def _since(time: object) -> str:
    try:
        began = datetime.fromisoformat(str(time))
    except ValueError:
        return ""
    if began.tzinfo is None:
        return ""
    return f" for {_duration((datetime.now(UTC) - began).total_seconds())}"


def _duration(seconds: float) -> str:
    for length, unit in ((86400, "day"), (3600, "hour"), (60, "minute")):
        if seconds >= 2 * length:
            return counted(int(seconds // length), unit)
    return counted(max(0, round(seconds)), "second")


def _push(push: dict[str, Any]) -> str:
    if not push:
        return "unknown"
    every = f"asked for every {_duration(float(push.get('poll') or 0))}"
    if push.get("by") == "notify":
        return "announced by the server, in all mailboxes"
    if push.get("by") == "idle":
        return f"announced by the server in {', '.join(push.get('idle', []))}; elsewhere {every}"
    return every


def _cache(cache: dict[str, Any]) -> str:
    from imapfs.account.values import show_size

    size = f"{show_size(int(cache.get('bytes', 0)))} of {show_size(int(cache.get('limit', 0)))}"
    messages = f"{counted(int(cache.get('messages', 0)), 'message')}, of which {cache.get('bodies', 0)} read"
    gone = " (deleted: unmount, and mount again)" if cache.get("deleted") else ""
    return f"{size}; {messages}; in {cache.get('path', '')}{gone}"


def _show(rows: list[tuple[str, str]]) -> None:
    if not sys.stdout.isatty():
        for name, value in rows:
            click.echo(one_line(f"{name}: {value}"))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=False, box=None)
    for name, value in rows:
        # A plain string would have "[...]" interpreted as markup.
        style = {"online": "green", "offline": "red", "throttled": "yellow"}.get(value.split(" ")[0], "")
        table.add_row(Text(one_line(name), style="bold"), Text(one_line(value), style=style))
    Console().print(table)
