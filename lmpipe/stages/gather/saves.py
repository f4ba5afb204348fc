"""Saves: slots that an engine has filled, and pages that gather copies itself under a grant.

Nothing becomes visible that was not written whole by who had the lease, and nothing is copied into the cache from
pages that the engine has taken back meanwhile: the grant is read after the copy and before the slot is closed.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lmpipe import failpoints, native
from lmpipe import messages as m
from lmpipe.handles import ChunkRecords, Codec, SessionId, Slot, Tier
from lmpipe.index_row import index_keys
from lmpipe.lifecycle import SlotEvent, SlotState
from lmpipe.shm.hold import HoldScanner
from lmpipe.stages.base import Context, Peer
from lmpipe.stages.gather.loads import joined, names_of
from lmpipe.stages.gather.outflow import Outflow
from lmpipe.stages.gather.producers import Engine, MappedSave, Producers
from lmpipe.tiers.dram import DramTier


class Saves:
    """The save side of gather. `bits` are the tiers below that are to take what is saved."""

    def __init__(
        self,
        context: Context,
        dram: DramTier,
        producers: Producers,
        outflow: Outflow,
        holds: HoldScanner,
        bits: int,
    ) -> None:
        self._context, self._dram, self._producers, self._outflow = context, dram, producers, outflow
        self._holds, self._bits = holds, bits
        self._copying: set[str] = set()
        """Lanes with a copy under way."""

    @property
    def _session(self) -> SessionId:
        return self._context.session.id

    @property
    def busy(self) -> bool:
        """Whether a copy runs or waits."""
        return bool(self._copying) or any(engine.saves for engine in self._producers)

    def save(self, peer: Peer, message: m.Save) -> None:
        """An engine's Save: commit its slots, or queue its pages."""
        engine = self._producers.get(message.session)
        if engine is None:
            self._context.reply(peer, m.Refused(self._session, "Save", message.save_id, "not registered"))
        elif message.segment == "arena":
            self._save_slots(engine, peer, message)
        elif message.segment == "pages" and engine.reader is not None and _is_whole(engine, message):
            engine.saves.append(MappedSave(message, peer))
        elif message.segment == "pages" and engine.reader is not None:
            reason = f"chunks of {engine.chunk_pages} pages and {engine.chunk_bytes} bytes were agreed"
            self._context.reply(peer, m.Refused(self._session, "Save", message.save_id, reason))
        else:
            self._context.reply(
                peer, m.Refused(self._session, "Save", message.save_id, f"no segment {message.segment!r}")
            )

    def _save_slots(self, engine: Engine, peer: Peer, message: m.Save) -> None:
        slots = [Slot.from_place(place) for place in message.chunks["place"].tolist()]
        keys = message.chunks["key"].tolist()
        fits = np.array([self._is_written(engine, slot, key) for slot, key in zip(slots, keys, strict=True)], np.bool_)
        self.commit([slot.index for slot, fit in zip(slots, fits, strict=True) if fit], engine)
        self._answer_save(peer, message.save_id, message.chunks[fits])
        if not fits.all():
            self._take_back(engine, [slot for slot, fit in zip(slots, fits, strict=True) if not fit])
            self._drop(peer, message.save_id, "stale lease", message.chunks[~fits])
        self.lend(engine)

    def lend(self, engine: Engine) -> None:
        """Give an engine leases up to its share, if there is room."""
        fresh = self._producers.top_up(engine)
        if fresh:
            self._context.reply(
                engine.peer, m.Credit(self._session, np.array([slot.place for slot in fresh], np.uint64))
            )

    def _take_back(self, engine: Engine, slots: list[Slot]) -> None:
        """Leases that were closed, but hold something else than the engine says."""
        for slot in slots:
            closed = self._dram.arena.state(slot.index) == (slot.generation, SlotState.READY)
            if closed and slot.index in engine.leases:
                engine.leases.discard(slot.index)
                self._dram.arena.free(slot)

    def _is_written(self, engine: Engine, slot: Slot, key: bytes) -> bool:
        """The slot header is the truth: lent to this engine, closed, in this life of the slot, for this key, of the
        agreed size.
        """
        arena = self._dram.arena
        if slot.index not in engine.leases or arena.state(slot.index) != (slot.generation, SlotState.READY):
            return False
        record = arena.record(slot.index)
        return (
            record["key"].tobytes() == key and int(record["nbytes"]) == int(record["raw_bytes"]) == engine.chunk_bytes
        )

    def commit(self, slots: list[int], engine: Engine) -> None:
        """Take written slots over from an engine's leases."""
        engine.leases.difference_update(slots)
        self.make_visible(slots, self._bits, engine.session)

    def make_visible(self, slots: list[int], bits: int, saver: SessionId) -> None:
        """Commit written slots, given in prompt order, and send them on to the tiers of `bits`."""
        if not slots:
            return
        done = self._dram.commit(slots, bits, saver)
        failpoints.hit("gather.save.indexed" if saver else "gather.load.committed")
        self._context.count("committed_chunks", len(done))
        self._context.count("known_chunks", len(slots) - len(done))
        if bits:
            self._outflow.add(names_of(joined([self._dram.arena.record(slot).tobytes() for slot in done])))
            self._outflow.pump()

    def _answer_save(self, peer: Peer, save_id: int, chunks: ChunkRecords) -> None:
        """Saved means that a lookup finds it now: say it only of what the tier really has."""
        has = self._has(chunks)
        if has.any():
            self._context.reply(peer, m.Saved(self._session, save_id, chunks[has]))
        if not has.all():
            self._drop(peer, save_id, "the DRAM index is full", chunks[~has])

    def _has(self, chunks: ChunkRecords) -> npt.NDArray[np.bool_]:
        """Which of the chunks the tier has, at least as exact as these, and valid for who saves them."""
        wanted = zip(names_of(chunks), chunks["fidelity"].tolist(), chunks["saved_at"].tolist(), strict=True)
        return np.array([self._dram.has(*name, *least) for name, *least in wanted], np.bool_)

    def _drop(self, peer: Peer, save_id: int, reason: str, chunks: ChunkRecords) -> None:
        self._context.count("dropped_chunks", len(chunks))
        self._context.reply(peer, m.SaveDropped(self._session, save_id, Tier.DRAM, reason, chunks))

    def copy_next(self) -> bool:
        """Start copying the next piece of a mapped save. Returns whether there was one and it could be begun."""
        turn = self._producers.next_save(self._copying)
        if turn is None:
            return False
        engine, reader, save, count = turn
        message = save.message
        part = slice(save.at, save.at + count)
        save.at += count
        if save.at == len(message.chunks):
            engine.saves.popleft()
        chunks, page_ids = message.chunks[part], message.page_ids[part]
        known = self._has(chunks)
        if known.any():
            self._context.count("known_chunks", int(known.sum()))
            self._context.reply(save.peer, m.Saved(self._session, message.save_id, chunks[known]))
        chunks, page_ids = chunks[~known], np.ascontiguousarray(page_ids[~known])
        if not self._granted(engine, message):
            self._drop(save.peer, message.save_id, "revoked", chunks)
            return True
        slots: list[Slot] = []
        for more in range(len(chunks) - 1, -1, -1):
            slot = self._dram.reserve(engine.chunk_bytes, self._session, more)
            if slot is None:
                break
            self._dram.arena.advance(slot, SlotEvent.OPEN)
            slots.append(slot)
        if len(slots) < len(chunks):
            self._drop(save.peer, message.save_id, "no room in DRAM", chunks[len(slots) :])
        if not slots:
            return True
        chunks, page_ids = chunks[: len(slots)], page_ids[: len(slots)]
        arena = self._dram.arena
        offsets = np.array([arena.offset(slot.index) for slot in slots], np.uint64)
        failpoints.hit("gather.save.leased")

        def copy() -> None:
            reader.gather(page_ids, offsets)
            failpoints.hit("gather.save.copied")

        lane = reader.lane
        self._copying.add(lane)
        self._context.submit(
            copy,
            lambda _: self._copied(lane, engine, save, slots, chunks, ""),
            lambda error: self._copied(lane, engine, save, slots, chunks, str(error)),
            "gather.copy",
            urgent=True,  # the engine keeps the pages until then
            nbytes=len(slots) * engine.chunk_bytes,
            chunks=len(slots),
        )
        return True

    def _granted(self, engine: Engine, message: m.Save) -> bool:
        native.fence()  # every byte that was copied was read before the grant is
        return self._holds.granted(engine.session, message.grant) == message.save_id

    def _copied(
        self, lane: str, engine: Engine, save: MappedSave, slots: list[Slot], chunks: ChunkRecords, error: str
    ) -> None:
        self._copying.discard(lane)
        message, arena = save.message, self._dram.arena
        if error or not self._granted(engine, message):
            for slot in slots:
                arena.free(slot)
            self._drop(save.peer, message.save_id, error or "revoked", chunks)
            return
        failpoints.hit("gather.save.granted")
        for slot, record in zip(slots, chunks, strict=True):
            record = record.copy()
            record["place"] = slot.place
            arena.set_record(slot.index, record)
            arena.advance(slot, SlotEvent.CLOSE)
        failpoints.hit("gather.save.closed")
        self.make_visible([slot.index for slot in slots], self._bits, engine.session)
        self._dram.touch(index_keys(message.chunks[: save.at]))  # the head stays more recent than what came after it
        self._answer_save(save.peer, message.save_id, chunks)

    def released(self, message: m.Release) -> None:
        """An engine gives leases back."""
        engine = self._producers.get(message.session)
        if engine is None or message.segment != "arena":
            return
        for slot in (Slot.from_place(place) for place in message.places.tolist()):
            if slot.index in engine.leases and self._dram.arena.state(slot.index)[0] == slot.generation:
                engine.leases.discard(slot.index)
                self._dram.arena.free(slot)
                failpoints.hit("gather.release.freed")


def _is_whole(engine: Engine, message: m.Save) -> bool:
    """Whether the pages named fill the chunks promised: a slot copied in part would be served as a whole one."""
    chunks, size = message.chunks, engine.chunk_bytes
    return message.page_ids.shape[1] == engine.chunk_pages and bool(
        np.all((chunks["nbytes"] == size) & (chunks["raw_bytes"] == size) & (chunks["codec"] == Codec.RAW))
    )
