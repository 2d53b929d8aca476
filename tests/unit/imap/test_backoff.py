"""When the next attempt is due and how many connections there may be: pure, on a clock of the test's own."""

import math

import pytest

from imapfs.imap.backoff import Backoff, Connectivity
from imapfs.imap.throttle import asked_wait, may_be_of_one


def backoff(limit: int = 8) -> Backoff:
    return Backoff(limit, jitter=lambda: 1.0)


@pytest.mark.parametrize(
    ("code", "text", "wait"),
    [
        ("", "Request is throttled. Suggested Backoff Time: 89117 milliseconds", 89.117),
        ("", "Server Unavailable. 15", 0.0),
        ("", "User is authenticated but not connected.", 0.0),
        ("ALERT", "Too many simultaneous connections. (Failure)", 0.0),
        ("OVERQUOTA", "Account exceeded command or bandwidth limits. (Failure)", 0.0),
        ("UNAVAILABLE", "Maximum number of connections from user+IP exceeded (mail_max_userip=10)", 0.0),
        ("THROTTLED", "", 0.0),
        ("LIMIT", "Rate limit hit", 0.0),
        ("", "Please try again in 5 minutes", 300.0),
        ("", "Please try again after 2 minutes.", 120.0),
        ("", "Please try again after 2 hours.", 600.0),
        ("UNAVAILABLE", "Try again in 90 s", 90.0),
        ("", "Too many commands, wait 30 seconds", 30.0),
        ("UNAVAILABLE", "try again in 999999999 hours", 600.0),
        ("OVERQUOTA", "Quota exceeded (mailbox for user is full)", None),
        ("AUTHENTICATIONFAILED", "Invalid credentials, try again later", None),
        ("NOPERM", "Permission denied", None),
        ("", "Unknown command", None),
        ("LIMIT", "Too many mailboxes", None),
        ("TOOBIG", "Message too large, try again later", None),
        ("SERVERBUG", "Internal error occurred. Refer to server log for more information.", None),
    ],
)
def test_what_servers_say_to_slow_a_client_down(code: str, text: str, wait: float | None) -> None:
    assert asked_wait(code, text) == (wait if wait is None else pytest.approx(wait))


@pytest.mark.parametrize(
    ("code", "text", "expected"),
    [
        ("UNAVAILABLE", "FETCH Server error while fetching messages", True),
        ("", "Please try again later", True),
        ("UNAVAILABLE", "Maximum number of connections from user+IP exceeded (mail_max_userip=10)", False),
        ("THROTTLED", "", False),
        ("", "Request is throttled. Suggested Backoff Time: 89117 milliseconds", False),
        ("UNAVAILABLE", "Try again in 90 s", False),
    ],
)
def test_a_refusal_without_time_or_reason_may_be_about_one_message(
    code: str, text: str, expected: bool
) -> None:
    assert asked_wait(code, text) is not None
    assert may_be_of_one(code, text) is expected


def test_a_lost_connection_is_replaced_at_once() -> None:
    it = backoff()
    it.succeeded(10.0)
    assert it.due_in(10.0) == math.inf
    it.lost("gone", 20.0, 2.0)
    assert (it.state(20.0), it.reason(20.0), it.due_in(20.0)) == (Connectivity.CONNECTING, "gone", 0.0)
    assert [it.patience(now) for now in (20.0, 21.5, 22.0, 30.0)] == [2.0, 0.5, 0.0, 0.0]
    it.succeeded(23.0)
    assert (it.state(23.0), it.retry_at(23.0), it.since(23.0)) == (Connectivity.ONLINE, None, 23.0)


def test_attempts_are_spaced_out_to_a_minute() -> None:
    it, now, waits = backoff(), 0.0, []
    for _ in range(9):
        it.failed("no route", now)
        waits.append(it.due_in(now))
        now += waits[-1]
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    assert it.since(now) == 0.0
    assert it.retry_at(now) == now


def test_after_a_success_attempts_come_quickly_again() -> None:
    it = backoff()
    for now in range(0, 700, 100):
        it.failed("no route", float(now))
    it.succeeded(700.0)
    it.failed("no route", 701.0)
    assert it.due_in(701.0) == 1.0


def test_jitter_only_shortens() -> None:
    for _ in range(100):
        it = Backoff(1)
        it.failed("no route", 0.0)
        assert 0.5 <= it.due_in(0.0) <= 1.0


def test_somebody_who_waits_makes_an_attempt_come_sooner() -> None:
    it = backoff()
    for now in range(0, 700, 100):
        it.failed("no route", float(now))
    assert it.due_in(601.0) == 59.0
    it.wanted(601.0)
    assert it.due_in(601.0) == 4.0


def test_a_changed_network_is_tried_at_once() -> None:
    it = backoff()
    for now in range(0, 700, 100):
        it.failed("no route", float(now))
    it.network_changed(600.2)
    assert it.due_in(600.2) == pytest.approx(0.8)
    it.failed("no DNS yet", 601.0)
    assert it.due_in(601.0) == 1.0


def test_a_refused_password_is_hardly_tried_again() -> None:
    it, now, waits = backoff(), 0.0, []
    for _ in range(6):
        it.failed("wrong", now, refused=True)
        it.wanted(now)
        it.network_changed(now)
        waits.append(it.due_in(now))
        now += waits[-1]
    assert waits == [15, 60, 300, 1800, 3600, 3600]
    it.give_up()
    it.wanted(now)
    it.network_changed(now)
    assert it.due_in(now) == math.inf


def test_the_named_wait_is_obeyed() -> None:
    it = backoff()
    it.throttled(90.0, "slow down", 4, 1000.0)
    assert (it.state(1089.0), it.reason(1089.0), it.retry_at(1089.0)) == (
        Connectivity.THROTTLED,
        "slow down",
        1090.0,
    )
    assert it.state(1090.0) is Connectivity.ONLINE


def test_a_network_change_ends_a_wait() -> None:
    it = backoff()
    it.throttled(600.0, "slow down", 4, 1000.0)
    it.network_changed(1001.0)
    assert it.state(1001.0) is Connectivity.ONLINE


def test_unnamed_waits_grow_while_they_follow_each_other() -> None:
    it, now, waits = backoff(), 1000.0, []
    for _ in range(8):
        it.throttled(0.0, "later", 1, now)
        waits.append((it.retry_at(now) or 0) - now)
        now += waits[-1]
    assert waits == [5, 10, 20, 40, 80, 160, 300, 300]
    it.throttled(0.0, "later", 1, now + 100)
    assert it.retry_at(now + 100) == now + 105


@pytest.mark.parametrize(("quiet", "wait"), [(0.0, 10.0), (60.0, 10.0), (60.5, 5.0), (1000.0, 5.0)])
def test_pauses_begin_short_again_after_a_quiet_minute(quiet: float, wait: float) -> None:
    it = backoff()
    it.throttled(0.0, "later", 1, 1000.0)
    now = 1005.0 + quiet
    it.throttled(0.0, "later", 1, now)
    assert it.retry_at(now) == now + wait


def test_answers_of_several_connections_count_once() -> None:
    it = backoff()
    for _ in range(8):
        it.throttled(0.0, "later", 8, 1000.0)
    assert it.allowed(1000.0) == 4
    assert it.retry_at(1000.0) == 1005.0


def test_connections_shrink_and_grow_again_slowly() -> None:
    it = backoff()
    it.throttled(10.0, "later", 8, 0.0)
    assert [it.allowed(now) for now in (0.0, 59.0, 60.0, 120.0, 240.0, 999.0)] == [4, 4, 5, 6, 8, 8]


def test_what_was_too_early_comes_later_the_next_time() -> None:
    it = backoff()
    it.limit_reached(3, 0.0)
    it.limit_reached(3, 60.0)
    assert [it.allowed(now) for now in (60.0, 179.0, 180.0)] == [3, 3, 4]
    it.limit_reached(0, 180.0)
    assert it.allowed(180.0) == 1


def test_a_pause_delays_the_replacement_of_a_connection() -> None:
    it = backoff()
    it.lost("gone", 0.0, 30.0)
    it.throttled(20.0, "later", 1, 1.0)
    assert it.due_in(1.0) == 20.0
