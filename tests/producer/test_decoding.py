"""Encoded chunks on their way into an engine's pages, what is damaged, and what cannot be decoded here."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rig import CALM, CHUNK_TOKENS, Engine, counters, until

from lmpipe.cli import main
from lmpipe.codecs import ANY, codec_named
from lmpipe.engines.paged import PagedEngine
from lmpipe.handles import CHUNK, ChunkRecords, Codec, SessionId, Tier
from lmpipe.layout import KVLayout
from lmpipe.lifecycle import SlotEvent
from lmpipe.producer import attachment as attachment_module
from lmpipe.producer.decoding import Decoder
from lmpipe.shm.hold import Holds
from lmpipe.shm.slots import SlotOwner
from lmpipe.testing import Node

LAYOUT = KVLayout.paged(2, 2, 64, "float16", 4)
RAW_BYTES = LAYOUT.chunk_bytes(CHUNK_TOKENS)
CHUNKS = 9


@pytest.fixture
def arena() -> Iterator[SlotOwner]:
    path = Path(f"/dev/shm/lmpipe-test-{os.getpid()}-{secrets.token_hex(4)}")
    path.mkdir(mode=0o700)
    owner = SlotOwner.create(path / "arena.shm", 2 * CHUNKS * RAW_BYTES, 32)
    yield owner
    owner.close()
    shutil.rmtree(path)


def encoded(arena: SlotOwner, engine: PagedEngine, keys: np.ndarray) -> ChunkRecords:
    """Chunks of these keys in the arena, by zstd."""
    records = np.zeros(len(keys), CHUNK)
    codec = codec_named("zstd")
    for key, record in zip(keys, records, strict=True):
        raw = engine.content(key, LAYOUT.chunk_pages(CHUNK_TOKENS)).tobytes()
        stored = bytearray(codec.bound(RAW_BYTES))
        nbytes = codec.encode(memoryview(raw), memoryview(stored), ANY)
        slot = arena.lease(nbytes, SessionId(1))
        assert slot is not None
        arena.advance(slot, SlotEvent.OPEN)
        arena.payload(slot.index, nbytes)[:] = stored[:nbytes]
        record["place"], record["codec"], record["nbytes"], record["raw_bytes"] = slot.place, 1, nbytes, RAW_BYTES
    return records


@pytest.mark.parametrize("threads", [1, 4])
def test_chunks_come_as_they_were_and_damage_is_named(arena: SlotOwner, threads: int) -> None:
    with PagedEngine(LAYOUT, 64) as engine:
        keys = np.random.default_rng(1).integers(0, 256, (CHUNKS, 16), np.uint8)
        records, ids = encoded(arena, engine, keys), engine.allocate(CHUNKS, CHUNK_TOKENS)
        decoder = Decoder(threads)
        for damaged in ([], [2, 7]):
            for at in damaged:
                arena.payload(int(records["place"][at]) >> 32)[20] ^= 0xFF
            engine.memory[...] = 0xEE
            failed = decoder.scatter(arena, records, engine.pool, ids)
            assert sorted(failed) == damaged == engine.wrong(keys, ids)
            assert all(reason.startswith("damaged in DRAM: ") for reason in failed.values())


def test_pages_that_the_engine_has_are_left_alone(arena: SlotOwner) -> None:
    with PagedEngine(LAYOUT, 64) as engine:
        keys = np.random.default_rng(2).integers(0, 256, (1, 16), np.uint8)
        records, ids = encoded(arena, engine, keys), engine.allocate(1, CHUNK_TOKENS)
        engine.memory[...] = 0xEE
        assert Decoder(1).scatter(arena, records, engine.pool, np.where(np.arange(4) < 2, -1, ids)) == {}
        assert np.all(engine.memory[:, ids[0, :2]] == 0xEE)
        assert np.array_equal(engine.memory[:, ids[0, 2:]], engine.content(keys[0], 4)[:, 2:])


def test_a_bug_reaches_the_caller_from_any_thread(arena: SlotOwner) -> None:
    with PagedEngine(LAYOUT, 64) as engine:
        keys = np.random.default_rng(3).integers(0, 256, (CHUNKS, 16), np.uint8)
        records, ids = encoded(arena, engine, keys), engine.allocate(CHUNKS, CHUNK_TOKENS)
        records["codec"][5] = 999
        with pytest.raises(ValueError, match="999"):
            Decoder(3).scatter(arena, records, engine.pool, ids)


@pytest.fixture
def node() -> Iterator[Node]:
    with Node({"tiers": {"dram": {"codec": "zstd"}, "ssd": {"codec": "raw"}}, **CALM}) as node:
        yield node


def test_a_damaged_slot_is_a_failed_load(node: Node) -> None:
    with Engine(node.run_dir, layout=LAYOUT) as engine:
        prompt = engine.prompt(1, 6)
        assert engine.save(prompt).wait(0)
        until(lambda: counters(node)["gather_dram_encoded_chunks"] == 6, "all is encoded")
        with engine.producer.lookup(prompt) as found:
            assert found.attachment is not None
            found.attachment.arena.payload(int(found.records["place"][3]) >> 32)[100] ^= 1
        result = engine.load(prompt)
        assert result.chunks == 3 and result.reason.startswith("damaged in DRAM")


def test_a_chunk_that_was_put_elsewhere_between_answer_and_hold_is_copied_from_there(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Engine(node.run_dir, layout=LAYOUT) as engine:
        prompt = engine.save_below(3, 4)
        take, orders = Holds.take, ["compress", "decompress", "compress"]  # raw as it comes up

        def late(self: Holds, *args: Any) -> Any:
            if orders:
                assert main([orders.pop(0), str(node.run_dir)]) == 0
            return take(self, *args)

        found = engine.producer.lookup(prompt)
        ids = engine.memory.allocate(found.chunks, CHUNK_TOKENS)
        monkeypatch.setattr(Holds, "take", late)
        result = engine.producer.load(found, engine.memory.pool, ids, deadline_ms=30_000)
        assert (result.chunks, result.reason) == (4, "")
        assert engine.memory.wrong(prompt.keys, ids) == []


def test_what_this_process_cannot_decode_is_a_miss(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    with Engine(node.run_dir, layout=LAYOUT) as engine:
        prompt = engine.prompt(2, 6)
        assert engine.save(prompt).wait(0)
        until(lambda: counters(node)["gather_dram_encoded_chunks"] == 6, "all is encoded")
        assert engine.found(prompt) == 6
        assert engine.producer.flush(prompt, tiers=("ssd",))
        known = attachment_module._DECODABLE.copy()
        known[Codec.ZSTD] = False
        monkeypatch.setattr(attachment_module, "_DECODABLE", known)
        assert engine.found(prompt) == 0
        engine.drop_from(prompt, Tier.DRAM)
        assert engine.load(prompt).by_tier == {Tier.SSD: 6}, "the stages decode what comes from there"
