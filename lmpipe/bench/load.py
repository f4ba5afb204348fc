"""Loading 4096 tokens, 512 MiB, from DRAM: as a copy alone and end to end.

copy        Copier.scatter of shared memory into all pages: the kernel, without lmpipe around it
end to end  Producer.lookup and Producer.load, both: the index read, the holds, the copy by this process, the holds
            given back; the prompt was hashed before. A node with DRAM only runs beside it
limit       one memcpy of the same 512 MiB, from shared memory to the same pages, with as many threads
"""

from __future__ import annotations

import sys
import time

from lmpipe import native
from lmpipe.bench.harness import Setting, main, rates, shared_directory
from lmpipe.bench.pages import Pages, Prompts
from lmpipe.bench.report import Figure
from lmpipe.bench.save import GOAL, QUICK_THREADS, SAVED_S, THREADS, label, node_of, producer_of
from lmpipe.testing import Node


def run(setting: Setting) -> list[Figure]:
    """Every combination of memory and threads."""
    figures: list[Figure] = []
    for mapped in (False, True):
        with shared_directory() as directory:
            setting.say(f"touching {'mapped' if mapped else 'private'} pages")
            pages = Pages(setting, directory, mapped=mapped)
            try:
                for threads in QUICK_THREADS if setting.quick else THREADS:
                    figures += _end_to_end(setting, pages, threads)
                    figures += _copy(setting, pages, threads)
            finally:
                pages.close()
    return figures


def _copy(setting: Setting, pages: Pages, threads: int) -> list[Figure]:
    copier, name = native.Copier(threads), label(pages, threads, "copy")
    values, limits = setting.alternate(name, lambda: pages.scatter(copier), lambda: pages.memcpy_in(copier))
    return [_figure(name, pages, values, limits)]


def _end_to_end(setting: Setting, pages: Pages, threads: int) -> list[Figure]:
    copier, name = native.Copier(threads), label(pages, threads, "end to end")
    with Node(node_of(pages, threads)) as node, producer_of(node, pages, threads) as producer:
        pool = pages.engine.pool
        prompt = producer.prompt(Prompts(pages.tokens).fresh())
        saved = pages.checksum()
        ticket = producer.save(prompt, None if pages.engine.source is not None else pool, pages.page_ids)
        if not ticket.wait(SAVED_S):
            raise RuntimeError(f"{name}: not saved: {ticket.dropped or 'no answer'}")

        def load() -> float:
            began = time.perf_counter()
            found = producer.lookup(prompt)
            loaded = producer.load(found, pool, pages.page_ids)
            took = time.perf_counter() - began
            if loaded.tokens != pages.tokens:
                raise RuntimeError(f"{name}: {loaded.tokens} of {pages.tokens} tokens loaded: {loaded.reason}")
            return took

        pages.engine.memory[:] = 0
        load()
        if pages.checksum() != saved:
            raise RuntimeError(f"{name}: what was loaded is not what was saved")
        values, limits = setting.alternate(name, load, lambda: pages.memcpy_in(copier))
        load()  # the copy benchmark that follows, and its limit, work on the same bytes
    return [_figure(name, pages, values, limits)]


def _figure(name: str, pages: Pages, values: list[float], limits: list[float]) -> Figure:
    return Figure.of(name, rates(pages.nbytes, values), "GB/s", limits=rates(pages.nbytes, limits), goal=GOAL)


if __name__ == "__main__":
    sys.exit(main(run))
