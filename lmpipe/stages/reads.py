"""Loads from a tier, one chunk at a time, in the order asked: destination, read, answer.

Every chunk that comes in is answered once, with Loaded or LoadFailed. Knows slots and messages; of the tier only the
function that reads.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from lmpipe import failpoints
from lmpipe.errors import FormatError, LmpipeError
from lmpipe.handles import ChunkRecords, SessionId
from lmpipe.messages import Load, Loaded, LoadFailed
from lmpipe.stages.base import Context
from lmpipe.stages.landing import Landing, Landings
from lmpipe.stages.links import Links

READS_AT_ONCE = 2
RETRY_S = 0.01
CANCELLED = 1024
CAUTION = 2.0
SMOOTHING = 0.3


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
        self._open_bytes = 0
        self._bytes_per_s = 0.0

    @property
    def busy(self) -> bool:
        """Whether something waits or is being read."""
        return bool(self._queue or self._reading)

    def sort(self, load: Load, find: Callable[[np.void], np.void | None], below: bool) -> None:
        """Queue what `find` has and this stage may write; the rest goes to the stage below, if there is one.

        What cannot be there in time fails now, so that the engine computes instead of waiting for its deadline.
        """
        rest: list[int] = []
        late: list[int] = []
        for at, record in enumerate(load.chunks):
            if self._landings.is_writing(record):
                continue  # asked twice: one answer is enough
            stored = find(record) if self._landings.may_write(record) else None
            if stored is None:
                rest.append(at)
            elif self._is_late(load, int(stored["nbytes"])):
                late.append(at)
            else:
                self._open_bytes += int(stored["nbytes"])
                self._queue.append(_Wanted(load, record, stored))
        if late:
            self.fail(load.load_id, "too much is to be read before it", load.chunks[late])
        if not rest:
            return
        chunks = load.chunks[rest]
        # With the sender's session: whoever fills a ring slot must know whose life ends the loan.
        relayed = Load(load.session, load.load_id, chunks, load.segment, load.deadline_ns)
        if not (below and self._context.down("load", relayed)):
            self.fail(load.load_id, "the tier below is down" if below else "not stored", chunks)

    def _is_late(self, load: Load, nbytes: int) -> bool:
        """Whether a chunk behind all that waits would come too late, even if reading were `CAUTION` times as fast as it
        was. Nothing is too late where nothing waits: or else nobody would see that reading has become faster.
        """
        if not (load.deadline_ns and self._open_bytes and self._bytes_per_s):
            return False
        expected_s = (self._open_bytes + nbytes) / self._bytes_per_s
        return self._context.now_s() + expected_s / CAUTION > load.deadline_ns / 1e9

    def _observe(self, nbytes: int, began_s: float, reading: int) -> None:
        took_s = max(self._context.now_s() - began_s, 1e-6)
        rate = nbytes * reading / took_s
        self._bytes_per_s += SMOOTHING * (rate - self._bytes_per_s) if self._bytes_per_s else rate

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
                self._drop_first()
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
                self._drop_first()
            else:
                self._queue.popleft()
        return None

    def _drop_first(self) -> None:
        self._open_bytes -= int(self._queue.popleft().stored["nbytes"])

    def _begin(self, wanted: _Wanted, landing: Landing) -> None:
        failpoints.hit("landing.opened")
        nbytes = int(wanted.stored["nbytes"])
        self._reading += 1
        began_s, reading = self._context.now_s(), self._reading

        def read() -> None:
            self._read(wanted.stored, landing.into)

        def done(_: None) -> None:
            self._reading -= 1
            self._open_bytes -= nbytes
            self._observe(nbytes, began_s, reading)
            there = self._landings.close(landing, SessionId(wanted.load.session))
            failpoints.hit("landing.closed")
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
            self._open_bytes -= nbytes
            self._landings.fail(landing)
            if not isinstance(error, LmpipeError):
                raise error
            if isinstance(error, FormatError):
                self._context.count("corrupt_chunks")
            self.fail(wanted.load.load_id, str(error), wanted.record.reshape(1))

        self._context.submit(read, done, failed, "read", urgent=True, nbytes=nbytes, chunks=1)
