"""Where a loaded chunk goes: into the arena slot that gather leased for it, or, still encoded, into the stage's own
ring.

Knows slots and the rule of who may write them. Knows no tier and no message.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from lmpipe.handles import Codec, SessionId, Slot
from lmpipe.lifecycle import SlotEvent
from lmpipe.shm.table import SlotTable
from lmpipe.stages.transit import Ring


def open_arena(arena: SlotTable, record: np.void, session: SessionId) -> memoryview | None:
    """The payload of the arena slot a record names, open for writing. None: it is not this session's to write now."""
    slot = Slot.from_place(int(record["place"]))
    nbytes = int(record["raw_bytes"])
    if not is_leased(arena, record, session) or arena.capacity(slot.index) < nbytes:
        return None
    return arena.payload(slot.index) if arena.advance(slot, SlotEvent.OPEN) else None


def is_leased(arena: SlotTable, record: np.void, session: SessionId) -> bool:
    """Whether the arena slot a record names is in that life, and this session's to write."""
    slot = Slot.from_place(int(record["place"]))
    return arena.state(slot.index)[0] == slot.generation and arena.owner(slot.index) == session


def close_arena(arena: SlotTable, record: np.void) -> np.void | None:
    """Declare the slot written: the record as it lies there, raw. None: its life is over."""
    slot = Slot.from_place(int(record["place"]))
    there = record.copy()
    there["codec"], there["nbytes"] = Codec.RAW, record["raw_bytes"]
    if arena.state(slot.index)[0] != slot.generation:
        return None
    arena.set_record(slot.index, there)
    return there if arena.advance(slot, SlotEvent.CLOSE) else None


@dataclass(slots=True)
class Landing:
    """One chunk's destination, open for writing."""

    record: np.void
    """As it was asked for: `place` is the arena slot."""
    into: memoryview
    slot: Slot | None
    """In the own ring; None: the arena."""


class Landings:
    """Destinations of one stage that reads from a tier. `ring`, called `segment`: None where nothing is encoded."""

    def __init__(
        self,
        arena: SlotTable,
        ring: Ring | None,
        segment: str,
        session: SessionId,
        alive: Callable[[SessionId], bool],
        lend_s: float,
    ) -> None:
        """`lend_s`: how long a ring slot is lent at most: then its reader, or the reader's last word, was lost."""
        self._arena, self._ring, self.segment, self._session = arena, ring, segment, session
        self._alive, self._lend_s = alive, lend_s
        self._lent: dict[int, tuple[SessionId, float]] = {}
        self._writing: set[int] = set()

    @property
    def used_bytes(self) -> int:
        """Bytes of the ring in use."""
        return 0 if self._ring is None else self._ring.slots.used_bytes

    @property
    def capacity_bytes(self) -> int:
        """Bytes of the ring."""
        return 0 if self._ring is None else self._ring.slots.capacity_bytes

    def may_write(self, record: np.void) -> bool:
        """Whether this stage is the one to fill the slot: an encoded chunk goes through any stage's ring."""
        return int(record["codec"]) != Codec.RAW or is_leased(self._arena, record, self._session)

    def is_writing(self, record: np.void) -> bool:
        """Whether the arena slot is being filled at this moment: then who asks again need not be answered twice, and
        must not hear that it cannot be written, for then it would be taken back.
        """
        return int(record["place"]) in self._writing

    def open(self, record: np.void) -> Landing | str | None:
        """A destination; None: the ring is full, later; a text: there will be none, and why."""
        if int(record["codec"]) == Codec.RAW:
            into = open_arena(self._arena, record, self._session)
            if into is None:
                return "stale"
            self._writing.add(int(record["place"]))
            return Landing(record, into, None)
        if self._ring is None:
            return "no ring for encoded chunks"
        if int(record["nbytes"]) > self._ring.slots.capacity_bytes:
            return "larger than the ring"
        found = self._ring.open(int(record["nbytes"]))
        return None if found is None else Landing(record, found[1], found[0])

    def close(self, landing: Landing, reader: SessionId) -> tuple[str, np.void] | None:
        """The chunk is complete: the segment and the record to announce. None: the arena slot's life is over."""
        if landing.slot is None or self._ring is None:
            self._writing.discard(int(landing.record["place"]))
            there = close_arena(self._arena, landing.record)
            return None if there is None else ("arena", there)
        record = landing.record.copy()
        self._ring.publish(landing.slot, record)
        self._lent[landing.slot.place] = reader, time.monotonic()
        return self.segment, record

    def fail(self, landing: Landing) -> None:
        """Nothing was read. An arena slot stays as it is: gather takes it back when it hears that the load failed."""
        self._writing.discard(int(landing.record["place"]))
        if landing.slot is not None and self._ring is not None:
            self._ring.free(landing.slot)

    def released(self, places: list[int]) -> None:
        """The reader is done with these slots."""
        for place in places:
            if self._lent.pop(place, None) is not None and self._ring is not None:
                self._ring.free(Slot.from_place(place))

    def tick(self) -> None:
        """Take back what was lent to the dead, or so long ago that nobody comes for it any more."""
        if self._ring is None:
            return
        living = {session: self._alive(session) for session in {session for session, _ in self._lent.values()}}
        before_s = time.monotonic() - self._lend_s
        for place, (session, lent_s) in list(self._lent.items()):
            if not living[session] or lent_s < before_s:
                del self._lent[place]
                self._ring.retire(Slot.from_place(place))
        self._ring.tick()
