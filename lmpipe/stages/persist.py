"""persist: slot → extent of a segment file on the way down, extent → slot on the way up. Owns the SSD tier.

    Save ─▶ on to replicate at once; hold the slots, write up to 32 MiB, flush by policy, rows ─▶ Persisted(ssd)
    Load ─▶ what the index has: read, verify, close the slot ─▶ Loaded; the rest ─▶ replicate

Answers from below go up as they are. One write is under way at a time, and two reads beside it.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from lmpipe import failpoints
from lmpipe import messages as m
from lmpipe.errors import ProtocolViolation
from lmpipe.handles import CHUNK, ChunkRecords, SessionId, Tier
from lmpipe.stages.base import Context, Peer
from lmpipe.stages.landing import Landings
from lmpipe.stages.links import Links
from lmpipe.stages.reads import Reads
from lmpipe.stages.recalls import Recalls
from lmpipe.stages.transit import Reading, Sources
from lmpipe.tiers import Stored
from lmpipe.tiers.ssd import SsdTier

log = logging.getLogger("lmpipe.persist")

T = TypeVar("T")

WRITE_BYTES = 32 << 20
QUEUE_CHUNKS = 256
TICK_S = 1.0
GRACE_S = 5.0
"""So long chunks wait for a replicate that is starting; then what was meant for it is dropped."""


@dataclass(frozen=True, slots=True)
class _Chunk:
    segment: str
    record: np.void


@dataclass(frozen=True, slots=True)
class _Forget:
    number: int
    message: m.Invalidate


class Persist:
    """The stage. `tier` is recovered already; `sources` has every segment that a Save may name."""

    name = "persist"

    def __init__(
        self, context: Context, tier: SsdTier, sources: Sources, landings: Landings, flush_interval_s: float | None
    ) -> None:
        """`flush_interval_s`: None to settle after every write."""
        self._context, self._tier, self._sources, self._landings = context, tier, sources, landings
        self._flush_interval_s = flush_interval_s
        self._links = Links(context)
        self._reads = Reads(context, self._links, landings, tier.read)
        self._recalls = Recalls(context, self._links, Tier.SSD)
        self._queue: deque[_Chunk | _Forget] = deque()
        self._unsettled: dict[int, np.void] = {}
        self._orphans: list[ChunkRecords] = []
        self._down_since_s = context.now_s()
        self._writing = False
        self._settle_at_s = 0.0
        self._tick_at_s = 0.0
        self._said = ""

    @property
    def _session(self) -> SessionId:
        return self._context.session.id

    def handle(self, peer: Peer | None, message: m.Message) -> None:
        """A message from above (`peer`) or from below."""
        if peer is None:
            self._from_below(message)
            return
        self._links.heard(peer)
        match message:
            case m.Save():
                self._save(message)
            case m.Load():
                self._reads.sort(message, self._tier.find, bool(self._context.chain))
            case m.Cancel():
                self._reads.cancel(message.load_id)
                self._context.down("load", message)
            case m.Release() if message.segment == self._landings.segment:
                self._landings.released(message.places.tolist())
            case m.Release():
                self._links.down("load", message)
            case m.Invalidate():
                number = self._recalls.begin(message)
                if Tier.SSD in message.tiers:
                    self._queue.append(_Forget(number, message))  # behind the saves that came before it
            case _:
                self._context.count("unexpected_messages")

    def _from_below(self, message: m.Message) -> None:
        match message:
            case m.Persisted() | m.SaveDropped() | m.Evicted():
                self._links.up("save", replace(message, session=self._session))
            case m.Loaded() | m.LoadFailed():
                self._links.up("load", replace(message, session=self._session))
            case m.Invalidated():
                self._recalls.answered_below(message)
            case _:
                self._context.count("unexpected_messages")

    # ---- save ----

    def _save(self, message: m.Save) -> None:
        if self._context.has_down:
            if self._context.chain:
                self._links.down("save", replace(message, session=self._session))
            elif self._context.now_s() < self._down_since_s + GRACE_S:
                self._orphans.append(message.chunks)
            else:
                self._dropped(Tier.REMOTE, "replicate is down", message.chunks, again=True)
        self._queue.extend(_Chunk(message.segment, record) for record in message.chunks)

    def _dropped(self, tier: Tier, reason: str, chunks: ChunkRecords, *, again: bool = False) -> None:
        if len(chunks):
            self._context.count("dropped_chunks", len(chunks))
            self._links.up("save", m.SaveDropped(self._session, 0, tier, reason, chunks, again))

    def _persisted(self, chunks: ChunkRecords) -> None:
        if len(chunks):
            self._links.up("save", m.Persisted(self._session, Tier.SSD, chunks))

    def _evicted(self, chunks: ChunkRecords) -> None:
        if len(chunks):
            self._context.count("evicted_chunks", len(chunks))
            self._links.up("save", m.Evicted(self._session, Tier.SSD, chunks))

    def _next_write(self) -> None:
        """Begin the job that is first in the queue: an invalidation, or a batch of chunks of one segment."""
        first = self._queue[0]
        if isinstance(first, _Forget):
            self._queue.popleft()
            self._invalidate(first)
            return
        batch: list[np.void] = []
        nbytes = 0
        while self._queue and isinstance(head := self._queue[0], _Chunk) and head.segment == first.segment:
            nbytes += int(head.record["nbytes"])
            if batch and nbytes > WRITE_BYTES:
                break
            batch.append(head.record)
            self._queue.popleft()
        records = _joined(batch)
        known = np.array([self._tier.has(record) for record in records], bool)
        self._persisted(records[known])
        reading = self._sources.take(first.segment, records[~known])
        self._dropped(Tier.SSD, "evicted before it was written", reading.stale)
        if len(reading.records):
            self._write(reading)
        else:
            reading.release()

    def _write(self, reading: Reading) -> None:
        nbytes = int(reading.records["nbytes"].sum())

        def write() -> tuple[Stored, Stored | None]:
            failpoints.hit("persist.save.held")
            written = self._tier.write(reading.records, reading.payloads)
            return written, None if self._flush_interval_s is not None else self._tier.settle()

        def done(result: tuple[Stored, Stored | None]) -> None:
            if reading.lost:  # more holds at once than the queues allow: the bytes cannot be trusted
                raise ProtocolViolation("a hold was lost while its chunk was written")
            reading.release()
            written, settled = result
            count = len(written.records)
            self._context.count("written_chunks", count)
            self._context.count("written_bytes", int(written.records["nbytes"].sum()))
            self._unsettled.update(zip(written.records["place"].tolist(), reading.records[:count], strict=True))
            self._dropped(Tier.SSD, written.reason, reading.records[count:], again=written.down)
            self._evicted(written.evicted)
            if settled is not None:
                self._settled(settled)
            elif not self._settle_at_s and self._flush_interval_s is not None:
                self._settle_at_s = self._context.now_s() + self._flush_interval_s

        self._job("write", write, done, nbytes, len(reading.records))

    def _settled(self, settled: Stored) -> None:
        """Answer for everything that was written before."""
        failpoints.hit("persist.save.settled")
        waiting, self._unsettled = self._unsettled, {}
        taken = [waiting.pop(place) for place in settled.records["place"].tolist() if place in waiting]
        self._persisted(_joined(taken))
        lost = settled.down or not settled.reason  # what a failing disk did not confirm
        self._dropped(Tier.SSD, settled.reason or "lost", _joined(list(waiting.values())), again=lost)
        self._evicted(settled.evicted)

    def _invalidate(self, forget: _Forget) -> None:
        def invalidate() -> int:
            return self._tier.invalidate(forget.message.namespace, forget.message.chunks)

        def done(removed: int) -> None:
            self._recalls.answered_here(forget.number, removed)

        self._job("invalidate", invalidate, done, urgent=True)  # somebody waits for the answer

    def _job(
        self,
        name: str,
        fn: Callable[[], T],
        done: Callable[[T], None],
        nbytes: int = 0,
        chunks: int = 0,
        *,
        urgent: bool = False,
    ) -> None:
        """What writes goes one by one. The tier answers trouble by values: an exception is a bug."""

        def finished(result: T) -> None:
            self._writing = False
            done(result)

        def failed(error: Exception) -> None:
            raise error

        self._writing = True
        self._context.submit(fn, finished, failed, name, urgent=urgent, nbytes=nbytes, chunks=chunks)

    # ---- time ----

    def step(self, now_s: float) -> float | None:
        """Begin what can begin."""
        self._links.pump()
        if now_s >= self._tick_at_s:
            self._tick_at_s = now_s + TICK_S
            self._tick()
        due_s = [self._tick_at_s - now_s]
        if (retry_s := self._reads.pump(now_s)) is not None:
            due_s.append(retry_s)
        if not self._writing:
            if self._settle_at_s and (now_s >= self._settle_at_s or self._context.draining):
                self._settle_at_s = 0.0
                self._job("settle", self._tier.settle, self._settled)
            elif self._queue:
                self._next_write()
        if not self._writing:  # nothing had to be written after all
            due_s += [0.0] if self._queue else []
            due_s += [self._settle_at_s - now_s] if self._settle_at_s else []
        return max(min(due_s), 0.0)

    def _tick(self) -> None:
        if self._orphans and self._context.now_s() >= self._down_since_s + GRACE_S:
            orphans, self._orphans = self._orphans, []
            for chunks in orphans:
                self._dropped(Tier.REMOTE, "replicate is down", chunks, again=True)
        self._tier.tick()
        self._landings.tick()
        self._context.gauge("rows", self._tier.rows)
        self._context.gauge("used_bytes", self._tier.used_bytes)
        self._context.gauge("capacity_bytes", self._tier.capacity_bytes)
        self._context.gauge("read_only", int(bool(self._tier.read_only)))
        if self._tier.read_only != self._said:
            self._said = self._tier.read_only
            log.warning(
                "the SSD tier takes %s", f"nothing, and is tried again: {self._said}" if self._said else "chunks"
            )
        self._context.gauge("ring_used_bytes", self._landings.used_bytes)
        self._context.gauge("ring_capacity_bytes", self._landings.capacity_bytes)

    def below_changed(self, chain: dict[str, SessionId]) -> None:
        """replicate is another one, or gone: gather sends its saves again, and ends its loads."""
        self._down_since_s = self._context.now_s()
        self._orphans.clear()
        self._links.forget_saves()
        self._recalls.below_changed()
        self._links.pump()

    def accepts_saves(self) -> bool:
        """False while enough waits."""
        return len(self._queue) < QUEUE_CHUNKS and not self._links.crowded

    def busy(self) -> bool:
        """Whether a chunk is not answered for."""
        return bool(self._queue or self._orphans or self._writing or self._unsettled or self._reads.busy)

    def close(self) -> None:
        """Seal the open segment file."""
        self._tier.close()


def _joined(records: list[np.void]) -> ChunkRecords:
    return np.frombuffer(b"".join(record.tobytes() for record in records), CHUNK)
