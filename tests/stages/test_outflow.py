"""What waits to go down is bounded by what is in DRAM, however long the tiers below stand still."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from lmpipe.handles import CHUNK, ChunkRecords, SessionId, Tier
from lmpipe.index import IndexWriter
from lmpipe.lifecycle import SlotEvent
from lmpipe.shm.node import NodeWords
from lmpipe.shm.slots import SlotOwner
from lmpipe.stages.gather.loads import joined, names_of
from lmpipe.stages.gather.outflow import GROUP_CHUNKS, LEAST_BACKLOG, WINDOW_CHUNKS, Outflow
from lmpipe.tiers.dram import DramTier

SAVER, OTHER = SessionId(7), SessionId(8)
SLOTS = 32
FLOOD = 4 * LEAST_BACKLOG


class Nobody:
    """Holds nothing."""

    def held(self) -> frozenset[int]:
        return frozenset()


def saved(dram: DramTier, number: int, saver: SessionId = SAVER) -> ChunkRecords:
    """One more chunk in DRAM, which the SSD tier has still to take; the least recent makes room."""
    slot = dram.reserve(4096, saver)
    assert slot is not None
    record = np.zeros(1, CHUNK)[0]
    record["key"], record["shards"] = np.void(number.to_bytes(16, "little")), 1
    record["nbytes"] = record["raw_bytes"] = 4096
    record["place"] = slot.place
    dram.arena.advance(slot, SlotEvent.OPEN)
    dram.arena.set_record(slot.index, record)
    dram.arena.advance(slot, SlotEvent.CLOSE)
    assert dram.commit([slot.index], 1, saver) == [slot.index]
    return joined([dram.arena.record(slot.index).tobytes()])


class Bench:
    """An arena and its index, and an outflow whose messages nobody answers unless a test does."""

    def __init__(self, path: Path) -> None:
        path.chmod(0o700)
        self._node = NodeWords.create(path / "node.shm")
        self._arena = SlotOwner.create(path / "arena.shm", SLOTS * 4096, SLOTS)
        self._index = IndexWriter(path, Tier.DRAM, 1 << 20, self._node)
        self.dram = DramTier(self._arena, self._index, Nobody(), lambda: 0.0)
        self.sent: list[np.void] = []
        self.outflow = Outflow(self.dram, lambda records: self.sent.extend(records.copy()) or True)

    def answer_all(self) -> list[int]:
        """Answer what was sent and is sent then; all numbers that were sent."""
        answered = 0
        while answered < len(self.sent):
            record = self.sent[answered]
            (name,) = names_of(record.reshape(1))
            assert self.outflow.answered(name, int(record["place"]), 1)
            answered += 1
            self.outflow.pump()
        assert self.outflow.waiting == 0
        return [int.from_bytes(record["key"].tobytes(), "little") for record in self.sent]

    def close(self) -> None:
        for part in (self._index, self._arena, self._node):
            part.close()


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    yield made
    made.close()


def test_a_flood_past_tiers_that_stand_still_is_forgotten_with_what_was_evicted(bench: Bench) -> None:
    outflow, longest = bench.outflow, 0
    for number in range(FLOOD):
        outflow.add(names_of(saved(bench.dram, number)))
        outflow.pump()
        longest = max(longest, outflow.waiting)
    assert len(bench.sent) == WINDOW_CHUNKS
    assert longest <= LEAST_BACKLOG + WINDOW_CHUNKS
    numbers = bench.answer_all()
    assert numbers == [*range(WINDOW_CHUNKS), *range(FLOOD - SLOTS, FLOOD)], "what is still there, once, in order"


def test_who_saves_most_does_not_hold_up_the_others(bench: Bench) -> None:
    for number in range(3 * GROUP_CHUNKS):
        bench.outflow.add(names_of(saved(bench.dram, number)))
    for number in (100, 101):
        bench.outflow.add(names_of(saved(bench.dram, number, OTHER)))
    bench.outflow.pump()
    numbers = [*range(GROUP_CHUNKS), 100, 101, *range(GROUP_CHUNKS, 3 * GROUP_CHUNKS)]
    assert [int.from_bytes(record["key"].tobytes(), "little") for record in bench.sent] == numbers
    bench.sent.clear()
    bench.outflow.restart()
    bench.outflow.pump()
    assert sorted(bench.answer_all()) == sorted(numbers), "the stage below is another one: all of it again"


def test_what_a_tier_that_is_down_refused_goes_again_a_few_at_a_time(bench: Bench) -> None:
    for number in range(SLOTS):
        bench.outflow.add(names_of(saved(bench.dram, number)))
    bench.outflow.pump()

    def refuse() -> int:
        sent, bench.sent = bench.sent, []
        for record in sent:
            (name,) = names_of(record.reshape(1))
            assert bench.outflow.answered(name, int(record["place"]), 1, again=True) == SAVER, "told each time"
        bench.outflow.pump()
        return len(sent)

    assert refuse() == SLOTS and bench.outflow.waiting == 0, "nobody has to wait for a tier that is down"
    assert bench.dram.unpersisted == SLOTS
    for _ in range(3):
        bench.outflow.try_again()
        bench.outflow.pump()
        assert refuse() == GROUP_CHUNKS
    saved(bench.dram, SLOTS)  # in the place of what was least recent
    sent: list[list[int]] = []
    while bench.dram.unpersisted > 1:
        bench.outflow.try_again()
        bench.outflow.pump()
        sent.append(bench.answer_all())
        bench.sent.clear()
    assert len(sent) == 3 and len(sent[0]) == GROUP_CHUNKS and sum(map(len, sent)) == SLOTS - 1, "more and more"
    assert {number for numbers in sent for number in numbers} < set(range(SLOTS)), "once each, but for what is gone"
