"""Chunks whose payload follows from their key, so that a wrong byte shows. For tests and the processes they start."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from lmpipe.handles import CHUNK, SessionId, Slot
from lmpipe.lifecycle import SlotEvent
from lmpipe.shm.slots import SlotOwner, SlotTable

NOBODY = SessionId(1)


def record(key: bytes, nbytes: int) -> np.void:
    """A chunk record."""
    made = np.zeros(1, CHUNK)[0]
    made["key"], made["nbytes"], made["raw_bytes"] = np.void(key), nbytes, nbytes
    return made


def fill(table: SlotTable, slot: Slot, key: bytes, nbytes: int, *, close: bool = True) -> None:
    """What a writer does with its lease; `nbytes` is a multiple of 16."""
    assert table.advance(slot, SlotEvent.OPEN)
    table.payload(slot.index, nbytes)[:] = key * (nbytes // 16)
    table.set_record(slot.index, record(key, nbytes))
    if close:
        assert table.advance(slot, SlotEvent.CLOSE)


def commit(owner: SlotOwner, key: bytes, nbytes: int, session: SessionId = NOBODY) -> Slot | None:
    """Lease, fill and commit."""
    slot = owner.lease(nbytes, session)
    if slot is not None:
        fill(owner, slot, key, nbytes)
        assert owner.advance(slot, SlotEvent.COMMIT)
    return slot


def intact(table: SlotTable, index: int) -> bool:
    """Whether the payload is what the record's key says."""
    found = table.record(index)
    nbytes = int(found["nbytes"])
    return bytes(table.payload(index, nbytes)) == found["key"].tobytes() * (nbytes // 16)


def no_overlap(owner: SlotOwner, indices: list[int]) -> bool:
    """Whether the slots' ranges are apart."""
    spans = sorted((owner.offset(i), owner.capacity(i)) for i in indices)
    return all(a + size <= b for (a, size), (b, _) in pairwise(spans))
