"""What a codec in DRAM does to the hits of a conversation workload: the part of `lmpipe bench codecs` that has nodes.

24 conversations share a system prompt; each turn is the whole history and 512 new tokens, and whose turn it is is drawn
by chance. A node with DRAM only keeps them, in memory for a quarter of all their raw KV. Before a turn counts, what was
saved before is encoded: the workload is slower than the codec, as one that computes is.
"""

from __future__ import annotations

import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from lmpipe.bench.harness import Setting, shared_directory
from lmpipe.bench.numbers import calibration_of, kv
from lmpipe.bench.report import Figure
from lmpipe.codecs import CODECS
from lmpipe.codecs.calibration import write
from lmpipe.engines.paged import PagedEngine
from lmpipe.handles import Codec
from lmpipe.launch.overview import overview
from lmpipe.layout import CHUNK_TOKENS, KVLayout
from lmpipe.producer import Producer
from lmpipe.testing import Node

CONVERSATIONS, TURNS = 24, 6
SYSTEM_TOKENS, TURN_TOKENS = 512, 512
ROOM, QUICK_ROOM = 0.25, 1.0
"""DRAM, as a part of the raw KV of all conversations."""
SEED = 20261122
SAVED_S, SETTLED_S, STEP_S = 60.0, 60.0, 0.005


def hits(setting: Setting) -> list[Figure]:
    """Prompt tokens found, by codec, against raw."""
    layout = KVLayout.paged(setting.size(8, 2), 2, 128, "bfloat16", 16)
    conversations, turns = setting.size(CONVERSATIONS, 3), setting.size(TURNS, 2)
    raw = 0.0
    figures: list[Figure] = []
    for number, codec in CODECS.items():
        if number is Codec.ZSTD:
            continue
        setting.say(f"hits: {codec.name}")
        part = 100 * _replay(layout, codec.name, conversations, turns, QUICK_ROOM if setting.quick else ROOM)
        raw = raw or part
        figures.append(Figure.of(f"hits, {codec.name} in DRAM", [part], "% of tokens", limits=[raw]))
    return figures


def _replay(layout: KVLayout, codec: str, conversations: int, turns: int, room: float) -> float:
    """The part of all prompt tokens that was found."""
    random = np.random.default_rng(SEED)
    system = random.integers(0, 128_000, SYSTEM_TOKENS, np.uint32)
    said = random.integers(0, 128_000, (conversations, turns * TURN_TOKENS), np.uint32)
    order = random.permutation(np.repeat(np.arange(conversations), turns)).tolist()
    longest = (SYSTEM_TOKENS + turns * TURN_TOKENS) // CHUNK_TOKENS
    chunks = (SYSTEM_TOKENS + said.size) // CHUNK_TOKENS
    capacity = int(room * chunks * layout.chunk_bytes(CHUNK_TOKENS))
    at = [0] * conversations
    found = asked = 0
    with (
        TemporaryDirectory(prefix="lmpipe-bench-") as directory,
        Node(_topology(layout, codec, capacity, Path(directory))) as node,
        shared_directory() as shared,
        PagedEngine(layout, longest * layout.chunk_pages(CHUNK_TOKENS), segment=shared / "pages.shm") as engine,
        Producer(node.run_dir, layout, model="bench", pages=engine.source, wait_s=20.0) as producer,
    ):
        pages = engine.allocate(longest, CHUNK_TOKENS)
        for number in range(longest):  # one content for all: how far it shrinks is what counts
            shape = layout.plane_count, layout.chunk_pages(CHUNK_TOKENS), layout.page_bytes
            engine.memory[:, pages[number]] = kv(layout, CHUNK_TOKENS, seed=number).reshape(shape)
        for who in order:
            at[who] += TURN_TOKENS
            prompt = producer.prompt(np.concatenate([system, said[who, : at[who]]]))
            seen = producer.lookup(prompt)
            found, asked = found + seen.tokens, asked + prompt.tokens
            seen.release()
            if not producer.save(prompt, None, pages[: len(prompt.keys)]).wait(SAVED_S):
                raise RuntimeError(f"hits, {codec}: a save was not answered")
            _settle(node, codec)
    return found / asked


def _topology(layout: KVLayout, codec: str, capacity: int, directory: Path) -> dict[str, Any]:
    calibration = directory / "calibration.json"
    write(calibration, calibration_of(layout))
    return {
        "chunk_tokens": CHUNK_TOKENS,
        "heartbeat_ms": 1000,
        "tiers": {"dram": {"capacity": capacity, "slots": None, "codec": codec}, "ssd": None},
        "codecs": {"adaptive": {"calibration": str(calibration)}},
    }


def _settle(node: Node, codec: str) -> None:
    """Until all that lies in DRAM is encoded."""
    deadline_s = time.monotonic() + SETTLED_S
    while codec != "raw" and time.monotonic() < deadline_s:
        dram = overview(node.info).tiers[0]
        if dram.encoded_chunks >= dram.rows:
            return
        time.sleep(STEP_S)
