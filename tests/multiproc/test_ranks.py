"""Two ranks of one engine: each saves, keeps and loads its own half of every chunk, at its own time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rig import WAIT_S, Engine, EngineProcess, all_tiers, assert_nothing_leaks, until, until_whole

from lmpipe.handles import Tier
from lmpipe.keys import Prompt
from lmpipe.lifecycle import SlotState
from lmpipe.producer import LoadResult
from lmpipe.shm.descriptor import SegmentKind
from lmpipe.shm.segment import Segment
from lmpipe.shm.table import SlotTable
from lmpipe.testing import Node

CHUNKS = 12
LEASES = 3 * 8


@pytest.fixture(scope="module", params=["raw", "zstd"])
def node(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Node]:
    with Node(small(tmp_path_factory.mktemp("remote"), request.param)) as node:
        yield node


def small(remote: Path, codec: str) -> dict[str, Any]:
    """An arena of 96 chunks over SSD and remote."""
    changes = all_tiers(remote, dram="1MiB", codec=codec)
    changes["tiers"]["dram"]["slots"] = 96
    return changes


def in_dram(engine: Engine, prompt: Prompt) -> int:
    """Rows of the DRAM index, whole or not."""
    attachment = engine.producer._link.attachment
    assert attachment is not None
    return sum(bool(attachment._index.readers[0].run([key])) for key in prompt.index_keys)


def until_persisted(node: Node) -> None:
    """Waits until every tier has taken what it is to take: what it has not is evicted last, before any newer row."""

    def pending() -> int:
        arena = SlotTable(Segment.attach(node.paths.arena, SegmentKind.SLOTS))
        try:
            states = enumerate(arena.state(index)[1] for index in range(arena.slots))
            return sum(state is SlotState.COMMITTED and bool(arena.pending(index)) for index, state in states)
        finally:
            arena.close()

    until(lambda: not pending(), "every tier has taken what it is to take")


def ranks_with_a_prompt_below(node: Node, tenant: str) -> tuple[list[Engine], Prompt]:
    """Both have saved their halves, which lie on the SSD too."""
    ranks = [Engine(node.run_dir, tenant=tenant, shard=rank, shards=2) for rank in range(2)]
    until_whole(node, *ranks)
    prompt = ranks[0].prompt(1, CHUNKS)
    for rank in ranks:
        assert rank.save(prompt).wait(0)
    assert all(rank.producer.flush(prompt, tiers=["ssd"]) for rank in ranks)
    return ranks, prompt


def load_one_after_the_other(ranks: list[Engine], prompt: Prompt) -> None:
    """None of the halves is in DRAM; every byte is compared with what that half has to hold."""
    assert in_dram(ranks[0], prompt) == 0
    for first, second in (ranks, ranks[::-1]):
        assert first.load(prompt).by_tier == {Tier.SSD: CHUNKS}
        with first.producer.lookup(prompt) as mine, second.producer.lookup(prompt) as other:
            assert (mine.by_tier, other.by_tier) == ({Tier.DRAM: CHUNKS}, {Tier.SSD: CHUNKS})
        assert second.load(prompt).by_tier == {Tier.SSD: CHUNKS}
        assert [rank.load(prompt).by_tier for rank in ranks] == [{Tier.DRAM: CHUNKS}] * 2
        ranks[0].drop_from(prompt, Tier.DRAM)
    for rank in ranks:
        rank.close()


def test_one_rank_s_load_does_not_hide_an_evicted_row_from_the_other(node: Node) -> None:
    ranks, prompt = ranks_with_a_prompt_below(node, "evicted")
    with Engine(node.run_dir, tenant="pressure") as other:
        for seed in range(100):
            if not in_dram(ranks[0], prompt):
                break
            assert other.save(other.prompt(seed, 16)).wait(WAIT_S)
    until_persisted(node)
    load_one_after_the_other(ranks, prompt)
    assert_nothing_leaks(node, 0)


def test_one_rank_s_load_does_not_hide_the_row_from_the_other_after_the_arena_is_gone(tmp_path: Path) -> None:
    with Node(small(tmp_path, "zstd")) as node:
        ranks, prompt = ranks_with_a_prompt_below(node, "arena removed")
        before = [rank.producer._link.attachment for rank in ranks]
        node.restart(keep_dram=False)
        until(lambda: all(r.producer._link.attachment not in (None, b) for r, b in zip(ranks, before, strict=True)))
        until_whole(node, *ranks)
        load_one_after_the_other(ranks, prompt)
        assert_nothing_leaks(node, 0)


def test_both_ranks_load_at_once(node: Node) -> None:
    """One of them in a process of its own; each compares every byte with what its own half has to hold."""
    with (
        Engine(node.run_dir, tenant="at once", shard=0, shards=2) as one,
        EngineProcess(node, tenant="at once", shard=1, shards=2) as two,
    ):
        until_whole(node, one)
        prompt = one.prompt(1, CHUNKS)
        assert one.save(prompt).wait(0) and two.ask("save", seed=1, chunks=CHUNKS)["saved"] == CHUNKS
        assert one.producer.flush(prompt, tiers=["ssd"]), "complete rows: of both ranks"
        for _ in range(5):
            one.drop_from(prompt, Tier.DRAM)
            two.tell("load", seed=1, chunks=CHUNKS)
            assert one.load(prompt).chunks == two.hear()["chunks"] == CHUNKS
    assert_nothing_leaks(node, LEASES)


def test_what_only_one_rank_has_saved_is_saved_by_the_other_alone(node: Node) -> None:
    ranks = [Engine(node.run_dir, tenant="alone", shard=rank, shards=2) for rank in range(2)]
    until_whole(node, *ranks)
    prompt = ranks[0].prompt(1, CHUNKS)
    assert ranks[0].save(prompt).saved == CHUNKS
    assert ranks[0].save(prompt).known == CHUNKS
    assert not ranks[0].producer.flush(prompt, tiers=["ssd"], timeout_s=0.2), "half of each row"
    until(lambda: ranks[0].producer.stats().get("persisted_chunks", 0) >= CHUNKS, "told to who saved it")
    ranks[0].drop_from(prompt, Tier.DRAM)
    assert [rank.found(prompt) for rank in ranks] == [0, 0]
    assert ranks[0].save(prompt).known == CHUNKS, "its own shard lies below"
    assert ranks[1].save(prompt).saved == CHUNKS
    with ranks[0].producer.lookup(prompt) as one, ranks[1].producer.lookup(prompt) as two:
        assert (one.by_tier, two.by_tier) == ({Tier.SSD: CHUNKS}, {Tier.DRAM: CHUNKS})
    results: list[LoadResult] = []
    threads = [threading.Thread(target=lambda rank=rank: results.append(rank.load(prompt))) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [result.chunks for result in results] == [CHUNKS] * 2
    assert ranks[0].producer.flush(prompt, tiers=["ssd"])
    until(lambda: ranks[1].producer.stats().get("persisted_chunks", 0) >= CHUNKS, "and the other's to the other")
    for rank in ranks:
        rank.close()
    assert_nothing_leaks(node, LEASES)
