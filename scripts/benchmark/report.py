"""How results are shown: a table on the terminal, JSON for programs, a chart for the documentation."""

import json
import math
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from imapfs import __version__
from scripts.benchmark.results import Result, Settings

FOOTNOTES = (
    "x: imapfs / peer of each repetition, which take turns. RTT: round trips. The goal is for the median.",
    "mbsync runs without fsync, its faster setting, and trusts only the test CA. Its time, and that of "
    "imapfs beside it, includes start, connection and login.",
    "The caches of the operating system are warm for everybody: emptying them takes root and is not possible "
    "everywhere.",
    "sshfs talks to its server by a pipe, without ssh and a network, which is a favour to it.",
    "The link models round trips (that of a TCP handshake too) and bandwidth, not slow start or loss.",
)

_LEFT, _RIGHT, _LINE, _MARGIN = 560, 230, 42, 36
_WIDTH = 1160
_COLOURS = {True: "#2a7f62", False: "#c8553d"}


def surroundings(directory: Path) -> dict[str, str]:
    """Versions and the machine, as far as they bear on the figures."""
    return {
        "imapfs": __version__,
        "Python": platform.python_version(),
        "kernel": platform.release(),
        "processors": str(os.cpu_count()),
        "Dovecot": _version("dovecot"),
        "mbsync": _version("mbsync"),
        "rsync": _version("rsync"),
        "file system": _said("findmnt", "-n", "-o", "FSTYPE", "-T", str(directory)),
    }


def _said(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def _version(program: str) -> str:
    found = re.search(r"\d[\w.]*", _said(program, "--version"))
    return found[0] if found else "unknown"


def show(results: Sequence[Result], about: dict[str, str], console: Console) -> None:
    """Print the table."""
    table = Table(title="imapfs benchmark", title_justify="left", show_lines=True)
    table.add_column("measured", ratio=1)
    for heading in ("imapfs", "peer", "min - median - max", "goal"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("", max_width=40)
    for result in results:
        what = Text(result.title)
        if result.peer:
            what.append(f"\nagainst {result.peer}", style="dim")
        if result.error is not None:
            verdict = Text("failed: " + result.error, style="bold red")
        else:
            verdict = Text("met", style="green") if result.met else Text("not met", style="bold yellow")
            if result.limit is not None and not result.met:
                unit = "s" if result.theirs is not None else result.row.unit
                limit = f": {_number(result.limit)} {unit} are {result.row.limit}"
                verdict.append(limit, style="not bold default")
        table.add_row(what, *_figures(result), verdict)
    console.print(table)
    console.print(Text(", ".join(f"{name} {value}" for name, value in about.items()), style="dim"))
    for note in FOOTNOTES:
        console.print(Text(note, style="dim"))


def show_profile(spent: dict[str, float], settings: Settings, console: Console) -> None:
    """Print where the processor time of one message goes, by layer."""
    total = sum(spent.values())
    table = Table(
        title=settings.fill("cold grep -r of {messages} messages, with the start"), title_justify="left"
    )
    table.add_column("layer")
    for heading in ("us a message", "share"):
        table.add_column(heading, justify="right")
    for name, seconds in sorted(spent.items(), key=lambda item: -item[1]):
        table.add_row(name, f"{1e6 * seconds / settings.messages:.1f}", f"{seconds / total:.0%}")
    table.add_row("all", f"{1e6 * total / settings.messages:.1f}", "", style="bold")
    console.print(table)
    console.print(Text("Processor time only. loop: the thread that answers the kernel.", style="dim"))


def _figures(result: Result) -> tuple[str, str, str, str]:
    unit = result.row.unit
    goal = f"<= {result.row.goal:g} {unit}"
    if not result.samples:
        return "", "", "", goal
    theirs = result.theirs
    ours = f"{_number(result.ours)} {unit if theirs is None else 's'}"
    values = (min(result.figures), result.median, max(result.figures))
    # Of one figure there is nothing more to say.
    spread = " - ".join(map(_number, values)) if len(result.samples) > 1 or theirs is not None else ""
    return ours, "" if theirs is None else f"{_number(theirs)} s", spread, goal


def _number(value: float) -> str:
    """Three digits, which is more than is certain."""
    if value == 0 or value >= 100:
        return f"{value:,.0f}"
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}"


def write(
    results: Sequence[Result], settings: Settings, about: dict[str, str], directory: Path
) -> list[Path]:
    """Write ``benchmark.json`` and ``benchmark.svg`` into ``directory`` and return their paths."""
    directory.mkdir(parents=True, exist_ok=True)
    data = directory / "benchmark.json"
    found = {
        "surroundings": about,
        "settings": asdict(settings),
        "notes": FOOTNOTES,
        "rows": [result.as_json() for result in results],
    }
    data.write_text(json.dumps(found, indent=2) + "\n")
    drawing = directory / "benchmark.svg"
    drawing.write_text(chart(results))
    return [data, drawing]


def chart(results: Sequence[Result]) -> str:
    """A bar for each row with another program as its peer: the median ratio to that, on a logarithmic scale.

    A thin line goes from the least to the most. Left of the line in the middle imapfs is faster.
    """
    shown = [result for result in results if result.row.peer and result.row.unit == "x"]
    figures = [figure for result in shown for figure in result.figures if figure > 0]
    low = math.floor(math.log10(min([0.1, *figures])))
    high = math.ceil(math.log10(max([10.0, *figures])))

    def x(figure: float) -> float:
        """Where a ratio is; 0 has no place on such a scale, and gets its left end."""
        exponent = math.log10(figure) if figure > 0 else low
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * (exponent - low) / (high - low)

    height = _LINE * len(shown) + 2 * _MARGIN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" '
        f'height="{height}" font-family="system-ui, sans-serif" font-size="13" fill="#222">',
        "<title>The time that imapfs takes as a multiple of the time that another program takes</title>",
        f'<rect width="{_WIDTH}" height="{height}" fill="#fff"/>',
        _text((x(10.0**low) + x(1)) / 2, _MARGIN / 2, "imapfs is faster", "middle"),
        _text((x(10.0**high) + x(1)) / 2, _MARGIN / 2, "the other is faster", "middle"),
    ]
    bottom = height - _MARGIN
    for exponent in range(low, high + 1):
        at = x(10.0**exponent)
        shade, width = ("#222", 1.5) if exponent == 0 else ("#ddd", 1)
        parts.append(f'<path d="M{at:.1f} {_MARGIN}V{bottom}" stroke="{shade}" stroke-width="{width}"/>')
        parts.append(_text(at, bottom + 14, f"{10.0**exponent:g} x", "middle"))
    for number, result in enumerate(shown):
        middle = _MARGIN + _LINE * (number + 0.5)
        parts.append(_text(_LEFT - 12, middle - 8, result.title, "end"))
        parts.append(_text(_LEFT - 12, middle + 8, f"against {result.peer}", "end", "#777"))
        if not result.samples:
            parts.append(_text(_WIDTH - _RIGHT + 12, middle, "failed"))
            continue
        least, median, most = map(x, (min(result.figures), result.median, max(result.figures)))
        left, right = sorted((median, x(1)))
        parts.append(
            f'<rect x="{left:.1f}" y="{middle - 7:.1f}" width="{max(right - left, 1):.1f}" height="14" '
            f'fill="{_COLOURS[result.median <= 1]}"/>'
        )
        parts.append(f'<path d="M{least:.1f} {middle:.1f}H{most:.1f}" stroke="#222" stroke-width="1.5"/>')
        ours, theirs, *_ = _figures(result)
        parts.append(_text(_WIDTH - _RIGHT + 12, middle, f"{_number(result.median)} x: {ours}, {theirs}"))
    return "\n".join([*parts, "</svg>", ""])


def _text(x: float, middle: float, text: str, anchor: str = "start", colour: str = "#222") -> str:
    place = f'x="{x:g}" y="{middle + 4.5:g}" text-anchor="{anchor}" fill="{colour}"'
    return f"<text {place}>{escape(text)}</text>"
