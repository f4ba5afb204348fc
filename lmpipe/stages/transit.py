"""Slots in transit: what a stage puts into its ring for its neighbours, and what it reads out of the arena or theirs.

A reader holds what it reads, as everybody does; so neither a stopped reader nor a restarted owner can make one chunk's
bytes pass for another's. The owner takes a slot back when its readers have answered; when they may be dead or stopped,
it dooms the slot and waits until no living session holds it. Hold words do not say which segment they mean: a hold on a
slot of the same number elsewhere delays that, no more.

Knows no tier, no codec and no message.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from lmpipe import failpoints
from lmpipe.handles import ChunkRecords, SessionId, Slot
from lmpipe.lifecycle import SlotEvent
from lmpipe.shm.hold import Holds, HoldScanner, HoldSet
from lmpipe.shm.session import SessionDir
from lmpipe.shm.slots import SlotOwner
from lmpipe.shm.table import SlotTable


class Ring:
    """The slots that this stage lends to its neighbours."""

    def __init__(self, slots: SlotOwner, session: SessionId, scanner: HoldScanner, sessions: SessionDir) -> None:
        self.slots = slots
        self._session, self._scanner = session, scanner
        scanner.refresh()
        found = slots.recover(sessions.alive, scanner.held())
        self._doomed: list[Slot] = [Slot(index, slots.state(index)[0]) for index in found.doomed]
        for index in found.committed:  # of a former life; somebody may read them still
            self.retire(Slot(index, slots.state(index)[0]))

    def open(self, nbytes: int) -> tuple[Slot, memoryview] | None:
        """A slot to write, with its payload. None: full."""
        slot = self.slots.lease(nbytes, self._session)
        if slot is None and self._doomed:
            self.tick()
            slot = self.slots.lease(nbytes, self._session)
        if slot is None:
            return None
        self.slots.advance(slot, SlotEvent.OPEN)
        return slot, self.slots.payload(slot.index)

    def publish(self, slot: Slot, record: np.void) -> None:
        """Let others read an open slot; `record` gets its place."""
        record["place"] = slot.place
        self.slots.set_record(slot.index, record)
        self.slots.advance(slot, SlotEvent.CLOSE)
        failpoints.hit("ring.publish.closed")
        self.slots.advance(slot, SlotEvent.COMMIT)

    def free(self, slot: Slot) -> None:
        """Take back a slot that nobody reads. Harmless when it is free already."""
        self.slots.advance(slot, SlotEvent.DOOM)
        self.slots.free(slot)

    def retire(self, slot: Slot) -> None:
        """Take back a slot that somebody may be reading, as soon as nobody is."""
        if self.slots.advance(slot, SlotEvent.DOOM):
            self._doomed.append(slot)

    def tick(self) -> None:
        """Free retired slots that nobody holds."""
        if self._doomed:
            self._scanner.refresh()
            held = self._scanner.held()
            still = [slot for slot in self._doomed if slot.place in held]
            for slot in self._doomed:
                if slot.place not in held:
                    self.slots.free(slot)
            self._doomed = still


@dataclass(slots=True)
class Reading:
    """Chunks that are held. `live` are those of `records` that were there, `payloads` their bytes."""

    records: ChunkRecords
    stale: ChunkRecords
    payloads: list[memoryview]
    sets: list[HoldSet] = field(default_factory=list[HoldSet])

    @property
    def lost(self) -> bool:
        """A hold was lost while it was needed: what was read may be anything."""
        return any(held.lost for held in self.sets)

    def release(self) -> None:
        """The bytes are no longer needed."""
        for held in self.sets:
            held.release()


class Sources:
    """The segments that messages name, for reading: "arena", "ring.compress", …"""

    def __init__(self, tables: Mapping[str, SlotTable], holds: Holds) -> None:
        self._tables, self._holds = tables, holds

    def take(self, segment: str, records: ChunkRecords, request: int = 0) -> Reading:
        """Hold chunks where their `place` says. Stale are those whose slot has another life or another chunk by now."""
        table = self._tables.get(segment)
        if table is None:
            return Reading(records[:0], records, [])
        slots = (records["place"] >> 32).astype(np.uint32)
        generations = (records["place"] & 0xFFFFFFFF).astype(np.uint32)
        known = slots < table.slots
        reading = Reading(records[:0], records[:0], [])
        live: list[int] = []
        for at in np.flatnonzero(known).tolist():
            held = self._holds.take(table, slots[at : at + 1], generations[at : at + 1], request)
            if not len(held):
                continue
            reading.sets.append(held)
            there, nbytes = table.record(int(slots[at])), int(records["nbytes"][at])
            if _same(there, records[at]) and nbytes <= table.capacity(int(slots[at])):
                live.append(at)
                reading.payloads.append(table.payload(int(slots[at]), nbytes))
        reading.records = records[live]
        reading.stale = np.delete(records, live)
        return reading


def _same(a: np.void, b: np.void) -> bool:
    return all(a[name] == b[name] for name in ("key", "shard", "layout", "codec", "nbytes"))
