"""The DRAM tier over a real arena and a real index: order of eviction, holds, pins, pending rows, restart, and a random
walk.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from lmpipe.clock import wall_s
from lmpipe.handles import CHUNK, SessionId, Slot, Tier
from lmpipe.index import IndexReader, IndexWriter
from lmpipe.index_row import index_keys
from lmpipe.lifecycle import SlotEvent, SlotState
from lmpipe.shm.node import NodeWords
from lmpipe.shm.slots import SlotOwner
from lmpipe.tiers.dram import DramTier

ME = SessionId(5)
CHUNK_BYTES = 8192
MAP_BYTES = 1 << 20


class Held:
    """Hold words as a test sets them. `late` are taken between the choice of what goes and its doom."""

    def __init__(self) -> None:
        self.words: set[int] = set()
        self.late: set[int] = set()
        self.scans = 0

    def held(self) -> frozenset[int]:
        seen = frozenset(self.words)
        self.words |= self.late
        self.late, self.scans = set(), self.scans + 1
        return seen


class Bench:
    """A tier of 8 chunks."""

    def __init__(self, path: Path) -> None:
        self.path, self.held, self.now_s = path, Held(), 0.0
        self.node = NodeWords.create(path / "node.shm")
        self.arena = SlotOwner.create(path / "arena.shm", 8 * CHUNK_BYTES, 64)
        self.index = IndexWriter(path, Tier.DRAM, MAP_BYTES, self.node)
        self.index.publish()
        self.reader = IndexReader(path, Tier.DRAM, MAP_BYTES, self.node)
        self.tier = DramTier(self.arena, self.index, self.held, lambda: self.now_s)

    def save(
        self,
        prompt: int,
        chunks: range,
        pending: int = 0,
        shard: int = 0,
        shards: int = 1,
        fidelity: int = 0,
        **times: int,
    ) -> list[int]:
        """Save chunks of a prompt; returns the positions that became visible. `times`: saved_at, expires_at."""
        slots: list[int] = []
        for position in chunks:
            slot = self.tier.reserve(CHUNK_BYTES, ME)
            if slot is None:
                break
            assert self.arena.advance(slot, SlotEvent.OPEN)
            record = np.zeros(1, CHUNK)
            record["key"] = prompt.to_bytes(8, "little") + position.to_bytes(8, "little")
            record["anchor"] = prompt.to_bytes(4, "little")
            record["position"], record["shard"], record["shards"] = position, shard, shards
            record["raw_bytes"] = record["nbytes"] = CHUNK_BYTES
            record["namespace"], record["fidelity"], record["place"] = prompt, fidelity, slot.place
            for name, at in times.items():
                record[name] = at
            self.arena.set_record(slot.index, record[0])
            assert self.arena.advance(slot, SlotEvent.CLOSE)
            slots.append(slot.index)
        done = self.tier.commit(slots, pending, ME)
        return [int(self.arena.record(slot)["position"]) for slot in done]

    def key(self, prompt: int, position: int) -> bytes:
        return prompt.to_bytes(4, "little") + prompt.to_bytes(8, "little") + position.to_bytes(8, "little")

    def found(self, prompt: int, chunks: int = 8) -> list[int]:
        """Positions a lookup finds, each by itself."""
        return [at for at in range(chunks) if self.reader.run([self.key(prompt, at)])]

    def slot(self, prompt: int, position: int, shard: int = 0) -> Slot:
        row = self.tier.row(self.key(prompt, position))
        assert row is not None
        index = row.slots[shard]
        return Slot(index, self.arena.state(index)[0])

    def close(self) -> None:
        self.reader.close()
        self.index.close()
        self.arena.close()
        self.node.close()


@pytest.fixture
def bench() -> Iterator[Bench]:
    path = Path(f"/dev/shm/lmpipe-test-{os.getpid()}-{secrets.token_hex(4)}")
    (path / "index").mkdir(parents=True, mode=0o700)
    path.chmod(0o700)
    made = Bench(path)
    yield made
    assert made.tier.audit() == []
    made.close()
    shutil.rmtree(path)


def test_saved_is_found(bench: Bench) -> None:
    assert bench.save(1, range(4)) == [0, 1, 2, 3]
    assert bench.found(1) == [0, 1, 2, 3] and len(bench.tier) == 4


def test_a_tail_goes_before_its_head_and_the_older_prompt_first(bench: Bench) -> None:
    bench.save(1, range(4))
    bench.save(2, range(4))
    bench.save(3, range(2))
    assert (bench.found(1), bench.found(2), bench.found(3)) == ([0, 1], [0, 1, 2, 3], [0, 1])
    assert sorted(int(r["position"]) for r in bench.tier.take_evicted()) == [2, 3]


def test_one_transaction_makes_room_for_several(bench: Bench) -> None:
    bench.save(1, range(8))
    assert bench.tier.reserve(CHUNK_BYTES, ME, more=3) is not None
    assert bench.found(1) == [0, 1, 2, 3] and bench.arena.free_bytes == 3 * CHUNK_BYTES


def test_touch_saves_a_prompt(bench: Bench) -> None:
    bench.save(1, range(4))
    bench.save(2, range(4))
    bench.tier.touch([bench.key(1, at) for at in range(4)])
    bench.save(3, range(2))
    assert bench.found(1) == [0, 1, 2, 3] and bench.found(2) == [0, 1]


def test_a_held_row_stays_to_be_found_and_goes_when_released(bench: Bench) -> None:
    bench.save(1, range(8))
    held = bench.slot(1, 7)
    bench.held.words.add(held.place)
    assert bench.save(2, range(4)) == [0, 1, 2, 3]
    assert bench.arena.state(held.index) == (held.generation, SlotState.COMMITTED)
    assert bench.found(1) == [0, 1, 2, 7] and bench.found(2) == [0, 1, 2, 3]
    bench.held.words.clear()
    bench.save(3, range(1))
    assert bench.found(1) == [0, 1, 2] and bench.found(3) == [0]


def test_a_hold_on_a_former_life_of_a_slot_keeps_nothing(bench: Bench) -> None:
    bench.save(1, range(8))
    slot = bench.slot(1, 7)
    bench.held.words.add(Slot(slot.index, slot.generation - 1).place)
    bench.save(2, range(1))
    assert bench.found(1) == [0, 1, 2, 3, 4, 5, 6]


def test_a_slot_held_after_the_choice_is_not_reused_and_comes_back_when_released(bench: Bench) -> None:
    bench.save(1, range(8))
    held = bench.slot(1, 7)
    bench.held.late.add(held.place)
    bench.save(2, range(1))
    assert bench.arena.state(held.index) == (held.generation, SlotState.DOOMED), "out of the index, but not free"
    assert bench.found(1) == [0, 1, 2, 3, 4, 5] and bench.found(2) == [0]
    bench.held.words.clear()
    bench.tier.tick()
    assert bench.arena.state(held.index)[1] is SlotState.FREE


@pytest.mark.parametrize("shard", [0, 1])
def test_a_row_with_one_shard_held_is_kept_whole(bench: Bench, shard: int) -> None:
    for each in range(2):
        bench.save(1, range(2), shard=each, shards=2)
    bench.held.words = {bench.slot(1, at, shard).place for at in range(2)}
    assert bench.save(2, range(6)) == [0, 1, 2, 3]
    assert bench.tier.reserve(2 * CHUNK_BYTES, ME) is not None, "of neighbours only those that are free to go"
    assert all(len(bench.reader.run([bench.key(1, at)])[0]) == 144 for at in range(2))
    bench.held.words.clear()
    bench.save(3, range(6))
    assert bench.found(1) == []


def test_everything_held_is_full_not_an_error(bench: Bench) -> None:
    bench.save(1, range(8))
    bench.held.words = {bench.slot(1, at).place for at in range(8)}
    assert bench.tier.reserve(CHUNK_BYTES, ME) is None
    assert bench.found(1) == list(range(8)), "nothing was given up for nothing"
    bench.held.words.clear()
    assert bench.tier.reserve(CHUNK_BYTES, ME) is not None


def test_holds_are_read_once_for_a_batch_and_once_more_after_its_doom(bench: Bench) -> None:
    bench.save(1, range(8))
    bench.held.words.add(bench.slot(1, 7).place)
    before = bench.held.scans
    assert bench.tier.reserve(CHUNK_BYTES, ME, more=5) is not None
    assert bench.held.scans == before + 2
    assert bench.found(1) == [0, 7]


def test_pins_outlast_pressure_and_end(bench: Bench) -> None:
    bench.save(1, range(8))
    assert bench.tier.pin([bench.key(1, at) for at in range(8)], 10.0) == 8
    assert bench.save(2, range(1)) == []
    bench.now_s = 11.0
    assert bench.save(2, range(1)) == [0]


def test_rows_not_persisted_go_last(bench: Bench) -> None:
    bench.save(1, range(4), pending=1)
    bench.save(2, range(4))
    bench.save(3, range(4))
    assert bench.found(1) == [0, 1, 2, 3] and bench.found(2) == []
    assert bench.tier.unpersisted == 4
    for at in range(4):
        bench.tier.answered(bench.key(1, at), 0, bench.slot(1, at).place, 1)
    assert bench.tier.unpersisted == 0


def test_a_known_chunk_is_not_kept_twice(bench: Bench) -> None:
    bench.save(1, range(2))
    used = bench.arena.used_bytes
    assert bench.save(1, range(2)) == []
    assert bench.arena.used_bytes == used and bench.found(1) == [0, 1]


def test_a_chunk_whose_time_is_over_by_its_next_savers_clock_is_saved_again(bench: Bench) -> None:
    """That clock may be ahead of gather's: what is said to be known would not be found by who saved it."""
    soon = int(wall_s()) + 100
    assert bench.save(1, range(1), expires_at=soon) == [0]
    assert bench.save(1, range(1), saved_at=soon - 1) == [], "valid, by either clock"
    key = bench.key(1, 0)
    assert bench.tier.has(key, 0, 0, soon - 1) and not bench.tier.has(key, 0, 0, soon)
    assert bench.save(1, range(1), saved_at=soon) == [0]
    assert bench.tier.has(key, 0, 0, soon + 1000) and bench.arena.used_bytes == CHUNK_BYTES


def fidelity_of(bench: Bench, position: int) -> int:
    return int(np.frombuffer(bench.reader.run([bench.key(1, position)])[0], CHUNK)[0]["fidelity"])


def test_a_more_exact_chunk_takes_the_place_of_a_less_exact_one(bench: Bench) -> None:
    assert bench.save(1, range(2), fidelity=200) == [0, 1]
    old = bench.slot(1, 0)
    assert not bench.tier.has(bench.key(1, 0), 0, 100) and bench.tier.has(bench.key(1, 0), 0, 200)
    assert bench.save(1, range(1), fidelity=200) == [], "as exact as what is there"
    assert bench.save(1, range(1), fidelity=300) == [], "less exact"
    assert bench.save(1, range(1), pending=1) == [0]
    assert (fidelity_of(bench, 0), fidelity_of(bench, 1)) == (0, 200)
    assert bench.arena.state(old.index)[1] is SlotState.FREE and bench.arena.used_bytes == 2 * CHUNK_BYTES
    bench.tier.answered(bench.key(1, 0), 0, old.place, 1)
    assert bench.tier.unpersisted == 1, "that was said of the former one"
    bench.tier.answered(bench.key(1, 0), 0, bench.slot(1, 0).place, 1)
    assert bench.tier.unpersisted == 0


def test_what_was_brought_up_because_it_is_more_exact_is_not_encoded_again(bench: Bench) -> None:
    bench.save(1, range(1), fidelity=200)
    slot = bench.tier.reserve(CHUNK_BYTES, ME)
    assert slot is not None and bench.arena.advance(slot, SlotEvent.OPEN)
    record = bench.arena.record(bench.slot(1, 0).index)
    record["fidelity"], record["place"] = 0, slot.place
    bench.arena.set_record(slot.index, record)
    bench.arena.advance(slot, SlotEvent.CLOSE)
    assert bench.tier.commit([slot.index], 0, SessionId(0)) == [slot.index]
    row = bench.tier.row(bench.key(1, 0))
    assert row is not None and row.stays_raw == {0} and fidelity_of(bench, 0) == 0


def test_who_reads_the_less_exact_one_keeps_it(bench: Bench) -> None:
    bench.save(1, range(1), fidelity=200)
    old = bench.slot(1, 0)
    bench.held.words.add(old.place)
    assert bench.save(1, range(1)) == [0]
    assert bench.arena.state(old.index) == (old.generation, SlotState.DOOMED)
    bench.held.words.clear()
    bench.tier.tick()
    assert bench.arena.state(old.index)[1] is SlotState.FREE


def test_a_full_index_takes_both_of_them(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.save(1, range(1), fidelity=200)
    with monkeypatch.context() as patched:
        patched.setattr(bench.index, "put", lambda rows: False)
        assert bench.save(1, range(1)) == []
    assert bench.found(1) == [] and bench.arena.used_bytes == 0


def test_of_two_copies_a_restart_keeps_the_more_exact(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.save(1, range(2), fidelity=200)
    with monkeypatch.context() as patched:  # died before the former ones were ended
        patched.setattr(bench.tier, "_end_replaced", lambda: None)
        bench.save(1, range(2), fidelity=100)
    bench.index.close()
    bench.index = IndexWriter(bench.path, Tier.DRAM, MAP_BYTES, bench.node)
    found = bench.arena.recover(lambda _: False)
    assert len(found.committed) == 4
    bench.tier = DramTier(bench.arena, bench.index, bench.held, lambda: bench.now_s)
    bench.tier.load_rows(found.committed)
    bench.index.publish()
    assert (fidelity_of(bench, 0), fidelity_of(bench, 1)) == (100, 100)
    assert bench.arena.used_bytes == 2 * CHUNK_BYTES


def test_a_row_is_evicted_with_all_its_shards(bench: Bench) -> None:
    bench.save(1, range(2), shard=0, shards=2)
    assert all(len(bench.reader.run([bench.key(1, at)])[0]) == 72 for at in range(2)), "half a row"
    bench.save(1, range(2), shard=1, shards=2)
    assert all(len(bench.reader.run([bench.key(1, at)])[0]) == 144 for at in range(2))
    bench.save(2, range(5))
    assert bench.found(1) == [0] and len(bench.reader.run([bench.key(1, 0)])[0]) == 144


def test_drop_by_namespace(bench: Bench) -> None:
    bench.save(1, range(3))
    bench.save(2, range(3))
    assert bench.tier.drop(bench.tier.keys(1)) == 3
    assert bench.found(1) == [] and bench.found(2) == [0, 1, 2]


def test_a_full_index_is_no_hit_and_takes_no_room(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.index, "put", lambda rows: False)
    assert bench.save(1, range(3)) == []
    assert bench.arena.used_bytes == 0 and len(bench.tier) == 0


def test_a_full_index_leaves_no_half_of_a_row_behind(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.save(1, range(2), shard=0, shards=2)
    with monkeypatch.context() as patched:
        patched.setattr(bench.index, "put", lambda rows: False)
        assert bench.save(1, range(1), shard=1, shards=2) == []
    assert bench.found(1) == [1] and bench.arena.used_bytes == CHUNK_BYTES
    assert bench.save(1, range(2), shard=0, shards=2) == [0]


def test_each_shard_has_its_own_saver(bench: Bench) -> None:
    bench.save(1, range(1), shard=0, shards=2)
    row = bench.tier.row(bench.key(1, 0))
    slot = bench.tier.reserve(CHUNK_BYTES, ME)
    assert row is not None and slot is not None
    record = bench.arena.record(row.slots[0])
    record["shard"] = 1
    bench.arena.advance(slot, SlotEvent.OPEN)
    bench.arena.set_record(slot.index, record)
    bench.arena.advance(slot, SlotEvent.CLOSE)
    bench.tier.commit([slot.index], 0, SessionId(6))
    assert row.savers == {0: ME, 1: 6}


def test_larger_chunks_find_room_in_pieces(bench: Bench) -> None:
    """Every second chunk is pinned: no run of neighbours is free but one that must be made."""
    bench.save(1, range(8))
    bench.tier.pin([bench.key(1, at) for at in (0, 3, 6)], 99.0)
    assert bench.tier.reserve(2 * CHUNK_BYTES, ME) is not None
    assert bench.tier.reserve(3 * CHUNK_BYTES, ME) is None, "the pins leave no window of three"


def test_what_is_free_in_pieces_is_put_together_and_nothing_else_given_up(bench: Bench) -> None:
    bench.save(1, range(8))
    bench.tier.drop([bench.key(1, at) for at in (1, 3, 5)])
    assert bench.tier.reserve(2 * CHUNK_BYTES, ME, more=2) is not None
    assert len(bench.found(1)) == 4, "one neighbour had to go"


def test_what_is_pending_is_not_evicted_for_what_can_wait(bench: Bench) -> None:
    bench.save(1, range(6), pending=1)
    bench.save(2, range(2))
    assert bench.tier.reserve(2 * CHUNK_BYTES, ME, clean_only=True) is not None
    assert (len(bench.found(1)), bench.found(2)) == (6, [])
    assert bench.tier.reserve(CHUNK_BYTES, ME, clean_only=True) is None
    assert len(bench.found(1)) == 6


def test_restart_finds_what_was_committed(bench: Bench) -> None:
    bench.save(1, range(4), pending=3)
    bench.save(2, range(2))
    lost = bench.tier.reserve(CHUNK_BYTES, ME)
    assert lost is not None and bench.arena.advance(lost, SlotEvent.OPEN)
    bench.index.close()
    bench.index = IndexWriter(bench.path, Tier.DRAM, MAP_BYTES, bench.node)
    found = bench.arena.recover(lambda _: False)
    bench.tier = DramTier(bench.arena, bench.index, bench.held, lambda: bench.now_s)
    pending = bench.tier.load_rows(found.committed)
    bench.index.publish()
    assert bench.found(1) == [0, 1, 2, 3] and bench.found(2) == [0, 1]
    assert len(pending) == 4 and bench.tier.unpersisted == 4
    assert bench.arena.state(lost.index)[1] is SlotState.FREE


def test_a_random_walk_keeps_the_invariants(bench: Bench) -> None:
    rng = np.random.default_rng(3)
    for turn in range(400):
        prompt, chunks = int(rng.integers(1, 5)), int(rng.integers(1, 9))
        match int(rng.integers(5)):
            case 0 | 1:
                rows = [(key, bench.tier.row(key)) for key in bench.tier.keys(namespace=0)]
                held = [key for key, row in rows if row is not None and row.is_held(bench.held.held())]
                bench.save(prompt, range(chunks), pending=int(rng.integers(2)))
                assert all(bench.tier.row(key) for key in held)
            case 2:
                bench.tier.touch([bench.key(prompt, at) for at in range(chunks)])
            case 3:
                rows = [bench.key(prompt, at) for at in range(8) if bench.tier.row(bench.key(prompt, at))]
                bench.held.words = {
                    Slot(s, bench.arena.state(s)[0]).place for k in rows for s in bench.tier.row(k).slots.values()
                }  # type: ignore[union-attr]
            case _:
                if bench.tier.row(bench.key(prompt, chunks)):
                    bench.tier.answered(bench.key(prompt, chunks), 0, bench.slot(prompt, chunks).place, 1)
                bench.held.words.clear()
        bench.now_s = float(turn)
        assert bench.tier.audit() == []
        for number in range(1, 5):
            for at in bench.found(number):
                assert bench.tier.row(bench.key(number, at)) is not None
    bench.held.words.clear()
    bench.tier.tick()
    assert bench.arena.used_bytes == len(bench.tier) * CHUNK_BYTES


def test_index_keys_of_records_equal_those_of_rows(bench: Bench) -> None:
    bench.save(7, range(2))
    row = bench.tier.row(bench.key(7, 1))
    assert row is not None and index_keys(np.frombuffer(row.value, CHUNK)) == [row.key]
