"""replicate: slot → remote object on the way down, remote object → slot on the way up. Owns the remote tier.

    Save ─▶ hold the slot, put the object, row ─▶ Persisted(remote)
    Load ─▶ what the index has: get, verify, close the slot ─▶ Loaded; the rest ─▶ LoadFailed

The last stage of the chain. Every call to the store is a job: it may last as long as the store's time-out.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np

from lmpipe import messages as m
from lmpipe.errors import LmpipeError, ProtocolViolation
from lmpipe.handles import SessionId, Tier
from lmpipe.stages.base import Context, Peer
from lmpipe.stages.landing import Landings
from lmpipe.stages.links import Links
from lmpipe.stages.reads import Reads
from lmpipe.stages.recalls import Recalls
from lmpipe.stages.transit import Reading, Sources
from lmpipe.tiers import Recovered, Stored
from lmpipe.tiers.remote_object import RemoteTier

PUTS_AT_ONCE = 2
QUEUE_CHUNKS = 256
TICK_S = 1.0
RELIST_S = 5.0


@dataclass(frozen=True, slots=True)
class _Chunk:
    segment: str
    record: np.void


@dataclass(frozen=True, slots=True)
class _Forget:
    number: int
    message: m.Invalidate


class Replicate:
    """The stage. It lists the store itself, as soon as that answers; `sources` has every segment a Save may name."""

    name = "replicate"

    def __init__(self, context: Context, tier: RemoteTier, sources: Sources, landings: Landings) -> None:
        self._context, self._tier, self._sources, self._landings = context, tier, sources, landings
        self._links = Links(context)
        self._reads = Reads(context, self._links, landings, tier.get)
        self._recalls = Recalls(context, self._links, Tier.REMOTE)
        self._queue: deque[_Chunk | _Forget] = deque()
        self._putting = 0
        self._forgetting = False
        self._ticking = False
        self._listing = False
        self._listed = False
        self._list_at_s = 0.0
        self._tick_at_s = 0.0

    @property
    def _session(self) -> SessionId:
        return self._context.session.id

    def handle(self, peer: Peer | None, message: m.Message) -> None:
        """A message from above; there is nothing below."""
        if peer is None:
            self._context.count("unexpected_messages")
            return
        self._links.heard(peer)
        match message:
            case m.Save():
                self._queue.extend(_Chunk(message.segment, record) for record in message.chunks)
            case m.Load():
                self._reads.sort(message, self._tier.find, below=False)
            case m.Cancel():
                self._reads.cancel(message.load_id)
            case m.Release():
                self._landings.released(message.places.tolist())
            case m.Invalidate():
                number = self._recalls.begin(message)
                if Tier.REMOTE in message.tiers:
                    self._queue.append(_Forget(number, message))  # behind the saves that came before it
            case _:
                self._context.count("unexpected_messages")

    # ---- save ----

    def _next(self) -> None:
        """Begin what is first in the queue."""
        head = self._queue.popleft()
        if isinstance(head, _Forget):
            self._invalidate(head)
            return
        chunk = head.record.reshape(1)
        if self._tier.has(head.record):
            self._links.up("save", m.Persisted(self._session, Tier.REMOTE, chunk))
            return
        reading = self._sources.take(head.segment, chunk)
        if len(reading.records):
            self._put(reading)
        else:
            reading.release()
            self._dropped("evicted before it was written", reading)

    def _dropped(self, reason: str, reading: Reading, *, again: bool = False) -> None:
        chunks = reading.records if len(reading.records) else reading.stale
        self._context.count("dropped_chunks", len(chunks))
        self._links.up("save", m.SaveDropped(self._session, 0, Tier.REMOTE, reason, chunks, again))

    def _put(self, reading: Reading) -> None:
        nbytes = int(reading.records["nbytes"][0])

        def put() -> Stored:
            return self._tier.put(reading.records[0], reading.payloads[0])

        def done(stored: Stored) -> None:
            self._putting -= 1
            if reading.lost:
                raise ProtocolViolation("a hold was lost while its chunk was sent")
            reading.release()
            if stored.reason:
                self._dropped(stored.reason, reading, again=stored.down)
            else:
                self._context.count("written_chunks")
                self._context.count("written_bytes", nbytes)
                self._links.up("save", m.Persisted(self._session, Tier.REMOTE, reading.records))
            if len(stored.evicted):
                self._context.count("evicted_chunks", len(stored.evicted))
                self._links.up("save", m.Evicted(self._session, Tier.REMOTE, stored.evicted))

        self._putting += 1
        self._context.submit(put, done, _bug, "put", nbytes=nbytes, chunks=1)

    def _invalidate(self, forget: _Forget) -> None:
        def invalidate() -> int:
            return self._tier.invalidate(forget.message.namespace, forget.message.chunks)

        def done(removed: int) -> None:
            self._forgetting = False
            self._recalls.answered_here(forget.number, removed)

        self._forgetting = True
        self._context.submit(invalidate, done, _bug, "invalidate", urgent=True)  # somebody waits for the answer

    # ---- time ----

    def step(self, now_s: float) -> float | None:
        """Begin what can begin."""
        self._links.pump()
        if now_s >= self._tick_at_s:
            self._tick_at_s = now_s + TICK_S
            self._tick(now_s)
        retry_s = self._reads.pump(now_s)
        # An invalidation waits for the puts before it, and the puts behind it wait for it; and neither it nor a listing
        # begins within the other: what was listed before and is entered after would come back.
        while self._queue and self._putting < PUTS_AT_ONCE and not self._forgetting:
            if isinstance(self._queue[0], _Forget) and (self._putting or self._listing):
                break
            self._next()
        due_s = self._tick_at_s - now_s
        return max(due_s if retry_s is None else min(due_s, retry_s), 0.0)

    def _tick(self, now_s: float) -> None:
        self._landings.tick()
        self._context.gauge("rows", self._tier.rows)
        self._context.gauge("used_bytes", self._tier.used_bytes)
        self._context.gauge("capacity_bytes", self._tier.capacity_bytes)
        self._context.gauge("store_down", int(bool(self._tier.down)))
        self._context.gauge("ring_used_bytes", self._landings.used_bytes)
        self._context.gauge("ring_capacity_bytes", self._landings.capacity_bytes)
        if not self._ticking:
            self._ticking = True
            if not self._listed and not self._forgetting and now_s >= self._list_at_s:
                self._listing, self._list_at_s = True, now_s + RELIST_S
                self._context.submit(self._tier.recover, self._recovered, self._not_listed, "list")
            else:
                self._context.submit(self._tier.tick, self._ticked, _bug, "tick")

    def _recovered(self, found: Recovered) -> None:
        self._ticking, self._listing, self._listed = False, False, True
        self._context.count("corrupt_chunks", found.damaged)

    def _not_listed(self, error: Exception) -> None:
        self._ticking = self._listing = False
        if not isinstance(error, LmpipeError):
            raise error

    def _ticked(self, _: None) -> None:
        self._ticking = False

    def below_changed(self, chain: dict[str, SessionId]) -> None:
        """Nothing is below."""

    def accepts_saves(self) -> bool:
        """False while enough waits."""
        return len(self._queue) < QUEUE_CHUNKS and not self._links.crowded

    def busy(self) -> bool:
        """Whether a chunk is not answered for."""
        return bool(self._queue or self._putting or self._forgetting or self._reads.busy)

    def close(self) -> None:
        """Nothing to do: every object is whole."""


def _bug(error: Exception) -> None:
    """The tier answers trouble by values."""
    raise error
