"""An engine's pages on its device as its producer knows them (`producer.ForeignPool`), over `DevicePool`.

Calls return when the copies are over: a producer's threads wait for them, asleep, while the engine goes on. The arena
is pinned beside the work, piece by piece; what is not pinned yet is copied all the same, slower.
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import cast

import numpy as np
import numpy.typing as npt
import torch

from lmpipe import native
from lmpipe.codecs import CODECS
from lmpipe.cuda.coding import ON_DEVICE
from lmpipe.cuda.lanes import Event
from lmpipe.cuda.pinned import PIECE_BYTES, Pinned
from lmpipe.cuda.pool import DevicePool
from lmpipe.cuda.runtime import Runtime
from lmpipe.errors import FormatError
from lmpipe.handles import Codec

PageIds = npt.NDArray[np.int32]


class EnginePages:
    """Give it to `Producer.save` and `Producer.load` as the pool."""

    def __init__(self, pool: DevicePool, runtime: Runtime | None = None, pin_bytes: int = PIECE_BYTES) -> None:
        """`runtime`: of the pool's device (`cupy_runtime.open_device`), to pin the arena with; None leaves it alone.
        `pin_bytes`: of the arena at a time.
        """
        self._pool, self._runtime, self._pin_bytes = pool, runtime, pin_bytes
        self._changed = threading.Condition()
        self._arena: native.Region | None = None
        self._pinned: Pinned | None = None
        self._users = 0

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

    @contextmanager
    def use(self, arena: native.Region) -> Generator[None]:
        """The arena is being pinned from its first use on. Another one waits until nobody copies from or to this one:
        memory is not unpinned under a copy.
        """
        with self._changed:
            self._changed.wait_for(lambda: arena is self._arena or not self._users)
            if arena is not self._arena:
                self._pin(arena)
            self._users += 1
        try:
            yield
        finally:
            with self._changed:
                self._users -= 1
                self._changed.notify_all()

    def _pin(self, arena: native.Region | None) -> None:
        if self._pinned is not None:
            self._pinned.close()
        self._arena, self._pinned = arena, None
        if arena is not None and self._runtime is not None:
            self._pinned = Pinned(self._runtime, arena, "arena", self._pin_bytes)

    def _one_memory(self, slot: memoryview) -> bool:
        """Whether the driver knows all of a slot as one memory, or none of it; no copy may cross the border of two."""
        if self._pinned is None:
            return True
        start = np.frombuffer(slot, np.uint8).ctypes.data - self._pinned.address
        return start // self._pin_bytes == (start + len(slot) - 1) // self._pin_bytes

    def save(self, page_ids: PageIds, slots: Sequence[memoryview], after: object) -> None:
        """Copy pages into slots."""
        targets = [slot if self._one_memory(slot) else bytearray(len(slot)) for slot in slots]
        self._pool.save_into(page_ids, list(map(memoryview, targets)), cast(Event | None, after)).synchronize()
        for slot, target in zip(slots, targets, strict=True):
            if target is not slot:
                slot[:] = target

    def load(self, page_ids: PageIds, slots: Sequence[memoryview], after: object) -> None:
        """Copy raw slots into pages."""
        self._pool.load_from(page_ids, self._sources(slots), cast(Event | None, after)).synchronize()

    def _sources(self, slots: Sequence[memoryview]) -> list[memoryview]:
        return [slot if self._one_memory(slot) else memoryview(bytearray(slot)) for slot in slots]

    def decode(
        self, page_ids: PageIds, slots: Sequence[memoryview], codecs: Sequence[Codec], after: object
    ) -> dict[int, str]:
        """Fill pages from encoded slots: by kernels, or on the host where a codec has none (zstd)."""
        wait = cast(Event | None, after)
        there = [at for at, codec in enumerate(codecs) if codec in ON_DEVICE]
        failed: dict[int, str] = {}
        if there:
            sources = self._sources([slots[at] for at in there])
            decoded = self._pool.decode_from(page_ids[there], sources, [codecs[at] for at in there], wait)
            failed = {there[at]: why for at, why in decoded.failed().items()}
        for at, codec in enumerate(codecs):
            if codec in ON_DEVICE:
                continue
            raw = np.empty(self._pool.chunk_bytes(page_ids), np.uint8)
            try:
                CODECS[codec].decode(slots[at], raw.data)
            except FormatError as error:
                failed[at] = str(error)
                continue
            self._pool.load_from(page_ids[at : at + 1], [raw.data], wait).synchronize()
        return {at: f"damaged in DRAM: {why}" for at, why in failed.items()}

    def close(self) -> None:
        """Wait for what runs; unpin the arena, give the staging memory back. No call is under way or comes."""
        self._pool.close()
        with self._changed:
            self._pin(None)
