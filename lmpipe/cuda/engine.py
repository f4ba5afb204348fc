"""An engine's pages on its device as its producer knows them (`producer.ForeignPool`), over `DevicePool`.

Calls return when the copies are over: a producer's threads wait for them, asleep, while the engine goes on. Only
`load_layers` returns before: the engine's stream waits for each layer. A pool keeps the pages' memory alive until then,
which is all that PyTorch's allocator has to know of the streams used here.
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
from lmpipe.cuda.pool import Decoded, DevicePool
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
        return self.load_layers(page_ids, slots, codecs, after).finish()

    def _unpacked(self, slot: memoryview, codec: Codec, page_ids: PageIds) -> memoryview:
        """A chunk, decoded on the host. Raises FormatError."""
        raw = np.empty(self._pool.chunk_bytes(page_ids), np.uint8)
        CODECS[codec].decode(slot, raw.data)
        return raw.data

    def load_layers(
        self, page_ids: PageIds, slots: Sequence[memoryview], codecs: Sequence[Codec], after: object
    ) -> LayersComing:
        """Begin to fill pages from slots, first layer first. Encoded chunks come with all their layers at once; what
        kernels cannot decode is decoded on the host before this returns.
        """
        coming = LayersComing(self._pool.pages.device)
        wait = cast(Event | None, after)
        raw: dict[int, memoryview] = {}
        for at, (slot, codec) in enumerate(zip(slots, codecs, strict=True)):
            try:
                if codec is Codec.RAW:
                    raw[at] = self._sources([slot])[0]
                elif self._pool.can_decode(codec, len(slot)):
                    coming.encoded.append(at)
                else:
                    raw[at] = self._unpacked(slot, codec, page_ids)
            except FormatError as error:
                coming.failed[at] = str(error)
        encoded = self._sources([slots[at] for at in coming.encoded])
        coming.sources = [*raw.values(), *encoded]
        try:
            if encoded:
                those = [codecs[at] for at in coming.encoded]
                coming.decoded = self._pool.decode_from(page_ids[coming.encoded], encoded, those, wait)
            if raw:
                coming.layers = self._pool.load_layers(page_ids[list(raw)], list(raw.values()), wait)
        except BaseException:
            coming.finish()  # of the slots nothing may be read any more
            raise
        return coming


class LayersComing:
    """Copies under way (`producer.pools.LayerCopies`). Keeps the memory they read."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.sources: list[memoryview] = []
        self.layers: list[Event] = []
        self.encoded: list[int] = []
        self.decoded: Decoded | None = None
        self.failed: dict[int, str] = {}

    def wait_layer(self, layer: int) -> None:
        """Have torch's current stream wait for a layer; in memory of the host, wait for it."""
        events = [self.layers[min(layer, len(self.layers) - 1)]] if self.layers else []
        if self.decoded is not None:
            events.append(self.decoded.done)
        for event in events:
            if self._device.type == "cuda":
                torch.cuda.current_stream(self._device).wait_event(cast(torch.cuda.Event, event))
            else:
                event.synchronize()

    def finish(self) -> dict[int, str]:
        """Wait; why chunks did not arrive."""
        if self.layers:
            self.layers[-1].synchronize()
        if self.decoded is not None:
            self.failed.update({self.encoded[at]: why for at, why in self.decoded.failed().items()})
        return {at: f"damaged in DRAM: {why}" for at, why in self.failed.items()}
