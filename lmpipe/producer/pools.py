"""Whose memory a chunk is copied from and to on the engine's side: pages of the host, which native threads copy, or
pages that only code of the engine's own can reach, on a GPU.

Knows no message and no hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import numpy as np
import numpy.typing as npt

from lmpipe import native
from lmpipe.handles import ChunkRecords, Codec
from lmpipe.producer.decoding import Decoder
from lmpipe.shm.table import SlotTable

PageIds = npt.NDArray[np.int32]


class ForeignPool(Protocol):
    """An engine's paged KV memory on a device (`cuda.engine.EnginePages`). Any thread may call.

    Slots are chunks' payloads in the arena. When a call returns, or raises, nothing is under way any more. Page id -1
    is no page.
    """

    @property
    def pages(self) -> int:
        """How many there are."""
        ...

    @property
    def bytes_per_page(self) -> int:
        """Of one page id over all planes."""
        ...

    def mark(self) -> object:
        """What the engine has ordered of its device until now, on the calling thread: copies begin after it."""
        ...

    def use(self, arena: native.Region) -> AbstractContextManager[None]:
        """Within it slots are of this arena."""
        ...

    def save(self, page_ids: PageIds, slots: Sequence[memoryview], after: object) -> None:
        """Copy pages, (chunks, pages of a chunk), into slots."""
        ...

    def load(self, page_ids: PageIds, slots: Sequence[memoryview], after: object) -> None:
        """Copy raw slots into pages."""
        ...

    def decode(
        self, page_ids: PageIds, slots: Sequence[memoryview], codecs: Sequence[Codec], after: object
    ) -> dict[int, str]:
        """Fill pages from encoded slots. Why chunks did not arrive that did not, by their place."""
        ...


Pool = native.PagePool | ForeignPool


def mark(pool: Pool | None) -> object:
    """What copies of this pool have to wait for, if they are ordered now."""
    return None if pool is None or isinstance(pool, native.PagePool) else pool.mark()


class Copies:
    """Copies between the arena and pools, in one direction of one producer."""

    def __init__(self, threads: int) -> None:
        """`threads`: native ones, for pools of the host."""
        self._copier, self._decoder = native.Copier(threads), Decoder(threads)

    def save(self, pool: Pool, page_ids: PageIds, arena: SlotTable, records: ChunkRecords, after: object) -> None:
        """Fill the slots of `records` from pages, (chunks, pages of a chunk), raw."""
        if isinstance(pool, native.PagePool):
            self._copier.gather(pool, page_ids, arena.region, _offsets(arena, records))
        else:
            with pool.use(arena.region):
                pool.save(page_ids, _payloads(arena, records), after)

    def load(self, pool: Pool, page_ids: PageIds, arena: SlotTable, records: ChunkRecords, after: object) -> None:
        """Fill pages from raw slots."""
        page_ids = np.ascontiguousarray(page_ids)
        if isinstance(pool, native.PagePool):
            self._copier.scatter(pool, page_ids, arena.region, _offsets(arena, records))
        else:
            with pool.use(arena.region):
                pool.load(page_ids, _payloads(arena, records), after)

    def decode(
        self, pool: Pool, page_ids: PageIds, arena: SlotTable, records: ChunkRecords, after: object
    ) -> dict[int, str]:
        """Fill pages from encoded slots. Why chunks did not arrive that did not, by their place."""
        page_ids = np.ascontiguousarray(page_ids)
        if isinstance(pool, native.PagePool):
            return self._decoder.scatter(arena, records, pool, page_ids)
        codecs = [Codec(number) for number in records["codec"].tolist()]
        with pool.use(arena.region):
            return pool.decode(page_ids, _payloads(arena, records), codecs, after)


def _payloads(arena: SlotTable, records: ChunkRecords) -> list[memoryview]:
    places, lengths = records["place"].tolist(), records["nbytes"].tolist()
    return [arena.payload(place >> 32, nbytes) for place, nbytes in zip(places, lengths, strict=True)]


def _offsets(arena: SlotTable, records: ChunkRecords) -> npt.NDArray[np.uint64]:
    return np.array([arena.offset(place >> 32) for place in records["place"].tolist()], np.uint64)
