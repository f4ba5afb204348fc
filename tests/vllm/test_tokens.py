"""Greedy tokens in fp32 are those of an engine without a cache, whatever was loaded, from wherever, up to any token."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from cached import CHUNK, ask, ask_with_salt, connector, only, producers, ready, scramble, settled, stats, tiers, tokens
from harness import Engine
from processes import EngineProcess

from lmpipe.testing import Node

BLOCK = 32


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    with Node(tiers(tmp_path_factory.mktemp("tiers"))) as node:
        yield node


@pytest.fixture(scope="module")
def engine(node: Node, llama: Path) -> Iterator[Engine]:
    with Engine(llama, connector(node)) as engine:
        yield ready(engine)


@pytest.mark.parametrize("tier", ["dram", "ssd", "remote"])
def test_warm_from_every_tier(node: Node, engine: Engine, plain: EngineProcess, tier: str) -> None:
    prompts = [tokens(length) for length in (5 * CHUNK + 9, 2 * CHUNK, 3 * CHUNK - 1)]
    wanted = plain.generate(prompts, 8)
    assert ask(engine, prompts) == (wanted, [0, 0, 0])
    for prompt in prompts:
        settled(engine, tier, prompt=prompt)
    only(node, tier)
    engine.reset_prefix_cache()
    before = stats(engine)
    got, cached = ask(engine, prompts)
    assert got == wanted
    assert cached == [5 * CHUNK, 2 * CHUNK, 2 * CHUNK]
    after = stats(engine)
    # What was fetched ahead counts as found in DRAM by then.
    came = {name: after.get(name, 0) - before.get(name, 0) for name in ("hit_chunks_dram", f"hit_chunks_{tier}")}
    assert sum(came.values()) == 9
    assert after.get("load_failed_chunks", 0) == before.get("load_failed_chunks", 0)
    assert engine.free_blocks == engine.scheduler.kv_cache_manager.block_pool.num_gpu_blocks - 1


def test_a_partial_hit_at_every_boundary(engine: Engine, plain: EngineProcess) -> None:
    whole = tokens(4 * CHUNK)
    ask(engine, [whole])
    settled(engine)
    shared = (0, 1, BLOCK, CHUNK - 1, CHUNK, CHUNK + 1, CHUNK + BLOCK, 2 * CHUNK, 4 * CHUNK - 1, 4 * CHUNK)
    prompts = [whole[:length] + tokens(20) for length in shared] + [whole, whole[:CHUNK], whole[: CHUNK + 1]]
    wanted = plain.generate(prompts, 8)
    for prompt, want, length in zip(prompts, wanted, (*shared, 4 * CHUNK, CHUNK, CHUNK + 1), strict=True):
        engine.reset_prefix_cache()
        assert ask(engine, [prompt]) == ([want], [length // CHUNK * CHUNK]), f"{length} shared tokens"


def test_a_load_starts_inside_a_chunk(engine: Engine, plain: EngineProcess) -> None:
    prompt = tokens(3 * CHUNK + 5)
    wanted = plain.generate([prompt], 8)
    assert ask(engine, [prompt])[0] == wanted
    settled(engine)
    engine.reset_prefix_cache()
    ask(engine, [prompt[: BLOCK + 1]], 1)  # the engine's own cache now has the first block, half a chunk
    before = stats(engine)["loaded_bytes"]
    assert ask(engine, [prompt]) == (wanted, [3 * CHUNK])
    assert stats(engine)["loaded_bytes"] > before


def test_answers_are_saved_too(engine: Engine, plain: EngineProcess) -> None:
    prompt = tokens(CHUNK - 10)
    answer = ask(engine, [prompt], 2 * CHUNK)[0][0]
    settled(engine)
    engine.reset_prefix_cache()
    turn = prompt + answer + tokens(7)
    assert ask(engine, [turn]) == (plain.generate([turn], 8), [2 * CHUNK])


def test_many_at_once(engine: Engine, plain: EngineProcess) -> None:
    document = tokens(2 * CHUNK + 3)
    prompts = [document[: CHUNK * (1 + n % 3)] + tokens(10 + n) for n in range(12)]
    wanted = plain.generate(prompts, 12)
    for _ in range(2):
        assert ask(engine, prompts, 12)[0] == wanted
        settled(engine)
        engine.reset_prefix_cache()


def test_salts_keep_caches_apart(engine: Engine) -> None:
    prompt = tokens(2 * CHUNK + 1)

    def cached(salt: str) -> int:
        engine.reset_prefix_cache()
        found = ask_with_salt(engine, prompt, salt)
        settled(engine)
        return found

    assert [cached(salt) for salt in ("a", "b", "", "a", "b", "")] == [0, 0, 0] + [2 * CHUNK] * 3


def test_scrambled_pages_change_the_tokens(node: Node, engine: Engine, plain: EngineProcess) -> None:
    """The negative control: what is loaded is really what the model attends to."""
    prompt = tokens(4 * CHUNK + 2)
    wanted = plain.generate([prompt], 8)
    assert ask(engine, [prompt])[0] == wanted
    settled(engine)
    engine.reset_prefix_cache()
    scramble(engine, prompt)
    got, cached = ask(engine, [prompt])
    assert cached == [4 * CHUNK]
    assert got != wanted
    worker = producers(engine)[1]
    worker.invalidate(worker.prompt(prompt))
