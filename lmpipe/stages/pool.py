"""A few worker threads for what takes long. Jobs go in from the runner's thread, come back to it finished.

Knows no stage. Threads are started when there is something to do, and are daemons: a process that has to die is not
held by a copy under way.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lmpipe.errors import ProtocolViolation
from lmpipe.spans import Spans

MAX_JOBS = 4096


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
        """`wake` is called on a worker thread after each job."""
        self.backlog = 0
        self._name, self._wanted, self._spans, self._wake = name, threads, spans, wake
        self._threads: list[threading.Thread] = []
        self._waiting: deque[Job] = deque()
        self._urgent: deque[Job] = deque()
        self._finished: deque[Job] = deque()
        self._changed = threading.Condition()
        self._closed = False

    def submit(self, job: Job, *, urgent: bool) -> None:
        """Run the job when a thread is free.

        Raises:
            ProtocolViolation: `MAX_JOBS` are under way: the stage does not bound its work.
        """
        if self.backlog >= MAX_JOBS:
            raise ProtocolViolation(f"{self._name} has {self.backlog} jobs under way and submits {job.name}")
        self.backlog += 1
        with self._changed:
            (self._urgent if urgent else self._waiting).append(job)
            self._changed.notify()
        if len(self._threads) < min(self._wanted, self.backlog):
            thread = threading.Thread(target=self._work, name=f"{self._name}-{len(self._threads)}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def take(self) -> Job | None:
        """The next finished job."""
        if not self._finished:
            return None
        self.backlog -= 1
        return self._finished.popleft()

    def close(self, timeout_s: float) -> bool:
        """Drop what waits; True when all threads have ended in time."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        deadline_s = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(deadline_s - time.monotonic(), 0))
        return not any(thread.is_alive() for thread in self._threads)

    def _work(self) -> None:
        while (job := self._next()) is not None:
            with self._spans.span(job.name, job.nbytes, job.chunks):
                try:
                    job.result = job.fn()
                except Exception as error:  # noqa: BLE001 - the runner judges it, on its own thread
                    job.error = error
            self._finished.append(job)
            del job  # what it holds is freed on the runner's thread, not when the next job comes
            self._wake()

    def _next(self) -> Job | None:
        with self._changed:
            while not (self._closed or self._urgent or self._waiting):
                self._changed.wait()
            if self._closed:
                return None
            return (self._urgent or self._waiting).popleft()
