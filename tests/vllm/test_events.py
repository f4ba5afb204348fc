"""What routers and operators are told: KV events, where hits came from, and what a reset means to whom."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cached import CHUNK, ask, connector, idle, only, producers, ready, settled, tiers, tokens, until
from harness import Engine
from processes import EngineProcess
from vllm.config import KVEventsConfig
from vllm.distributed.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, KVCacheEvent
from vllm.v1.core.kv_cache_utils import maybe_convert_block_hash
from vllm.v1.metrics.cache_hit_source import CacheHitSource

from lmpipe.testing import Node

BLOCK = 32
OWNED = {"medium": "CPU", "ownership": "lmpipe"}


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """Room in DRAM for three dozen chunks of 128 KiB."""
    small = {"capacity": "5MiB", "slots": 64}
    with Node(tiers(tmp_path_factory.mktemp("tiers"), dram=small)) as node:
        yield node


@pytest.fixture(scope="module")
def engine(node: Node, llama: Path) -> Iterator[Engine]:
    events = KVEventsConfig(enable_kv_cache_events=True, publisher="null")
    with Engine(llama, connector(node), kv_events_config=events) as engine:
        yield ready(engine)


@pytest.fixture
def told(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[KVCacheEvent]:
    """What of lmpipe's goes into vLLM's stream from here on."""
    list(engine.scheduler_connector.take_events())
    told: list[KVCacheEvent] = []
    publish = engine.scheduler.kv_event_publisher.publish

    def listen(batch: Any) -> None:
        told.extend(e for e in batch.events if isinstance(e, AllBlocksCleared) or e.ownership == "lmpipe")
        publish(batch)

    monkeypatch.setattr(engine.scheduler.kv_event_publisher, "publish", listen)
    return told


def hashes(engine: Engine, monkeypatch: pytest.MonkeyPatch, prompt: list[int]) -> list[Any]:
    """Ask the prompt; vLLM's own names of its blocks."""
    seen: list[Any] = []
    connector = engine.scheduler_connector
    arrived = connector._scheduler.arrived
    with monkeypatch.context() as patch:
        patch.setattr(connector._scheduler, "arrived", lambda request: (seen.append(request), arrived(request))[1])
        ask(engine, [prompt], 1)
    return [maybe_convert_block_hash(one) for one in seen[0].block_hashes]


def test_what_is_saved_and_evicted_is_told(
    engine: Engine, told: list[KVCacheEvent], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = tokens(3 * CHUNK + 5)
    names = hashes(engine, monkeypatch, prompt)
    settled(engine)
    idle(engine)
    ask(engine, [tokens(8)], 1)
    stored = [event for event in told if isinstance(event, BlockStored)]
    assert [name for event in stored for name in event.block_hashes] == names[: 3 * CHUNK // BLOCK]
    assert [token for event in stored for token in event.token_ids] == prompt[: 3 * CHUNK]
    assert stored[0].parent_block_hash is None
    assert all({"medium": event.medium, "ownership": event.ownership} == OWNED for event in stored)
    assert {event.block_size for event in stored} == {BLOCK}

    def removed() -> set[Any]:
        ask(engine, [tokens(4 * CHUNK)], 1)
        settled(engine)
        return {name for event in told if isinstance(event, BlockRemoved) for name in event.block_hashes}

    until(lambda: removed() >= set(names[: 3 * CHUNK // BLOCK]), "the prompt is evicted, and told so")
    assert all(
        {"medium": event.medium, "ownership": event.ownership} == OWNED
        for event in told
        if isinstance(event, BlockRemoved)
    )


def test_where_hits_came_from(engine: Engine, node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = tokens(5 * CHUNK + 7)
    ask(engine, [prompt[: 2 * CHUNK]], 1)
    settled(engine, "ssd", prompt=prompt[: 2 * CHUNK])
    only(node, "ssd")
    engine.reset_prefix_cache()
    monkeypatch.setattr(producers(engine)[0], "prefetch", lambda prompt, exact: 0)
    splits: list[dict[CacheHitSource, int]] = []
    sources = engine.scheduler_connector._scheduler.sources

    def seen(request: Any, count: int) -> dict[CacheHitSource, int]:
        splits.append(sources(request, count))
        assert sum(splits[-1].values()) == count
        return splits[-1]

    monkeypatch.setattr(engine.scheduler_connector._scheduler, "sources", seen)
    assert ask(engine, [prompt], 1)[1] == [2 * CHUNK]
    settled(engine)
    engine.reset_prefix_cache()
    ask(engine, [prompt[: BLOCK + 1]], 1)  # half a chunk is in the engine
    assert ask(engine, [prompt], 1)[1] == [5 * CHUNK]
    disk, host = CacheHitSource.DISK, CacheHitSource.HOST
    assert splits == [{disk: 2 * CHUNK}, {host: 5 * CHUNK - BLOCK}]


def test_a_reset(engine: Engine, node: Node, llama: Path, plain: EngineProcess, told: list[KVCacheEvent]) -> None:
    """As after an update of weights in place: what is saved from then on is this engine's alone."""
    prompts = [tokens(3 * CHUNK + 5) for _ in range(2)]
    wanted = plain.generate(prompts, 8)
    assert ask(engine, prompts) == (wanted, [0, 0])
    settled(engine, "ssd", prompt=prompts[0])
    with EngineProcess(llama, connector(node)) as other:
        until(lambda: other.generate_with_hits(prompts[:1], 8) == (wanted[:1], [3 * CHUNK]), "the other engine hits")
        assert engine.reset_prefix_cache(connector=True)
        assert ask(engine, prompts) == (wanted, [0, 0])
        assert any(isinstance(event, AllBlocksCleared) for event in told)
        settled(engine)
        engine.reset_prefix_cache()
        assert ask(engine, prompts) == (wanted, [3 * CHUNK] * 2)
        other.reset_prefix_cache()
        assert other.generate_with_hits(prompts, 8) == (wanted, [0, 0])
    idle(engine)
    assert engine.free_blocks == engine.scheduler.kv_cache_manager.block_pool.num_gpu_blocks - 1
