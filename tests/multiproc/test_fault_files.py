"""Fault 9 of a peer: files without header and checksum, unknown after a restart. Real segment files, really damaged."""

from __future__ import annotations

import os
import random
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from rig import CALM, DRAM_ONLY, Engine, until_whole

from lmpipe.handles import CHUNK, ChunkRecords, Tier
from lmpipe.index_row import row_records
from lmpipe.testing import Node

PROMPTS, CHUNKS = range(8), 8
BLOCK = 4096


@pytest.fixture
def node() -> Iterator[Node]:
    with Node({**CALM, "tiers": {"ssd": {"segment": "1MiB", "capacity": "16MiB"}}}) as node:
        yield node


def save_all(engine: Engine) -> None:
    for seed in PROMPTS:
        prompt = engine.prompt(seed, CHUNKS)
        assert engine.save(prompt).wait(0)
        assert engine.producer.flush(prompt, tiers=("ssd",))


def start_without_dram(node: Node, engine: Engine) -> None:
    """Stop, and start again with nothing but the files."""
    node.restart(keep_dram=False)
    until_whole(node, engine)


def segments(node: Node) -> list[Path]:
    return sorted((node.directory / "ssd").glob("*.seg"))


def flip(path: Path, offset: int) -> None:
    """One bit, on the disk: the tier reads past the page cache."""
    with path.open("r+b") as file:
        byte = os.pread(file.fileno(), 1, offset)[0]
        os.pwrite(file.fileno(), bytes([byte ^ 1 << random.Random(offset).randrange(8)]), offset)
        os.fsync(file.fileno())


def records(path: Path) -> list[int]:
    """Offsets of what is in use: blocks that are not zero."""
    data = path.read_bytes()
    return [at for at in range(0, len(data), BLOCK) if any(data[at : at + BLOCK])]


def test_fault_09_files_are_known_after_a_restart_and_damage_is_a_miss(node: Node) -> None:
    with Engine(node.run_dir) as engine:
        save_all(engine)
        start_without_dram(node, engine)
        for seed in PROMPTS:
            result = engine.load(engine.prompt(seed, CHUNKS))
            assert (result.chunks, result.by_tier) == (CHUNKS, {Tier.SSD: CHUNKS})

        # Damage while the node runs, with rows that point at it: the load notices, and the row goes.
        start_without_dram(node, engine)
        for path in segments(node)[:2]:
            for at in records(path)[1::9]:
                flip(path, at + 1234)
        loaded = [engine.load(engine.prompt(seed, CHUNKS)).chunks for seed in PROMPTS]  # every byte is compared
        assert 0 < sum(loaded) < len(PROMPTS) * CHUNKS
        save_all(engine)
        assert [engine.load(engine.prompt(seed, CHUNKS)).chunks for seed in PROMPTS] == [CHUNKS] * len(PROMPTS)


@pytest.mark.parametrize("where", ["headers", "footer", "cut"])
def test_fault_09_damage_found_at_start_costs_what_is_damaged(node: Node, where: str) -> None:
    with Engine(node.run_dir) as engine:
        save_all(engine)
        node.stop()
        for number, path in enumerate(segments(node)):
            used = records(path)
            if where == "headers":
                for at in used[: len(used) // 2] if number else used[:1]:  # the file's own, then its records'
                    flip(path, at + 40)
            elif where == "footer":
                flip(path, used[-1] + 16)
            else:
                os.truncate(path, used[-1] // 2 // BLOCK * BLOCK + 100)
        node.start()
        until_whole(node, engine)
        loaded = [engine.load(engine.prompt(seed, CHUNKS)).chunks for seed in PROMPTS]
        if where == "footer":
            assert sum(loaded) == len(PROMPTS) * CHUNKS, "the records themselves are whole"
        else:
            assert sum(loaded) < len(PROMPTS) * CHUNKS
        save_all(engine)
        assert [engine.load(engine.prompt(seed, CHUNKS)).chunks for seed in PROMPTS] == [CHUNKS] * len(PROMPTS)
        assert node.status().state == "ready"


def rows_of(engine: Engine, seed: int) -> ChunkRecords:
    attachment = engine.producer._link.attachment
    assert attachment is not None
    with attachment._index.guard:
        (reader, *_) = attachment._index.tiers([], 0.0)
        return row_records(b"".join(reader.run(engine.prompt(seed, CHUNKS).index_keys)))


def test_fault_09_a_damaged_row_of_the_index_leads_to_no_other_chunk() -> None:
    """LMDB knows no checksums; the slot says itself what it has. Bits of every field, and another row's fields."""
    with Node(DRAM_ONLY) as node, Engine(node.run_dir) as engine:
        for seed in (1, 2):
            assert engine.save(engine.prompt(seed, CHUNKS)).wait(0)
        (path,) = node.paths.index.glob("dram-*/data.mdb")
        record, other = (rows_of(engine, seed)[at] for seed, at in ((1, 2), (2, 3)))
        bits = [record.tobytes()]
        fields = CHUNK.fields or {}
        for dtype, offset, *_ in fields.values():
            damaged = bytearray(bits[0])
            damaged[offset : offset + dtype.itemsize] = other.tobytes()[offset : offset + dtype.itemsize]
            bits.append(bytes(damaged))
        for bit in range(8 * CHUNK.itemsize):
            damaged = bytearray(bits[0])
            damaged[bit // 8] ^= 1 << bit % 8
            bits.append(bytes(damaged))
        data = path.read_bytes()
        places = [found.start() for found in re.finditer(re.escape(bits[0]), data)]  # old pages have it too
        with path.open("r+b") as file:
            for damage in bits:
                for place in places:
                    os.pwrite(file.fileno(), damage, place)
                loaded = engine.load(engine.prompt(1, CHUNKS)).chunks  # compares every byte
                assert loaded == (CHUNKS if damage == bits[0] else 2)
