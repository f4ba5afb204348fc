"""The flights of gather over a real arena and a real index: who waits, and what becomes of it when a stage dies."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from lmpipe.bus import Peer
from lmpipe.handles import CHUNK, ChunkRecords, Codec, SessionId, Slot, Tier
from lmpipe.index import IndexReader, IndexWriter
from lmpipe.index_row import index_keys
from lmpipe.lifecycle import SlotEvent, SlotState
from lmpipe.shm.node import NodeWords
from lmpipe.shm.slots import SlotOwner
from lmpipe.stages.gather.loads import Loads, Waiter, joined, names_of
from lmpipe.stages.gather.parked import GRACE_S, PARK_S, Parked
from lmpipe.tiers.dram import DramTier

COMPRESS, PERSIST, REPLICATE = SessionId(11), SessionId(12), SessionId(13)
CHAIN = {"compress": COMPRESS, "persist": PERSIST, "replicate": REPLICATE}
ENGINE = SessionId(5)
CHUNK_BYTES = 8192
MAP_BYTES = 1 << 20


class Nobody:
    """Holds nothing."""

    def held(self) -> frozenset[int]:
        return frozenset()


class Bench:
    """Flights over 16 slots, and rows of two tiers below; sessions in `dead` have lost their locks."""

    def __init__(self, path: Path) -> None:
        self.node = NodeWords.create(path / "node.shm")
        self.arena = SlotOwner.create(path / "arena.shm", 16 * CHUNK_BYTES, 64)
        self.indexes = {tier: IndexWriter(path, tier, MAP_BYTES, self.node) for tier in Tier}
        for index in self.indexes.values():
            index.publish()
        self.readers = {tier: IndexReader(path, tier, MAP_BYTES, self.node) for tier in (Tier.SSD, Tier.REMOTE)}
        self.dram = DramTier(self.arena, self.indexes[Tier.DRAM], Nobody(), lambda: 0.0)
        self.dead: set[SessionId] = set()
        self.loads = Loads(self.dram, self.readers, lambda session: session not in self.dead)

    def stored(self, tier: Tier, count: int, *, seed: int, codec: Codec = Codec.RAW) -> ChunkRecords:
        """Rows of a tier."""
        made = np.zeros(count, CHUNK)
        made["key"] = np.random.default_rng(seed).integers(0, 256, (count, 16), np.uint8).view("V16").reshape(-1)
        made["shards"], made["codec"] = 1, codec
        made["raw_bytes"] = made["nbytes"] = CHUNK_BYTES
        assert self.indexes[tier].put_records(made)
        return made

    def ask(self, records: ChunkRecords, load_id: int = 1, chain: dict[str, SessionId] | None = None) -> Waiter:
        """A load that somebody waits for, and that is asked of the stages below."""
        waiter = Waiter(Peer("load", b"e"), ENGINE, load_id, 0)
        asked = self.loads.ask(waiter, records, CHAIN if chain is None else chain)
        assert not asked.ready and not asked.failed
        self.slots = [Slot.from_place(place) for place in joined(asked.down)["place"].tolist()]
        return waiter

    def states(self) -> list[SlotState]:
        """Of the slots of the last load."""
        return [self.arena.state(slot.index)[1] for slot in self.slots]

    def close(self) -> None:
        for index in (*self.readers.values(), *self.indexes.values()):
            index.close()
        self.arena.close()
        self.node.close()


@pytest.fixture
def bench() -> Iterator[Bench]:
    path = Path(f"/dev/shm/lmpipe-test-{os.getpid()}-{secrets.token_hex(4)}")
    (path / "index").mkdir(parents=True, mode=0o700)
    path.chmod(0o700)
    made = Bench(path)
    yield made
    made.close()
    shutil.rmtree(path)


@pytest.mark.parametrize(
    ("tier", "codec", "fatal"),
    [
        (Tier.SSD, Codec.RAW, {COMPRESS, PERSIST}),
        (Tier.SSD, Codec.ZSTD, {COMPRESS, PERSIST}),
        (Tier.REMOTE, Codec.RAW, {COMPRESS, PERSIST, REPLICATE}),
        (Tier.REMOTE, Codec.ZSTD, {COMPRESS, PERSIST, REPLICATE}),
    ],
)
def test_a_load_needs_every_stage_down_to_the_one_that_has_it(
    bench: Bench, tier: Tier, codec: Codec, fatal: set[SessionId]
) -> None:
    for seed, (stage, session) in enumerate(CHAIN.items()):
        bench.dead.clear()
        waiter = bench.ask(records := bench.stored(tier, 2, seed=seed, codec=codec), seed)
        assert bench.loads.stranded() == []
        bench.dead.add(session)
        stranded = bench.loads.stranded()
        if session not in fatal:
            assert stranded == [] and bench.loads.waited_for
            bench.loads.cancel(ENGINE, seed)
            continue
        ((who, why, asked),) = stranded
        assert (who, why) == (waiter, stage)
        assert names_of(joined(asked)) == names_of(records)
        assert not bench.loads.waited_for and not waiter.names
        assert bench.loads.stranded() == []
        assert bench.states() == [SlotState.LEASED] * 2, "whoever has the lease may be writing"


def test_only_those_who_wait_for_the_dead_are_told(bench: Bench) -> None:
    near, far = bench.stored(Tier.SSD, 2, seed=1), bench.stored(Tier.REMOTE, 3, seed=2)
    both = bench.ask(np.concatenate([near, far]), 1)
    bench.ask(bench.stored(Tier.SSD, 1, seed=3), 2)
    bench.dead.add(REPLICATE)
    ((who, why, asked),) = bench.loads.stranded()
    assert (who, why, len(asked)) == (both, "replicate", 3)
    assert sorted(both.names) == sorted(names_of(near))
    for name in names_of(near):
        assert [waiter for waiter, _ in bench.loads.settle(name)] == [both]
    assert bench.loads.waited_for


def test_what_is_asked_twice_in_one_load_is_answered_once(bench: Bench) -> None:
    record = bench.stored(Tier.SSD, 1, seed=1)
    waiter = bench.ask(np.concatenate([record, record]))
    (name,) = names_of(record)
    assert [who for who, _ in bench.loads.settle(name)] == [waiter]
    assert not bench.loads.waited_for


def test_nothing_is_asked_of_the_dead_or_of_those_behind_them(bench: Bench) -> None:
    near, far = bench.stored(Tier.SSD, 1, seed=1), bench.stored(Tier.REMOTE, 1, seed=2)
    waiter = Waiter(Peer("load", b"e"), ENGINE, 1, 0)
    for session, reasons in (
        (REPLICATE, {"replicate is down"}),
        (PERSIST, {"replicate is down", "persist is down"}),
        (COMPRESS, {"replicate is down", "persist is down"}),
    ):
        bench.dead = {session}
        asked = bench.loads.ask(waiter, np.concatenate([near, far]), CHAIN)
        assert set(asked.failed) | {"replicate is down"} == reasons
        for name in names_of(near):
            bench.loads.give_up(name)


def test_a_flight_that_is_cut_off_is_told_by_its_slot(bench: Bench) -> None:
    """Its writer lives; the question, or the answer, was lost with the stage between."""
    records = bench.stored(Tier.REMOTE, 3, seed=1)
    bench.ask(records)
    untouched, begun, complete = bench.slots
    for slot in (begun, complete):
        assert bench.arena.advance(slot, SlotEvent.OPEN)
    record = records[2].copy()
    record["place"] = complete.place
    bench.arena.set_record(complete.index, record)
    assert bench.arena.advance(complete, SlotEvent.CLOSE)
    taken, landed = bench.loads.cut_off()
    assert not taken and not len(landed), "all is well"
    bench.dead.add(PERSIST)
    bench.loads.stranded()
    assert bench.loads.orphans() == []
    taken, landed = bench.loads.cut_off()
    assert taken == names_of(records)[:1] and index_keys(landed) == index_keys(records)[2:]
    assert bench.states() == [SlotState.FREE, SlotState.WRITING, SlotState.READY]
    assert not bench.arena.advance(untouched, SlotEvent.OPEN), "who was late finds the lease gone"
    assert [name for name, _ in bench.loads.landed(landed)] == names_of(records)[2:]
    for name in names_of(records)[::2]:
        bench.loads.give_up(name)
    assert bench.loads.cut_off()[0] == [] and len(bench.loads) == 1
    assert bench.arena.advance(begun, SlotEvent.CLOSE)
    assert len(bench.loads.cut_off()[1]) == 1


def test_a_load_that_comes_while_the_node_starts_is_kept_for_a_moment() -> None:
    parked, none = Parked(frozenset({"persist"}), 100.0), np.zeros(0, CHUNK)
    waiting, late = Waiter(Peer("load", b"e"), ENGINE, 1, 0), Waiter(Peer("load", b"e"), ENGINE, 2, int(100.05e9))
    ahead = Waiter(None, ENGINE, 0, 0)
    assert all(parked.park(waiter, none, 100.0) for waiter in (waiting, late, ahead))
    assert parked.due(100.0) == [] and parked.wait_s(100.0) == pytest.approx(0.05)
    assert [waiter for waiter, _ in parked.due(100.06)] == [late]
    assert parked.wait_s(100.06) == pytest.approx(PARK_S - 0.06)
    assert [waiter for waiter, _ in parked.due(100.0 + PARK_S)] == [waiting], "a recompute is not held up for longer"
    assert parked.due(101.0) == [] and parked.wait_s(101.0) == pytest.approx(GRACE_S - 1)
    parked.heard({"persist": PERSIST})
    assert [waiter for waiter, _ in parked.due(101.0)] == [ahead] and parked.wait_s(101.0) is None
    assert not parked.park(waiting, none, 101.0)
