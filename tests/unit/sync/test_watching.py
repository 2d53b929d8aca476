"""How long a watch is done without after a refusal."""

import time

import pytest

from imapfs.sync.watching import Watching


def test_a_refused_idle_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """One NO ended push for the life of the mount."""
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    it = Watching.__new__(Watching)
    it._refusals = {}
    pauses = []
    for _ in range(8):
        it._refused("IDLE")
        began = now
        while it._is_refused("IDLE"):
            now += 20.0
        pauses.append(now - began)
    assert not it._is_refused("NOTIFY")
    assert pauses == [60, 120, 240, 480, 960, 1920, 3600, 3600]
