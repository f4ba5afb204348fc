"""Spans: what a profiler is told of them."""

from __future__ import annotations

from typing import Any

import nvtx
import pytest

from lmpipe import spans


class Domain:
    """A domain as nvtx gives it where a profiler is attached: what was pushed and not popped."""

    def __init__(self) -> None:
        self.pushed: list[tuple[str, Any]] = []

    def get_event_attributes(self, message: str, payload: Any = None) -> tuple[str, Any]:
        """What a range is pushed with."""
        return message, payload

    def push_range(self, attributes: tuple[str, Any]) -> None:
        """Begin."""
        self.pushed.append(attributes)

    def pop_range(self) -> None:
        """End."""


def test_ranges_carry_bytes_and_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    domain = Domain()
    monkeypatch.setattr(nvtx, "get_domain", lambda _: domain)
    monkeypatch.setattr(nvtx, "Domain", Domain)
    watched = spans.Spans("test")
    assert watched.watched and not watched.recording
    with watched.span("gather.copy", 4096, 3), watched.span("gather.step"):
        pass
    (copy, payload), (step, nothing) = domain.pushed
    assert (copy, step, nothing) == ("gather.copy", "gather.step", None)
    assert (int(payload["bytes"]), int(payload["chunks"])) == (4096, 3)


def test_nobody_watches() -> None:
    unwatched = spans.Spans("test")
    assert not unwatched.watched
    with unwatched.span("gather.copy", 4096, 3):
        pass
