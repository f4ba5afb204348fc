"""What a producer counts and whom it tells: counters, published where `lmpipe status` reads them, and a user's
callbacks.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import Counter
from collections.abc import Callable

from lmpipe.errors import LmpipeError
from lmpipe.handles import ChunkRecords
from lmpipe.metrics import PRODUCER_COUNTERS
from lmpipe.producer.attachment import Attachment
from lmpipe.shm.counters import Counters

log = logging.getLogger("lmpipe.producer")

Event = Callable[[str, ChunkRecords], None]
EVENTS = ("saved", "persisted", "loaded", "evicted", "failed")


class Accounts:
    """Counts from any thread; `publish` is the link's."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._published: Counters | None = None
        self._callbacks: dict[str, list[Event]] = {event: [] for event in EVENTS}

    def on(self, event: str, callback: Event) -> None:
        """Register a callback.

        Raises:
            ValueError: no such event.
        """
        if event not in self._callbacks:
            raise ValueError(f"unknown event {event!r} (known: {', '.join(EVENTS)})")
        self._callbacks[event].append(callback)

    def emit(self, event: str, records: ChunkRecords) -> None:
        """Tell the callbacks of an event."""
        for callback in self._callbacks[event]:
            try:
                callback(event, records)
            except Exception:
                log.exception("a callback on %s raised", event)

    def add(self, name: str, amount: int) -> None:
        """Add to one counter."""
        with self._lock:
            self._counts[name] += amount

    def count(self, **amounts: int) -> None:
        """Add to counters."""
        counts = self._counts
        with self._lock:
            for name, amount in amounts.items():
                counts[name] += amount

    def snapshot(self) -> dict[str, int]:
        """All counters that are not 0."""
        with self._lock:
            return dict(self._counts)

    def publish(self, attachment: Attachment | None) -> None:
        """Write the counters into the node's run directory, into another file when the session is another one."""
        if attachment is None:
            return
        path = attachment.info.paths.engine_counters(self._name, attachment.session.id, os.getpid())
        if self._published is None or self._published.segment.path != path:
            self.close()
            try:
                self._published = Counters.create(path, PRODUCER_COUNTERS)
            except LmpipeError as error:  # no room, or the node is on its way out: figures are not worth an engine
                log.debug("no counters for now: %s", error)
                return
        for name, value in self.snapshot().items():
            self._published.set(name, value)

    def close(self) -> None:
        """Unmap; the file stays for the sums."""
        if self._published is not None:
            self._published.close()
            self._published = None
