"""Writes and cold reads of the SSD tier, 32 MiB chunks, against plain O_DIRECT calls of the same sizes, same directory.

    write      SsdTier.write of four chunks and settle: checksums, record headers, bytes, the flush that the policy asks
               for, index rows; new segment files are made and full ones sealed as they fall due. The limit: four
               pwrites of 32 MiB into a file whose space was taken before, and a fdatasync where the tier does one
    full tier  the same in a tier that is at its capacity: for each new file an old one is given up. No goal: the limit
               removes nothing
    cold read  SsdTier.read of four chunks, one after the other: the header compared, every byte's checksum verified.
               The limit: four preads of 32 MiB

Nothing is dropped from caches: O_DIRECT does not look into the page cache, so reads are cold by construction, as far as
this machine goes; what a disk, or the host below a virtual one, keeps in its own memory serves both sides alike.
"""

from __future__ import annotations

import itertools
import os
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from lmpipe.bench.harness import Setting, main, rates, shared_directory
from lmpipe.bench.report import Figure, Goal
from lmpipe.handles import CHUNK, ChunkRecords, Tier
from lmpipe.index import IndexWriter
from lmpipe.rundir import RunDir
from lmpipe.shm.node import NodeWords
from lmpipe.tiers.segment_file import aligned, open_direct
from lmpipe.tiers.ssd import SsdTier

GOAL = Goal("ratio", ">=", 0.9)
CHUNKS = 4
SEGMENT_CHUNKS = 8
RUNS = 15
"""More than elsewhere: a disk's own rate swings most."""
FULL_SEGMENTS = 4
Flush = Literal["each", "none"]
CASES: tuple[tuple[Flush, bool], ...] = (("each", False), ("none", False), ("none", True))


class Raw:
    """A file of `count` chunks with all its space taken, read and written as plainly as O_DIRECT allows."""

    def __init__(self, path: Path, chunk_bytes: int, count: int) -> None:
        self._path, self._chunk_bytes = path, chunk_bytes
        self._descriptor, self.direct = open_direct(path, os.O_RDWR | os.O_CREAT)
        os.posix_fallocate(self._descriptor, 0, chunk_bytes * count)
        self._written = 0

    @property
    def written(self) -> int:
        """Chunks written so far; what lies behind them would be read from no disk."""
        return self._written

    def write(self, payloads: Sequence[memoryview], *, flush: bool) -> float:
        """Seconds to append chunks."""
        at, self._written = self._written, self._written + len(payloads)
        began = time.perf_counter()
        for place, payload in enumerate(payloads, at):
            left, done = payload, 0
            while len(left):
                count = os.pwritev(self._descriptor, [left], place * self._chunk_bytes + done)
                left, done = left[count:], done + count
        if flush:
            os.fdatasync(self._descriptor)
        return time.perf_counter() - began

    def read(self, at: int, buffers: Sequence[memoryview]) -> float:
        """Seconds to read the chunks from number `at` on."""
        began = time.perf_counter()
        for place, buffer in enumerate(buffers, at):
            left, done = buffer, 0
            while len(left):
                count = os.preadv(self._descriptor, [left], place * self._chunk_bytes + done)
                if not count:
                    raise RuntimeError(f"{self._path} ends early")
                left, done = left[count:], done + count
        return time.perf_counter() - began

    def close(self) -> None:
        """Close and remove it."""
        os.close(self._descriptor)
        self._path.unlink()


def run(setting: Setting) -> list[Figure]:
    """Write with and without flush, then read."""
    setting.disk.mkdir(parents=True, exist_ok=True)
    directory = Path(tempfile.mkdtemp(prefix="bench-ssd-", dir=setting.disk))
    chunk_bytes = setting.size(32 << 20, 1 << 20)
    try:
        with shared_directory() as run_dir:
            for path in RunDir(run_dir).directories[1:]:
                path.mkdir(mode=0o700)
            node = NodeWords.create(RunDir(run_dir).node_shm)
            try:
                return [
                    figure
                    for flush, full in CASES
                    for figure in _measure(setting, run_dir, directory, chunk_bytes, node, flush, full=full)
                ]
            finally:
                node.close()
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _measure(
    setting: Setting, run_dir: Path, parent: Path, chunk_bytes: int, node: NodeWords, flush: Flush, *, full: bool
) -> list[Figure]:
    index = IndexWriter(run_dir, Tier.SSD, 16 << 20, node)
    directory = parent / f"{flush}-{'full' if full else 'roomy'}"
    segment_bytes = chunk_bytes * SEGMENT_CHUNKS
    runs = setting.size(RUNS, setting.runs)
    rounds = runs + setting.warm_ups
    segments = FULL_SEGMENTS if full else CHUNKS * rounds // (SEGMENT_CHUNKS - 1) + 2
    tier = SsdTier(directory, segment_bytes * segments, flush, segment_bytes, index)
    tier.recover()
    raw = Raw(directory / "raw", chunk_bytes, CHUNKS * rounds)
    try:
        if not (raw.direct and tier.direct):
            setting.say(f"{directory}: this file system has no O_DIRECT; reads come from the page cache")
        random = np.random.default_rng(3)
        payloads = [aligned(chunk_bytes) for _ in range(CHUNKS)]
        for payload in payloads:
            payload[:] = random.bytes(chunk_bytes)
        stored: list[ChunkRecords] = []

        def write() -> float:
            records = _records(chunk_bytes)
            began = time.perf_counter()
            written = tier.write(records, payloads)
            settled = tier.settle()
            took = time.perf_counter() - began
            if len(written.records) < CHUNKS or settled.reason:
                raise RuntimeError(f"not written: {written.reason or settled.reason}")
            stored.append(written.records)
            return took

        what = "write, full tier" if full else f"write, {'flushed' if flush == 'each' else 'not flushed'}"
        nbytes = CHUNKS * chunk_bytes
        values, limits = setting.alternate(what, write, lambda: raw.write(payloads, flush=flush == "each"), runs)
        goal = None if full else GOAL
        figures = [Figure.of(what, rates(nbytes, values), "GB/s", limits=rates(nbytes, limits), goal=goal)]
        if flush == "none" and not full:
            figures += _reads(setting, tier, raw, stored, payloads)
        return figures
    finally:
        raw.close()
        tier.close()
        index.close()


def _reads(
    setting: Setting, tier: SsdTier, raw: Raw, stored: list[ChunkRecords], payloads: Sequence[memoryview]
) -> list[Figure]:
    kept = [records for records in stored if all(tier.find(record) is not None for record in records)]
    turns, rounds = itertools.cycle(range(0, raw.written, CHUNKS)), itertools.cycle(kept)
    buffers = [aligned(len(payload)) for payload in payloads]
    for buffer in buffers:
        buffer[:] = bytes(len(buffer))

    def read() -> float:
        began = time.perf_counter()
        for record, buffer in zip(next(rounds), buffers, strict=True):
            tier.read(record, buffer)
        took = time.perf_counter() - began
        if bytes(buffers[-1][-64:]) != bytes(payloads[-1][-64:]):
            raise RuntimeError("what was read is not what was written")
        return took

    nbytes = sum(map(len, payloads))
    values, limits = setting.alternate("cold read", read, lambda: raw.read(next(turns), buffers), RUNS)
    return [Figure.of("cold read", rates(nbytes, values), "GB/s", limits=rates(nbytes, limits), goal=GOAL)]


def _records(chunk_bytes: int) -> ChunkRecords:
    records = np.zeros(CHUNKS, CHUNK)
    for at in range(CHUNKS):
        records["key"][at] = np.void(secrets.token_bytes(16))
    records["anchor"] = np.void(secrets.token_bytes(4))
    records["position"] = np.arange(CHUNKS)
    records["shards"], records["layout"], records["namespace"] = 1, 1, 1
    records["raw_bytes"] = records["nbytes"] = chunk_bytes
    return records


if __name__ == "__main__":
    sys.exit(main(run))
