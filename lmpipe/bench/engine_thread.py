"""What a save of 128K tokens of mapped pages costs the engine's thread: the time until Producer.save returns.

That time depends on the number of chunks and page ids, not on bytes, so the pages are small and the page ids those of
the real thing: 512 chunks of 16. Each save is of a prompt that was not seen before, and is answered before the next
one. The limit is one plain ipc send of a message of the same size.
"""

from __future__ import annotations

import threading
import time

from lmpipe.bench.harness import Setting, scaled, shared_directory
from lmpipe.bench.pages import Prompts
from lmpipe.bench.raw_ipc import RawClient, echo
from lmpipe.bench.report import Figure, Goal
from lmpipe.engines.paged import PagedEngine
from lmpipe.handles import CHUNK
from lmpipe.layout import CHUNK_TOKENS, KVLayout
from lmpipe.producer import Producer
from lmpipe.testing import Node

LAYOUT = KVLayout.paged(1, 1, 8, "bfloat16", 16)
SAVED_S = 30.0
NODE = {
    "chunk_tokens": CHUNK_TOKENS,
    "heartbeat_ms": 1000,
    "tiers": {"dram": {"capacity": "256MiB", "slots": 16384}, "ssd": None},
    "index": {"dram": "64MiB"},
}


def run(setting: Setting) -> list[Figure]:
    """Median, 99th percentile, and against the send."""
    tokens, runs = setting.size(131072, 4096), 300
    chunks = tokens // CHUNK_TOKENS
    with (
        shared_directory() as directory,
        PagedEngine(LAYOUT, tokens // LAYOUT.page_tokens, segment=directory / "pages.shm") as engine,
        Node(NODE) as node,
        Producer(node.run_dir, LAYOUT, model="bench", pages=engine.source, wait_s=20.0) as producer,
    ):
        page_ids, prompts = engine.allocate(chunks, CHUNK_TOKENS), Prompts(tokens)
        echoing = threading.Thread(target=echo, args=(directory / "raw",))
        echoing.start()
        raw = RawClient(directory / "raw")
        frames = [bytes(200), bytes(chunks * CHUNK.itemsize), page_ids.tobytes()]

        def save() -> float:
            prompt = producer.prompt(prompts.fresh())
            began = time.perf_counter()
            ticket = producer.save(prompt, None, page_ids)
            took = time.perf_counter() - began
            if not ticket.wait(SAVED_S):
                raise RuntimeError(f"not saved: {ticket.dropped or 'no answer'}")
            return took

        def send() -> float:
            took = raw.send(frames)
            raw.wait()
            return took

        try:
            values, limits = setting.alternate("engine thread", save, send, runs)
        finally:
            raw.close(stop=True)
            echoing.join()
    name = f"engine thread, save of {tokens // 1024}K mapped tokens"
    values, limits = scaled(values, 1e3), scaled(limits, 1e3)
    goal = Goal("value", "<=", 1.0)
    return [
        Figure.of(f"{name}, p50", values, "ms", limits=limits, goal=goal),
        Figure.of(f"{name}, p99", values, "ms", limits=limits, goal=goal, quantile=0.99),
    ]
