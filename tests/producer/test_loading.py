"""Lookups and loads as an engine sees them: threads, holds, deadlines, parts of chunks, what is worth loading."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from rig import CALM, CHUNK_TOKENS, Engine, assert_nothing_leaks, until, until_whole

from lmpipe.handles import Tier
from lmpipe.producer.admission import EXPLORE_EVERY
from lmpipe.testing import Node

Make = Callable[..., Engine]


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    """DRAM and SSD; few holds for each producer."""
    with Node({**CALM, "engines": {"hold_entries": 64}}) as node:
        until_whole(node)
        yield node


def test_many_threads_share_a_producer(make_engine: Make, mapped: bool) -> None:
    engine = make_engine(mapped=mapped)
    lock = threading.Lock()

    def work(number: int) -> int:
        loaded = 0
        for turn in range(12):
            prompt = engine.producer.prompt(np.arange(6 * CHUNK_TOKENS) + (number + turn) % 5)
            with lock:
                ids, into = (engine.memory.allocate(6, CHUNK_TOKENS) for _ in range(2))
            engine.memory.fill(prompt.keys, ids)
            ticket = engine.send(prompt, ids)
            with engine.producer.lookup(prompt):
                pass
            assert ticket.wait(30), ticket.dropped
            result = engine.producer.load(engine.producer.lookup(prompt), engine.memory.pool, into)
            assert engine.memory.wrong(prompt.keys[: result.chunks], into) == []
            loaded += result.chunks
            with lock:
                engine.memory.free(ids)
                engine.memory.free(into)
        return loaded

    with ThreadPoolExecutor(6) as pool:
        assert sum(pool.map(work, range(6))) > 0
    assert engine.holding == 0
    stats = engine.producer.stats()
    assert stats["save_chunks"] == stats["saved_chunks"] + stats.get("known_chunks", 0) == 6 * 12 * 6


def test_holds_are_bounded_and_the_oldest_are_lost_first(make_engine: Make) -> None:
    engine = make_engine()
    prompts = [engine.prompt(seed, 30) for seed in (1, 2, 3)]
    for prompt in prompts:
        assert engine.save(prompt).wait(0)
    first, second = engine.producer.lookup(prompts[0]), engine.producer.lookup(prompts[1])
    assert engine.holding == 60
    third = engine.producer.lookup(prompts[2])
    assert first.holds is not None and second.holds is not None and third.holds is not None
    assert (first.holds.lost, second.holds.lost, third.holds.lost) == (True, False, False)
    ids = engine.memory.allocate(30, CHUNK_TOKENS)
    lost = engine.producer.load(first, engine.memory.pool, ids)
    assert (lost.chunks, lost.reason) == (0, "hold lost"), "what is no longer held may have changed under the copy"
    for prompt, found in zip(prompts[1:], (second, third), strict=True):
        assert engine.producer.load(found, engine.memory.pool, ids).chunks == 30
        assert engine.memory.wrong(prompt.keys, ids) == []
    assert engine.holding == 0
    assert engine.load(prompts[0]).chunks == 30


def test_a_find_is_released_by_leaving_it(make_engine: Make) -> None:
    engine = make_engine()
    prompt = engine.prompt(1, 5)
    assert engine.save(prompt).wait(0)
    with engine.producer.lookup(prompt, max_tokens=3 * CHUNK_TOKENS + 5) as found:
        assert (found.chunks, found.tokens, found.by_tier) == (3, 48, {Tier.DRAM: 3})
        assert engine.holding == 3
    found.release()
    assert engine.holding == 0


def test_a_find_that_nobody_gave_back_ends_with_its_producer(make_engine: Make, node: Node) -> None:
    engine, other = make_engine(), make_engine()
    prompt = engine.prompt(1, 5)
    assert engine.save(prompt).wait(0)
    forgotten = engine.producer.lookup(prompt)
    assert forgotten.chunks == 5
    engine.producer.close()
    assert_nothing_leaks(node, leases=8)
    ids = other.memory.allocate(5, CHUNK_TOKENS)
    assert engine.producer.load(forgotten, engine.memory.pool, ids).reason == "lmpipe absent"
    forgotten.release()
    assert other.load(other.prompt(1, 5)).chunks == 5


def test_a_load_starts_within_a_chunk_and_writes_nothing_before(make_engine: Make) -> None:
    """The engine has the first pages already: -1 leaves them alone."""
    engine = make_engine()
    prompt = engine.prompt(1, 3)
    assert engine.save(prompt).wait(0)
    ids = engine.memory.allocate(3, CHUNK_TOKENS)
    engine.memory.memory[:, ids.ravel()] = 0xEE
    partial = ids.copy()
    partial[0, :2] = -1
    result = engine.producer.load(engine.producer.lookup(prompt), engine.memory.pool, partial)
    assert result.tokens == 48
    assert (engine.memory.memory[:, ids[0, :2]] == 0xEE).all()
    engine.memory.memory[:, ids[0, :2]] = engine.memory.content(prompt.keys[0], 4)[:, :2]
    assert engine.memory.wrong(prompt.keys, ids) == []


def test_fewer_pages_load_fewer_chunks_and_no_chunk_counts_as_failed(make_engine: Make) -> None:
    engine = make_engine()
    prompt = engine.prompt(1, 6)
    assert engine.save(prompt).wait(0)
    ids = engine.memory.allocate(4, CHUNK_TOKENS)
    result = engine.producer.load(engine.producer.lookup(prompt), engine.memory.pool, ids)
    assert (result.chunks, result.reason) == (4, "")
    assert "load_failed_chunks" not in engine.producer.stats()


def test_what_lies_below_is_loaded_and_then_lies_in_dram(make_engine: Make, mapped: bool, node: Node) -> None:
    engine = make_engine(mapped=mapped)
    prompt = engine.save_below(1, 8)
    with engine.producer.lookup(prompt) as found:
        assert found.by_tier == {Tier.SSD: 8}
    assert engine.load(prompt).by_tier == {Tier.SSD: 8}
    assert engine.load(prompt).by_tier == {Tier.DRAM: 8}
    engine.drop_from(prompt, Tier.DRAM, first=5)
    assert engine.load(prompt).by_tier == {Tier.DRAM: 5, Tier.SSD: 3}
    assert_nothing_leaks(node, 8)


def test_a_prefetch_makes_the_next_load_a_dram_hit(make_engine: Make) -> None:
    engine = make_engine()
    prompt = engine.save_below(1, 8)
    assert engine.producer.prefetch(prompt) == 8

    def in_dram() -> bool:
        with engine.producer.lookup(prompt) as found:
            return found.by_tier == {Tier.DRAM: 8}

    until(in_dram)
    assert engine.producer.prefetch(prompt) == 0
    assert engine.load(prompt).by_tier == {Tier.DRAM: 8}


def test_a_deadline_that_has_passed_ends_the_load_and_not_the_cache(make_engine: Make, node: Node) -> None:
    engine = make_engine()
    prompt = engine.save_below(1, 8)
    result = engine.load(prompt, deadline_ms=0)
    assert result.chunks < 8
    assert result.reason
    until(lambda: engine.load(prompt).chunks == 8)
    assert_nothing_leaks(node, 8)


def test_what_is_invalidated_while_it_comes_up_is_answered_and_not_kept(make_engine: Make, node: Node) -> None:
    engine, other = make_engine(), make_engine()
    for seed in range(10):
        prompt = engine.save_below(seed, 12)
        removing = threading.Thread(target=other.producer.invalidate, args=(other.prompt(seed, 12),))
        removing.start()
        started_s = time.monotonic()
        engine.load(prompt, deadline_ms=40_000)
        assert time.monotonic() - started_s < 20, "the deadline is no answer"
        removing.join()
        assert engine.found(prompt) == 0
    assert_nothing_leaks(node, 16)


def test_a_tier_slower_than_prefill_is_not_loaded_but_tried_now_and_then(make_engine: Make) -> None:
    engine = make_engine()
    prompt = engine.save_below(1, 6)
    admission = engine.producer.admission
    assert engine.found(prompt) == 6, "nothing is known yet"
    admission.observe_prefill(1000, 0.001)
    admission.load_bytes_per_s[Tier.SSD] = 10.0
    found = [engine.found(prompt) for _ in range(2 * EXPLORE_EVERY)]
    assert found.count(0) == 2 * EXPLORE_EVERY - 2
    assert found.count(6) == 2
    assert engine.save(engine.prompt(2, 2)).wait(0)
    assert engine.load(engine.prompt(2, 2)).chunks == 2, "DRAM is always worth it"
    admission.load_bytes_per_s[Tier.SSD] = 1e12
    assert engine.found(prompt) == 6


def test_the_tail_of_a_prompt_is_evicted_before_its_head_and_touch_counts(node: Node) -> None:
    small: dict[str, Any] = {"tiers": {"ssd": None, "dram": {"capacity": "1MiB", "slots": 48}}}
    with Node(small) as tiny, Engine(tiny.run_dir, pages_in=tiny.directory) as engine:
        old, kept = engine.prompt(1, 16), engine.prompt(2, 16)
        assert engine.save(old).wait(0)
        assert engine.save(kept).wait(0)
        engine.producer.touch(old)
        assert engine.save(engine.prompt(3, 24)).wait(0)
        assert engine.found(old) == 16
        assert engine.found(kept) == 8, "its head"
        assert engine.load(kept).chunks == 8
        assert engine.producer.pin(kept) == 8
        for seed in range(4, 10):
            assert engine.save(engine.prompt(seed, 24)).wait(0)
        assert engine.found(kept) == 8
        assert engine.found(old) == 0
        assert engine.producer.unpin(kept) == 8
        assert engine.producer.pin(engine.prompt(99, 4)) == 0
        for seed in range(10, 13):
            assert engine.save(engine.prompt(seed, 24)).wait(0)
        assert engine.found(kept) == 0
