"""Chunks with bytes that follow from their key, in page-aligned memory; and a run directory with a node segment."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from lmpipe.handles import CHUNK, ChunkRecords, round_up
from lmpipe.shm.node import NodeWords
from lmpipe.tiers.segment_file import aligned


@contextmanager
def node_words() -> Iterator[tuple[Path, NodeWords]]:
    run_dir = Path(f"/dev/shm/lmpipe-test-{os.getpid()}-{secrets.token_hex(4)}")
    (run_dir / "index").mkdir(parents=True, mode=0o700)
    run_dir.chmod(0o700)
    words = NodeWords.create(run_dir / "node.shm")
    try:
        yield run_dir, words
    finally:
        words.close()
        shutil.rmtree(run_dir)


def chunks(
    count: int, nbytes: int = 5000, *, seed: int = 0, shard: int = 0, shards: int = 1, namespace: int = 7
) -> ChunkRecords:
    """Records of `count` chunks, the same for the same seed."""
    made = np.zeros(count, CHUNK)
    noise = np.random.default_rng(seed).integers(0, 256, (count, 16), np.uint8)
    made["key"] = noise.view("V16").reshape(-1)
    made["anchor"] = np.void(noise[0, :4].tobytes()) if count else made["anchor"]
    made["position"], made["shard"], made["shards"], made["layout"] = np.arange(count), shard, shards, 11
    made["raw_bytes"], made["nbytes"], made["saved_at"], made["namespace"] = nbytes, nbytes, 1_700_000_000, namespace
    return made


def payload(record: np.void) -> memoryview:
    """The bytes of a chunk, followed by rubbish up to the slot's end."""
    nbytes = int(record["nbytes"])
    made = aligned(round_up(nbytes))
    made[:] = b"\xee" * len(made)
    seed = int.from_bytes(record["key"].tobytes(), "little") + int(record["shard"])
    made[:nbytes] = np.random.default_rng(seed).bytes(nbytes)
    return made


def payloads(records: ChunkRecords) -> list[memoryview]:
    return [payload(record) for record in records]


def same(record: np.void, got: memoryview) -> bool:
    nbytes = int(record["nbytes"])
    return bytes(got[:nbytes]) == bytes(payload(record)[:nbytes])
