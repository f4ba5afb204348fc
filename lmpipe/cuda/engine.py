"""An engine's pages on its device as its producer knows them (`producer.ForeignPool`), over `DevicePool`.

Calls return when the copies are over: a producer's threads wait for them, asleep, while the engine goes on. The arena
is pinned beside the work, piece by piece; what is not pinned yet is copied all the same, slower.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import cast

import numpy as np
import numpy.typing as npt
import torch

from lmpipe import native
from lmpipe.codecs import CODECS
from lmpipe.cuda.coding import ON_DEVICE
from lmpipe.cuda.lanes import Event
from lmpipe.cuda.pinned import Pinned
from lmpipe.cuda.pool import DevicePool
from lmpipe.cuda.runtime import Runtime
from lmpipe.errors import FormatError
from lmpipe.handles import Codec

PageIds = npt.NDArray[np.int32]


class EnginePages:
    """Give it to `Producer.save` and `Producer.load` as the pool."""

    def __init__(self, pool: DevicePool, runtime: Runtime | None = None) -> None:
        """`runtime`: of the pool's device (`cupy_runtime.open_device`), to pin the arena with; None leaves it alone."""
        self._pool, self._runtime = pool, runtime
        self._lock = threading.Lock()
        self._arena: native.Region | None = None
        self._pinned: Pinned | None = None

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

    def use(self, arena: native.Region) -> None:
        """Pin this arena, and no other one any more."""
        with self._lock:
            if arena is self._arena:
                return
            self._unpin()
            self._arena = arena
            if self._runtime is not None:
                self._pinned = Pinned(self._runtime, arena, "arena")

    def _unpin(self) -> None:
        if self._pinned is not None:
            self._pinned.close()
            self._pinned = None

    def save(self, page_ids: PageIds, slots: Sequence[memoryview], after: object) -> None:
        """Copy pages into slots."""
        self._pool.save_into(page_ids, slots, cast(Event | None, after)).synchronize()

    def load(self, page_ids: PageIds, slots: Sequence[memoryview], after: object) -> None:
        """Copy raw slots into pages."""
        self._pool.load_from(page_ids, slots, cast(Event | None, after)).synchronize()

    def decode(
        self, page_ids: PageIds, slots: Sequence[memoryview], codecs: Sequence[Codec], after: object
    ) -> dict[int, str]:
        """Fill pages from encoded slots: by kernels, or on the host where a codec has none (zstd)."""
        wait = cast(Event | None, after)
        failed: dict[int, str] = {}
        there = [at for at, codec in enumerate(codecs) if codec in ON_DEVICE]
        if there:
            decoded = self._pool.decode_from(
                page_ids[there], [slots[i] for i in there], [codecs[i] for i in there], wait
            )
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
        with self._lock:
            self._unpin()
            self._arena = None
