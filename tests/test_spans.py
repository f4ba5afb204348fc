"""Spans: what a profiler is told of them."""

from __future__ import annotations

import threading
from pathlib import Path
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


def test_spans_of_a_process_without_a_loop_are_flushed(tmp_path: Path) -> None:
    """By a thread, which ends with them; what is known late is asked for each time."""
    path, asked = tmp_path / "trace.json", threading.Event()
    flushed = spans.FlushedSpans("engine", path, every_s=0.001)
    flushed.ask(asked.set)
    with flushed.span("engine.load", 4096, 1):
        pass
    assert asked.wait(10)
    flushed.ask_no_more(asked.set)
    flushed.close()
    assert [event["name"] for event in spans.read_trace(path)] == ["process_name", "engine.load"]
    assert "lmpipe-trace" not in {thread.name for thread in threading.enumerate()}
    unrecorded = spans.FlushedSpans("engine")
    assert "lmpipe-trace" not in {thread.name for thread in threading.enumerate()}
    unrecorded.close()
