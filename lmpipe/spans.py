"""Named spans of time: nvtx ranges always, Chrome trace events in a file when asked. Knows nothing of what is timed.

Without a profiler attached an nvtx range costs about 0.1 µs; with one, ranges carry their bytes and chunks. The trace
file is Chrome's JSON array format, one event a line and the closing bracket left off, which its readers allow: a
process that is killed leaves a file that can be read. Timestamps are CLOCK_MONOTONIC in µs, so the files of all
processes of a machine merge on one time line.

What a thread does is shown on that thread's row. What no thread of the process does, such as a device's work, has rows
with names, called tracks; its times are known late, and are asked for at every `flush`.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any, cast

import numpy as np
import nvtx
import orjson

MAX_EVENTS = 1 << 16
MAX_FILE_BYTES = 1 << 28
FLUSH_S = 0.5
FIRST_TRACK = 1 << 30
"""Tracks have numbers from here on, where no thread's id is."""
PAYLOAD = np.dtype([("bytes", "<u8"), ("chunks", "<u8")])
"""What an nvtx range carries, as profilers show it."""


class Spans:
    """Takes the spans of one process, from any of its threads. `dropped` counts events for which there was no room."""

    def __init__(self, process: str, trace: Path | None = None) -> None:
        """Without `trace` only nvtx ranges are made. A trace that is there is added to: it is of an earlier life."""
        self.dropped = 0
        untyped = cast(Any, nvtx)
        self._domain: Any = untyped.get_domain("lmpipe")
        self._attached = isinstance(self._domain, untyped.Domain)  # else one that does nothing
        self._attributes: dict[str, Any] = {}
        self._file = trace.open("ab") if trace else None
        self._events: deque[tuple[str, int, int, int, int, int]] = deque()
        self._numbers = count(FIRST_TRACK)
        self._tracks: deque[tuple[int, str]] = deque()
        """Whose names are not written yet."""
        self._late: list[Callable[[], object]] = []
        self._pid = os.getpid()
        self._bytes = self._file.tell() if self._file else 0
        if self._file:
            named = {"ph": "M", "name": "process_name", "pid": self._pid, "args": {"name": process}}
            self._write((b"" if self._bytes else b"[\n") + orjson.dumps(named) + b",\n")

    @property
    def recording(self) -> bool:
        """Whether a trace is written."""
        return self._file is not None

    @property
    def watched(self) -> bool:
        """Whether a trace is written or a profiler is attached: only then are arguments worth computing."""
        return self._attached or self._file is not None

    def span(self, name: str, nbytes: int = 0, chunks: int = 0) -> Span:
        """A context manager around the work."""
        attributes = self._attributes.get(name)
        if attributes is None:
            attributes = self._attributes[name] = self._domain.get_event_attributes(name)
        if self._attached and (nbytes or chunks):
            attributes = self._domain.get_event_attributes(name, payload=np.array((nbytes, chunks), PAYLOAD))
        return Span(self, self._domain, attributes, name, nbytes, chunks)

    def add(self, name: str, begin_ns: int, end_ns: int, nbytes: int, chunks: int, track: int | None = None) -> None:
        """Records an event, of the calling thread without a track; written at the next `flush`."""
        if len(self._events) < MAX_EVENTS:
            row = threading.get_native_id() if track is None else track
            self._events.append((name, begin_ns, end_ns, row, nbytes, chunks))
        else:
            self.dropped += 1

    def track(self, name: str) -> int:
        """A row of the trace for events that are of no thread. Those on it must not overlap."""
        number = next(self._numbers)
        self._tracks.append((number, name))
        return number

    def ask(self, late: Callable[[], object]) -> None:
        """At every `flush` from now on `late` is called, to `add` what it has learnt; it may take milliseconds."""
        self._late.append(late)

    def ask_no_more(self, late: Callable[[], object]) -> None:
        """Ends `ask`."""
        self._late.remove(late)

    def flush(self) -> None:
        """Writes what was recorded. Called by one thread."""
        if self._file is None:
            return
        for late in tuple(self._late):
            late()
        lines: list[bytes] = []
        while self._tracks:
            number, name = self._tracks.popleft()
            named = {"ph": "M", "name": "thread_name", "pid": self._pid, "tid": number, "args": {"name": name}}
            lines.append(orjson.dumps(named))
        for _ in range(len(self._events)):
            name, begin_ns, end_ns, tid, nbytes, chunks = self._events.popleft()
            event = {
                "ph": "X",
                "name": name,
                "ts": begin_ns / 1000,
                "dur": (end_ns - begin_ns) / 1000,
                "pid": self._pid,
                "tid": tid,
                "args": {"bytes": nbytes, "chunks": chunks},
            }
            lines.append(orjson.dumps(event))
        if lines:
            self._write(b",\n".join(lines) + b",\n")

    def _write(self, data: bytes) -> None:
        if self._file is None or self._bytes + len(data) > MAX_FILE_BYTES:
            self.dropped += data.count(b"\n")
            return
        self._bytes += len(data)
        self._file.write(data)
        self._file.flush()

    def close(self) -> None:
        """Writes the rest and closes the file."""
        self.flush()
        if self._file:
            self._file.close()
            self._file = None


class FlushedSpans(Spans):
    """Of a process that has no loop to flush them in: a thread does, as long as a trace is written."""

    def __init__(self, process: str, trace: Path | None = None, every_s: float = FLUSH_S) -> None:
        super().__init__(process, trace)
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        if trace is not None:
            self._thread = threading.Thread(target=self._run, args=(every_s,), name="lmpipe-trace", daemon=True)
            self._thread.start()

    def _run(self, every_s: float) -> None:
        while not self._over.wait(every_s):
            self.flush()

    def close(self) -> None:
        """End the thread, write the rest and close the file."""
        self._over.set()
        if self._thread is not None:
            self._thread.join()
        super().close()


class Span:
    """One span; made by `Spans.span`."""

    __slots__ = ("_args", "_attributes", "_begin_ns", "_domain", "_spans")

    def __init__(self, spans: Spans, domain: Any, attributes: Any, name: str, nbytes: int, chunks: int) -> None:
        self._spans = spans
        self._domain = domain
        self._attributes = attributes
        self._args = name, nbytes, chunks
        self._begin_ns = 0

    def __enter__(self) -> Span:
        self._domain.push_range(self._attributes)
        if self._spans.recording:
            self._begin_ns = time.monotonic_ns()
        return self

    def __exit__(self, *_: object) -> None:
        if self._begin_ns:
            name, nbytes, chunks = self._args
            self._spans.add(name, self._begin_ns, time.monotonic_ns(), nbytes, chunks)
        self._domain.pop_range()


def read_trace(path: Path) -> list[dict[str, Any]]:
    """The events of a trace file; a last line that was cut off is left out."""
    lines = path.read_bytes().splitlines()[1:]
    return [orjson.loads(line[:-1]) for line in lines if line.endswith(b"},")]
