"""A node's memory without its processes: a real arena, a real DRAM index, and the note by which a producer maps them.

A lookup asks no process, so it can be measured without any. Rows of prompts have slots, committed and as small as slots
can be; the other rows are there to make the index large: random keys in groups of 64 under one anchor, written in the
order in which prompts come, that is, none.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from lmpipe.handles import CHUNK, ChunkRecords, SessionId, Tier
from lmpipe.index import IndexWriter
from lmpipe.index_row import index_keys
from lmpipe.keys import GROUP_CHUNKS, Prompt, namespace_id
from lmpipe.layout import KVLayout
from lmpipe.lifecycle import SlotEvent
from lmpipe.rundir import RunDir
from lmpipe.shm.node import NodeWords
from lmpipe.shm.slots import SlotOwner
from lmpipe.topology import NODE_VERSION, DramTier, Engines, Index, NodeInfo, Process, Tiers, Topology

OWNER = SessionId(1)
BATCH_ROWS = 1 << 16


class StillNode:
    """A run directory that producers can attach to; `slots` chunks of `layout` fit its arena."""

    def __init__(self, run_dir: Path, layout: KVLayout, chunk_tokens: int, slots: int, map_bytes: int) -> None:
        self._paths = RunDir(run_dir)
        self._layout, self._chunk_tokens = layout, chunk_tokens
        for directory in self._paths.directories:
            directory.mkdir(mode=0o700, exist_ok=True)
        capacity = slots * max(layout.chunk_bytes(chunk_tokens), 4096)
        topology = Topology(
            name="still",
            tiers=Tiers(dram=DramTier(capacity=capacity, slots=slots)),
            run_dir=str(run_dir),
            chunk_tokens=chunk_tokens,
            processes=[Process("gather", ["gather"])],
            engines=Engines(),
            index=Index(dram=map_bytes),
        )
        self._node = NodeWords.create(self._paths.node_shm)
        self._arena = SlotOwner.create(self._paths.arena, capacity, slots)
        self._index = IndexWriter(run_dir, Tier.DRAM, map_bytes, self._node)
        endpoints = {"gather": {channel: self._paths.endpoint("gather", channel) for channel in ("load", "save")}}
        arena_id = self._arena.segment.id.hex()
        self._info = NodeInfo(NODE_VERSION, topology, str(run_dir), arena_id, endpoints, os.getpid(), time.time())

    def fill(self, rows: int, say: Callable[[int], None]) -> None:
        """Add rows of chunks that nobody will ask for; `say` is told how many there are."""
        random = np.random.default_rng(11)
        while (done := self._index.count()) < rows:
            say(done)
            records = np.zeros(min(BATCH_ROWS, rows - done), CHUNK)
            keys = random.integers(0, 256, (len(records), 16), np.uint8)
            groups = np.arange(len(records)) // GROUP_CHUNKS * GROUP_CHUNKS
            records["key"] = keys.view("V16").ravel()
            records["anchor"] = np.ascontiguousarray(keys[groups, :4]).view("V4").ravel()
            records["shards"] = 1
            self._put(records)

    def add(self, prompt: Prompt) -> None:
        """Commit all of a prompt's chunks: slots, then rows. Raises RuntimeError when the arena is full."""
        records = np.zeros(len(prompt.keys), CHUNK)
        records["key"] = np.ascontiguousarray(prompt.keys).view("V16").ravel()
        records["anchor"] = np.ascontiguousarray(prompt.anchors()).view("V4").ravel()
        records["position"] = np.arange(len(records))
        records["shards"] = 1
        records["layout"] = self._layout.layout_id()
        records["raw_bytes"] = records["nbytes"] = self._layout.chunk_bytes(self._chunk_tokens)
        records["saved_at"] = int(time.time())
        records["namespace"] = namespace_id(prompt.namespace)
        for at in range(len(records)):
            slot = self._arena.lease(int(records["nbytes"][at]), OWNER)
            if slot is None:
                raise RuntimeError(f"no slot for chunk {at} of {len(records)}")
            records["place"][at] = slot.place
            self._arena.set_record(slot.index, records[at])
            for event in (SlotEvent.OPEN, SlotEvent.CLOSE, SlotEvent.COMMIT):
                self._arena.advance(slot, event)
        self._put(records)

    def _put(self, records: ChunkRecords) -> None:
        raw, size = records.tobytes(), CHUNK.itemsize
        rows = [(key, raw[at * size : (at + 1) * size]) for at, key in enumerate(index_keys(records))]
        if not self._index.put(sorted(rows)):
            raise RuntimeError(f"the index is full at {self._index.count()} rows")

    def open(self) -> int:
        """Let producers find it; the number of rows."""
        self._index.publish()
        self._info.write()
        return self._index.count()

    def close(self) -> None:
        """Unmap; the files stay."""
        self._index.close()
        self._arena.close()
        self._node.close()
