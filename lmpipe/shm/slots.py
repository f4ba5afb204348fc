"""Slots of a segment: what any process may do with them (`SlotTable`), and what only their owner may (`SlotOwner`).

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

from collections.abc import Callable, Container
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lmpipe.errors import ProtocolViolation, SegmentError
from lmpipe.handles import BLOCK_BYTES, CHUNK, ChunkRecords, SessionId, Slot
from lmpipe.lifecycle import ACTORS, TRANSITIONS, Actor, SlotEvent, SlotState
from lmpipe.native import Headers, Region
from lmpipe.shm.allocator import Ranges, size_class
from lmpipe.shm.descriptor import (
    CHECKSUM_BYTES,
    GENERATION_MASK,
    GENERATION_SHIFT,
    HEADER_BYTES,
    S_CAPACITY,
    S_OFFSET,
    S_OWNER,
    S_PENDING,
    S_RECORD,
    SLOT_HEADER,
    SLOT_HEADER_BYTES,
    STATE_MASK,
    WORD_BYTES,
    SegmentKind,
    payload_offset,
)
from lmpipe.shm.recovery import Recovered, audit_headers
from lmpipe.shm.segment import Progress, Segment, words_of

# A slot's words, counted in words from the first slot's header.
_SLOT_WORDS = SLOT_HEADER_BYTES // WORD_BYTES
_OWNER, _PENDING, _OFFSET, _CAPACITY = (at // WORD_BYTES for at in (S_OWNER, S_PENDING, S_OFFSET, S_CAPACITY))

_STATES = tuple(SlotState)
_NOT_LEGAL = -1
# By event, then by present state: the next state. `lifecycle.TRANSITIONS` in the shape that a hot call wants.
_NEXT = {event: tuple(int(TRANSITIONS.get((state, event), _NOT_LEGAL)) for state in _STATES) for event in SlotEvent}


def default_slots(capacity_bytes: int) -> int:
    """How many slots a memory gets when nobody says: one for each 256 KiB, which is small for a chunk."""
    return min(max(capacity_bytes // (256 << 10), 64), 262_144)


def next_generation(generation: int) -> int:
    """The generation after this one: 32 bits, never 0, so that a hold word is never 0 either."""
    return (generation + 1) & GENERATION_MASK or 1


class SlotTable:
    """The slots as any process sees them: those that write what they were lent, those that read under a hold."""

    def __init__(self, segment: Segment) -> None:
        """
        Raises:
            SegmentError: it is no slot segment, or its header's counts do not fit it.
        """
        if segment.kind is not SegmentKind.SLOTS:
            raise SegmentError(f"{segment.path}: is a segment of kind {segment.kind.name}, wanted is SLOTS")
        self.segment = segment
        self.slots = segment.count
        self.payload_start = payload_offset(self.slots)
        if self.slots < 1 or self.payload_start > segment.nbytes:
            raise SegmentError(f"{segment.path}: {self.slots} slots do not fit in {segment.nbytes} bytes")
        self._words = words_of(segment, HEADER_BYTES, self.slots * _SLOT_WORDS)
        self.headers = Headers(segment.buf, HEADER_BYTES, SLOT_HEADER_BYTES, self.slots)
        """State words, for `native.HoldTable`."""
        table = np.frombuffer(segment.buf, SLOT_HEADER, self.slots, HEADER_BYTES)
        self._records: ChunkRecords = table["record"]
        self._checksums: npt.NDArray[np.void] = table["checksum"]

    @property
    def region(self) -> Region:
        """The whole segment, for native copies: payloads are at `offset(slot)`."""
        return self.segment.region

    @property
    def capacity_bytes(self) -> int:
        """Bytes that all payloads together may have."""
        return (self.segment.nbytes - self.payload_start) // BLOCK_BYTES * BLOCK_BYTES

    def state(self, index: int) -> tuple[int, SlotState]:
        """Generation and state. No such index (from a stranger's message): generation 0, which no slot ever has."""
        if not 0 <= index < self.slots:
            return 0, SlotState.FREE
        word = self._words.load(index * _SLOT_WORDS)
        state = word & STATE_MASK
        if state >= len(_STATES):
            raise ProtocolViolation(f"{self.segment.path}: slot {index} is in state {state}, which does not exist")
        return word >> GENERATION_SHIFT, _STATES[state]

    def advance(self, slot: Slot, event: SlotEvent) -> bool:
        """Fire a writer's event. False: this life of the slot is over, or the event is not legal in its state.

        Raises:
            ProtocolViolation: the event is the owner's.
        """
        if ACTORS[event] is not Actor.WRITER:
            raise ProtocolViolation(f"{event} of a slot is its owner's to fire")
        return self._fire(slot, event)

    def _fire(self, slot: Slot, event: SlotEvent) -> bool:
        if not 0 <= slot.index < self.slots:
            return False
        words, at, steps = self._words, slot.index * _SLOT_WORDS, _NEXT[event]
        while True:  # each turn but the last means that the other side has advanced the slot, and a life has six states
            word = words.load(at)
            state = word & STATE_MASK
            if word >> GENERATION_SHIFT != slot.generation or state >= len(steps) or steps[state] == _NOT_LEGAL:
                return False
            generation = next_generation(slot.generation) if event is SlotEvent.FREE else slot.generation
            if words.cas(at, word, generation << GENERATION_SHIFT | steps[state]):
                return True

    def record(self, index: int) -> np.void:
        """A copy of the slot's chunk record."""
        # Copying a np.void of many fields takes 9 µs, copying its bytes half of one.
        at = HEADER_BYTES + index * SLOT_HEADER_BYTES + S_RECORD
        return np.frombuffer(bytearray(self.segment.buf[at : at + CHUNK.itemsize]), CHUNK)[0]

    def records(self, indices: npt.ArrayLike) -> ChunkRecords:
        """Copies of many slots' chunk records."""
        return self._records[np.asarray(indices, np.intp)]

    def set_record(self, index: int, record: np.void) -> None:
        """Write the chunk record; under a lease, before CLOSE."""
        self._records[index] = record

    def owner(self, index: int) -> SessionId:
        """The session that holds the lease, or held it last."""
        return SessionId(self._words.load(index * _SLOT_WORDS + _OWNER))

    def set_owner(self, index: int, owner: SessionId) -> None:
        """Lend the slot to another session; only its owner process, before anybody has opened it."""
        self._words.store(index * _SLOT_WORDS + _OWNER, owner)

    def pending(self, index: int) -> int:
        """Bits of the tiers that have still to take the chunk."""
        return self._words.load(index * _SLOT_WORDS + _PENDING)

    def set_pending(self, index: int, bits: int) -> None:
        """Say which tiers have still to take the chunk."""
        self._words.store(index * _SLOT_WORDS + _PENDING, bits)

    def clear_pending(self, index: int, bits: int) -> int:
        """Clear bits and return what remains, in one atomic step."""
        return self._words.fetch_and(index * _SLOT_WORDS + _PENDING, ~bits & (1 << 64) - 1) & ~bits

    def checksum(self, index: int) -> bytes:
        """xxh3-128 of the payload; zeros when not known."""
        return self._checksums[index].tobytes()

    def set_checksum(self, index: int, checksum: bytes) -> None:
        """Keep the payload's xxh3-128."""
        self._checksums[index] = np.void(checksum)

    def offset(self, index: int) -> int:
        """Where the payload is, from the segment's start."""
        return self._words.load(index * _SLOT_WORDS + _OFFSET)

    def capacity(self, index: int) -> int:
        """Bytes that the payload may have."""
        return self._words.load(index * _SLOT_WORDS + _CAPACITY)

    def payload(self, index: int, nbytes: int | None = None) -> memoryview:
        """The payload's bytes, without a copy: all that it may have, or the first `nbytes`.

        Raises:
            ProtocolViolation: more than the slot may have, or its header points outside of the segment.
        """
        offset, capacity = self.offset(index), self.capacity(index)
        if nbytes is None:
            nbytes = capacity
        end = offset + nbytes
        if not 0 <= nbytes <= capacity or offset < self.payload_start or end > self.segment.nbytes:
            raise ProtocolViolation(
                f"{self.segment.path}: slot {index} has no {nbytes} bytes, but {capacity} at {offset}"
            )
        return self.segment.buf[offset:end]

    def close(self) -> None:
        """Unmap; the table is of no use after."""
        if hasattr(self, "_words"):
            del self._words, self.headers, self._records, self._checksums
        self.segment.close()


class SlotOwner(SlotTable):
    """The slots as the one process sees them that gives them out: gather for the arena, a stage for its ring."""

    def __init__(self, segment: Segment) -> None:
        """A segment that has slots in use needs `recover` before the first lease."""
        super().__init__(segment)
        # Fresh memory is zero, and generation 0 is nobody's.
        words = self._header_words()
        for index in np.flatnonzero(words >> GENERATION_SHIFT == 0).tolist():
            self._words.store(index * _SLOT_WORDS, int(words[index]) & STATE_MASK | 1 << GENERATION_SHIFT)
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
        return self._words.snapshot()[::_SLOT_WORDS]

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
        words, at = self._words, index * _SLOT_WORDS
        self._taken[index] = (offset, size)
        words.store(at + _OFFSET, offset)
        words.store(at + _CAPACITY, size)
        words.store(at + _OWNER, owner)
        words.store(at + _PENDING, 0)
        # The last life's record under this life's generation would be another chunk's key on these bytes.
        self._records[index] = _NO_RECORD if record is None else record
        self._checksums[index] = _NO_CHECKSUM
        slot = Slot(index, words.load(at) >> GENERATION_SHIFT)
        if not self._fire(slot, SlotEvent.LEASE):
            raise ProtocolViolation(f"{self.segment.path}: slot {index} was free and is {self.state(index)[1].name}")
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
        """End this life of the slot and take its range back. False: it has ended before, or is COMMITTED and has to
        be doomed first.

        The range is taken from this process's memory, not from the header, which every writer can reach.
        """
        if not self._fire(slot, SlotEvent.FREE):
            return False
        self._ranges.give(*self._taken.pop(slot.index))
        self._spare.append(slot.index)
        return True

    def window(self, nbytes: int, limit: int = 1024) -> list[list[int]]:
        """Groups of committed slots, each of which leaves room for `nbytes` when all of it is freed; for memory in
        pieces.

        A group is neighbours in order of address together with the free ranges between and beside them, and none is
        larger than it need be. Groups may overlap. No more than `limit` are returned, spread evenly over the memory.
        """
        taken = sorted((offset, size, index) for index, (offset, size) in self._taken.items())
        if not taken:
            return []
        offsets, sizes, order = np.array(taken, np.int64).T
        end = self.payload_start + self.capacity_bytes
        # Freeing slots i..j leaves the range from the end of slot i-1 to the start of slot j+1.
        lows = np.concatenate(([self.payload_start], (offsets + sizes)[:-1]))
        highs = np.concatenate((offsets[1:], [end]))
        first = np.arange(len(order))
        last = np.searchsorted(highs, lows + size_class(nbytes))
        states = self._header_words()[order] & STATE_MASK
        busy = np.concatenate(([0], np.cumsum(states != SlotState.COMMITTED)))
        ok = (last < len(order)) & (last >= first)
        ok[ok] &= busy[last[ok] + 1] == busy[first[ok]]
        # Of groups with the same end only the one that starts last is needed.
        ok[:-1] &= last[:-1] != last[1:]
        chosen = np.flatnonzero(ok)
        chosen = chosen[:: max(1, -(-len(chosen) // limit))]
        return [order[a : b + 1].tolist() for a, b in zip(chosen.tolist(), last[chosen].tolist(), strict=True)]

    def recover(self, alive: Callable[[SessionId], bool], held: Container[int] = frozenset()) -> Recovered:
        """Make the allocator from the headers, after a restart; dying in here and starting again does no harm.

        `alive`: whether a session still lives. `held`: places (`Slot.place`) that some reader holds.
        """
        headers = np.frombuffer(self.segment.buf, SLOT_HEADER, self.slots, HEADER_BYTES)
        audit = audit_headers(self._header_words(), headers, self.payload_start, self.capacity_bytes)
        found = Recovered(damaged=len(audit.damaged))
        for index, generation in audit.damaged.items():
            # A store, not an event: no event leads out of a state that does not exist.
            word = next_generation(generation) << GENERATION_SHIFT | SlotState.FREE
            self._words.store(index * _SLOT_WORDS, word)

        @cache
        def living(owner: SessionId) -> bool:
            return owner != 0 and alive(owner)

        kept: dict[int, tuple[int, int]] = {}
        for index, span in audit.spans.items():
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


_NO_RECORD = np.zeros(1, CHUNK)[0]
_NO_CHECKSUM = np.void(bytes(CHECKSUM_BYTES))
