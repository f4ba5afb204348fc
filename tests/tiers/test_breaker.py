"""The circuit breaker, by a clock of the test's own."""

from __future__ import annotations

from lmpipe.tiers.breaker import FAILURES, OPEN_S, Breaker


def test_it_opens_after_failures_in_a_row_and_tries_one_caller_at_a_time() -> None:
    now = [0.0]
    breaker = Breaker(lambda: now[0])
    for _ in range(FAILURES - 1):
        assert breaker.allows()
        breaker.failed("no route")
    breaker.succeeded()
    for _ in range(FAILURES):
        assert breaker.allows() and not breaker.reason
        breaker.failed("no route")
    assert breaker.reason == "no route" and not breaker.allows()
    now[0] += OPEN_S[0]
    assert breaker.allows() and not breaker.allows()  # one trial
    breaker.failed("still none")
    now[0] += OPEN_S[0]
    assert not breaker.allows()  # the time has doubled
    now[0] += OPEN_S[0]
    assert breaker.allows()
    breaker.succeeded()
    assert breaker.allows() and breaker.allows() and not breaker.reason


def test_the_wait_is_bounded() -> None:
    now = [0.0]
    breaker = Breaker(lambda: now[0])
    for _ in range(FAILURES):
        breaker.failed("x")
    for _ in range(30):
        now[0] += OPEN_S[1]
        assert breaker.allows()
        breaker.failed("x")
    now[0] += OPEN_S[1]
    assert breaker.allows()


def test_a_trial_that_never_reports_is_followed_by_another() -> None:
    now = [0.0]
    breaker = Breaker(lambda: now[0])
    for _ in range(FAILURES):
        breaker.failed("x")
    now[0] += OPEN_S[0]
    assert breaker.allows()
    now[0] += OPEN_S[1]
    assert breaker.allows()
