"""Threads that load, so that no step waits. Daemons: an engine that ends does not wait for a load either."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

from lmpipe.engines.vllm.orders import LoadOrder, LoadReport

Job = Callable[[], LoadReport]


class LoadThreads:
    """Up to `most` threads, started as they are needed. `submit` and `take` are one thread's."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._threads: list[threading.Thread] = []
        self._jobs: queue.SimpleQueue[tuple[LoadOrder, Job] | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[tuple[LoadOrder, LoadReport]] = queue.SimpleQueue()
        self.under_way = 0

    def submit(self, order: LoadOrder, job: Job) -> None:
        """Have a load made; `job` never raises."""
        self.under_way += 1
        if self.under_way > len(self._threads) and len(self._threads) < self._most:
            thread = threading.Thread(target=self._run, name=f"lmpipe-load-{len(self._threads)}", daemon=True)
            self._threads.append(thread)
            thread.start()
        self._jobs.put((order, job))

    def take(self, wait_s: float) -> list[tuple[LoadOrder, LoadReport]]:
        """Loads that have ended since the last call; where there are none yet, wait for one."""
        ended: list[tuple[LoadOrder, LoadReport]] = []
        while self.under_way:
            try:
                ended.append(self._done.get(timeout=wait_s) if wait_s and not ended else self._done.get_nowait())
            except queue.Empty:
                break
            self.under_way -= 1
        return ended

    def close(self) -> None:
        """No more loads: those under way end, those that wait are not made."""
        while not self._jobs.empty():
            self._jobs.get()
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        while (asked := self._jobs.get()) is not None:
            order, job = asked
            self._done.put((order, job()))
