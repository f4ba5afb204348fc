"""Chunks that lie encoded in DRAM, with real processes: found and loaded as saved, whoever dies or reads meanwhile."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from numbers_engine import LAYOUT, NumbersEngine, dram
from rig import CALM, CHUNK_TOKENS, Engine, assert_nothing_leaks, bytes_in_use, counters, until, until_whole

from lmpipe.cli import main
from lmpipe.codecs import CODECS
from lmpipe.handles import Codec, Fidelity, Tier
from lmpipe.testing import Node

CHUNK_BYTES = LAYOUT.chunk_bytes(CHUNK_TOKENS)
CODEC_NAMES = [c.name for c in CODECS.values() if c.number not in (Codec.RAW, Codec.ADAPTIVE)]
FIDELITY = {codec.name: codec.fidelity for codec in CODECS.values()}
HOLDS_MORE = {"split": 1.1, "fp8": 1.3, "int4h": 1.7}


def encoded(node: Node) -> int:
    return counters(node)["gather_dram_encoded_chunks"]


@pytest.fixture(params=CODEC_NAMES)
def codec(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def node(codec: str) -> Iterator[Node]:
    with Node(dram(codec)) as node:
        yield node


@pytest.fixture
def engine(node: Node, codec: str) -> Iterator[Engine]:
    with NumbersEngine(node.run_dir, codec) as engine:
        yield engine


def test_what_is_saved_is_encoded_and_loaded(node: Node, engine: Engine, codec: str) -> None:
    prompt = engine.prompt(1, 20)
    assert engine.save(prompt).wait(0)
    until(lambda: encoded(node) == 20, "all is encoded")
    leased = 8 * CHUNK_BYTES
    until(lambda: bytes_in_use(node) - leased < 0.95 * 20 * CHUNK_BYTES, "the raw slots have gone")
    result = engine.load(prompt)
    assert (result.chunks, result.by_tier, result.fidelity) == (20, {Tier.DRAM: 20}, FIDELITY[codec])
    assert result.nbytes == 20 * CHUNK_BYTES, "bytes loaded are the engine's"
    assert counters(node)["gather_dram_saved_bytes"] > 0.1 * 20 * CHUNK_BYTES
    if FIDELITY[codec] == Fidelity.EXACT:
        assert engine.save(prompt).known == 20
    assert_nothing_leaks(node, 8)


def test_an_engine_with_several_threads_loads_the_same(node: Node, engine: Engine, codec: str) -> None:
    prompt = engine.prompt(2, 20)
    assert engine.save(prompt).wait(0)
    until(lambda: encoded(node) == 20, "all is encoded")
    with NumbersEngine(node.run_dir, codec, copy_threads=3) as other:
        assert other.load(prompt).chunks == 20


def test_a_restart_finds_them_as_they_lie(node: Node, engine: Engine) -> None:
    prompt = engine.prompt(3, 20)
    assert engine.save(prompt).wait(0)
    until(lambda: encoded(node) == 20, "all is encoded")
    node.restart(keep_dram=True)
    until_whole(node, engine)
    until(lambda: encoded(node) == 20, "they are encoded still")
    assert engine.load(prompt).by_tier == {Tier.DRAM: 20}
    assert counters(node)["gather_encoded_chunks"] == 0, "nothing was encoded again"


SOME = pytest.mark.parametrize("codec", ["split", "int4h"], indirect=True)


@SOME
def test_gather_killed_while_it_encodes_loses_nothing(node: Node, engine: Engine) -> None:
    draw = random.Random(5)
    kept = engine.prompt(4, 24)
    assert engine.save(kept).wait(0)
    for turn in range(8):
        order = "decompress" if turn % 2 else "compress"
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(main, [order, str(node.run_dir), "--timeout", "1"])
            time.sleep(draw.random() * 0.03)
            pid = node.kill("gather", signal.SIGKILL)
            assert engine.found(kept) == 24, "also while gather is dead"
            node.wait_restarted("gather", pid)
            asked.result()
        until_whole(node, engine)
        assert engine.load(kept).chunks == 24
    until(lambda: encoded(node) == 24, "all is encoded in the end")
    assert_nothing_leaks(node, 8)


@SOME
def test_no_lookup_misses_a_chunk_that_is_being_put_into_another_slot(node: Node, engine: Engine, codec: str) -> None:
    prompt = engine.prompt(5, 30)
    assert engine.save(prompt).wait(0)
    with NumbersEngine(node.run_dir, codec) as other, ThreadPoolExecutor(2) as pool:
        turning = True

        def read(reader: Engine) -> int:
            looks = 0
            while turning:
                assert reader.found(prompt) == 30
                looks += 1
                if looks % 10 == 0:
                    assert reader.load(prompt).chunks == 30
            return looks

        readers = [pool.submit(read, reader) for reader in (engine, other)]
        try:
            for _ in range(6):
                assert main(["decompress", str(node.run_dir)]) == 0
                assert main(["compress", str(node.run_dir)]) == 0
        finally:
            turning = False
        assert all(reader.result() > 10 for reader in readers)
    assert_nothing_leaks(node, 8)


@pytest.mark.parametrize("codec", HOLDS_MORE)
def test_equal_bytes_of_dram_hold_more(codec: str) -> None:
    prompts, chunks = 70, 8
    hits: dict[str, int] = {}
    for each in ("raw", codec):
        with Node(dram(each, "8MiB")) as node, NumbersEngine(node.run_dir, codec) as engine:
            for number in range(prompts):
                assert engine.save(engine.prompt(100 + number, chunks)).saved == chunks
                done = 0 if each == "raw" else chunks * (number + 1)
                until(lambda n=node, done=done: counters(n)["gather_encoded_chunks"] == done, "all is encoded")
            hits[each] = sum(engine.load(engine.prompt(100 + number, chunks)).tokens for number in range(prompts))
            assert_nothing_leaks(node, 8)
    assert hits[codec] > HOLDS_MORE[codec] * hits["raw"], hits


def test_exact_requests_are_served_from_below_where_dram_has_lost_something(tmp_path: Path) -> None:
    changes = {"tiers": {"dram": {"codec": "int4h", "capacity": "8MiB"}, "ssd": {"codec": "split"}}, **CALM}
    with Node(changes) as node, NumbersEngine(node.run_dir, "int4h") as engine:
        prompt = engine.prompt(1, 10)
        assert engine.save(prompt).wait(0)
        assert engine.producer.flush(prompt, tiers=("ssd",))
        until(lambda: encoded(node) == 10, "all is encoded")
        result = engine.load(prompt)
        assert (result.by_tier, result.fidelity) == ({Tier.DRAM: 10}, Fidelity.INT4H)
        engine.memory.error = 0.0
        for tier in (Tier.SSD, Tier.DRAM):  # what was brought up is kept as it is
            with engine.producer.lookup(prompt, exact=True) as found:
                ids = engine.memory.allocate(10, CHUNK_TOKENS)
                result = engine.producer.load(found, engine.memory.pool, ids, deadline_ms=30_000)
            assert (result.by_tier, result.fidelity, result.reason) == ({tier: 10}, Fidelity.EXACT, "")
            assert engine.memory.wrong(prompt.keys, ids) == []
            engine.memory.free(ids)
        assert_nothing_leaks(node, 8)
