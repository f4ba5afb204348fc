"""An engine that does nothing but save and load, to have something to profile.

    python -m lmpipe.bench.engine_load RUN_DIR TRACE.json

Prompts of 16 chunks, some heads shared, in an order that repeats a few of them often; together they are half as large
again as the DRAM tier, so that the tiers below are asked too. Each request is what an engine does: look up, load what
was found, save all of it. Runs until SIGTERM, with spans of its own.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np

from lmpipe.engines.paged import PagedEngine
from lmpipe.layout import KVLayout
from lmpipe.producer import Producer
from lmpipe.spans import Spans
from lmpipe.topology import NodeInfo

LAYOUT = KVLayout.paged(4, 8, 64, "bfloat16", 16)
CHUNKS = 16
PROMPTS = (4, 256)
READY_S = 30.0
COPIED_S = 10.0
FLUSH_S = 0.5
PAUSE_S = 0.002
"""A breath between requests: an engine computes there."""


def serve(run_dir: Path, trace: Path, stopped: threading.Event) -> int:
    """One request after the other; the exit status."""
    capacity = NodeInfo.read(run_dir).topology.tiers.dram.capacity
    with Producer(run_dir, LAYOUT, model="load", name="load", wait_s=READY_S) as producer:
        if producer.state != "ready":
            print(f"the producer is {producer.state}: {producer.reason}", file=sys.stderr)
            return 1
        tokens = CHUNKS * producer.chunk_tokens
        count = min(max(capacity * 3 // 2 // (CHUNKS * producer.chunk_bytes), PROMPTS[0]), PROMPTS[1])
        random = np.random.default_rng(9)
        texts = random.integers(0, 128_000, (count, tokens), np.uint32)
        texts[count // 2 :, : tokens // 2] = texts[: count - count // 2, : tokens // 2]
        prompts = [producer.prompt(text) for text in texts]
        spans = Spans("engine", trace)
        with PagedEngine(LAYOUT, CHUNKS * producer.chunk_pages) as engine:
            engine.memory[:] = random.integers(0, 255, engine.memory.shape[-1], np.uint8)
            page_ids = engine.allocate(CHUNKS, producer.chunk_tokens)
            flushed_s = 0.0
            while not stopped.wait(PAUSE_S):
                prompt = prompts[int(count * random.random() ** 3)]
                with spans.span("engine.request", CHUNKS * producer.chunk_bytes, CHUNKS):
                    with spans.span("engine.lookup"):
                        found = producer.lookup(prompt)
                    with spans.span("engine.load", found.chunks * producer.chunk_bytes, found.chunks):
                        loaded = producer.load(found, engine.pool, page_ids[: found.chunks])
                    with spans.span("engine.save", chunks=CHUNKS - loaded.chunks):
                        ticket = producer.save(
                            prompt, engine.pool, page_ids[loaded.chunks :], first_chunk=loaded.chunks
                        )
                    with spans.span("engine.copied"):
                        ticket.copied.wait(COPIED_S)
                if time.monotonic() > flushed_s + FLUSH_S:
                    flushed_s = time.monotonic()
                    spans.flush()
            producer.flush(timeout_s=COPIED_S)
        spans.close()
    return 0


def main() -> int:
    """The exit status."""
    stopped = threading.Event()

    def stop(number: int, frame: object) -> None:
        stopped.set()

    signal.signal(signal.SIGTERM, stop)
    return serve(Path(sys.argv[1]), Path(sys.argv[2]), stopped)


if __name__ == "__main__":
    sys.exit(main())
