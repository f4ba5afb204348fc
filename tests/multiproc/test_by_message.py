"""Lookups of an engine that cannot map the index: gather is asked, and says what the engine would have read itself."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest
from rig import DRAM_ONLY, Engine, all_tiers, counters, holds, until, until_whole

from lmpipe.handles import Tier
from lmpipe.keys import Prompt
from lmpipe.producer import Found
from lmpipe.testing import Node

CHUNKS = 6
FOREIGN = "LMDB 0.9.1, pid namespace 1"
PATIENT: dict[str, Any] = {"engines": {"lookup_deadline_ms": 20_000}}


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    with Node(all_tiers(tmp_path_factory.mktemp("remote")) | PATIENT) as node:
        yield node


@pytest.fixture
def foreign(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on, whoever attaches has another LMDB than the node."""
    monkeypatch.setattr("lmpipe.index.reader_identity", lambda: FOREIGN)


@pytest.fixture
def pair(node: Node, request: pytest.FixtureRequest) -> Iterator[tuple[Engine, Engine]]:
    """One that maps the index, and one that asks."""
    tenant = request.node.nodeid
    with Engine(node.run_dir, tenant=tenant) as mapping:
        request.getfixturevalue("foreign")
        with Engine(node.run_dir, tenant=tenant) as asking:
            assert not by_message(mapping) and by_message(asking)
            until_whole(node, mapping, asking)
            yield mapping, asking


def by_message(engine: Engine) -> bool:
    attachment = engine.producer._link.attachment
    assert attachment is not None
    return attachment.by_message


def what(found: Found) -> list[tuple[Any, ...]]:
    """Everything of a find but who holds it."""
    return [(record.tobytes(), int(tier)) for record, tier in zip(found.records, found.tiers, strict=True)]


def assert_same(pair: tuple[Engine, Engine], prompt: Prompt, chunks: int, **how: Any) -> None:
    mapping, asking = pair
    with mapping.producer.lookup(prompt, **how) as one, asking.producer.lookup(prompt, **how) as other:
        assert what(one) == what(other)
        assert one.chunks == chunks
        assert list(one.dram) == list(other.dram)
        assert mapping.holding == asking.holding == len(one.dram)
    assert mapping.holding == asking.holding == 0


def test_the_same_is_found_wherever_it_lies(pair: tuple[Engine, Engine]) -> None:
    mapping, asking = pair
    prompt = mapping.save_below(1, CHUNKS)
    assert_same(pair, prompt, CHUNKS)
    assert asking.load(prompt).chunks == CHUNKS  # from SSD
    assert_same(pair, prompt, CHUNKS)  # now in DRAM
    assert_same(pair, prompt, CHUNKS - 2, first_chunk=2)
    assert_same(pair, prompt, 2, max_tokens=2 * mapping.producer.chunk_tokens)
    mapping.drop_from(prompt, Tier.DRAM, first=2)
    assert_same(pair, prompt, CHUNKS)  # two in DRAM, the rest below
    mapping.drop_from(prompt, Tier.SSD, Tier.DRAM, first=4)
    assert_same(pair, prompt, CHUNKS)  # in all three tiers
    assert asking.load(prompt).chunks == CHUNKS
    mapping.drop_from(prompt, *Tier, first=1)
    assert_same(pair, prompt, 1)
    assert_same(pair, mapping.prompt(2, CHUNKS), 0)
    asked = asking.producer.stats()
    assert asked["lookups_by_message"] >= asked["lookups"] and not asked.get("lookups_unanswered")
    assert "lookups_by_message" not in mapping.producer.stats()


def test_an_engine_that_asks_saves_loads_and_prefetches(pair: tuple[Engine, Engine], node: Node) -> None:
    mapping, asking = pair
    prompt = asking.save_below(1, CHUNKS)
    assert asking.save(prompt).known == CHUNKS
    assert asking.producer.prefetch(prompt) == CHUNKS
    until(lambda: asking.producer._all_in(prompt, Tier.DRAM), "what was prefetched is in DRAM")
    assert asking.load(prompt).by_tier == {Tier.DRAM: CHUNKS}
    assert mapping.load(prompt).chunks == CHUNKS
    assert counters(node)["gather_lookups"] >= 3


def test_chunks_that_have_lost_something(pair: tuple[Engine, Engine]) -> None:
    mapping = pair[0]
    prompt = mapping.prompt(1, CHUNKS)
    ids = mapping.prefill(prompt)
    pool, lossy = mapping.memory.pool, 3
    assert mapping.producer.save(prompt, pool, ids[:lossy]).wait(20)
    assert mapping.producer.save(prompt, pool, ids[lossy:], first_chunk=lossy, fidelity=7).wait(20)
    assert_same(pair, prompt, CHUNKS)
    assert_same(pair, prompt, lossy, exact=True)


def test_shards_of_two_ranks(node: Node, request: pytest.FixtureRequest) -> None:
    tenant = request.node.nodeid
    ranks = [Engine(node.run_dir, tenant=tenant, shard=shard, shards=2) for shard in (0, 1)]
    request.getfixturevalue("foreign")
    asking = [Engine(node.run_dir, tenant=tenant, shard=shard, shards=2) for shard in (0, 1)]
    try:
        until_whole(node, *ranks, *asking)
        prompt = ranks[0].prompt(1, CHUNKS)
        assert ranks[0].save(prompt).wait(0)
        for shard in (0, 1):
            assert_same((ranks[shard], asking[shard]), prompt, 0)  # the other rank's half is missing
        assert ranks[1].save(prompt).wait(0)
        assert ranks[1].producer.flush(prompt, tiers=[Tier.SSD])
        ranks[1].drop_from(prompt, Tier.DRAM)
        for shard in (0, 1):
            assert_same((ranks[shard], asking[shard]), prompt, CHUNKS)
            assert asking[shard].load(prompt).chunks == CHUNKS
    finally:
        for engine in (*ranks, *asking):
            engine.close()


def test_what_is_held_by_one_that_asks_is_not_evicted(foreign: None) -> None:
    small = DRAM_ONLY | PATIENT | {"tiers": {"dram": {"capacity": "1MiB", "slots": 128}, "ssd": None}}
    with Node(small) as node, Engine(node.run_dir) as engine:
        assert by_message(engine)
        prompt = engine.prompt(1, CHUNKS)
        assert engine.save(prompt).wait(0)
        found = engine.producer.lookup(prompt)
        assert found.chunks == len(holds(node)) == CHUNKS
        for seed in range(2, 40):
            engine.save(engine.prompt(seed, CHUNKS))
        assert counters(node)["gather_evicted_chunks"]
        ids = engine.memory.allocate(CHUNKS, engine.producer.chunk_tokens)
        assert engine.producer.load(found, engine.memory.pool, ids).chunks == CHUNKS
        assert engine.memory.wrong(prompt.keys, ids) == []
        assert not holds(node)


def test_gather_that_hangs_costs_one_deadline_and_is_asked_again_when_it_is_heard_of(foreign: None) -> None:
    with Node(DRAM_ONLY | {"engines": {"lookup_deadline_ms": 300}}) as node, Engine(node.run_dir) as engine:
        prompt = engine.prompt(1, CHUNKS)
        assert engine.save(prompt).wait(0)
        until(lambda: engine.found(prompt) == CHUNKS, "it is found")
        gather = node.kill("gather", signal.SIGSTOP)
        try:
            until(lambda: not engine.found(prompt), "nobody answers")
            before = engine.producer.stats()
            assert before["lookups_unanswered"] >= 1
            for _ in range(20):
                assert not engine.found(prompt)
            after = engine.producer.stats()
            # What gather had said before it was stopped may be heard once more; beyond that nothing is asked.
            assert after["lookups_by_message"] - before["lookups_by_message"] <= 1
            assert engine.producer.save(prompt, engine.memory.pool, engine.prefill(prompt)) is not None
        finally:
            os.kill(gather, signal.SIGCONT)
        until(lambda: engine.found(prompt) == CHUNKS, "it is found again")


def test_lookups_end_with_gather_and_come_back_with_it(foreign: None) -> None:
    with Node(DRAM_ONLY | PATIENT) as node, Engine(node.run_dir) as engine:
        prompt = engine.prompt(1, CHUNKS)
        assert engine.save(prompt).wait(0)
        assert engine.producer.mapped
        old = node.kill("gather")
        until(lambda: not engine.found(prompt), "nobody answers")
        node.wait_restarted("gather", old)
        until(lambda: engine.found(prompt) == CHUNKS, "it is found again")
        assert engine.load(prompt).chunks == CHUNKS
        assert not holds(node)


def test_an_index_that_cannot_be_opened_is_asked_for(node: Node, caplog: pytest.LogCaptureFixture) -> None:
    with Engine(node.run_dir) as engine:
        prompt = engine.prompt(1, CHUNKS)
        assert engine.save(prompt).wait(0)
    (locks,) = node.paths.index.glob("dram-*/lock.mdb")
    hidden = locks.rename(locks.with_name("hidden"))
    locks.mkdir()
    try:
        with Engine(node.run_dir) as engine:
            assert by_message(engine)
            assert "lookups go by message" in caplog.text and "Is a directory" in caplog.text
            assert engine.found(engine.prompt(1, CHUNKS)) == CHUNKS
    finally:
        locks.rmdir()
        hidden.rename(locks)


def test_more_keys_than_one_message_has_room_for(pair: tuple[Engine, Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    mapping, _ = pair
    prompt = mapping.prompt(1, CHUNKS)
    assert mapping.save(prompt).wait(0)
    monkeypatch.setattr("lmpipe.messages.MAX_LOOKUP_KEYS", 4)
    assert pair[1].found(prompt) == 4
