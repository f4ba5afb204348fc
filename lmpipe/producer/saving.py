"""Saving: one thread that turns an engine's pages into committed chunks without holding up the engine.

Private pages are copied here, by native threads, into slots leased from gather; the engine only keeps the memory
unchanged until `SaveTicket.copied`. Mapped pages are not touched: the message names them, and a grant word says until
when gather may read them.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import numpy.typing as npt

from lmpipe import failpoints
from lmpipe import messages as m
from lmpipe.bus import Channel
from lmpipe.clock import wall_s
from lmpipe.handles import CHUNK, ChunkRecords, Codec, Fidelity, Slot
from lmpipe.keys import Prompt, namespace_id
from lmpipe.lifecycle import SlotEvent
from lmpipe.producer.attachment import Attachment, Wanted
from lmpipe.producer.link import LeasePool, Link
from lmpipe.producer.pools import Copies, Pool, mark
from lmpipe.shm.hold import Grant

log = logging.getLogger("lmpipe.producer")

QUEUED_SAVES = 64
GROUP_CHUNKS = 8
LEASE_WAIT_S = 5.0

PageIds = npt.NDArray[np.int32]


def chunk_records(
    prompt: Prompt, first: int, count: int, wanted: Wanted, ttl_s: int = 0, fidelity: int = Fidelity.EXACT
) -> ChunkRecords:
    """Records of chunks [first, first + count) of a prompt as they are saved: raw, nowhere yet."""
    now_s = int(wall_s())
    records = np.zeros(count, CHUNK)
    records["key"] = np.ascontiguousarray(prompt.keys[first : first + count]).view("V16").ravel()
    records["anchor"] = np.ascontiguousarray(prompt.anchors(first)[:count]).view("V4").ravel()
    records["position"] = np.arange(first, first + count)
    records["shard"], records["shards"] = wanted.shard, wanted.shards
    records["codec"], records["fidelity"] = Codec.RAW, fidelity
    records["layout"] = wanted.layout
    records["raw_bytes"] = records["nbytes"] = wanted.chunk_bytes
    records["saved_at"] = now_s
    records["expires_at"] = now_s + ttl_s if ttl_s else 0
    records["namespace"] = namespace_id(prompt.root)
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
    book: Callable[[str, int], None] = lambda _, __: None
    """Told of every chunk's end, by the name of its counter."""
    used: Callable[[], None] = lambda: None
    """Told at the end if any of it can be found."""
    heard_s: float = 0.0
    """When something was last sent or answered; 0: nothing was sent yet."""
    _done: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _grant: Grant | None = None
    _revoked: bool = False
    _reading: bool = False

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
        """Attach the grant word; False when the save was revoked or ended before."""
        with self._lock:
            wanted = not self._revoked and not self._done.is_set()
            if wanted:
                self._grant = grant
            return wanted

    def start_reading(self) -> bool:
        """The engine's pages are about to be read here; False: the save is over, and they may have changed."""
        with self._lock:
            self._reading = not self._done.is_set()
            return self._reading

    def stop_reading(self, *, last: bool) -> None:
        """The reading is done; `last`: there will be no more. `copied` is never set in between, however a save ends."""
        with self._lock:
            self._reading = False
            if last or self._done.is_set():
                self.copied.set()

    def count(self, *, saved: int = 0, known: int = 0, dropped: int = 0, reason: str = "") -> None:
        """Book chunks; the last one ends the save, and what comes after it is not booked."""
        with self._lock:
            self._count(saved, known, dropped, reason)

    def _count(self, saved: int, known: int, dropped: int, reason: str) -> None:
        if self._done.is_set():
            return
        self.heard_s = time.monotonic()
        self.saved += saved
        self.known += known
        if dropped:
            self.dropped[reason] = self.dropped.get(reason, 0) + dropped
        for name, chunks in (("saved_chunks", saved), ("known_chunks", known), ("save_dropped_chunks", dropped)):
            if chunks:
                self.book(name, chunks)
        if self.open_chunks() > 0:
            return
        grant, self._grant = self._grant, None
        if grant is not None:
            grant.release()
        if not self._reading:
            self.copied.set()
        if self.saved or self.known:
            self.used()
        self._done.set()

    def open_chunks(self) -> int:
        """Chunks without an answer."""
        return self.chunks - self.saved - self.known - sum(self.dropped.values())

    def drop_rest(self, reason: str) -> None:
        """Book whatever is open as dropped."""
        with self._lock:
            self._count(0, 0, self.open_chunks(), reason)


@dataclass(slots=True)
class _Job:
    ticket: SaveTicket
    prompt: Prompt
    records: ChunkRecords
    known_as: Wanted
    """What is known already need not be saved."""
    first: int
    pool: Pool | None
    page_ids: PageIds
    after: object
    """When the pages have been computed."""


class Saver:
    """The save queue of one producer, and its thread. Bounded: a full queue drops the save and says so."""

    def __init__(
        self, link: Link, leases: LeasePool, wanted: Callable[[], Wanted], copy_threads: int, ttl_s: int
    ) -> None:
        self._link, self._leases, self._wanted, self._ttl_s = link, leases, wanted, ttl_s
        self._copies = Copies(copy_threads)
        self._jobs: queue.Queue[_Job | None] = queue.Queue(QUEUED_SAVES)
        self.tickets: dict[int, SaveTicket] = {}
        self._starved = False
        link.saves_open = lambda: bool(self.tickets)
        link.saves_overdue = lambda limit_s: self._starved or bool(self._overdue(limit_s))
        self._thread = threading.Thread(target=self._run, name="lmpipe-save", daemon=True)
        self._thread.start()

    def put(
        self,
        ticket: SaveTicket,
        prompt: Prompt,
        first: int,
        pool: Pool | None,
        page_ids: PageIds,
        fidelity: int,
        exact: bool,
    ) -> None:
        """Queue a save. Called on the engine's thread: no copy, no socket, no index read.

        Pages on a device hold what has been ordered there until now.
        """
        view = prompt.part(0)  # an engine's prompt goes on growing
        records = chunk_records(prompt, first, ticket.chunks, self._wanted(), self._ttl_s, fidelity)
        ticket.used = partial(self._touch, "load", view, first + ticket.chunks)
        # The ids are copied: an engine's block table goes on changing.
        wanted = self._wanted()
        known_as = replace(wanted, max_fidelity=fidelity) if exact else wanted
        job = _Job(ticket, view, records, known_as, first, pool, np.array(page_ids, np.int32, order="C"), mark(pool))
        self.tickets[ticket.save_id] = ticket
        try:
            self._jobs.put_nowait(job)
        except queue.Full:
            self.finish(ticket, "save queue full")

    def _touch(self, channel: Channel, prompt: Prompt, chunks: int) -> None:
        """A prompt's head stays more recent than what came after it, and what the engine has is in use."""
        attachment = self._link.attachment
        if attachment is not None:
            used = chunk_records(prompt, 0, chunks, self._wanted())
            self._link.post(channel, m.Touch(attachment.session.id, used))

    def _overdue(self, limit_s: float) -> list[SaveTicket]:
        """Saves of which nothing was heard for so long, though gather answers pings."""
        before_s = time.monotonic() - limit_s
        return [ticket for ticket in list(self.tickets.values()) if 0.0 < ticket.heard_s < before_s]

    def registered_again(self, limit_s: float) -> None:
        """gather has said what is lent; what it has not answered till now it will not answer any more."""
        self._starved = False
        for ticket in self._overdue(limit_s):
            self.finish(ticket, "no answer from gather")

    def finish(self, ticket: SaveTicket, reason: str) -> None:
        """End a save that gets no more answers."""
        ticket.drop_rest(reason)
        self.tickets.pop(ticket.save_id, None)

    def lost(self, reason: str) -> None:
        """Gather is gone: nothing that is open will be answered."""
        self._leases.reset()
        for ticket in list(self.tickets.values()):
            self.finish(ticket, reason)

    def close(self) -> None:
        """End the thread after what is queued; for more leases it waits no longer."""
        self._leases.close()
        self._jobs.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            self._work_on(job)
            del job  # and with it the engine's memory, which else would stay until the next save

    def _work_on(self, job: _Job) -> None:
        attachment = self._link.attachment
        if self._link.state != "ready" or attachment is None or not attachment.enter():
            self.finish(job.ticket, "lmpipe absent")
            return
        try:
            self._save(attachment, job)
        except Exception:
            log.critical("a bug: this save is dropped, the engine goes on", exc_info=True)
            self.finish(job.ticket, "a bug in lmpipe")
        finally:
            attachment.leave()

    def _save(self, attachment: Attachment, job: _Job) -> None:
        ticket = job.ticket
        known = min(attachment.known(job.prompt, job.first, job.known_as), ticket.chunks)
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
        failpoints.hit("producer.save.granted")
        message = m.Save(session, ticket.save_id, "pages", job.records[known:], job.page_ids[known:], grant.index)
        ticket.heard_s = time.monotonic()
        if not self._link.post("save", message):
            self.finish(ticket, "gather busy")

    def _copy(self, attachment: Attachment, job: _Job, pool: Pool, known: int) -> None:
        ticket, at = job.ticket, known
        while at < ticket.chunks and not ticket.done:
            slots = self._leases.take(min(GROUP_CHUNKS, ticket.chunks - at), LEASE_WAIT_S)
            if not slots:
                self._starved = True  # there is no room, or the word of new leases was lost
                self.finish(ticket, "no room in time")
                return
            failpoints.hit("producer.save.leased")
            if not ticket.start_reading():  # cancelled, or lost with the node that lent the slots
                self._leases.put_back(slots)
                return
            try:
                records = self._fill(attachment, job, pool, at, slots)
            except BaseException:
                ticket.stop_reading(last=False)
                # They stay in use for the pool: gather may name them as unused before it reads this.
                places = np.array([slot.place for slot in slots], np.uint64)
                self._link.post("save", m.Release(attachment.session.id, "arena", places))
                raise
            at += len(records)
            ticket.stop_reading(last=at == ticket.chunks)
            message = m.Save(attachment.session.id, ticket.save_id, "arena", records, _NO_PAGES, -1)
            ticket.heard_s = time.monotonic()
            if len(records) and not self._link.post("save", message):
                ticket.count(dropped=len(records), reason="gather busy")
            elif not ticket.done and job.first + at > len(records):
                self._touch("save", job.prompt, job.first + at)  # behind what was just sent
            self._leases.done(slots)

    def _fill(self, attachment: Attachment, job: _Job, pool: Pool, at: int, slots: list[Slot]) -> ChunkRecords:
        """Copy chunks from `at` on into those of the slots that are still ours; their records."""
        arena = attachment.arena
        opened = [slot for slot in slots if self._open(attachment, slot)]
        failpoints.hit("producer.save.opened")
        last = at + len(opened)
        records = job.records[at:last].copy()
        records["place"] = [slot.place for slot in opened]
        self._copies.save(pool, job.page_ids[at:last], arena, records, job.after)
        failpoints.hit("producer.save.copied")
        for slot, record in zip(opened, records, strict=True):
            arena.set_record(slot.index, record)
            arena.advance(slot, SlotEvent.CLOSE)
        failpoints.hit("producer.save.closed")
        return records

    def _open(self, attachment: Attachment, slot: Slot) -> bool:
        """The lease must be ours and large enough: anything else is stale and is left alone."""
        arena = attachment.arena
        return (
            arena.owner(slot.index) == attachment.session.id
            and arena.capacity(slot.index) >= self._wanted().chunk_bytes
            and arena.advance(slot, SlotEvent.OPEN)
        )


_NO_PAGES: PageIds = np.empty((0, 0), np.int32)
