"""A few worker threads for what takes long. Jobs go in from the runner's thread, come back to it finished.

Urgent jobs, for which somebody waits, have threads of their own. The others yield the processor (nice): saving must not
slow down the engine whose prompts it saves.

Knows no stage. Threads are started when there is something to do, and are daemons: a process that has to die is not
held by a copy under way.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lmpipe.errors import ProtocolViolation
from lmpipe.spans import Spans

MAX_JOBS = 4096
YIELDING = 10
"""Added to the nice value of threads for which nobody waits: a tenth of the processor where others want all of it."""


@dataclass(slots=True)
class Job:
    """A piece of work and what is to follow it."""

    fn: Callable[[], Any]
    done: Callable[[Any], None]
    failed: Callable[[Exception], None]
    name: str
    nbytes: int = 0
    chunks: int = 0
    result: Any = None
    error: Exception | None = None


class Pool:
    """`backlog` is the number of jobs submitted and not yet taken back."""

    def __init__(self, name: str, threads: int, spans: Spans, wake: Callable[[], None]) -> None:
        """Up to `threads` for urgent jobs and as many for others; `wake` is called on one of them after each job."""
        self.backlog = 0
        self._name, self._spans, self._wake = name, spans, wake
        self._urgent, self._patient = _Lane(threads), _Lane(threads)
        self._finished: deque[Job] = deque()
        self._closed = False

    def submit(self, job: Job, *, urgent: bool) -> None:
        """Run the job when a thread is free.

        Raises:
            ProtocolViolation: `MAX_JOBS` are under way: the stage does not bound its work.
        """
        if self.backlog >= MAX_JOBS:
            raise ProtocolViolation(f"{self._name} has {self.backlog} jobs under way and submits {job.name}")
        self.backlog += 1
        lane = self._urgent if urgent else self._patient
        with lane.changed:
            lane.waiting.append(job)
            lane.under_way += 1
            lane.changed.notify()
            wanted = len(lane.threads) < min(lane.most, lane.under_way)
        if wanted:
            name = f"{self._name}-{'urgent-' if urgent else ''}{len(lane.threads)}"
            thread = threading.Thread(target=self._work, args=(lane,), name=name, daemon=True)
            lane.threads.append(thread)
            thread.start()

    def take(self) -> Job | None:
        """The next finished job."""
        if not self._finished:
            return None
        self.backlog -= 1
        return self._finished.popleft()

    def close(self, timeout_s: float) -> bool:
        """Drop what waits; True when all threads have ended in time."""
        self._closed = True
        threads = [*self._urgent.threads, *self._patient.threads]
        for lane in (self._urgent, self._patient):
            with lane.changed:
                lane.changed.notify_all()
        deadline_s = time.monotonic() + timeout_s
        for thread in threads:
            thread.join(max(deadline_s - time.monotonic(), 0))
        return not any(thread.is_alive() for thread in threads)

    def _work(self, lane: _Lane) -> None:
        if lane is self._patient:
            yield_processor()
        while (job := self._next(lane)) is not None:
            with self._spans.span(job.name, job.nbytes, job.chunks):
                try:
                    job.result = job.fn()
                except Exception as error:  # noqa: BLE001 - the runner judges it, on its own thread
                    job.error = error
            with lane.changed:
                lane.under_way -= 1
            self._finished.append(job)
            del job  # what it holds is freed on the runner's thread, not when the next job comes
            self._wake()

    def _next(self, lane: _Lane) -> Job | None:
        with lane.changed:
            while not (self._closed or lane.waiting):
                lane.changed.wait()
            return None if self._closed else lane.waiting.popleft()


def yield_processor() -> None:
    """From now on the calling thread gives way to others."""
    thread = threading.get_native_id()
    os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + YIELDING)


class _Lane:
    """Jobs of one kind, and the threads that take them."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.threads: list[threading.Thread] = []
        self.waiting: deque[Job] = deque()
        self.under_way = 0
        self.changed = threading.Condition()
