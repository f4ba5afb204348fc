"""By CUDA IPC: saves, as gather reads pages that another process exports; and chunks out of another's device memory.

open    the reader of 32K tokens' pages made and closed again: handles, event, stream. Done once for an engine
save    all its chunks, pages in random order, into pinned memory, against one DMA of the same bytes between memory of
        this process on the same device and the same pinned memory
hot     as many bytes out of that process's memory into this one's, both on the device, a chunk at a time: what a cache
        of hot chunks there would be copied with (docs/decisions/0023); against a DMA of them from pinned memory

The clock is the host's, from an idle device to an idle device; the messages and grants of a save are not inside it.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager

import numpy as np

from lmpipe import messages as m
from lmpipe import native
from lmpipe.bench.harness import Setting, rates, scaled
from lmpipe.bench.report import Figure, Goal
from lmpipe.cuda.copy import Copies
from lmpipe.cuda.ipc import Allocations, close_source, plane_addresses
from lmpipe.cuda.readers import DeviceReaders
from lmpipe.cuda.runtime import Runtime
from lmpipe.layout import CHUNK_TOKENS, KVLayout
from lmpipe.tiers.segment_file import aligned

SAVED = Goal("ratio", ">=", 0.9)
PIN_S = 120.0


@contextmanager
def exported(layout: KVLayout, tokens: int) -> Generator[m.DeviceSource]:
    """Another process's pages on the first device."""
    shape = (layout.layers, layout.kv_heads, layout.head_dim, tokens)
    argv = [sys.executable, "-P", "-m", "lmpipe.bench.gpu_exporter", *map(str, shape)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as engine:
        assert engine.stdin is not None and engine.stdout is not None
        hello = engine.stdout.readline()
        if not hello:
            raise RuntimeError("the process that was to export pages ended")
        register = m.decode([bytes.fromhex(hello)])
        assert isinstance(register, m.Register) and isinstance(register.pages, m.DeviceSource)
        yield register.pages
        engine.stdin.close()


def run(
    setting: Setting, runtime: Runtime, source: m.DeviceSource, layout: KVLayout, tokens: int, own: int
) -> list[Figure]:
    """All three figures.

    Args:
        setting: how large.
        runtime: the device, in this process.
        source: pages of another one.
        layout: of them.
        tokens: that they hold.
        own: address of as much memory of the device that is this process's.
    """
    nbytes, chunk_bytes = layout.chunk_bytes(tokens), layout.chunk_bytes(CHUNK_TOKENS)
    memory = aligned(nbytes)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    ctypes.memset(address, 0, nbytes)
    readers = DeviceReaders([runtime], native.Region.at(address, nbytes, True, memory), native.Copier(1))
    if not readers.pinned.wait(PIN_S):
        raise RuntimeError("the memory that saves go to could not be pinned")
    order = np.random.default_rng(0).permutation(source.pages).astype(np.int32)
    page_ids = order.reshape(-1, layout.chunk_pages(CHUNK_TOKENS))
    offsets = np.arange(len(page_ids), dtype=np.uint64) * np.uint64(chunk_bytes)
    # A copy lies within one pinned piece: to the driver each is a memory of its own.
    starts = np.arange(0, nbytes, readers.pinned.piece_bytes, dtype=np.uint64)
    sizes = np.diff(np.append(starts, np.uint64(nbytes)))
    stream = runtime.new_stream(urgent=False)

    def opened() -> float:
        began = time.perf_counter()
        reader = readers.open(source, lambda: True)
        seconds = time.perf_counter() - began
        reader.close()
        return seconds

    def save() -> float:
        began = time.perf_counter()
        reader.gather(page_ids, offsets)
        return time.perf_counter() - began

    def dma() -> float:
        began = time.perf_counter()
        runtime.copy(starts + np.uint64(address), starts + np.uint64(own), sizes, stream)
        runtime.finish(stream)
        return time.perf_counter() - began

    def load() -> float:
        began = time.perf_counter()
        runtime.copy(starts + np.uint64(own), starts + np.uint64(address), sizes, stream)
        runtime.finish(stream)
        return time.perf_counter() - began

    def hot() -> float:
        began = time.perf_counter()
        runtime.copy(chunks.dst, chunks.src, chunks.nbytes, stream)
        runtime.finish(stream)
        return time.perf_counter() - began

    opens = [opened() for _ in range(setting.warm_ups + setting.runs)][setting.warm_ups :]
    reader = readers.open(source, lambda: True)
    name = f"save by IPC, {tokens} tokens"
    values, limits = setting.alternate(name, save, dma)
    reader.close()
    allocations = Allocations(runtime)
    planes = plane_addresses(source, allocations)
    each = source.page_bytes * np.uint64(source.pages)
    chunks = Copies(np.cumsum(each) - each + np.uint64(own), planes, each).cut(own, chunk_bytes)
    hot_name = f"chunks out of device memory by IPC, {tokens} tokens"
    hot_values, loads = setting.alternate(hot_name, hot, load)
    close_source(source, allocations)
    runtime.free_stream(stream)
    readers.close()
    return [
        Figure.of("pages opened by IPC", scaled(opens, 1e3), "ms"),
        Figure.of(name, rates(nbytes, values), "GB/s", limits=rates(nbytes, limits), goal=SAVED),
        Figure.of(hot_name, rates(nbytes, hot_values), "GB/s", limits=rates(nbytes, loads)),
    ]
