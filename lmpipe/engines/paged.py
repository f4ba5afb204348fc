"""A paged KV cache without a model: what an engine's memory looks like to lmpipe, for tests and benchmarks, yours too.

Pages lie in private memory, or in a named shared segment from which gather copies them itself. What a chunk should hold
follows from its key, so a checker needs no store of its own.
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

from lmpipe import native
from lmpipe.layout import KVLayout
from lmpipe.messages import PageSource
from lmpipe.shm.descriptor import HEADER_BYTES, SegmentKind
from lmpipe.shm.segment import Segment

PageIds = npt.NDArray[np.int32]


class PagedEngine:
    """`pages` pages for each plane of `layout`, handed out in random order.

    Args:
        segment: where to make the shared segment; None: private memory.

    Raises:
        SegmentError: no room for the segment, or it exists.
    """

    def __init__(self, layout: KVLayout, pages: int, *, segment: Path | None = None, seed: int = 0) -> None:
        self.layout = layout
        planes, page_bytes = layout.plane_count, layout.page_bytes
        nbytes = planes * pages * page_bytes
        self._segment = None if segment is None else Segment.create(segment, SegmentKind.PAGES, HEADER_BYTES + nbytes)
        if self._segment is None:
            flat = np.zeros(nbytes, np.uint8)
            region, start = native.Region(flat.data), 0
        else:
            flat = np.frombuffer(self._segment.buf, np.uint8, nbytes, HEADER_BYTES)
            region, start = self._segment.region, HEADER_BYTES
        self.memory: npt.NDArray[np.uint8] = flat.reshape(planes, pages, page_bytes)
        """(planes, pages, bytes of a page)."""
        offsets = start + np.arange(planes, dtype=np.uint64) * np.uint64(pages * page_bytes)
        sizes = np.full(planes, page_bytes, np.uint64)
        self.pool = native.PagePool([region], np.zeros(planes, np.uint32), offsets, sizes, sizes, pages)
        self.source: PageSource | None = None
        """What a producer is given as `pages`; None for private memory."""
        if self._segment is not None:
            self.source = PageSource(str(segment), self._segment.id.hex(), offsets, sizes, sizes, pages)
        self._free = np.random.default_rng(seed).permutation(pages).astype(np.int32).tolist()

    def allocate(self, chunks: int, chunk_tokens: int) -> PageIds:
        """Page ids of `chunks` chunks, (chunks, pages of a chunk).

        Raises:
            MemoryError: not that many pages are free.
        """
        per_chunk = self.layout.chunk_pages(chunk_tokens)
        if chunks * per_chunk > len(self._free):
            raise MemoryError(f"{chunks * per_chunk} pages wanted, {len(self._free)} are free")
        taken, self._free = self._free[: chunks * per_chunk], self._free[chunks * per_chunk :]
        return np.array(taken, np.int32).reshape(chunks, per_chunk)

    def free(self, page_ids: PageIds) -> None:
        """Give pages back; they may be handed out, and overwritten, at once."""
        self._free += page_ids.ravel().tolist()

    def content(self, key: npt.NDArray[np.uint8], pages: int) -> npt.NDArray[np.uint8]:
        """What the chunk of this key holds: (planes, pages, bytes of a page)."""
        shape = (self.layout.plane_count, pages, self.layout.page_bytes)
        seed = int.from_bytes(key.tobytes(), "little")
        return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)

    def fill(self, keys: npt.NDArray[np.uint8], page_ids: PageIds) -> None:
        """Write what the chunks of these keys, (chunks, 16), hold: the stand-in for prefill."""
        for key, pages in zip(keys, page_ids, strict=False):
            self.memory[:, pages] = self.content(key, len(pages))

    def wrong(self, keys: npt.NDArray[np.uint8], page_ids: PageIds) -> list[int]:
        """Positions of chunks whose pages do not hold what their keys say."""
        pairs = enumerate(zip(keys, page_ids, strict=False))
        return [at for at, (key, ids) in pairs if not np.array_equal(self.memory[:, ids], self.content(key, len(ids)))]

    def close(self) -> None:
        """Drop the memory, and the segment's file."""
        self.memory = np.empty((0, 0, 0), np.uint8)
        del self.pool
        if self._segment is not None:
            self._segment.unlink()
            self._segment.close()

    def __enter__(self) -> PagedEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
