"""Runs checks on servers, each by itself, and writes down what came of it."""

import contextlib
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal, NamedTuple

from tests.support.acceptance.checks import CHECKS, Lacks, Trial
from tests.support.acceptance.peers import Peer
from tests.support.requirements import Missing
from tests.support.servers.tls import CertificateAuthority

LOG: Final = "log"
"""The column for what the mounts of all checks have logged."""
BEGIN: Final = "<!-- what scripts/servers --write printed -->"
END: Final = "<!-- the end of it -->"
_WHY: Final = 300
"""Maximum number of characters that say why a check failed."""
_TAIL: Final = 200
"""Lines of a log that are printed of a check that failed, if details are wanted."""


class Cell(NamedTuple):
    """What came of one check."""

    verdict: Literal["ok", "lacks", "fails"]
    why: str = ""


@dataclass
class Row:
    """What came of one server."""

    title: str
    cells: dict[str, Cell] = field(default_factory=dict)
    not_run: str = ""
    """Why there are no cells."""
    is_broken: bool = False
    """Whether that is because it did not start, although it is here."""

    @property
    def fails(self) -> bool:
        """Whether anything is not as it should be."""
        return self.is_broken or any(cell.verdict == "fails" for cell in self.cells.values())


def run_server(
    kind: type[Peer],
    names: Iterable[str],
    tell: Callable[[str], object],
    *,
    detailed: bool,
) -> Row:
    """Run the checks ``names`` on one server, and ``tell`` what came of each.

    ``detailed`` also prints tracebacks and what was said to the server.
    """
    with tempfile.TemporaryDirectory(prefix="imapfs-servers-") as made:
        directory = Path(made)
        try:
            with kind(CertificateAuthority(directory)) as peer:
                tell(f"{peer.title}\n")
                return _run_checks(peer, names, directory, tell, detailed)
        except Missing as error:
            tell(f"{kind.key}: not run: {error}\n")
            return Row(kind.key, not_run=str(error))
        except Exception as error:
            if detailed:
                traceback.print_exc()
            tell(f"{kind.key}: not run: {_line(error)}\n")
            return Row(kind.key, not_run=_line(error), is_broken=True)


def _run_checks(
    peer: Peer, names: Iterable[str], directory: Path, tell: Callable[[str], object], detailed: bool
) -> Row:
    row = Row(peer.title)
    complaints: list[str] = []
    for name in names:
        began = time.monotonic()
        said, cell = _run_check(peer, name, directory / name.replace(" ", "-"), detailed)
        complaints += said
        row.cells[name] = cell
        tell(f"  {name:12} {cell.verdict:5} {time.monotonic() - began:5.1f} s  {cell.why}\n")
    row.cells[LOG] = Cell("fails", complaints[0][:_WHY]) if complaints else Cell("ok")
    for complaint in complaints:
        tell(f"  {LOG:12} {complaint}\n")
    return row


def _run_check(peer: Peer, name: str, directory: Path, detailed: bool) -> tuple[list[str], Cell]:
    directory.mkdir()
    trial: Trial | None = None
    cell = Cell("ok")
    try:
        with contextlib.ExitStack() as stack:
            outside = stack.enter_context(peer.outside())
            trial = Trial(peer, name, directory, stack, outside, detailed=detailed)
            CHECKS[name](trial)
    except Lacks as error:
        cell = Cell("lacks", str(error))
    except Exception as error:
        if detailed:
            traceback.print_exc()
            for mounted in trial.mounts if trial else []:
                print(*mounted.log_text().splitlines()[-_TAIL:], sep="\n")
        cell = Cell("fails", _line(error))
    return [f"{name}: {complaint}" for complaint in (trial.complaints() if trial else [])], cell


def _line(error: BaseException) -> str:
    """Return one line that says what went wrong, and where a check does not say so itself."""
    text = " ".join(str(error).split())
    if not isinstance(error, AssertionError):
        # An OSError names paths, which are others in each run.
        said = (error.strerror or text) if isinstance(error, OSError) else text
        text = f"{type(error).__name__}: {said}"
    elif not text:
        frames = traceback.extract_tb(error.__traceback__)
        text = f"not so: {frames[-1].line}"
    return text[:_WHY]


def table(rows: Sequence[Row], heads: Sequence[str]) -> Iterator[str]:
    """Return the lines of the matrix in Markdown, and after it why what is not ``ok`` is not."""
    yield f"| server | {' | '.join(heads)} |"
    yield "|---" * (len(heads) + 1) + "|"
    ran = [row for row in rows if not row.not_run]
    for row in ran:
        yield f"| {row.title} | {' | '.join(_mark(row.cells, head) for head in heads)} |"
    for row in rows:
        if row.not_run:
            yield f"| {row.title} | {' | '.join('not run' for _ in heads)} |"
    notes = [
        f"- {row.title}, {head}: {_escaped(cell.why)}"
        for row in ran
        for head, cell in row.cells.items()
        if cell.verdict != "ok"
    ]
    notes += [f"- {row.title}: not run: {_escaped(row.not_run)}" for row in rows if row.not_run]
    if notes:
        yield ""
        yield from notes


def write(page: Path, lines: Iterable[str]) -> None:
    """Put ``lines`` between the two marks of a page. Raises ValueError where it lacks them."""
    text = page.read_text()
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{page} lacks the lines {BEGIN} and {END}")
    page.write_text("\n".join([before + begin, *lines, end + after]))


def _mark(cells: Mapping[str, Cell], head: str) -> str:
    cell = cells.get(head)
    return "" if cell is None else {"ok": "ok", "lacks": "lacks", "fails": "**fails**"}[cell.verdict]


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "\\<").replace("*", "\\*")
