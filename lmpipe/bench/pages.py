"""The bytes that saves and loads are measured with: paged KV of an 8B model, in private or in mapped memory.

32 layers, 8 KV heads of 128, bf16, pages of 16 tokens: 32 KiB for each page and plane, 64 planes, 32 MiB for a chunk of
256 tokens. Page ids are in random order. The scratch segment stands for the arena: tmpfs, prefaulted, as long as the
transfer.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np

from lmpipe import native
from lmpipe.bench.harness import Setting
from lmpipe.engines.paged import PagedEngine
from lmpipe.layout import CHUNK_TOKENS, KVLayout
from lmpipe.shm.descriptor import HEADER_BYTES, SegmentKind
from lmpipe.shm.segment import Segment


class Pages:
    """An engine's pages, full of random bytes, and a scratch segment of the same size."""

    def __init__(self, setting: Setting, directory: Path, *, mapped: bool) -> None:
        layers, tokens = setting.size(32, 2), setting.size(4096, 512)
        self.layout = KVLayout.paged(layers, 8, 128, "bfloat16", 16)
        self.tokens, self.chunks = tokens, tokens // CHUNK_TOKENS
        self.chunk_bytes = self.layout.chunk_bytes(CHUNK_TOKENS)
        self.nbytes = self.chunks * self.chunk_bytes
        self.kind = "mapped" if mapped else "private"
        segment = directory / "pages.shm" if mapped else None
        self.engine = PagedEngine(self.layout, tokens // self.layout.page_tokens, segment=segment)
        self.page_ids = self.engine.allocate(self.chunks, CHUNK_TOKENS)
        flat = self.engine.memory.reshape(-1).view(np.uint64)
        # Written, not only read: an untouched page is the kernel's one page of zeros, which costs nothing to copy.
        flat[:] = np.random.default_rng(1).integers(0, 1 << 63, len(flat), np.uint64)
        self.region = native.Region(self.engine.memory.data)
        self.scratch = Segment.create(directory / "scratch.shm", SegmentKind.PAGES, HEADER_BYTES + self.nbytes)
        self.offsets = HEADER_BYTES + np.arange(self.chunks, dtype=np.uint64) * np.uint64(self.chunk_bytes)

    def gather(self, copier: native.Copier) -> float:
        """Pages to the scratch segment, chunk by chunk in one call; seconds."""
        began = time.perf_counter()
        copier.gather(self.engine.pool, self.page_ids, self.scratch.region, self.offsets)
        return time.perf_counter() - began

    def scatter(self, copier: native.Copier) -> float:
        """The scratch segment to the pages; seconds."""
        began = time.perf_counter()
        copier.scatter(self.engine.pool, self.page_ids, self.scratch.region, self.offsets)
        return time.perf_counter() - began

    def memcpy_out(self, copier: native.Copier) -> float:
        """One memcpy of all pages to the scratch segment; seconds."""
        began = time.perf_counter()
        copier.memcpy(self.scratch.region, HEADER_BYTES, self.region, 0, self.nbytes)
        return time.perf_counter() - began

    def memcpy_in(self, copier: native.Copier) -> float:
        """One memcpy of the scratch segment to the pages; seconds."""
        began = time.perf_counter()
        copier.memcpy(self.region, 0, self.scratch.region, HEADER_BYTES, self.nbytes)
        return time.perf_counter() - began

    def checksum(self) -> bytes:
        """Of all pages: what was there before is there again."""
        return native.xxh3_128(self.engine.memory.reshape(-1).data)

    def close(self) -> None:
        """Give the memory back."""
        del self.region
        self.engine.close()
        self.scratch.unlink()
        self.scratch.close()


class Prompts:
    """Prompts that nobody has seen: other tokens at each call."""

    def __init__(self, tokens: int, seed: int = 7) -> None:
        self._tokens = tokens
        self._random = np.random.default_rng(seed)

    def fresh(self) -> np.ndarray[tuple[int], np.dtype[np.uint32]]:
        """Token ids of a vocabulary of 128K, as uint32."""
        return self._random.integers(0, 128_000, self._tokens, np.uint32)
