"""The command line of the benchmark; ``scripts/bench`` sets up what it needs and starts it."""

import shutil
import signal
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import click
from rich.console import Console
from rich.text import Text

import scripts.benchmark.rows  # noqa: F401 - fills ROWS
from imapfs import mountinfo
from scripts.benchmark import report
from scripts.benchmark.bench import Bench, surroundings
from scripts.benchmark.results import ROWS, Result, Row, RowFailed, Settings

_FULL = Settings(
    messages=10_000, crowd=100_000, few=1000, million=1_000_000, latency=50, repeat=5, limit=1200
)
_QUICK = Settings(messages=1000, crowd=5000, few=30, million=10_000, latency=50, repeat=2, limit=15)
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_PROGRAMS = {
    "bindfs": "bindfs",
    "dovecot": "dovecot-imapd",
    "find": "findutils",
    "fusermount3": "fuse3",
    "grep": "grep",
    "mbsync": "isync",
    "rclone": "rclone",
    "rsync": "rsync",
    "setfattr": "attr",
    "/usr/lib/openssh/sftp-server": "openssh-sftp-server",
    "sshfs": "sshfs",
}


@click.command()
@click.option("--quick", is_flag=True, help="Under two minutes: little mail, few repetitions, rough figures.")
@click.option("--rows", metavar="NAME,...", help="Only these rows.  [default: all]")
@click.option("--list", "only_list", is_flag=True, help="List the rows and end.")
@click.option(
    "--messages", type=click.IntRange(100), help="Messages in the mailbox that is read.  [default: 10000]"
)
@click.option("--crowd", type=click.IntRange(2000), help="Messages in the large mailbox.  [default: 100000]")
@click.option(
    "--few", type=click.IntRange(1), help="Messages that are moved, flagged, put in.  [default: 1000]"
)
@click.option(
    "--million", type=click.IntRange(1000), help="Messages in the largest account.  [default: 1000000]"
)
@click.option("--profile", is_flag=True, help="Show where a message's time goes in a cold scan, and end.")
@click.option("--latency", type=click.FloatRange(1), metavar="MS", help="Round trip in ms.  [default: 50]")
@click.option("--repeat", type=click.IntRange(1, 20), help="Repetitions of each row.  [default: 5]")
@click.option("--limit", type=click.FloatRange(1), metavar="SECONDS", help="Longest wait for a program.")
@click.option(
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("bench-results"),
    show_default=True,
    help="Directory for benchmark.json and benchmark.svg.",
)
def main(
    quick: bool, rows: str | None, only_list: bool, profile: bool, output: Path, **given: int | float | None
) -> None:
    """Measure imapfs beside mbsync, a Maildir, IMAPClient and other mounts, on a private mail server.

    Exit code 0 if every row was measured, whether its goal is met or not; 1 if a row failed or could not
    begin; 130 if interrupted (what was measured is shown).
    """
    if only_list:
        for row in ROWS.values():
            click.echo(f"{row.name:16} {_QUICK.fill(row.title) if quick else _FULL.fill(row.title)}")
        return
    chosen = _choose(rows)
    _check_programs()
    base = _QUICK if quick else _FULL
    settings = replace(base, **{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]
    sys.exit(_run(chosen, settings, None if profile else output))


def _choose(names: str | None) -> list[Row]:
    if names is None:
        return list(ROWS.values())
    unknown = [name for name in names.split(",") if name not in ROWS]
    if unknown:
        raise click.BadParameter(f"no row {unknown[0]!r}; there are {', '.join(ROWS)}", param_hint="--rows")
    return [ROWS[name] for name in names.split(",")]


def _check_programs() -> None:
    missing = [
        f"{program} (package {package})"
        for program, package in _PROGRAMS.items()
        if not shutil.which(program)
    ]
    if missing:
        raise click.ClickException(f"not installed: {', '.join(missing)}; scripts/bench installs them")


def _run(rows: list[Row], settings: Settings, output: Path | None) -> int:
    """Measure ``rows`` and write what came out to ``output``; without it, show a profile instead."""
    for number in _SIGNALS:
        signal.signal(number, _interrupt)
    console = Console()
    if not console.is_terminal:
        # A file has no width, and 80 columns are too few.
        console.width = 140
    directory = Path(tempfile.mkdtemp(prefix="imapfs-bench-"))
    results: list[Result] = []
    code = 0
    try:
        about = report.surroundings(directory)
        with surroundings(settings, directory) as bench:
            if output is None:
                report.show_profile(bench.profile(), settings, console)
                return 0
            # A row that is interrupted is not shown: it could look complete.
            results.extend(_measure(row, bench, console) for row in rows)
    except KeyboardInterrupt:
        code = 130
    except (OSError, RuntimeError) as error:
        raise click.ClickException(str(error)) from None
    finally:
        # Through a mount that is still there, this would delete the mail instead.
        if not any(mount.mountpoint.is_relative_to(directory) for mount in mountinfo.all_mounts()):
            shutil.rmtree(directory)
    if results and output is not None:
        report.show(results, about, console)
        for path in report.write(results, settings, about, output):
            console.print(Text(f"wrote {path}"))
    return code or int(any(result.error for result in results))


def _interrupt(*_: object) -> NoReturn:
    """End the run; what it leaves is then cleaned up undisturbed."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def _measure(row: Row, bench: Bench, console: Console) -> Result:
    """Every repetition of ``row``; a failure of whatever kind ends the row and not the run."""
    result = Result(row, bench.settings.fill(row.title), bench.settings.fill(row.peer))
    started = time.monotonic()
    with console.status(Text(result.title)):
        try:
            for sample in row.measure(bench):
                result.samples.append(sample)
        except RowFailed as failure:
            result.error = str(failure)
        except Exception as error:
            result.error = f"{type(error).__name__}: {error}"
    result.seconds = time.monotonic() - started
    figures = ", ".join(f"{figure:.3g}" for figure in result.figures)
    console.print(Text(f"{row.name}: {result.error or figures} ({result.seconds:.0f} s)"))
    return result


if __name__ == "__main__":
    main()
