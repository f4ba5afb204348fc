"""A node that is not there yet, comes, goes, comes back, and is another one then: engines notice and are not harmed."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import msgspec
import numpy as np
import pytest
import yaml
from rig import BIG, CALM, CHUNK_TOKENS, DRAM_ONLY, LAYOUT, WAIT_S, Engine, assert_nothing_leaks, tokens_of, until
from rig import until_whole as until_registered

from lmpipe.engines.paged import PagedEngine
from lmpipe.handles import Tier
from lmpipe.producer import Producer
from lmpipe.testing import Node

LEASES = 8


@pytest.fixture
def node() -> Iterator[Node]:
    """Not started yet."""
    node = Node(DRAM_ONLY)
    yield node
    node.close()


def refill(node: Node, changes: dict[str, object]) -> None:
    """Change the topology file of a stopped node."""
    plain = yaml.safe_load(node.file.read_text())
    plain["tiers"]["dram"] |= changes
    node.file.write_text(yaml.safe_dump(plain))


@pytest.mark.parametrize("mapped", [False, True])
def test_an_engine_that_is_there_first_registers_when_the_node_comes(node: Node, mapped: bool) -> None:
    memory = PagedEngine(LAYOUT, 64, segment=node.directory / "pages.shm" if mapped else None)
    producer = Producer(node.run_dir, LAYOUT, model="test", pages=memory.source)
    pool = None if mapped else memory.pool
    early = producer.prompt(tokens_of(1, 32))  # keyed with the default chunk size: this node's is another
    assert producer.chunk_tokens != CHUNK_TOKENS
    per_chunk = LAYOUT.chunk_pages(producer.chunk_tokens)
    ids = np.arange(per_chunk, dtype=np.int32)[None]
    assert producer.state == "absent"
    assert producer.lookup(early).chunks == 0
    assert producer.save(early, pool, ids).dropped == {"lmpipe absent": 1}
    assert producer.invalidate(early) == -1
    assert (producer.prefetch(early), producer.pin(early), producer.flush()) == (0, 0, True)
    node.start()
    assert producer.wait_ready(WAIT_S)
    assert producer.chunk_tokens == CHUNK_TOKENS
    late = producer.save(early, pool, ids)
    assert late.wait(WAIT_S) is False, "keys of another chunk size are dropped, not raised at the engine"
    assert producer.lookup(early).chunks == 0
    prompt = producer.prompt(tokens_of(1, 4))
    pages = memory.allocate(4, CHUNK_TOKENS)
    memory.fill(prompt.keys, pages)
    assert producer.save(prompt, pool, pages).wait(WAIT_S)
    assert producer.load(producer.lookup(prompt), memory.pool, pages).chunks == 4
    assert memory.wrong(prompt.keys, pages) == []
    producer.close()
    memory.close()


def test_down_and_up_again_with_and_without_the_arena(node: Node) -> None:
    node.start()
    with Engine(node.run_dir) as engine, Engine(node.run_dir, pages_in=node.directory) as mapped:
        prompt = engine.prompt(1, 8)
        assert engine.save(prompt).wait(0)
        node.restart(keep_dram=True)
        until_registered(node, engine, mapped)
        assert engine.load(prompt).chunks == 8
        assert mapped.load(mapped.prompt(1, 8)).chunks == 8

        held = engine.producer.lookup(prompt)
        node.stop()
        until(lambda: engine.producer.state == "absent", "it is noticed")
        ids = engine.memory.allocate(8, CHUNK_TOKENS)
        assert engine.producer.load(held, engine.memory.pool, ids).chunks == 8, "what is mapped is there still"
        assert engine.memory.wrong(prompt.keys, ids) == []
        engine.memory.free(ids)
        assert engine.send(prompt, ids).dropped
        stale = engine.producer.lookup(prompt)
        node.start()
        until_registered(node, engine, mapped)
        assert engine.found(prompt) == 0, "a new node knows nothing"
        for by in (engine, mapped):
            assert by.save(by.prompt(2, 8)).wait(0)
            assert by.load(by.prompt(2, 8)).chunks == 8
        stale.release()
        assert_nothing_leaks(node, LEASES)


def test_a_node_killed_with_sigkill_and_started_with_another_size(node: Node) -> None:
    node.start()
    with Engine(node.run_dir) as engine, Engine(node.run_dir, pages_in=node.directory) as mapped:
        for capacity in ("16MiB", "8MiB"):
            prompt = engine.prompt(1, 8)
            assert engine.save(prompt).wait(0)
            node.kill("all", signal.SIGKILL)
            refill(node, {"capacity": capacity})
            node.start()
            until_registered(node, engine, mapped)
            for by in (engine, mapped):
                assert by.save(by.prompt(3, 8)).wait(0)
                assert by.load(by.prompt(3, 8)).chunks == 8
            assert_nothing_leaks(node, LEASES)


def test_what_a_small_node_refuses_a_larger_one_takes(node: Node, caplog: pytest.LogCaptureFixture) -> None:
    refill(node, {"capacity": "1MiB", "slots": 16})
    node.start()
    with Engine(node.run_dir, layout=BIG, pages=8) as engine:
        until(lambda: engine.producer.state == "refused")
        assert "raise tiers.dram.capacity" in engine.producer.reason
        node.kill("supervisor")
        node.start()  # the same node, its note written again
        assert engine.producer.wait_ready(0) is False
        node.stop()
        refill(node, {"capacity": "16MiB"})
        node.start()
        until_registered(node, engine)
        assert engine.save(engine.prompt(1, 2)).wait(0)
        assert engine.load(engine.prompt(1, 2)).chunks == 2
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1 and "lmpipe refused this engine" in warnings[0], warnings


def test_a_node_of_another_version_is_a_miss_with_one_warning(node: Node, caplog: pytest.LogCaptureFixture) -> None:
    node.start()
    info = node.info
    node.kill("all")
    msgspec.structs.replace(info, version=info.version + 1).write()
    with Engine(node.run_dir, wait_s=0) as engine:
        assert engine.found(engine.prompt(1, 32)) == 0
        beat = engine.producer._link._next_beat_s
        until(lambda: engine.producer._link._next_beat_s > beat, "it has looked again")
        assert engine.producer.state == "absent"
        assert f"version {info.version + 1}, this lmpipe speaks {info.version}" in engine.producer.reason
        node.start()  # by this lmpipe: what the other left is not taken over, but nothing of it is in the way
        until_registered(node, engine)
        assert engine.save(engine.prompt(1, 2)).wait(0)
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1 and "use the same lmpipe on both sides" in warnings[0], warnings


def test_the_run_directory_removed_under_a_living_engine(node: Node) -> None:
    node.start()
    with Engine(node.run_dir) as engine:
        assert engine.save(engine.prompt(1, 4)).wait(0)
        node.kill("all")
        node.close()
        assert not node.run_dir.exists()
        until(lambda: engine.producer.state == "absent")
        assert engine.load(engine.prompt(1, 4)).chunks in (0, 4)
        assert engine.send(engine.prompt(1, 4), engine.prefill(engine.prompt(1, 4))).dropped
        node.directory.mkdir(mode=0o700)
        with Node(DRAM_ONLY | {"run_dir": str(node.run_dir)}) as again:
            until_registered(again, engine)
            assert engine.save(engine.prompt(1, 4)).wait(0)
            assert engine.load(engine.prompt(1, 4)).chunks == 4


def test_a_find_of_a_former_node_is_never_loaded_from_slots_of_this_one() -> None:
    """Both arenas have a slot of that number and generation; one holds the chunk, the engine has the other mapped."""
    with Node(CALM) as node, Engine(node.run_dir) as engine:
        until_registered(node, engine)
        for seed in (1, 2):
            assert engine.save(engine.prompt(seed, 8)).wait(0)
        prompt = engine.prompt(3, 10)
        assert engine.save(prompt).wait(0)
        assert engine.producer.flush(prompt, tiers=("ssd",))
        engine.drop_from(prompt, Tier.DRAM, first=2)
        found = engine.producer.lookup(prompt)
        assert found.by_tier == {Tier.DRAM: 2, Tier.SSD: 8}
        node.restart(keep_dram=False)
        until_registered(node, engine)
        ids = engine.memory.allocate(10, CHUNK_TOKENS)
        result = engine.producer.load(found, engine.memory.pool, ids)
        assert engine.memory.wrong(prompt.keys[: result.chunks], ids) == []
        assert (result.chunks, result.reason) == (2, "lmpipe was started anew")
        engine.memory.free(ids)
        until(lambda: engine.load(prompt).chunks == 10)
