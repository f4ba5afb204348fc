"""gather: engine pages → arena slots on the way down, reserved slots and promotion on the way up. Owns the DRAM tier.

    Save (slots)  ─▶ check the lease, commit, Saved ─┐ Save (pages)  ─▶ lease, copy, check the grant ───┴─▶ pending ─▶
    Save to the stage below ─▶ Persisted ─▶ clear the bit Load          ─▶ there? on its way? else reserve a slot, ask
    below ─▶ Loaded ─▶ commit, answer who waits; in the background, and by Recode: chunks in another codec (recoding.py)

The only writer of the arena's allocator and of the `dram` index. It reads engine pages and never writes them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lmpipe import failpoints
from lmpipe import messages as m
from lmpipe.errors import LmpipeError, ProtocolViolation
from lmpipe.handles import ChunkRecords, SessionId, Tier
from lmpipe.index import IndexReader
from lmpipe.index_row import index_keys
from lmpipe.shm.descriptor import PENDING_REMOTE, PENDING_SSD
from lmpipe.shm.hold import HoldScanner
from lmpipe.shm.session import SessionDir
from lmpipe.stages.base import Context, Peer
from lmpipe.stages.gather.loads import WRITERS, Loads, Waiter, joined, names_of
from lmpipe.stages.gather.lookups import Lookups
from lmpipe.stages.gather.outflow import Name, Outflow
from lmpipe.stages.gather.pages import PageReaders
from lmpipe.stages.gather.parked import Parked
from lmpipe.stages.gather.producers import Producers
from lmpipe.stages.gather.recoding import Coding, Recoder
from lmpipe.stages.gather.saves import Saves
from lmpipe.tiers.dram import DramTier
from lmpipe.topology import Tiers
from lmpipe.wire import VERSION

PENDING = {Tier.SSD: PENDING_SSD, Tier.REMOTE: PENDING_REMOTE}
SWEEP_S = 1.0
LOOK_S = 0.025
"""How often it is looked whether the stages live that somebody's load passes through."""


@dataclass(slots=True)
class _Recall:
    """An Invalidate that went down and is not answered yet."""

    peer: Peer
    ref: int
    removed: int
    seen_s: float = 0.0
    """When the sweep saw it first."""


class Gather:
    """The stage. `below` has an index reader for each tier below DRAM; `leases` is what each engine is lent at most;
    `pages` is where engines put their KV cache, `readers` how it is read, `pinned_bytes` how much of the arena a GPU's
    driver has pinned, `tiers` what the topology says of tiers, `coding` what is to be made of chunks in DRAM.
    """

    name = "gather"

    def __init__(
        self,
        context: Context,
        dram: DramTier,
        below: dict[Tier, IndexReader],
        holds: HoldScanner,
        sessions: SessionDir,
        *,
        pages: Path,
        readers: PageReaders,
        pinned_bytes: Callable[[], int],
        tiers: Tiers,
        coding: Coding,
        chunk_tokens: int,
        leases: int,
        max_producers: int,
        answer_s: float,
    ) -> None:
        self._context, self._dram, self._holds = context, dram, holds
        self._answer_s, self._pinned_bytes = answer_s, pinned_bytes
        self._chunk_tokens = chunk_tokens
        self._bits = sum(PENDING[tier] for tier in below)
        self._producers = Producers(dram, sessions.alive, max_producers, leases, pages, readers, tiers, coding.layouts)
        self._loads = Loads(dram, below, sessions.alive)
        self._lookups = Lookups(dram, below)
        self._outflow = Outflow(dram, self._send_down)
        self._saves = Saves(context, dram, self._producers, self._outflow, holds, self._bits)
        self._recoder = Recoder(context, dram, coding)
        self._parked = Parked(frozenset(WRITERS[tier] for tier in below), context.now_s())
        self._recalls: dict[int, _Recall] = {}
        self._nearest: SessionId | None = None
        self._next_id = 0
        self._next_sweep_s = 0.0
        self._next_look_s = 0.0
        holds.refresh()  # before anything can be evicted: holds of living engines count from the first moment
        found = dram.arena.recover(sessions.alive, holds.held(), self._bits)
        pending = dram.load_rows(found.committed, found.doomed)
        self._producers.adopt(found.leased)
        self._outflow.add(names_of(joined([dram.arena.record(slot).tobytes() for slot in pending])))
        context.count("recovered_chunks", len(found.committed))

    # Messages.

    def handle(self, peer: Peer | None, message: m.Message) -> None:
        """One message from an engine (`peer`) or from the stage below (None)."""
        if peer is not None:
            self._request(peer, message)
            return
        match message:  # from below only: an engine that says so is refused
            case m.Persisted() if message.tier in PENDING:
                self._taken(message.tier, message.chunks)
            case m.SaveDropped() if message.tier in PENDING:
                self._refused_below(message)
            case m.Loaded():
                self._loaded(message.chunks)
            case m.LoadFailed():
                self._load_failed(message.reason, message.chunks)
            case m.Invalidated():
                self._recalled(message)
            case m.Evicted():
                self._tell_evicted(message.tier, message.chunks)
            case _:
                self._context.count("unexpected_messages")

    def _request(self, peer: Peer, message: m.Message) -> None:
        match message:
            case m.Register():
                self._register(peer, message)
            case m.Save():
                self._saves.save(peer, message)
            case m.Load():
                self._load(
                    Waiter(peer, SessionId(message.session), message.load_id, message.deadline_ns), message.chunks
                )
            case m.Lookup():
                self._context.count("lookups")
                self._context.reply(peer, self._lookups.answer(self._session, message))
            case m.Prefetch():
                self._load(Waiter(None, SessionId(message.session), 0, 0), message.chunks)
            case m.Cancel():
                self._loads.cancel(message.session, message.load_id)
            case m.Touch():
                self._dram.touch(index_keys(message.chunks))
            case m.Pin():
                until_s = self._context.now_s() + message.ttl_s if message.pin else 0.0
                count = self._dram.pin(index_keys(message.chunks), until_s)
                self._context.reply(peer, m.Pinned(self._session, message.ref, count))
            case m.Invalidate():
                self._invalidate(peer, message)
            case m.Recode():
                self._recoder.order(peer, message)
            case m.Release():
                self._saves.released(message)
            case _:
                reason = "gather does not serve this"
                self._context.reply(peer, m.Refused(self._session, type(message).__name__, m.id_of(message), reason))

    @property
    def _session(self) -> SessionId:
        return self._context.session.id

    def _register(self, peer: Peer, message: m.Register) -> None:
        if VERSION not in message.versions:
            reason = (
                f"this node speaks version {VERSION}, the engine {message.versions}: use the same lmpipe on both sides"
            )
            self._context.reply(peer, m.Refused(self._session, "Register", 0, reason))
            return
        self._holds.refresh()  # mapped before the first hold can be taken
        try:
            engine = self._producers.register(message, peer)
        except ProtocolViolation:
            raise
        except LmpipeError as error:
            self._context.reply(peer, m.Refused(self._session, "Register", 0, str(error)))
            return
        self._saves.commit(self._producers.written(engine), engine)
        self._producers.top_up(engine)
        places = np.array([slot.place for slot in self._producers.unused(engine)], np.uint64)
        self._context.reply(
            peer, m.Registered(self._session, VERSION, message.chunk_tokens, engine.chunk_bytes, places)
        )

    # What the tiers below say.

    def _send_down(self, records: ChunkRecords) -> bool:
        self._next_id += 1
        return bool(self._context.chain) and self._context.down(
            "save", m.Save(self._session, self._next_id, "arena", records)
        )

    def _taken(self, tier: Tier, chunks: ChunkRecords) -> None:
        self._context.count(f"persisted_{tier}_chunks", len(chunks))
        for saver, part in self._answered(tier, chunks).items():
            engine = self._producers.get(saver)
            if engine is not None:
                self._context.reply(engine.peer, m.Persisted(self._session, tier, part))

    def _refused_below(self, message: m.SaveDropped) -> None:
        self._context.count(f"refused_{message.tier}_chunks", len(message.chunks))
        for saver, part in self._answered(message.tier, message.chunks, again=message.again).items():
            engine = self._producers.get(saver)
            if engine is not None:
                self._context.reply(engine.peer, m.SaveDropped(self._session, 0, message.tier, message.reason, part))

    def _answered(self, tier: Tier, chunks: ChunkRecords, *, again: bool = False) -> dict[SessionId, ChunkRecords]:
        by_saver: dict[SessionId, list[int]] = defaultdict(list)
        for at, (name, place) in enumerate(zip(names_of(chunks), chunks["place"].tolist(), strict=True)):
            saver = self._outflow.answered(name, place, PENDING[tier], again=again)
            if saver:
                by_saver[saver].append(at)
        failpoints.hit("gather.outflow.answered")
        self._outflow.pump()
        return {saver: chunks[places] for saver, places in by_saver.items()}

    # Loads.

    def _load(self, waiter: Waiter, chunks: ChunkRecords) -> None:
        if not self._parked.park(waiter, chunks, self._context.now_s()):
            self._load_now(waiter, chunks)

    def _load_now(self, waiter: Waiter, chunks: ChunkRecords) -> None:
        if waiter.deadline_ns and waiter.deadline_ns <= self._context.now_s() * 1e9:
            self._tell_failed(waiter, "deadline", chunks)  # and nothing is evicted for it
            return
        asked = self._loads.ask(waiter, chunks, self._context.chain)
        if asked.ready:
            self._tell_loaded(waiter, joined(asked.ready))
        for reason, records in asked.failed.items():
            self._tell_failed(waiter, reason, joined(records))
        if asked.down:
            self._next_id += 1
            records = joined(asked.down)
            failpoints.hit("gather.load.reserved")
            message = m.Load(self._session, self._next_id, records, "arena", waiter.deadline_ns)
            if not self._context.down("load", message):
                self._load_failed("the stage below is busy", records)

    def _loaded(self, chunks: ChunkRecords) -> None:
        landed = self._loads.landed(chunks)
        failpoints.hit("gather.load.landed")
        by_bits: dict[int, list[int]] = defaultdict(list)
        for _, flight in landed:
            if flight.unwanted:
                self._dram.arena.free(flight.slot)
            else:  # what came from the remote tier is worth keeping on the SSD as well
                bits = self._bits & PENDING_SSD if flight.tier is Tier.REMOTE else 0
                by_bits[bits].append(flight.slot.index)
        for bits, slots in by_bits.items():
            self._saves.make_visible(slots, bits, SessionId(0))
        answers: dict[int, tuple[Waiter, list[bytes]]] = {}
        for name, _ in landed:
            row = self._dram.row(name[0])
            for waiter, asked in self._loads.settle(name):
                if row is None or name[1] not in row.records:
                    self._tell_failed(waiter, "invalidated on its way", joined([asked]))
                    continue
                answers.setdefault(id(waiter), (waiter, []))[1].append(row.records[name[1]])
        self._context.count("promoted_chunks", len(landed))
        for waiter, records in answers.values():
            self._tell_loaded(waiter, joined(records))

    def _load_failed(self, reason: str, chunks: ChunkRecords) -> None:
        for name, place in zip(names_of(chunks), chunks["place"].tolist(), strict=True):
            self._give_up(name, reason, place)

    def _give_up(self, name: Name, reason: str, place: int | None = None) -> None:
        for waiter, record in self._loads.give_up(name, place):
            self._tell_failed(waiter, reason, joined([record]))

    def _tell_loaded(self, waiter: Waiter, chunks: ChunkRecords) -> None:
        if waiter.peer is not None:
            self._context.reply(waiter.peer, m.Loaded(self._session, waiter.load_id, "arena", chunks))

    def _tell_failed(self, waiter: Waiter, reason: str, chunks: ChunkRecords) -> None:
        self._context.count("load_failed_chunks", len(chunks))
        if waiter.peer is not None:
            self._context.reply(waiter.peer, m.LoadFailed(self._session, waiter.load_id, reason, chunks))

    # Invalidation.

    def _invalidate(self, peer: Peer, message: m.Invalidate) -> None:
        removed = 0
        keys = set(index_keys(message.chunks)) if len(message.chunks) else None
        self._loads.invalidate(keys)
        if Tier.DRAM in message.tiers:
            removed = self._dram.drop(keys if keys is not None else self._dram.keys(message.namespace))
        if not self._context.has_down or set(message.tiers) <= {Tier.DRAM}:
            self._context.reply(peer, m.Invalidated(self._session, message.ref, removed))
            return
        self._next_id += 1
        self._recalls[self._next_id] = _Recall(peer, message.ref, removed)
        self._loads.begin_recall(self._next_id, keys, message.namespace)
        # Behind the saves that went before it: none of them may bring back what is being removed.
        recall = m.Invalidate(self._session, self._next_id, message.namespace, message.tiers, message.chunks)
        if not self._context.chain or not self._context.down("save", recall):
            self._loads.end_recall(self._next_id)
            del self._recalls[self._next_id]
            self._context.reply(
                peer, m.Refused(self._session, "Invalidate", message.ref, "the tiers below take nothing now")
            )

    def _recalled(self, message: m.Invalidated) -> None:
        recall = self._recalls.pop(message.ref, None)
        self._loads.end_recall(message.ref)
        if recall is not None:
            self._context.reply(recall.peer, m.Invalidated(self._session, recall.ref, recall.removed + message.removed))

    # Time, and the stage below.

    def step(self, now_s: float) -> float | None:
        """One bounded piece of work; seconds until the next is due."""
        if now_s >= self._next_sweep_s:
            self._next_sweep_s = now_s + SWEEP_S
            self._sweep()
        if self._loads.waited_for and now_s >= self._next_look_s:
            self._next_look_s = now_s + LOOK_S
            self._end_stranded()
        for waiter in self._loads.expired(int(now_s * 1e9)):
            self._tell_failed(waiter, "deadline", joined(list(waiter.names.values())))
        for waiter, chunks in self._parked.due(now_s):
            self._load_now(waiter, chunks)
        self._outflow.pump()
        self._recoder.add(self._dram.take_cleaned())
        more = self._recoder.step()
        started = self._saves.copy_next()
        evicted = self._dram.take_evicted()
        if len(evicted):
            self._context.count("evicted_chunks", len(evicted))
            self._tell_evicted(Tier.DRAM, evicted)
        if started or more:
            return 0.0
        due_s = [self._next_sweep_s - now_s]
        if self._loads.waited_for:
            due_s.append(self._next_look_s - now_s)
        if (deadline_ns := self._loads.next_deadline_ns()) > 0:
            due_s.append(deadline_ns / 1e9 - now_s)
        if (wait_s := self._parked.wait_s(now_s)) is not None:
            due_s.append(wait_s)
        return min(due_s)

    def _end_stranded(self) -> None:
        """Nobody waits for the dead: what they were to load fails now, the slots that were theirs come back."""
        stranded = self._loads.stranded()
        for waiter, stage, records in stranded:
            self._tell_failed(waiter, f"{stage} died", joined(records))
        if stranded:
            self._bury_flights()

    def _bury_flights(self) -> None:
        for name in self._loads.orphans():
            self._give_up(name, "the stage that read it died")
        taken, complete = self._loads.cut_off()
        for name in taken:
            self._give_up(name, "a stage on its way died")
        if len(complete):
            self._loaded(complete)

    def _ask_again(self) -> None:
        """A message may be lost though all who live go on living."""
        now_s = self._context.now_s()
        self._loads.end_former()
        sent = self._outflow.resend(now_s, self._answer_s)
        again, complete = self._loads.overdue(now_s, self._answer_s)
        if len(complete):
            self._loaded(complete)
        if len(again):
            self._next_id += 1
            self._context.down("load", m.Load(self._session, self._next_id, again, "arena", 0))
        self._context.count("asked_again_chunks", sent + len(again) + len(complete))
        for number, recall in list(self._recalls.items()):
            recall.seen_s = recall.seen_s or now_s
            if now_s - recall.seen_s > self._answer_s:
                del self._recalls[number]
                self._end_recall(number, recall, "no answer from below")

    def _end_recall(self, number: int, recall: _Recall, reason: str) -> None:
        self._loads.end_recall(number)
        self._context.reply(recall.peer, m.Refused(self._session, "Invalidate", recall.ref, reason))

    def _tell_evicted(self, tier: Tier, chunks: ChunkRecords) -> None:
        for engine in self._producers:
            self._context.reply(engine.peer, m.Evicted(self._session, tier, chunks))

    def _sweep(self) -> None:
        """Once a second: what the dead held comes back, doomed slots that are held no more are freed, figures are
        published.
        """
        self._producers.bury()
        for engine in self._producers:
            self._saves.lend(engine)  # it has nothing to send that would ask for leases if it ran out of them
        self._holds.refresh()
        self._bury_flights()
        self._ask_again()
        self._outflow.try_again()
        self._dram.tick()
        self._recoder.retry()
        arena = self._dram.arena
        self._context.gauge("dram_used_bytes", arena.used_bytes)
        self._context.gauge("dram_capacity_bytes", arena.capacity_bytes)
        self._context.gauge("dram_rows", len(self._dram))
        self._context.gauge("dram_encoded_chunks", self._dram.encoded_chunks)
        self._context.gauge("dram_saved_bytes", self._dram.saved_bytes)
        self._context.gauge("unpersisted_rows", self._dram.unpersisted)
        self._context.gauge("producers", len(self._producers))
        self._context.gauge("pinned_bytes", self._pinned_bytes())

    def below_changed(self, chain: dict[str, SessionId]) -> None:
        """The sessions below are others now, or none: what was sent to the old ones is sent again, what they were to
        load fails.
        """
        for session in chain.values():
            self._loads.adopt(self._producers.leases_of(session))
        self._end_stranded()
        self._bury_flights()
        self._parked.heard(chain)
        self._outflow.restart()
        nearest = next(iter(chain.values()), None)
        if nearest == self._nearest:
            return  # who got the recalls is there still, and tells those below it that are new
        self._nearest = nearest
        for number, recall in self._recalls.items():
            self._end_recall(number, recall, "a tier below went away")
        self._recalls.clear()

    def accepts_saves(self) -> bool:
        """False while enough mapped saves wait: the socket holds the rest back."""
        return sum(len(engine.saves) for engine in self._producers) < 4 * max(len(self._producers), 1)

    def busy(self) -> bool:
        """Whether something is still on its way down or being copied."""
        return self._saves.busy or bool(self._context.chain and self._outflow.waiting)

    def close(self) -> None:
        """Let go of the engines' pages."""
        for engine in self._producers:
            engine.close()
