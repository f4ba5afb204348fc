"""What waits to go down is bounded by what is in DRAM, however long the tiers below stand still."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lmpipe.handles import CHUNK, ChunkRecords, SessionId, Tier
from lmpipe.index import IndexWriter
from lmpipe.lifecycle import SlotEvent
from lmpipe.shm.node import NodeWords
from lmpipe.shm.slots import SlotOwner
from lmpipe.stages.gather.loads import joined, names_of
from lmpipe.stages.gather.outflow import LEAST_BACKLOG, WINDOW_CHUNKS, Outflow
from lmpipe.tiers.dram import DramTier

SAVER = SessionId(7)
SLOTS = 32
FLOOD = 4 * LEAST_BACKLOG


class Nobody:
    """Holds nothing."""

    def held(self) -> frozenset[int]:
        return frozenset()


def saved(dram: DramTier, number: int) -> ChunkRecords:
    """One more chunk in DRAM, which the SSD tier has still to take; the least recent makes room."""
    slot = dram.reserve(4096, SAVER)
    assert slot is not None
    record = np.zeros(1, CHUNK)[0]
    record["key"], record["shards"] = np.void(number.to_bytes(16, "little")), 1
    record["nbytes"] = record["raw_bytes"] = 4096
    record["place"] = slot.place
    dram.arena.advance(slot, SlotEvent.OPEN)
    dram.arena.set_record(slot.index, record)
    dram.arena.advance(slot, SlotEvent.CLOSE)
    assert dram.commit([slot.index], 1, SAVER) == [slot.index]
    return joined([dram.arena.record(slot.index).tobytes()])


def test_a_flood_past_tiers_that_stand_still_is_forgotten_with_what_was_evicted(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    node = NodeWords.create(tmp_path / "node.shm")
    arena = SlotOwner.create(tmp_path / "arena.shm", SLOTS * 4096, SLOTS)
    index = IndexWriter(tmp_path, Tier.DRAM, 1 << 20, node)
    dram = DramTier(arena, index, Nobody(), lambda: 0.0)
    sent: list[np.void] = []
    outflow = Outflow(dram, lambda records: sent.extend(records.copy()) or True)
    longest = 0
    for number in range(FLOOD):  # and nobody answers
        outflow.add(names_of(saved(dram, number)))
        outflow.pump()
        longest = max(longest, outflow.waiting)
    assert len(sent) == WINDOW_CHUNKS
    assert longest <= LEAST_BACKLOG + WINDOW_CHUNKS
    answered = 0
    while answered < len(sent):
        record = sent[answered]
        (name,) = names_of(record.reshape(1))
        assert outflow.answered(name, int(record["place"]), 1) == SAVER
        answered += 1
        outflow.pump()
    numbers = [int.from_bytes(record["key"].tobytes(), "little") for record in sent]
    assert numbers == [*range(WINDOW_CHUNKS), *range(FLOOD - SLOTS, FLOOD)], "what is still there, once, in order"
    assert outflow.waiting == 0
    for part in (index, arena, node):
        part.close()
