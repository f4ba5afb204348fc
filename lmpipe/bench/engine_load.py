"""An engine that does nothing but save and load, to have something to profile.

    python -m lmpipe.bench.engine_load RUN_DIR TRACE.json

Prompts of 16 chunks, some heads shared, in an order that repeats a few of them often; together they are half as large
again as the DRAM tier, so that the tiers below are asked too. Each request is what an engine does: look up, load what
was found, save all of it. Runs until SIGTERM, with spans of its own. Where the topology names GPUs and torch sees one,
the pages lie there.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from lmpipe.bench.load_pages import PagesOf, host_pages
from lmpipe.layout import KVLayout
from lmpipe.producer import Producer
from lmpipe.spans import FlushedSpans
from lmpipe.topology import NodeInfo

LAYOUT = KVLayout.paged(4, 8, 64, "bfloat16", 16)
CHUNKS = 16
PROMPTS = (4, 256)
READY_S = 30.0
COPIED_S = 10.0
PAUSE_S = 0.002
"""A breath between requests: an engine computes there."""


def pages_for(devices: Sequence[str]) -> PagesOf:
    """Where the pages of a node's engines lie, if its topology names these GPUs."""
    if not devices:
        return host_pages
    if find_spec("torch") is not None:
        import torch  # noqa: PLC0415  engines have it; without a GPU this one does not need it

        if torch.cuda.is_available():
            from lmpipe.bench.gpu_load import gpu_pages  # noqa: PLC0415
            from lmpipe.cuda.cupy_runtime import open_device  # noqa: PLC0415

            return partial(gpu_pages, open_device(devices[0]))
    print("the pages lie in memory of the host: there is no torch that sees a GPU", file=sys.stderr)
    return host_pages


def serve(run_dir: Path, trace: Path, stopped: threading.Event, pages_of: PagesOf | None = None) -> int:
    """One request after the other; the exit status."""
    topology = NodeInfo.read(run_dir).topology
    made = pages_of or pages_for(topology.engines.devices)
    chunk_pages, spans = LAYOUT.chunk_pages(topology.chunk_tokens), FlushedSpans("engine", trace)
    with (
        made(LAYOUT, CHUNKS * chunk_pages, spans) as pages,
        Producer(run_dir, LAYOUT, model="load", name="load", wait_s=READY_S, pages=pages.source) as producer,
    ):
        if producer.state != "ready":
            print(f"the producer is {producer.state}: {producer.reason}", file=sys.stderr)
            return 1
        capacity = topology.tiers.dram.capacity
        tokens = CHUNKS * producer.chunk_tokens
        count = min(max(capacity * 3 // 2 // (CHUNKS * producer.chunk_bytes), PROMPTS[0]), PROMPTS[1])
        random = np.random.default_rng(9)
        texts = random.integers(0, 128_000, (count, tokens), np.uint32)
        texts[count // 2 :, : tokens // 2] = texts[: count - count // 2, : tokens // 2]
        prompts = [producer.prompt(text) for text in texts]
        page_ids = random.permutation(CHUNKS * chunk_pages).astype(np.int32).reshape(CHUNKS, chunk_pages)
        while not stopped.wait(PAUSE_S):
            prompt = prompts[int(count * random.random() ** 3)]
            with spans.span("engine.request", CHUNKS * producer.chunk_bytes, CHUNKS):
                with spans.span("engine.lookup"):
                    found = producer.lookup(prompt)
                with spans.span("engine.load", found.chunks * producer.chunk_bytes, found.chunks):
                    loaded = producer.load(found, pages.loads, page_ids[: found.chunks])
                with spans.span("engine.save", chunks=CHUNKS - loaded.chunks):
                    pages.mark()
                    ticket = producer.save(prompt, pages.saves, page_ids[loaded.chunks :], first_chunk=loaded.chunks)
                with spans.span("engine.copied"):
                    ticket.copied.wait(COPIED_S)
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
