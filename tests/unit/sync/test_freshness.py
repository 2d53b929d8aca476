"""When what is known is good enough, and when the server has to be asked."""

import time

import pytest

from imapfs.model import ROOT, Ino
from imapfs.sync.freshness import Freshness

BOX = Ino(7)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_what_was_never_asked_is_due(clock: list[float]) -> None:
    assert Freshness().is_due(BOX, 5)


def test_unwatched_ages(clock: list[float]) -> None:
    fresh = Freshness()
    fresh.asked(BOX, clock[0])
    clock[0] += 5
    assert not fresh.is_due(BOX, 5)
    clock[0] += 1
    assert fresh.is_due(BOX, 5)


@pytest.mark.parametrize("what", [BOX, None])
def test_watched_does_not_age_until_there_is_news(clock: list[float], what: Ino | None) -> None:
    fresh = Freshness()
    fresh.watch(what, clock[0])
    assert fresh.is_due(BOX, 5)
    fresh.asked(BOX, clock[0])
    clock[0] += 1e6
    assert not fresh.is_due(BOX, 5)
    assert fresh.is_due(BOX, 0)
    fresh.announced(BOX)
    assert fresh.is_due(BOX, 5)
    assert fresh.has_news(BOX)
    fresh.asked(BOX, clock[0])
    assert not fresh.is_due(BOX, 5)


def test_question_from_before_the_watch_or_the_news_does_not_count(clock: list[float]) -> None:
    fresh = Freshness()
    fresh.watch(BOX, 1010)
    fresh.asked(BOX, 1009)
    clock[0] = 1020
    assert fresh.is_due(BOX, 5)
    fresh.asked(BOX, 1011)
    fresh.announced(BOX)
    fresh.asked(BOX, 1019)
    assert fresh.has_news(BOX)


def test_older_question_that_is_answered_later_takes_nothing_back(clock: list[float]) -> None:
    fresh = Freshness()
    fresh.asked(BOX, 1000)
    fresh.asked(BOX, 990)
    clock[0] = 1004
    assert not fresh.is_due(BOX, 5)


def test_end_of_a_watch_lets_it_age_again(clock: list[float]) -> None:
    fresh = Freshness()
    fresh.watch(None, clock[0])
    fresh.asked(ROOT, clock[0])
    clock[0] += 100
    assert not fresh.is_due(ROOT, 5)
    fresh.unwatch(None)
    assert fresh.is_due(ROOT, 5)
    assert not fresh.is_watched(ROOT)


def test_forgotten_is_due_though_it_is_watched(clock: list[float]) -> None:
    fresh = Freshness()
    fresh.watch(BOX, clock[0])
    fresh.asked(BOX, clock[0])
    fresh.forget(BOX)
    assert fresh.is_due(BOX, 5)
