"""When a device did its work, for the trace (spans.py): marks in its streams, whose times are read later.

    who launches   begin ─▶ work ─▶ end        marks in the stream of the work; nothing waits
    at a flush     reached ends ─▶ a reference: a mark made now, and waited for, so that its time on the host is known
                   begin of the work = time of the reference − what passed on the device in between

A reference comes after the work that it places, and places only what has ended since the last one: between the two
clocks nothing adds up, and a device's milliseconds, which are fp32, stay short. It is as exact as the time is short
within which it was made and seen. Imports neither torch nor CuPy.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple, Protocol, Self

from lmpipe.cuda.runtime import Runtime, Stream
from lmpipe.errors import LmpipeError
from lmpipe.spans import Spans

MAX_PENDING = 1 << 14
"""Pieces of work whose time is not known yet; what comes beyond is dropped, and counted."""
EXACT_NS = 50_000
"""A reference that was seen so soon is good enough."""
REFERENCES = 4
"""So many are tried; the one that was seen soonest counts."""
PATIENCE_NS = 2_000_000
"""So long a reference is waited for; then the work is placed at the next flush."""

log = logging.getLogger("lmpipe.cuda")


class Mark(Protocol):
    """A place in a stream's work; the device notes the time when it comes there."""

    def query(self) -> bool:
        """Whether the device has come there."""
        ...

    def elapsed_ms(self, later: Self) -> float:
        """On the device, from this mark to a later one, both reached."""
        ...

    def free(self) -> None:
        """It is asked nothing any more."""
        ...


class RuntimeMark:
    """A mark by lmpipe's own runtime."""

    def __init__(self, runtime: Runtime, stream: Stream) -> None:
        """Behind what the stream was given so far."""
        self._runtime, self._event = runtime, runtime.new_event(timed=True)
        runtime.record(self._event, stream)

    def query(self) -> bool:
        """Whether the device has come there."""
        return self._runtime.reached(self._event)

    def elapsed_ms(self, later: RuntimeMark) -> float:
        """On the device."""
        return self._runtime.elapsed_ms(self._event, later._event)

    def free(self) -> None:
        """Free the event."""
        self._runtime.free_event(self._event)


@dataclass(frozen=True, slots=True)
class _Work:
    track: int
    name: str
    nbytes: int
    chunks: int
    begin: Mark
    end: Mark

    def free(self) -> None:
        self.begin.free()
        self.end.free()


class _Reference(NamedTuple):
    mark: Mark
    host_ns: int
    window_ns: int


class Timeline:
    """One device's work in the trace of this process. Any thread may add to it; `spans.flush` asks it."""

    def __init__(self, spans: Spans, device: str, reference: Callable[[], Mark]) -> None:
        """Args:
        spans: that are being recorded.
        device: its name, before the names of its tracks.
        reference: makes a mark in a stream that has no work.
        """
        self._spans, self._device, self._mark = spans, device, reference
        self._lock = threading.Lock()
        self._pending: list[_Work] = []
        self._ends_ns: dict[int, int] = {}
        self._lost = False
        spans.ask(self._resolve)

    def track(self, name: str) -> int:
        """A row for work that is done in order."""
        return self._spans.track(f"{self._device}: {name}")

    @contextmanager
    def work(self, track: int, name: str, nbytes: int, chunks: int, mark: Callable[[], Mark]) -> Generator[None]:
        """What is launched within it is shown; `mark` makes a mark in its stream."""
        begin = mark()
        try:
            yield
        except BaseException:
            begin.free()
            raise
        work = _Work(track, name, nbytes, chunks, begin, mark())
        with self._lock:
            if len(self._pending) < MAX_PENDING and not self._lost:
                self._pending.append(work)
                return
        self._spans.dropped += 1
        work.free()

    def _resolve(self) -> None:
        """Add to the trace what the device has done, as far as it can be said without waiting for more."""
        with self._lock:
            pending, self._pending = self._pending, []
        try:
            left = self._place(pending)
        except (LmpipeError, RuntimeError) as error:  # whoever works with the device next meets it too
            log.warning("the trace shows no more of %s: %s", self._device, error)
            self._spans.dropped += len(pending)
            self._lost, left = True, []
        with self._lock:
            self._pending[:0] = left

    def _place(self, pending: list[_Work]) -> list[_Work]:
        """What is left for another time."""
        done: list[_Work] = []
        left: list[_Work] = []
        running: set[int] = set()
        for work in pending:
            if work.track in running or not work.end.query():
                running.add(work.track)  # work of a track ends in order
                left.append(work)
            else:
                done.append(work)
        if not done:
            return left
        reference = self._reference()
        if reference is None:
            return pending
        for work in done:
            begin_ns = reference.host_ns - round(work.begin.elapsed_ms(reference.mark) * 1e6)
            end_ns = begin_ns + round(work.begin.elapsed_ms(work.end) * 1e6)
            # By two references, each a little off, work may seem to overlap with what was before it.
            begin_ns = max(begin_ns, self._ends_ns.get(work.track, 0))
            self._ends_ns[work.track] = end_ns = max(begin_ns, end_ns)
            self._spans.add(work.name, begin_ns, end_ns, work.nbytes, work.chunks, work.track)
            work.free()
        reference.mark.free()
        return left

    def _reference(self) -> _Reference | None:
        """A mark that has been reached, and when; None: the device has other things to do."""
        best: _Reference | None = None
        for _ in range(REFERENCES):
            before_ns = now_ns = time.monotonic_ns()
            mark = self._mark()
            while not mark.query() and now_ns < before_ns + PATIENCE_NS:
                now_ns = time.monotonic_ns()
            now_ns = time.monotonic_ns()
            found = _Reference(mark, (before_ns + now_ns) // 2, now_ns - before_ns)
            if found.window_ns >= PATIENCE_NS or (best is not None and best.window_ns <= found.window_ns):
                mark.free()
                continue
            if best is not None:
                best.mark.free()
            best = found
            if best.window_ns <= EXACT_NS:
                break
        return best

    def close(self) -> None:
        """Add what the device has done by now; what it has not counts as dropped. No work comes any more."""
        self._resolve()
        self._spans.ask_no_more(self._resolve)
        self._spans.dropped += len(self._pending)
        for work in self._pending:
            work.free()
        self._pending.clear()
