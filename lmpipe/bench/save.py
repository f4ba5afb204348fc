"""Saving 4096 tokens, 512 MiB: as a copy alone and end to end; and what a save of 128K tokens costs the engine.

copy           Copier.gather of all pages into shared memory: the kernel, without lmpipe around it
end to end     Producer.save until the ticket says saved: leases, copy, commit and index rows, in a node with DRAM
               only. Private pages are copied by this process, mapped pages by gather
limit          one memcpy of the same 512 MiB, from the same pages to shared memory, with as many threads
engine thread  the time until Producer.save returns; see engine_thread.py
"""

from __future__ import annotations

import sys
import time
from typing import Any

from lmpipe import native
from lmpipe.bench import engine_thread
from lmpipe.bench.harness import Setting, main, rates, shared_directory
from lmpipe.bench.pages import Pages, Prompts
from lmpipe.bench.report import Figure, Goal
from lmpipe.producer import Producer
from lmpipe.testing import Node

GOAL = Goal("ratio", ">=", 0.9)
THREADS, QUICK_THREADS = (1, 2), (2,)
SAVED_S = 60.0


def run(setting: Setting) -> list[Figure]:
    """Every combination of memory and threads, then the engine thread."""
    figures: list[Figure] = []
    for mapped in (False, True):
        with shared_directory() as directory:
            setting.say(f"touching {'mapped' if mapped else 'private'} pages")
            pages = Pages(setting, directory, mapped=mapped)
            try:
                for threads in QUICK_THREADS if setting.quick else THREADS:
                    figures += _copy(setting, pages, threads)
                    figures += _end_to_end(setting, pages, threads)
            finally:
                pages.close()
    return figures + engine_thread.run(setting)


def label(pages: Pages, threads: int, what: str) -> str:
    """Name of a figure."""
    return f"{what}, {pages.kind} pages, {threads} thread{'s' if threads > 1 else ''}"


def node_of(pages: Pages, threads: int) -> dict[str, Any]:
    """A node with DRAM only: room for the transfer, for as much again that is leased ahead, and an eighth more."""
    room = max(pages.nbytes * 17 // 8, 64 << 20)
    return {
        "chunk_tokens": 256,
        "copy_threads": threads,
        "heartbeat_ms": 1000,
        "tiers": {"dram": {"capacity": room, "slots": None}, "ssd": None},
        "engines": {"leases": 16},
    }


def producer_of(node: Node, pages: Pages, threads: int) -> Producer:
    """An engine's producer that copies with so many threads. Raises RuntimeError when the node does not take it."""
    producer = Producer(
        node.run_dir, pages.layout, model="bench", pages=pages.engine.source, copy_threads=threads, wait_s=20.0
    )
    if producer.state != "ready":
        producer.close()
        raise RuntimeError(f"the producer is {producer.state}: {producer.reason}")
    return producer


def _copy(setting: Setting, pages: Pages, threads: int) -> list[Figure]:
    copier, name = native.Copier(threads), label(pages, threads, "copy")
    values, limits = setting.alternate(name, lambda: pages.gather(copier), lambda: pages.memcpy_out(copier))
    return [_figure(name, pages, values, limits)]


def _end_to_end(setting: Setting, pages: Pages, threads: int) -> list[Figure]:
    copier, name, prompts = native.Copier(threads), label(pages, threads, "end to end"), Prompts(pages.tokens)
    with Node(node_of(pages, threads)) as node, producer_of(node, pages, threads) as producer:
        pool = None if pages.engine.source is not None else pages.engine.pool

        def save() -> float:
            prompt = producer.prompt(prompts.fresh())
            began = time.perf_counter()
            ticket = producer.save(prompt, pool, pages.page_ids)
            if not ticket.wait(SAVED_S):
                raise RuntimeError(f"{name}: not saved: {ticket.dropped or 'no answer'}")
            took = time.perf_counter() - began
            if producer.invalidate(prompt) < 0:  # the next one finds the same warm slots free
                raise RuntimeError(f"{name}: no answer to an invalidation")
            return took

        values, limits = setting.alternate(name, save, lambda: pages.memcpy_out(copier))
    return [_figure(name, pages, values, limits)]


def _figure(name: str, pages: Pages, values: list[float], limits: list[float]) -> Figure:
    return Figure.of(name, rates(pages.nbytes, values), "GB/s", limits=rates(pages.nbytes, limits), goal=GOAL)


if __name__ == "__main__":
    sys.exit(main(run))
