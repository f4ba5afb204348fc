"""The slots of a segment as the one process sees them that gives them out: leases, frees, recovery.

The segment is all that survives SIGKILL, so the order of stores is the recovery protocol (descriptor.py):

    lease   offset, capacity, owner, pending, record, checksum, then the state word FREE -> LEASED
    free    the state word -> FREE with the next generation, and nothing after it

A process that is killed has executed a prefix of its program; every store in that prefix becomes visible, and the
atomic state word keeps compiler and hardware from moving the others across it. So a header that is in use always has
its range, and a range is never given out before the header that had it reads FREE: two slots in use never overlap,
whenever the owner dies.

CLOSE is the writer's word that bytes and record are complete and may be kept: recovery commits what it finds READY.
Whoever copies pages that may be revoked meanwhile checks the grant *before* it closes the slot.

Knows no tiers, no policy and no messages. A `SlotOwner` has one thread; the calls of `SlotTable` may come from any.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Container
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lmpipe import failpoints
from lmpipe.errors import ProtocolViolation
from lmpipe.handles import CHUNK, SessionId, Slot
from lmpipe.lifecycle import SlotEvent, SlotState
from lmpipe.shm.allocator import Ranges, size_class
from lmpipe.shm.descriptor import (
    CHECKSUM_BYTES,
    GENERATION_SHIFT,
    HEADER_BYTES,
    S_OWNER,
    SLOT_HEADER,
    SLOT_HEADER_BYTES,
    STATE_MASK,
    SegmentKind,
    payload_offset,
)
from lmpipe.shm.recovery import Recovered, audit_headers
from lmpipe.shm.segment import Progress, Segment
from lmpipe.shm.table import SLOT_WORDS, SlotTable, next_generation

__all__ = ["SlotOwner", "SlotTable", "default_slots"]

# All of a slot's header but the state word, as a lease writes it.
_LEASED = struct.Struct(f"<QQQQ{CHUNK.itemsize}s{CHECKSUM_BYTES}s")
assert S_OWNER + _LEASED.size == SLOT_HEADER_BYTES
_NO_RECORD, _NO_CHECKSUM = bytes(CHUNK.itemsize), bytes(CHECKSUM_BYTES)


def default_slots(capacity_bytes: int) -> int:
    """How many slots a memory gets when nobody says: one for each 256 KiB, which is small for a chunk."""
    return min(max(capacity_bytes // (256 << 10), 64), 262_144)


class SlotOwner(SlotTable):
    """The slots as the one process sees them that gives them out: gather for the arena, a stage for its ring."""

    def __init__(self, segment: Segment) -> None:
        """A segment that has slots in use needs `recover` before the first lease."""
        super().__init__(segment)
        # Fresh memory is zero, and generation 0 is nobody's.
        words = self._header_words()
        for index in np.flatnonzero(words == 0).tolist():
            self._words.store(index * SLOT_WORDS, 1 << GENERATION_SHIFT | SlotState.FREE)
        self._needs_recovery = bool(np.any(words & STATE_MASK))
        self._taken: dict[int, tuple[int, int]] = {}
        self._adopt({})

    @classmethod
    def create(
        cls,
        path: Path,
        capacity_bytes: int,
        slots: int | None = None,
        *,
        progress: Progress | None = None,
        prefault: bool = True,
    ) -> SlotOwner:
        """Make a segment whose payloads may have `capacity_bytes` together.

        Raises:
            SegmentError: as `Segment.create`.
        """
        count = default_slots(capacity_bytes) if slots is None else slots
        nbytes = payload_offset(count) + capacity_bytes
        return cls(Segment.create(path, SegmentKind.SLOTS, nbytes, count=count, progress=progress, prefault=prefault))

    def _header_words(self) -> npt.NDArray[np.uint64]:
        return self._words.snapshot()[::SLOT_WORDS]

    def _adopt(self, taken: dict[int, tuple[int, int]]) -> None:
        """Make the allocator agree with the slots in use."""
        self._taken = taken
        self._ranges = Ranges.around(self.payload_start, self.capacity_bytes, taken.values())
        # The lowest index is given out first, so that headers in use stay together.
        self._spare = [index for index in range(self.slots - 1, -1, -1) if index not in taken]

    @property
    def free_bytes(self) -> int:
        """Bytes that no slot has; they need not be in one piece."""
        return self._ranges.free_bytes

    @property
    def used_bytes(self) -> int:
        """Bytes that slots have, rounded up to size classes."""
        return self.capacity_bytes - self._ranges.free_bytes

    @property
    def largest_free(self) -> int:
        """The longest free range."""
        return self._ranges.largest

    @property
    def slots_free(self) -> int:
        """Headers not in use."""
        return len(self._spare)

    def lease(self, nbytes: int, owner: SessionId, record: np.void | None = None) -> Slot | None:
        """Give `owner` the right to write a slot of at least `nbytes`. None: full, or too much in pieces.

        Raises:
            ProtocolViolation: the segment has not been recovered, or a writer has touched a free slot.
        """
        if self._needs_recovery:
            raise ProtocolViolation(f"{self.segment.path}: has slots in use; recover() comes before the first lease")
        if nbytes < 1:
            raise ProtocolViolation(f"a lease of {nbytes} bytes")
        if not self._spare:
            return None
        size = size_class(nbytes)
        offset = self._ranges.take(size)
        if offset is None:
            return None
        index = self._spare.pop()
        self._taken[index] = (offset, size)
        # The last life's record under this life's generation would be another chunk's key on these bytes.
        content = _NO_RECORD if record is None else record.tobytes()
        at = HEADER_BYTES + index * SLOT_HEADER_BYTES + S_OWNER
        _LEASED.pack_into(self.segment.buf, at, owner, 0, offset, size, content, _NO_CHECKSUM)
        failpoints.hit("slots.lease.written")
        slot = Slot(index, self._words.load(index * SLOT_WORDS) >> GENERATION_SHIFT)
        if not self._fire(slot, SlotEvent.LEASE):
            raise ProtocolViolation(f"{self.segment.path}: slot {index} was free and is {self.state(index)[1].name}")
        failpoints.hit("slots.lease.leased")
        return slot

    def advance(self, slot: Slot, event: SlotEvent) -> bool:
        """Fire any event. False: this life of the slot is over, or the event is not legal in its state.

        Raises:
            ProtocolViolation: the event is LEASE, which needs a range: `lease` does it.
        """
        if event is SlotEvent.LEASE:
            raise ProtocolViolation("lease() leases")
        return self.free(slot) if event is SlotEvent.FREE else self._fire(slot, event)

    def free(self, slot: Slot) -> bool:
        """End this life of the slot and take its range back. False: it has ended before, or has to be doomed first.

        The range is taken from this process's memory, not from the header, which every writer can reach.
        """
        return self._fire(slot, SlotEvent.FREE) and self._take_range(slot)

    def take_back(self, slot: Slot) -> bool:
        """End a lease whose holder has not opened the slot. False: it has, or this life of the slot is over.

        One compare-and-swap decides: either the holder has opened the slot, or it will find the lease gone.
        """
        return self._fire(slot, SlotEvent.FREE, SlotState.LEASED) and self._take_range(slot)

    def _take_range(self, slot: Slot) -> bool:
        failpoints.hit("slots.free.freed")
        self._ranges.give(*self._taken.pop(slot.index))
        self._spare.append(slot.index)
        return True

    def window(self, nbytes: int, limit: int = 1024) -> list[list[int]]:
        """Groups of committed slots, each of which leaves room for `nbytes` when all of it is freed.

        For memory in pieces: when there is room as it is, there are none. A group is neighbours in order of address
        together with the free ranges between and beside them, and none is larger than it need be. Groups may overlap.
        No more than `limit` are returned, spread evenly over the memory.
        """
        size = size_class(nbytes)
        if self.largest_free >= size:
            return []
        taken = sorted((offset, size, index) for index, (offset, size) in self._taken.items())
        if not taken:
            return []
        offsets, sizes, order = np.array(taken, np.int64).T
        end = self.payload_start + self.capacity_bytes
        # Freeing slots i..j leaves the range from the end of slot i-1 to the start of slot j+1.
        lows = np.concatenate(([self.payload_start], (offsets + sizes)[:-1]))
        highs = np.concatenate((offsets[1:], [end]))
        first = np.arange(len(order))
        last = np.searchsorted(highs, lows + size)
        states = self._header_words()[order] & STATE_MASK
        busy = np.concatenate(([0], np.cumsum(states != SlotState.COMMITTED)))
        ok = (last < len(order)) & (last >= first)
        ok[ok] &= busy[last[ok] + 1] == busy[first[ok]]
        # Of groups with the same end only the one that starts last is needed.
        ok[:-1] &= last[:-1] != last[1:]
        chosen = np.flatnonzero(ok)
        chosen = chosen[:: max(1, -(-len(chosen) // limit))]
        return [order[a : b + 1].tolist() for a, b in zip(chosen.tolist(), last[chosen].tolist(), strict=True)]

    def recover(
        self, alive: Callable[[SessionId], bool], held: Container[int] = frozenset(), pending: int = 0
    ) -> Recovered:
        """Make the allocator from the headers, after a restart; dying in here and starting again does no harm.

        `alive`: whether a session still lives. `held`: places (`Slot.place`) that some reader holds. `pending`: bits
        for chunks that were READY, which no tier below has heard of.
        """
        headers = np.frombuffer(self.segment.buf, SLOT_HEADER, self.slots, HEADER_BYTES)
        audit = audit_headers(self._header_words(), headers, self.payload_start, self.capacity_bytes)
        found = Recovered(damaged=len(audit.damaged))
        for index, generation in audit.damaged.items():
            # A store, not an event: no event leads out of a state that does not exist.
            word = next_generation(generation) << GENERATION_SHIFT | SlotState.FREE
            self._words.store(index * SLOT_WORDS, word)

        @cache
        def living(owner: SessionId) -> bool:
            return owner != 0 and alive(owner)

        kept: dict[int, tuple[int, int]] = {}
        for index, span in audit.spans.items():
            if self.state(index)[1] is SlotState.READY:
                self.set_pending(index, pending)  # before the commit: no death in between can lose them
                failpoints.hit("slots.recover.pending")
            if self._settle(index, living, held, found):
                kept[index] = span
            else:
                found.freed += 1
        self._adopt(kept)
        self._needs_recovery = False
        return found

    def _settle(self, index: int, alive: Callable[[SessionId], bool], held: Container[int], found: Recovered) -> bool:
        """Decide about one slot that makes sense. False: it was freed."""
        generation, state = self.state(index)
        slot = Slot(index, generation)
        if state is SlotState.COMMITTED or (state is SlotState.READY and self._fire(slot, SlotEvent.COMMIT)):
            found.committed.append(index)
            return True
        if state is SlotState.DOOMED:
            if slot.place in held:
                found.doomed.append(index)
                return True
        elif alive(owner := self.owner(index)):
            # It may be writing at this moment; by its lease it may.
            found.leased.setdefault(owner, []).append(index)
            return True
        self._fire(slot, SlotEvent.FREE)
        return False
