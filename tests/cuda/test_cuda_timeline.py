"""A device's work in the trace: its clock on the host's, work that is not done yet, devices that are busy or lost."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lmpipe.cuda import timeline
from lmpipe.cuda.timeline import Timeline
from lmpipe.errors import DeviceLost
from lmpipe.spans import Spans, read_trace

LOOK_NS = 1000
"""The host's clock goes on by so much whenever somebody looks at it."""


@dataclass
class Device:
    """Does nothing until it is told to, but for references; its clock is a line over the host's."""

    rate: float = 1.0
    busy: bool = False
    lost: bool = False
    late_ns: list[int] = field(default_factory=list[int])
    """So long after the device has come to a reference the host sees it, each time."""
    host_ns: int = 10**12
    marks: list[DeviceMark] = field(default_factory=list["DeviceMark"])

    def monotonic_ns(self) -> int:
        self.host_ns += LOOK_NS
        return self.host_ns

    def now_ms(self) -> float:
        return 5e6 + self.host_ns * self.rate / 1e6

    def mark(self) -> DeviceMark:
        """Behind the work so far."""
        self.marks.append(DeviceMark(self))
        return self.marks[-1]

    def reference(self) -> DeviceMark:
        """In a stream of its own."""
        mark = self.mark()
        if not self.busy:
            mark.reach()
        self.host_ns += self.late_ns.pop(0) if self.late_ns else 0
        return mark

    def work(self, line: Timeline, track: int, name: str, begin_ns: int, end_ns: int, nbytes: int = 8) -> None:
        """Launch it, and do it at a time of the host's clock; 0: it is not done, or not begun, yet."""
        with line.work(track, name, nbytes, 1, self.mark):
            pass
        begin, end = self.marks[-2:]
        for mark, at_ns in ((begin, begin_ns), (end, end_ns)):
            if at_ns:
                self.host_ns = at_ns
                mark.reach()


@dataclass(eq=False)
class DeviceMark:
    device: Device
    at_ms: float | None = None
    freed: bool = False

    def reach(self) -> None:
        self.at_ms = self.device.now_ms()

    def query(self) -> bool:
        assert not self.freed
        if self.device.lost:
            raise DeviceLost("looking at an event")
        return self.at_ms is not None

    def elapsed_ms(self, later: DeviceMark) -> float:
        assert self.at_ms is not None and later.at_ms is not None and later.at_ms >= self.at_ms
        return later.at_ms - self.at_ms

    def free(self) -> None:
        assert not self.freed
        self.freed = True


@dataclass
class Recorded:
    """A trace and what is in it."""

    path: Path
    spans: Spans
    device: Device
    line: Timeline

    def events(self) -> list[dict[str, Any]]:
        self.spans.flush()
        return [event for event in read_trace(self.path) if event["ph"] == "X"]

    def names(self) -> list[str]:
        return [event["name"] for event in self.events()]


@pytest.fixture
def recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorded]:
    device, path = Device(), tmp_path / "trace.json"
    monkeypatch.setattr(timeline, "time", SimpleNamespace(monotonic_ns=device.monotonic_ns))
    spans = Spans("engine", path)
    yield Recorded(path, spans, device, Timeline(spans, "GPU 0", device.reference))
    spans.close()


@pytest.mark.parametrize("rate", [1.0, 1.001, 0.9])
def test_the_devices_clock_is_mapped_to_the_hosts(recorded: Recorded, rate: float) -> None:
    """Also if it goes at another rate: a reference places only what has just ended."""
    device, start = recorded.device, recorded.device.host_ns
    device.rate = rate
    saves, loads = recorded.line.track("saves, lane 1"), recorded.line.track("loads, lane 1")
    for second in range(3):
        at = start + second * 10**9
        device.work(recorded.line, saves, "gather", at + 1_000_000, at + 3_000_000, 4096)
        device.work(recorded.line, loads, "copy", at + 2_000_000, at + 4_000_000)
        recorded.spans.flush()
    events = recorded.events()
    assert [event["name"] for event in events] == ["gather", "copy"] * 3
    assert events[0]["args"] == {"bytes": 4096, "chunks": 1}
    for number, event in enumerate(events):
        wanted_us = (start + number // 2 * 10**9 + (1 + number % 2) * 1_000_000) / 1000
        assert abs(event["ts"] - wanted_us) <= 3000 * abs(rate - 1) + 2 * LOOK_NS / 1000 + 0.5
        assert event["dur"] == pytest.approx(2000 * rate, abs=0.01)
    named = {
        event["tid"]: event["args"]["name"]
        for event in read_trace(recorded.path)
        if "tid" in event and "ts" not in event
    }
    assert named == {saves: "GPU 0: saves, lane 1", loads: "GPU 0: loads, lane 1"}
    assert all(mark.freed for mark in device.marks)


def test_work_that_is_not_done_at_a_flush_comes_later_and_in_order(recorded: Recorded) -> None:
    device, now = recorded.device, recorded.device.host_ns
    lanes = [recorded.line.track(f"lane {number}") for number in (1, 2)]
    device.work(recorded.line, lanes[0], "running", now + 1000, 0)
    running = device.marks[-1]
    device.work(recorded.line, lanes[0], "behind it", now + 8000, now + 9000)  # reached while others are looked at
    device.work(recorded.line, lanes[1], "in another lane", now + 2000, now + 5000)
    assert recorded.names() == ["in another lane"]
    assert recorded.names() == ["in another lane"]
    running.reach()
    assert recorded.names() == ["in another lane", "running", "behind it"]
    assert all(mark.freed for mark in device.marks)


def test_a_device_that_has_no_time_for_a_reference(recorded: Recorded) -> None:
    device, now = recorded.device, recorded.device.host_ns
    device.work(recorded.line, recorded.line.track("saves"), "copy", now + 1000, now + 5000)
    device.busy = True
    assert recorded.names() == []
    device.busy = False
    assert recorded.names() == ["copy"]
    assert all(mark.freed for mark in device.marks)


def test_work_of_a_lane_does_not_overlap_by_an_inexact_reference(recorded: Recorded) -> None:
    """The host hears late of the first reference, so the first work seems to be later than it was."""
    device, now, track = recorded.device, recorded.device.host_ns, recorded.line.track("saves")
    device.work(recorded.line, track, "first", now + 1000, now + 100_000)
    device.late_ns = [1_000_000] * timeline.REFERENCES
    recorded.spans.flush()
    device.work(recorded.line, track, "second", now + 110_000, now + 900_000)
    first, second = recorded.events()
    assert first["ts"] > (now + 400_000) / 1000
    assert second["ts"] == pytest.approx(first["ts"] + first["dur"], abs=1e-3)
    assert second["ts"] + second["dur"] == pytest.approx((now + 900_000) / 1000, abs=3)


def test_of_several_references_the_one_seen_soonest_counts(recorded: Recorded) -> None:
    device, now = recorded.device, recorded.device.host_ns
    device.work(recorded.line, recorded.line.track("saves"), "copy", now + 1000, now + 5000)
    device.late_ns = [900_000, 200_000, 60_000, 300_000]
    (event,) = recorded.events()
    assert abs(event["ts"] - (now + 1000) / 1000) < 60 / 2 + 3 * LOOK_NS / 1000
    assert not device.late_ns and all(mark.freed for mark in device.marks)


def test_too_much_at_once_is_dropped_and_counted(recorded: Recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timeline, "MAX_PENDING", 2)
    track = recorded.line.track("saves")
    for number in range(5):
        recorded.device.work(recorded.line, track, f"{number}", 0, 0)
    assert recorded.spans.dropped == 3
    for mark in recorded.device.marks[:4]:
        mark.reach()
    assert recorded.names() == ["0", "1"]
    assert all(mark.freed for mark in recorded.device.marks)


def test_a_device_that_is_lost(recorded: Recorded, caplog: pytest.LogCaptureFixture) -> None:
    """Flushing goes on; who works with the device next meets it."""
    device, now, track = recorded.device, recorded.device.host_ns, recorded.line.track("saves")
    device.work(recorded.line, track, "copy", now + 1000, now + 5000)
    device.lost = True
    assert recorded.names() == []
    assert "the trace shows no more of GPU 0" in caplog.text
    device.work(recorded.line, track, "another", 0, 0)
    assert recorded.names() == [] and recorded.spans.dropped == 2
    recorded.line.close()


def test_work_that_fails_is_not_shown(recorded: Recorded) -> None:
    with (
        pytest.raises(ValueError, match="no"),
        recorded.line.work(recorded.line.track("saves"), "copy", 1, 1, recorded.device.mark),
    ):
        raise ValueError("no")
    assert recorded.names() == [] and all(mark.freed for mark in recorded.device.marks)


def test_the_end_shows_what_is_done_and_drops_the_rest(recorded: Recorded) -> None:
    device, now = recorded.device, recorded.device.host_ns
    tracks = [recorded.line.track(name) for name in ("saves", "loads")]
    device.work(recorded.line, tracks[0], "done", now + 1000, now + 5000)
    device.work(recorded.line, tracks[1], "running", now + 1000, 0)
    recorded.line.close()
    assert recorded.names() == ["done"] and recorded.spans.dropped == 1
    assert all(mark.freed for mark in device.marks)


DIES = """
import os, signal, sys, time
from pathlib import Path
from lmpipe.cuda.lanes import HostMark
from lmpipe.cuda.timeline import Timeline
from lmpipe.spans import Spans
spans = Spans("engine", Path(sys.argv[1]))
line = Timeline(spans, "GPU 0", HostMark)
track = line.track("saves")
for name in ("flushed", "not flushed"):
    with line.work(track, name, 8, 1, HostMark):
        pass
    if name == "flushed":
        spans.flush()
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_process_that_dies_leaves_what_it_had_flushed(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    for _ in range(2):  # its successor adds to the same file
        subprocess.run([sys.executable, "-c", DIES, str(path)], check=False)
    events = read_trace(path)
    assert [event["name"] for event in events if event["ph"] == "X"] == ["flushed"] * 2
    assert [event["args"]["name"] for event in events if event["name"] == "thread_name"] == ["GPU 0: saves"] * 2
    assert len({event["pid"] for event in events}) == 2
