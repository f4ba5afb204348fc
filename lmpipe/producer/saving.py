"""Saving: one thread that turns an engine's pages into committed chunks without holding up the engine.

Private pages are copied here, by native threads, into slots leased from gather; the engine only keeps the memory
unchanged until `SaveTicket.copied`. Mapped pages are not touched: the message names them, and a grant word says until
when gather may read them.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from lmpipe import messages as m
from lmpipe import native
from lmpipe.handles import CHUNK, ChunkRecords, Codec, Fidelity, Slot
from lmpipe.keys import Prompt, namespace_id
from lmpipe.lifecycle import SlotEvent
from lmpipe.producer.attachment import Attachment, Wanted
from lmpipe.producer.link import LeasePool, Link
from lmpipe.shm.hold import Grant

QUEUED_SAVES = 64
GROUP_CHUNKS = 8
LEASE_WAIT_S = 5.0

PageIds = npt.NDArray[np.int32]


def chunk_records(prompt: Prompt, first: int, count: int, wanted: Wanted, ttl_s: int = 0) -> ChunkRecords:
    """Records of chunks [first, first + count) of a prompt as they are saved: raw, exact, nowhere yet."""
    now_s = int(time.time())
    records = np.zeros(count, CHUNK)
    records["key"] = np.ascontiguousarray(prompt.keys[first : first + count]).view("V16").ravel()
    records["anchor"] = np.ascontiguousarray(prompt.anchors(first)[:count]).view("V4").ravel()
    records["position"] = np.arange(first, first + count)
    records["shard"], records["shards"] = wanted.shard, wanted.shards
    records["codec"], records["fidelity"] = Codec.RAW, Fidelity.EXACT
    records["layout"] = wanted.layout
    records["raw_bytes"] = records["nbytes"] = wanted.chunk_bytes
    records["saved_at"] = now_s
    records["expires_at"] = now_s + ttl_s if ttl_s else 0
    records["namespace"] = namespace_id(prompt.namespace)
    return records


@dataclass(slots=True, eq=False)
class SaveTicket:
    """One save on its way. Every chunk ends as saved (visible to lookups), known (it was there), or dropped with a
    reason.
    """

    save_id: int
    chunks: int
    copied: threading.Event = field(default_factory=threading.Event)
    """Set when the engine's memory is no longer needed."""
    saved: int = 0
    known: int = 0
    dropped: dict[str, int] = field(default_factory=dict[str, int])
    _done: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _grant: Grant | None = None
    _revoked: bool = False

    @property
    def done(self) -> bool:
        """Whether every chunk has its answer."""
        return self._done.is_set()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait for every chunk's answer. True: all of them can now be found."""
        return self._done.wait(timeout_s) and not self.dropped

    def revoke(self) -> None:
        """The pages are about to be reused: what gather has not committed by now is discarded. Mapped pages only; never
        blocks.
        """
        with self._lock:
            self._revoked = True
            if self._grant is not None:
                self._grant.revoke()

    def granted(self, grant: Grant) -> bool:
        """Attach the grant word; False when the save was revoked before."""
        with self._lock:
            if not self._revoked:
                self._grant = grant
            return not self._revoked

    def count(self, *, saved: int = 0, known: int = 0, dropped: int = 0, reason: str = "") -> None:
        """Book chunks; the last one ends the save."""
        with self._lock:
            self.saved += saved
            self.known += known
            if dropped:
                self.dropped[reason] = self.dropped.get(reason, 0) + dropped
            if self.open_chunks() > 0:
                return
            grant, self._grant = self._grant, None
        if grant is not None:
            grant.release()
        self.copied.set()
        self._done.set()

    def open_chunks(self) -> int:
        """Chunks without an answer."""
        return self.chunks - self.saved - self.known - sum(self.dropped.values())

    def drop_rest(self, reason: str) -> int:
        """Book whatever is open as dropped. Returns how many."""
        rest = self.open_chunks()
        if rest > 0:
            self.count(dropped=rest, reason=reason)
        return max(rest, 0)


@dataclass(slots=True)
class _Job:
    ticket: SaveTicket
    prompt: Prompt
    records: ChunkRecords
    first: int
    pool: native.PagePool | None
    page_ids: PageIds


class Saver:
    """The save queue of one producer, and its thread. Bounded: a full queue drops the save and says so."""

    def __init__(self, link: Link, leases: LeasePool, wanted: Callable[[], Wanted], copy_threads: int) -> None:
        self._link, self._leases, self._wanted = link, leases, wanted
        self._copier = native.Copier(copy_threads)
        self._jobs: queue.Queue[_Job | None] = queue.Queue(QUEUED_SAVES)
        self.tickets: dict[int, SaveTicket] = {}
        self._thread = threading.Thread(target=self._run, name="lmpipe-save", daemon=True)
        self._thread.start()

    def put(
        self, ticket: SaveTicket, prompt: Prompt, first: int, pool: native.PagePool | None, page_ids: PageIds
    ) -> None:
        """Queue a save. Called on the engine's thread: no copy, no socket, no index read."""
        view = Prompt(prompt.namespace, prompt.chunk_tokens, prompt.tokens, prompt.keys, prompt.index_keys)
        job = _Job(ticket, view, chunk_records(prompt, first, ticket.chunks, self._wanted()), first, pool, page_ids)
        self.tickets[ticket.save_id] = ticket
        try:
            self._jobs.put_nowait(job)
        except queue.Full:
            self.finish(ticket, "save queue full")

    def finish(self, ticket: SaveTicket, reason: str) -> int:
        """End a save that gets no more answers."""
        dropped = ticket.drop_rest(reason)
        self.tickets.pop(ticket.save_id, None)
        return dropped

    def lost(self, reason: str) -> None:
        """Gather is gone: nothing that is open will be answered."""
        self._leases.reset()
        for ticket in list(self.tickets.values()):
            self.finish(ticket, reason)

    def close(self) -> None:
        """End the thread after what is queued."""
        self._jobs.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            attachment = self._link.attachment
            if self._link.state != "ready" or attachment is None or not attachment.enter():
                self.finish(job.ticket, "lmpipe absent")
                continue
            try:
                self._save(attachment, job)
            finally:
                attachment.leave()

    def _save(self, attachment: Attachment, job: _Job) -> None:
        ticket = job.ticket
        known = min(attachment.known(job.prompt, job.first, self._wanted()), ticket.chunks)
        if known:
            ticket.count(known=known)
        if ticket.done:
            self.tickets.pop(ticket.save_id, None)
        elif job.pool is None:
            self._send_pages(attachment, job, known)
        else:
            self._copy(attachment, job, job.pool, known)

    def _send_pages(self, attachment: Attachment, job: _Job, known: int) -> None:
        ticket, session = job.ticket, attachment.session.id
        grant = attachment.holds.grant(ticket.save_id)
        if grant is None or not ticket.granted(grant):
            if grant is not None:
                grant.release()
            self.finish(ticket, "revoked" if grant is not None else "too many saves in flight")
            return
        message = m.Save(session, ticket.save_id, "pages", job.records[known:], job.page_ids[known:], grant.index)
        if not self._link.post("save", message):
            self.finish(ticket, "gather busy")

    def _copy(self, attachment: Attachment, job: _Job, pool: native.PagePool, known: int) -> None:
        ticket, arena, session = job.ticket, attachment.arena, attachment.session.id
        at = known
        while at < ticket.chunks and not ticket.done:
            slots = self._leases.take(min(GROUP_CHUNKS, ticket.chunks - at), LEASE_WAIT_S)
            if not slots:
                self.finish(ticket, "no room in time")
                return
            opened = [slot for slot in slots if self._open(attachment, slot)]
            count = len(opened)
            if count:
                offsets = np.array([arena.offset(slot.index) for slot in opened], np.uint64)
                records = job.records[at : at + count].copy()
                records["place"] = [slot.place for slot in opened]
                self._copier.gather(pool, job.page_ids[at : at + count], arena.region, offsets)
                for slot, record in zip(opened, records, strict=True):
                    arena.set_record(slot.index, record)
                    arena.advance(slot, SlotEvent.CLOSE)
                at += count
                if at == ticket.chunks:
                    ticket.copied.set()
                if not self._link.post("save", m.Save(session, ticket.save_id, "arena", records, _NO_PAGES, -1)):
                    ticket.count(dropped=count, reason="gather busy")
            self._leases.done(slots)
        ticket.copied.set()

    def _open(self, attachment: Attachment, slot: Slot) -> bool:
        """The lease must be ours and large enough: anything else is stale and is left alone."""
        arena = attachment.arena
        return (
            arena.owner(slot.index) == attachment.session.id
            and arena.capacity(slot.index) >= self._wanted().chunk_bytes
            and arena.advance(slot, SlotEvent.OPEN)
        )


_NO_PAGES: PageIds = np.empty((0, 0), np.int32)
