"""Rows of several shards over the indexes of three tiers: what is a hit, and where each rank's part is taken from."""

from __future__ import annotations

import os
import random
import secrets
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lmpipe.handles import CHUNK, Tier
from lmpipe.index import IndexReader, IndexWriter
from lmpipe.producer.shards import run_of_shards
from lmpipe.producer.wanted import Wanted
from lmpipe.shm.node import NodeWords

MAP_BYTES = 1 << 20
NOW_S = 1000.0
TIERS = (Tier.DRAM, Tier.SSD, Tier.REMOTE)
DRAM, SSD, REMOTE = range(3)
KEYS = [bytes(4) + number.to_bytes(16, "big") for number in range(24)]


class Indexes:
    """Three tiers. `place` says from which tier a record is."""

    def __init__(self, path: Path) -> None:
        self.node = NodeWords.create(path / "node.shm")
        self.writers = [IndexWriter(path, tier, MAP_BYTES, self.node) for tier in TIERS]
        for writer in self.writers:
            writer.publish()
        self.readers = [IndexReader(path, tier, MAP_BYTES, self.node) for tier in TIERS]

    def put(self, tier: int, chunks: Iterable[int], shards: Iterable[int], of: int = 2, **fields: Any) -> None:
        for chunk in chunks:
            for shard in shards:
                record = np.zeros(1, CHUNK)
                record["key"], record["anchor"] = np.void(KEYS[chunk][4:]), np.void(KEYS[chunk][:4])
                record["position"], record["shard"], record["shards"] = chunk, shard, of
                record["layout"], record["raw_bytes"], record["place"] = 100 + shard, 4096, tier
                for name, value in fields.items():
                    record[name] = value
                assert self.writers[tier].put_records(record)

    def found(self, shard: int, *, of: int = 2, first: int = 0, own: bool = False) -> list[int]:
        """The tier of each chunk of the run."""
        wanted = Wanted(100 + shard, 4096, shard, of)
        records, tiers = run_of_shards(self.readers, KEYS, first, wanted, NOW_S, own=own)
        assert records["place"].tolist() == tiers.tolist() and tiers.dtype == np.uint8
        assert set(records["shard"].tolist()) <= {shard}
        assert records["position"].tolist() == list(range(first, first + len(records)))
        return tiers.tolist()

    def close(self) -> None:
        for part in (*self.readers, *self.writers, self.node):
            part.close()


@pytest.fixture
def indexes() -> Iterator[Indexes]:
    path = Path(f"/dev/shm/lmpipe-test-{os.getpid()}-{secrets.token_hex(4)}")
    (path / "index").mkdir(parents=True, mode=0o700)
    path.chmod(0o700)
    made = Indexes(path)
    yield made
    made.close()
    shutil.rmtree(path)


def test_half_a_row_is_no_hit(indexes: Indexes) -> None:
    indexes.put(DRAM, range(4), [0])
    assert indexes.found(0) == indexes.found(1) == []


def test_a_promoted_shard_does_not_hide_the_row_from_the_other_rank(indexes: Indexes) -> None:
    indexes.put(SSD, range(6), [0, 1])
    indexes.put(DRAM, range(4), [0])
    assert indexes.found(0) == [DRAM] * 4 + [SSD] * 2
    assert indexes.found(1) == [SSD] * 6


def test_a_row_may_have_each_shard_in_another_tier(indexes: Indexes) -> None:
    for tier in range(3):
        indexes.put(tier, range(3), [tier], of=3)
    assert [indexes.found(shard, of=3) for shard in range(3)] == [[DRAM] * 3, [SSD] * 3, [REMOTE] * 3]


def test_complete_and_incomplete_rows_take_turns(indexes: Indexes) -> None:
    indexes.put(DRAM, range(10), [1])
    indexes.put(DRAM, [0, 3, 4, 9], [0])
    indexes.put(SSD, [1, 2, 5, 6, 8], [0, 1])
    indexes.put(REMOTE, [7], [0])
    assert indexes.found(1) == [DRAM] * 10
    assert indexes.found(0) == [DRAM, SSD, SSD, DRAM, DRAM, SSD, SSD, REMOTE, SSD, DRAM]
    assert indexes.found(0, first=7) == [REMOTE, SSD, DRAM]


def test_the_run_ends_where_a_shard_is_nowhere(indexes: Indexes) -> None:
    indexes.put(DRAM, range(8), [0])
    indexes.put(SSD, [0, 1, 2, 4, 5], [1])
    assert indexes.found(0) == [DRAM] * 3 and indexes.found(1) == [SSD] * 3


@pytest.mark.parametrize("shard", [0, 1])
def test_every_shard_has_to_be_valid_and_exact_enough(indexes: Indexes, shard: int) -> None:
    indexes.put(DRAM, range(6), [1 - shard])
    indexes.put(DRAM, [0], [shard], expires_at=NOW_S + 1)
    indexes.put(DRAM, [1, 4], [shard])
    indexes.put(DRAM, [2], [shard], expires_at=NOW_S)
    indexes.put(DRAM, [3], [shard], fidelity=1)
    assert indexes.found(0) == indexes.found(1) == [DRAM] * 2
    indexes.put(SSD, [2, 3], [shard])
    both = [indexes.found(0), indexes.found(1)]
    assert both[1 - shard] == [DRAM] * 5 and both[shard] == [DRAM, DRAM, SSD, SSD, DRAM]


def test_a_foreign_shard_may_have_another_layout_but_not_another_split(indexes: Indexes) -> None:
    indexes.put(DRAM, range(4), [0])
    indexes.put(DRAM, [0], [1], layout=7, raw_bytes=1)
    indexes.put(DRAM, [1], [1])
    indexes.put(SSD, [2], [1], of=4)
    assert indexes.found(0) == [DRAM] * 2
    assert indexes.found(1) == [], "its own has to have its own layout"


def test_a_rank_knows_what_it_has_saved_itself(indexes: Indexes) -> None:
    indexes.put(SSD, range(2), [1])
    indexes.put(DRAM, range(2, 4), [0, 1])
    indexes.put(DRAM, [4], [1], expires_at=NOW_S)
    assert indexes.found(1, own=True) == [SSD, SSD, DRAM, DRAM]
    assert indexes.found(0, own=True) == [] and indexes.found(0, own=True, first=2) == [DRAM, DRAM]


def test_no_index_is_a_miss(indexes: Indexes) -> None:
    for tier in TIERS:
        indexes.node.set_index_generation(tier, 99)
    assert indexes.found(0) == []


def test_random_rows_are_found_as_far_as_every_shard_is_somewhere(indexes: Indexes) -> None:
    seed = int.from_bytes(os.urandom(4), "little")
    print(f"seed {seed}")
    draw = random.Random(seed)
    for turn in range(40):
        of = draw.choice([2, 3])
        there: list[dict[int, set[int]]] = []
        density = draw.choice([0.5, 0.8, 0.95])
        for tier in range(3):
            indexes.writers[tier].delete(KEYS)
            rows = {chunk: {s for s in range(of) if draw.random() < density} for chunk in range(len(KEYS))}
            rows = {chunk: shards for chunk, shards in rows.items() if shards and draw.random() < 0.9}
            for chunk, shards in rows.items():
                indexes.put(tier, [chunk], sorted(shards), of=of)
            there.append(rows)
        full = [
            set().union(*(rows.get(chunk, set()) for rows in there)) == set(range(of)) for chunk in range(len(KEYS))
        ]
        length = full.index(False) if False in full else len(KEYS)
        for shard in range(of):
            tiers = indexes.found(shard, of=of)
            assert len(tiers) == length, turn
            assert all(shard in there[tier].get(chunk, set()) for chunk, tier in enumerate(tiers))
            fastest = [next(t for t in range(3) if shard in there[t].get(chunk, set())) for chunk in range(length)]
            assert tiers[:1] == fastest[:1]
