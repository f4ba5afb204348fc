"""An engine's pages on its device as its producer knows them (`producer.ForeignPool`), over `DevicePool`.

Calls return when the copies are over: a producer's threads wait for them, asleep, while the engine goes on. A pool
keeps the pages' memory alive until then, which is all that PyTorch's allocator has to know of the streams used here.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import cast

import numpy as np
import numpy.typing as npt
import torch

from lmpipe import native
from lmpipe.codecs import CODECS
from lmpipe.cuda.arena import PinnedArena
from lmpipe.cuda.lanes import Event
from lmpipe.cuda.pool import DevicePool
from lmpipe.errors import FormatError
from lmpipe.handles import Codec

PageIds = npt.NDArray[np.int32]


class EnginePages:
    """Give it to `Producer.save` and `Producer.load` as the pool."""

    def __init__(self, pool: DevicePool, arena: PinnedArena | None = None) -> None:
        """`arena`: of the producer that it will be given to; None copies to and from memory that is not pinned."""
        self._pool, self._arena = pool, arena

    @property
    def pages(self) -> int:
        """How many there are."""
        return self._pool.pages.pages

    @property
    def bytes_per_page(self) -> int:
        """Of one page id over all planes."""
        layout = self._pool.pages.layout
        return layout.plane_count * layout.page_bytes

    def mark(self) -> Event | None:
        """An event in torch's current stream."""
        device = self._pool.pages.device
        if device.type != "cuda":
            return None
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(device))
        return event

    def use(self, arena: native.Region) -> AbstractContextManager[None]:
        """Within it slots are of this arena."""
        return nullcontext() if self._arena is None else self._arena.use(arena)

    def _is_one_memory(self, slot: memoryview) -> bool:
        return self._arena is None or self._arena.is_one_memory(slot)

    def save(self, page_ids: PageIds, slots: Sequence[memoryview], after: object) -> None:
        """Copy pages into slots."""
        targets = [slot if self._is_one_memory(slot) else bytearray(len(slot)) for slot in slots]
        self._pool.save_into(page_ids, list(map(memoryview, targets)), cast(Event | None, after)).synchronize()
        for slot, target in zip(slots, targets, strict=True):
            if target is not slot:
                slot[:] = target

    def load(self, page_ids: PageIds, slots: Sequence[memoryview], after: object) -> None:
        """Copy raw slots into pages."""
        self._pool.load_from(page_ids, self._sources(slots), cast(Event | None, after)).synchronize()

    def _sources(self, slots: Sequence[memoryview]) -> list[memoryview]:
        return [slot if self._is_one_memory(slot) else memoryview(bytearray(slot)) for slot in slots]

    def decode(
        self, page_ids: PageIds, slots: Sequence[memoryview], codecs: Sequence[Codec], after: object
    ) -> dict[int, str]:
        """Fill pages from encoded slots: by kernels, or on the host what they cannot (zstd, or a large chunk)."""
        wait = cast(Event | None, after)
        coded = list(enumerate(zip(codecs, slots, strict=True)))
        there = [at for at, (codec, slot) in coded if self._pool.can_decode(codec, len(slot))]
        failed: dict[int, str] = {}
        if there:
            sources = self._sources([slots[at] for at in there])
            decoded = self._pool.decode_from(page_ids[there], sources, [codecs[at] for at in there], wait)
            failed = {there[at]: why for at, why in decoded.failed().items()}
        for at, (codec, slot) in coded:
            if at in there:
                continue
            raw = np.empty(self._pool.chunk_bytes(page_ids), np.uint8)
            try:
                CODECS[codec].decode(slot, raw.data)
            except FormatError as error:
                failed[at] = str(error)
                continue
            self._pool.load_from(page_ids[at : at + 1], [raw.data], wait).synchronize()
        return {at: f"damaged in DRAM: {why}" for at, why in failed.items()}
