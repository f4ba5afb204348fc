"""The slots of a segment as any process sees them: states and events, records, payloads. Knows no allocation
(slots.py) and no policy.

The calls may come from any thread. What another process may change meanwhile is read and written as whole words; the
record and the payload are ordinary memory, to be touched only under a lease, or read under a hold.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lmpipe.errors import ProtocolViolation, SegmentError
from lmpipe.handles import BLOCK_BYTES, CHUNK, ChunkRecords, SessionId, Slot
from lmpipe.lifecycle import ACTORS, TRANSITIONS, Actor, SlotEvent, SlotState
from lmpipe.native import Headers, Region
from lmpipe.shm.descriptor import (
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
from lmpipe.shm.segment import Segment, words_of

SLOT_WORDS = SLOT_HEADER_BYTES // WORD_BYTES
_OWNER, _PENDING, _OFFSET, _CAPACITY = (at // WORD_BYTES for at in (S_OWNER, S_PENDING, S_OFFSET, S_CAPACITY))

_STATES = tuple(SlotState)
_NOT_LEGAL = -1
# By event, then by present state: the next state. `lifecycle.TRANSITIONS` in the shape that a hot call wants.
_NEXT = {event: tuple(int(TRANSITIONS.get((state, event), _NOT_LEGAL)) for state in _STATES) for event in SlotEvent}


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
        self._words = words_of(segment, HEADER_BYTES, self.slots * SLOT_WORDS)
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
        word = self._words.load(index * SLOT_WORDS)
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

    def _fire(self, slot: Slot, event: SlotEvent, only: SlotState | None = None) -> bool:
        if not 0 <= slot.index < self.slots:
            return False
        words, at, steps = self._words, slot.index * SLOT_WORDS, _NEXT[event]
        while True:  # each turn but the last means that the other side has advanced the slot, and a life has six states
            word = words.load(at)
            state = word & STATE_MASK
            if word >> GENERATION_SHIFT != slot.generation or state >= len(steps) or steps[state] == _NOT_LEGAL:
                return False
            if only is not None and state != only:
                return False
            generation = next_generation(slot.generation) if event is SlotEvent.FREE else slot.generation
            if words.cas(at, word, generation << GENERATION_SHIFT | steps[state]):
                return True

    def record(self, index: int) -> np.void:
        """A copy of the slot's chunk record."""
        # Copying a np.void of many fields takes 9 µs, copying its bytes half of one.
        if not 0 <= index < self.slots:
            raise ProtocolViolation(f"{self.segment.path}: slot {index} of {self.slots}")
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
        return SessionId(self._words.load(index * SLOT_WORDS + _OWNER))

    def set_owner(self, index: int, owner: SessionId) -> None:
        """Lend the slot to another session; only its owner process, before anybody has opened it."""
        self._words.store(index * SLOT_WORDS + _OWNER, owner)

    def pending(self, index: int) -> int:
        """Bits of the tiers that have still to take the chunk."""
        return self._words.load(index * SLOT_WORDS + _PENDING)

    def set_pending(self, index: int, bits: int) -> None:
        """Say which tiers have still to take the chunk."""
        self._words.store(index * SLOT_WORDS + _PENDING, bits)

    def clear_pending(self, index: int, bits: int) -> int:
        """Clear bits and return what remains, in one atomic step."""
        return self._words.fetch_and(index * SLOT_WORDS + _PENDING, ~bits & (1 << 64) - 1) & ~bits

    def checksum(self, index: int) -> bytes:
        """xxh3-128 of the payload; zeros when not known."""
        return self._checksums[index].tobytes()

    def set_checksum(self, index: int, checksum: bytes) -> None:
        """Keep the payload's xxh3-128."""
        self._checksums[index] = np.void(checksum)

    def offset(self, index: int) -> int:
        """Where the payload is, from the segment's start."""
        return self._words.load(index * SLOT_WORDS + _OFFSET)

    def capacity(self, index: int) -> int:
        """Bytes that the payload may have."""
        return self._words.load(index * SLOT_WORDS + _CAPACITY)

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
        if not self.segment.closed:
            del self._words, self.headers, self._records, self._checksums  # they keep the mapping
            self.segment.close()
