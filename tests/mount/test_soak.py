"""The soak test in short; at length: scripts/soak."""

from pathlib import Path

from scripts.soak import lines, soak


def test_nothing_is_lost_doubled_or_leaked(tmp_path: Path) -> None:
    report = soak(tmp_path, seconds=15, seed=2)
    assert not report.violation, report.violation
    assert not report.grown, report.grown
    text = "\n".join(lines(report))
    assert report.figures.faults.total() > 0, text
    assert report.logins > 1, text
    assert report.figures.versions > 20, text
