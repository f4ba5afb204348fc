"""How long indexes take to be rebuilt, by what they hold: the SSD's from its files, DRAM's from the arena's headers.

    SSD     `SsdTier.recover` over 100 GiB of segment files of 1 GiB, their payloads sparse: 12,800 records of 8 MiB,
            and a million of 100 KiB. With footers, as every file has that was filled or closed; without, as if all had
            been open when the machine went down (then every record's header is read; fewer of the small ones)
    DRAM    gather's start over an arena that is taken over: mapped and faulted in, headers checked, rows written. By
            size, with a slot for each MiB, and by number of slots

The files are written and read through O_DIRECT where the disk has it; nothing is dropped from caches below it.
"""

from __future__ import annotations

import secrets
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from lmpipe.bench.harness import Setting, main, shared_directory
from lmpipe.bench.report import Figure
from lmpipe.handles import BLOCK_BYTES, CHUNK, ChunkRecords, Extent, SessionId, Tier
from lmpipe.index import IndexWriter
from lmpipe.lifecycle import SlotEvent
from lmpipe.rundir import RunDir
from lmpipe.shm.descriptor import SegmentKind
from lmpipe.shm.node import NodeWords
from lmpipe.shm.segment import Segment
from lmpipe.shm.slots import SlotOwner
from lmpipe.tiers.dram import DramTier
from lmpipe.tiers.format import Footer, SegmentHeader, chunk_header, digests, piece_lengths, record_blocks
from lmpipe.tiers.segment_file import segment_path
from lmpipe.tiers.ssd import SsdTier

MIB = 1 << 20
SEGMENT_BYTES = 1 << 30
FILES = 100
SSD_CASES = (
    (8 * MIB, True, 12_800),
    (8 * MIB, False, 12_800),
    (100 << 10, True, 1_000_000),
    (100 << 10, False, 100_000),
)
"""Bytes of a record, whether files have footers, records."""
DRAM_CASES = ((1 << 10, 1024), (4 << 10, 4096), (8 << 10, 8192), (1 << 10, 65_536), (1 << 10, 200_000))
"""MiB of the arena, slots in use."""
MAP_BYTES = 1 << 30


class NobodyHolds:
    """No slot of a benchmark is held."""

    def held(self) -> frozenset[int]:
        """None."""
        return frozenset()


def run(setting: Setting) -> list[Figure]:
    """Each case once: a rebuild is long, and its length hardly varies."""
    figures: list[Figure] = []
    setting.disk.mkdir(parents=True, exist_ok=True)
    with shared_directory() as run_dir:
        for directory in RunDir(run_dir).directories[1:]:
            directory.mkdir(mode=0o700)
        node = NodeWords.create(RunDir(run_dir).node_shm)
        try:
            for nbytes, footers, count in SSD_CASES:
                figures.append(_ssd(setting, run_dir, node, nbytes, setting.size(count, 200), footers=footers))
            for mib, slots in DRAM_CASES[: setting.size(len(DRAM_CASES), 1)]:
                figures += _dram(setting, run_dir, node, setting.size(mib, 16), setting.size(slots, 64))
        finally:
            node.close()
    return figures


def _records(count: int, nbytes: int) -> ChunkRecords:
    made = np.zeros(count, CHUNK)
    noise = np.random.default_rng(1).integers(0, 256, (count, 16), np.uint8)
    made["key"] = noise.view("V16").reshape(-1)
    # Groups of 64, as prompts have them: rows of a group stand side by side.
    made["anchor"] = np.ascontiguousarray(noise[np.arange(count) // 64 * 64, :4]).view("V4").reshape(-1)
    made["position"], made["shards"], made["layout"], made["namespace"] = np.arange(count) % 64, 1, 1, 1
    made["raw_bytes"], made["nbytes"], made["saved_at"] = nbytes, nbytes, int(time.time())
    return made


def _ssd(setting: Setting, run_dir: Path, node: NodeWords, nbytes: int, count: int, *, footers: bool) -> Figure:
    name = f"SSD, {count:,} records of {_size(nbytes)}, {'with' if footers else 'without'} footers"
    setting.say(f"{name}: writing")
    with tempfile.TemporaryDirectory(prefix="bench-rebuild-", dir=setting.disk) as place:
        directory = Path(place)
        _write_files(directory, _records(count, nbytes), nbytes, footers=footers)
        index = IndexWriter(run_dir, Tier.SSD, MAP_BYTES if not setting.quick else 8 * MIB, node)
        try:
            tier = SsdTier(directory, 2 * FILES * SEGMENT_BYTES, "none", SEGMENT_BYTES, index)
            setting.say(f"{name}: rebuilding")
            began_s = time.monotonic()
            found = tier.recover()
            took_s = time.monotonic() - began_s
            if (found.rows, found.damaged, found.unindexed) != (count, 0, 0):
                raise RuntimeError(f"{name}: {found}")
            tier.close()
        finally:
            index.close()
    return Figure.of(name, [took_s], "s")


def _write_files(directory: Path, records: ChunkRecords, nbytes: int, *, footers: bool) -> None:
    """Segment files as the tier writes them, with holes for payloads."""
    blocks, table = record_blocks(nbytes), digests(memoryview(bytes(nbytes)), piece_lengths(nbytes))
    per_file = (SEGMENT_BYTES // BLOCK_BYTES - 64) // (blocks + 1)
    for number, at in enumerate(range(0, len(records), per_file), 1):
        part, identity = records[at : at + per_file], secrets.token_bytes(16)
        part["place"] = [Extent(number, 1 + i * blocks).place for i in range(len(part))]
        end = 1 + len(part) * blocks
        with segment_path(directory, number).open("wb") as file:
            file.write(SegmentHeader(number, identity, int(time.time())).pack())
            if footers:
                file.seek(end * BLOCK_BYTES)
                file.write(Footer(number, identity, part, np.empty(0, np.uint32)).pack(end))
                continue
            for i, record in enumerate(part):
                file.seek((1 + i * blocks) * BLOCK_BYTES)
                file.write(chunk_header(record, identity, table).pack())
            file.truncate(SEGMENT_BYTES)


def _dram(setting: Setting, run_dir: Path, node: NodeWords, mib: int, slots: int) -> list[Figure]:
    name = f"DRAM, {mib / 1024:g} GiB, {slots:,} slots"
    setting.say(f"{name}: filling")
    path = RunDir(run_dir).arena
    made = SlotOwner.create(path, mib * MIB, slots)
    for record in _records(slots, mib * MIB // slots // BLOCK_BYTES * BLOCK_BYTES):
        slot = made.lease(int(record["nbytes"]), SessionId(1), record)
        if slot is None:
            break
        for event in (SlotEvent.OPEN, SlotEvent.CLOSE, SlotEvent.COMMIT):
            made.advance(slot, event)
    made.close()
    setting.say(f"{name}: taking over")
    index = IndexWriter(run_dir, Tier.DRAM, MAP_BYTES if not setting.quick else 8 * MIB, node)
    try:
        began_s = time.monotonic()
        arena = SlotOwner(Segment.attach(path, SegmentKind.SLOTS))
        tier = DramTier(arena, index, NobodyHolds(), time.monotonic)
        tier.load_rows(arena.recover(lambda _: False).committed)
        index.publish()
        done_s = time.monotonic()
        arena.segment.prefault()
        faulted_s = time.monotonic()
        rows = len(tier)
        arena.close()
    finally:
        index.close()
        path.unlink()
    if rows < slots // 2:
        raise RuntimeError(f"{name}: {rows} rows")
    return [
        Figure.of(f"{name}: {rows:,} rows", [done_s - began_s], "s"),
        Figure.of(f"{name}: faulted in beside the work", [faulted_s - done_s], "s"),
    ]


def _size(nbytes: int) -> str:
    return f"{nbytes // MIB} MiB" if nbytes >= MIB else f"{nbytes >> 10} KiB"


if __name__ == "__main__":
    sys.exit(main(run))
