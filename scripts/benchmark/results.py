"""What a row is, what came out of it, and whether that meets the goal."""

import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from scripts.benchmark.bench import Bench


class RowFailed(Exception):
    """A row could not be measured, or what was measured did not do what it should; says what in one line."""


class Sample(NamedTuple):
    """One repetition. Without ``theirs``, ``ours`` is the figure itself; with it, the figure is the ratio."""

    ours: float
    theirs: float | None = None
    limit: float | None = None
    """What holds ``ours``, measured in the same repetition and unit; see `Row.limit`."""

    @property
    def figure(self) -> float:
        return self.ours if self.theirs is None else self.ours / self.theirs

    def as_json(self) -> dict[str, float]:
        found = {"imapfs": self.ours, "peer": self.theirs, "limit": self.limit}
        return {name: value for name, value in found.items() if value is not None}


Measure = Callable[["Bench"], Iterator[Sample]]


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table. ``title`` and ``peer`` may hold fields of `Settings` in braces."""

    name: str
    title: str
    peer: str
    goal: float
    unit: str
    measure: Measure
    limit: str = ""
    """What `Sample.limit` is."""


ROWS: dict[str, Row] = {}
"""Every row by its name, in the order of the table."""


def row(
    name: str, title: str, *, goal: float, peer: str = "", unit: str = "x", limit: str = ""
) -> Callable[[Measure], Measure]:
    """Make the decorated function a row: it yields a `Sample` for each repetition.

    ``goal`` is the largest median figure that meets it, in ``unit``; "x" is the ratio to the ``peer``,
    "times" that to another figure of imapfs.
    ``limit`` says what the limit is that its samples have measured.
    """

    def register(measure: Measure) -> Measure:
        ROWS[name] = Row(name, title, peer, goal, unit, measure, limit)
        return measure

    return register


@dataclass
class Result:
    """What became of a row; ``error`` says why there are no, or not all, samples."""

    row: Row
    title: str
    peer: str
    samples: list[Sample] = field(default_factory=list)
    error: str | None = None
    seconds: float = 0.0

    @property
    def figures(self) -> list[float]:
        return [sample.figure for sample in self.samples]

    @property
    def median(self) -> float:
        return statistics.median(self.figures)

    @property
    def ours(self) -> float:
        """The median of what imapfs took, in seconds where there is a peer, else in the row's unit."""
        return statistics.median(sample.ours for sample in self.samples)

    @property
    def theirs(self) -> float | None:
        values = [sample.theirs for sample in self.samples if sample.theirs is not None]
        return statistics.median(values) if values else None

    @property
    def limit(self) -> float | None:
        """The median of what holds imapfs, in the unit of `ours`."""
        values = [sample.limit for sample in self.samples if sample.limit is not None]
        return statistics.median(values) if values else None

    @property
    def met(self) -> bool:
        return self.error is None and self.median <= self.row.goal

    def as_json(self) -> dict[str, Any]:
        """Everything that there is to know, for a file."""
        found: dict[str, Any] = {
            "row": self.row.name,
            "title": self.title,
            "peer": self.peer or None,
            "unit": self.row.unit,
            "goal": self.row.goal,
            "met": self.met,
            "limit": self.row.limit or None,
            "error": self.error,
            "seconds": round(self.seconds, 1),
            "samples": [sample.as_json() for sample in self.samples],
        }
        if self.samples:
            found |= {"min": min(self.figures), "median": self.median, "max": max(self.figures)}
        return found


@dataclass(frozen=True, slots=True)
class Settings:
    """The sizes of a run."""

    messages: int
    """In the mailbox that is read; some 11 KB each."""
    crowd: int
    """In the large mailbox; 1 KB each."""
    few: int
    """Moved, flagged or put in."""
    million: int
    """In the account of 100 mailboxes; small ones."""
    latency: float
    """Milliseconds of a round trip."""
    repeat: int
    limit: float
    """Seconds after which a program that is measured is taken for hopeless."""

    @property
    def round_trip(self) -> float:
        """Seconds."""
        return self.latency / 1000

    def fill(self, text: str) -> str:
        """``text`` with the settings in the place of their names in braces."""
        return text.format_map(
            {
                name: f"{value:,}" if isinstance(value, int) else f"{value:g}"
                for name, value in asdict(self).items()
            }
        )
