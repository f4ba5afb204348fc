"""The wall clock goes forward, whatever is done to the machine's."""

from __future__ import annotations

import pytest

from lmpipe import clock


def test_it_follows_steps_forward_and_goes_on_after_steps_back(monkeypatch: pytest.MonkeyPatch) -> None:
    now = {"wall": 1000.0, "monotonic": 5.0}
    monkeypatch.setattr(clock.time, "time", lambda: now["wall"])
    monkeypatch.setattr(clock.time, "monotonic", lambda: now["monotonic"])
    monkeypatch.setattr(clock, "_offset_s", now["wall"] - now["monotonic"])

    def after(wall_s: float, monotonic_s: float) -> float:
        now["wall"] += wall_s
        now["monotonic"] += monotonic_s
        return clock.wall_s()

    assert after(0, 0) == 1000
    assert after(1, 1) == 1001
    assert after(3600, 1) == 4601, "a step forward is believed"
    assert after(-7200, 1) == 4602, "a step back is not, but time goes on"
    assert after(10, 10) == 4612
    assert after(7200, 1) == 4613, "the clock is behind still"
    assert after(7200, 1) == 1000 + 1 + 3600 - 7200 + 10 + 7200 + 7200


def test_who_is_stopped_while_reading_the_clocks_is_not_ahead_from_then_on(monkeypatch: pytest.MonkeyPatch) -> None:
    now, stops = {"wall": 1000.0, "monotonic": 5.0}, 3.0

    def stopped(name: str) -> float:
        """Time passes after each look at a clock, and the clock tells what it was."""
        seen = now[name]
        now["wall"] += stops
        now["monotonic"] += stops
        return seen

    monkeypatch.setattr(clock.time, "time", lambda: stopped("wall"))
    monkeypatch.setattr(clock.time, "monotonic", lambda: stopped("monotonic"))
    monkeypatch.setattr(clock, "_offset_s", 995.0)
    clock.wall_s()
    stops = 0.0
    assert clock.wall_s() == now["wall"]
