"""Whose memory a chunk is copied from and to on the engine's side: pages of the host, which native threads copy, or
pages that only code of the engine's own can reach, on a GPU.

Knows no message and no hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from lmpipe import native
from lmpipe.handles import ChunkRecords, Codec
from lmpipe.producer.decoding import Decoder
from lmpipe.shm.table import SlotTable

PageIds = npt.NDArray[np.int32]


class LayerCopies(Protocol):
    """Copies into pages on a device that are under way, first layer first. Any thread may call."""

    def wait_layer(self, layer: int) -> None:
        """What the calling thread's current stream is given from now on begins when this layer, and all before it, are
        in the pages.
        """
        ...

    def finish(self) -> dict[int, str]:
        """Wait on the host until nothing is under way. Why chunks did not arrive that did not, by their place."""
        ...


class ForeignPool(Protocol):
    """An engine's paged KV memory on a device (`cuda.engine.EnginePages`). Any thread may call.

    Slots are chunks' payloads in the arena. When a call raises, or returns (but for `load_layers`), nothing is under
    way any more. Page id -1 is no page.
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

    def load_layers(
        self, page_ids: PageIds, slots: Sequence[memoryview], codecs: Sequence[Codec], after: object
    ) -> LayerCopies:
        """Begin to fill pages from slots, raw or encoded. Slots stay as they are until the copies are finished."""
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
        with pool.use(arena.region):
            return pool.decode(page_ids, _payloads(arena, records), _codecs(records), after)

    def load_layers(
        self, pool: ForeignPool, page_ids: PageIds, arena: SlotTable, records: ChunkRecords, after: object
    ) -> LayerCopies:
        """Begin to fill pages from slots, raw or encoded."""
        with ExitStack() as used:
            used.enter_context(pool.use(arena.region))
            page_ids = np.ascontiguousarray(page_ids)
            copies = pool.load_layers(page_ids, _payloads(arena, records), _codecs(records), after)
            return _Using(copies, used.pop_all())


@dataclass(slots=True)
class _Using:
    """Copies from an arena, which is in use until they are finished."""

    copies: LayerCopies
    used: ExitStack

    def wait_layer(self, layer: int) -> None:
        self.copies.wait_layer(layer)

    def finish(self) -> dict[int, str]:
        with self.used:
            return self.copies.finish()


def _codecs(records: ChunkRecords) -> list[Codec]:
    return [Codec(number) for number in records["codec"].tolist()]


def _payloads(arena: SlotTable, records: ChunkRecords) -> list[memoryview]:
    places, lengths = records["place"].tolist(), records["nbytes"].tolist()
    return [arena.payload(place >> 32, nbytes) for place, nbytes in zip(places, lengths, strict=True)]


def _offsets(arena: SlotTable, records: ChunkRecords) -> npt.NDArray[np.uint64]:
    return np.array([arena.offset(place >> 32) for place in records["place"].tolist()], np.uint64)
