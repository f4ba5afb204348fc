"""Loads from a tier, one chunk at a time, in the order asked: destination, read, answer.

Every chunk that comes in is answered once, with Loaded or LoadFailed. Knows slots and messages; of the tier only the
function that reads.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from lmpipe.errors import FormatError, LmpipeError
from lmpipe.handles import ChunkRecords, SessionId
from lmpipe.messages import Load, Loaded, LoadFailed
from lmpipe.stages.base import Context
from lmpipe.stages.landing import Landing, Landings
from lmpipe.stages.links import Links

READS_AT_ONCE = 2
RETRY_S = 0.01
CANCELLED = 1024


@dataclass(slots=True)
class _Wanted:
    load: Load
    record: np.void
    """As asked for: `place` is the arena slot."""
    stored: np.void


class Reads:
    """The queue of one stage. `read` runs on a worker thread; an LmpipeError of it says that there is nothing."""

    def __init__(
        self, context: Context, links: Links, landings: Landings, read: Callable[[np.void, memoryview], None]
    ) -> None:
        self._context, self._links, self._landings, self._read = context, links, landings, read
        self._queue: deque[_Wanted] = deque()
        self._cancelled: dict[int, None] = {}
        self._reading = 0

    @property
    def busy(self) -> bool:
        """Whether something waits or is being read."""
        return bool(self._queue or self._reading)

    def sort(self, load: Load, find: Callable[[np.void], np.void | None], below: bool) -> None:
        """Queue what `find` has and this stage may write; the rest goes to the stage below, if there is one."""
        rest: list[int] = []
        for at, record in enumerate(load.chunks):
            if self._landings.is_writing(record):
                continue  # asked twice: one answer is enough
            stored = find(record) if self._landings.may_write(record) else None
            if stored is None:
                rest.append(at)
            else:
                self._queue.append(_Wanted(load, record, stored))
        if not rest:
            return
        chunks = load.chunks[rest]
        # With the sender's session: whoever fills a ring slot must know whose life ends the loan.
        relayed = Load(load.session, load.load_id, chunks, load.segment, load.deadline_ns)
        if not (below and self._context.down("load", relayed)):
            self.fail(load.load_id, "the tier below is down" if below else "not stored", chunks)

    def fail(self, load_id: int, reason: str, chunks: ChunkRecords) -> None:
        """Say that these chunks will not come."""
        self._context.count("load_failed_chunks", len(chunks))
        self._links.up("load", LoadFailed(self._context.session.id, load_id, reason, chunks))

    def cancel(self, load_id: int) -> None:
        """Nobody waits for this load; what has not begun is not begun."""
        self._cancelled[load_id] = None
        if len(self._cancelled) > CANCELLED:
            del self._cancelled[next(iter(self._cancelled))]

    def pump(self, now_s: float) -> float | None:
        """Begin what can begin; when to come again though nothing has happened."""
        while self._queue and self._reading < READS_AT_ONCE:
            wanted = self._queue[0]
            if self._landings.is_writing(wanted.record):
                self._queue.popleft()
                continue
            load = wanted.load
            reason = ""
            if load.deadline_ns and now_s * 1e9 >= load.deadline_ns:
                reason = "deadline"
            elif load.load_id in self._cancelled:
                reason = "cancelled"
            landing = None if reason else self._landings.open(wanted.record)
            if isinstance(landing, str):
                reason = landing
            elif landing is not None:
                self._begin(wanted, landing)
            elif not reason:
                return RETRY_S  # the ring is full: a Release, or the deadline, ends it
            if reason:
                self.fail(load.load_id, reason, wanted.record.reshape(1))
            self._queue.popleft()
        return None

    def _begin(self, wanted: _Wanted, landing: Landing) -> None:
        nbytes = int(wanted.stored["nbytes"])

        def read() -> None:
            self._read(wanted.stored, landing.into)

        def done(_: None) -> None:
            self._reading -= 1
            there = self._landings.close(landing, SessionId(wanted.load.session))
            if there is None:
                self.fail(wanted.load.load_id, "stale", wanted.record.reshape(1))
                return
            self._context.count("read_chunks")
            self._context.count("read_bytes", nbytes)
            segment, record = there
            message = Loaded(self._context.session.id, wanted.load.load_id, segment, record.reshape(1))
            self._links.up("load", message)

        def failed(error: Exception) -> None:
            self._reading -= 1
            self._landings.fail(landing)
            if not isinstance(error, LmpipeError):
                raise error
            if isinstance(error, FormatError):
                self._context.count("corrupt_chunks")
            self.fail(wanted.load.load_id, str(error), wanted.record.reshape(1))

        self._reading += 1
        self._context.submit(read, done, failed, "read", urgent=True, nbytes=nbytes, chunks=1)
