"""A KV cache that only code of the engine's own reaches, as on a GPU: the worker takes its way for devices.

`DeferredPool` fills a layer's pages when somebody waits for the layer, and not before: who forgets to wait attends to
what was there. `log` has what happened, in order.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lmpipe import native
from lmpipe.codecs import CODECS
from lmpipe.engines.vllm.device import DeviceMemory
from lmpipe.engines.vllm.geometry import GroupPages
from lmpipe.errors import FormatError
from lmpipe.handles import Codec

PageIds = npt.NDArray[np.int32]


class DeferredPool:
    """`producer.ForeignPool` over a cache group's pages."""

    def __init__(self, group: GroupPages, log: list[tuple[str, object]]) -> None:
        self.layout, self.pages, self.log = group.layout, group.pages, log
        self.bytes_per_page = self.layout.plane_count * self.layout.page_bytes
        self.users = 0
        self.begun: Callable[[], object] = lambda: None
        """Called when a load by layers has begun."""
        self.damaged: dict[int, str] = {}
        """Chunks that do not arrive."""
        length = (group.pages - 1) * group.stride + self.layout.page_bytes
        self.planes = [
            np.lib.stride_tricks.as_strided(
                np.ctypeslib.as_array((ctypes.c_uint8 * length).from_address(address)),
                (group.pages, self.layout.page_bytes),
                (group.stride, 1),
            )
            for address in group.offsets.tolist()
        ]

    def mark(self) -> object:
        self.log.append(("mark", threading.current_thread().name))
        return "mark"

    @contextmanager
    def use(self, arena: native.Region) -> Generator[None]:
        self.users += 1
        try:
            yield
        finally:
            self.users -= 1

    def save(self, page_ids: PageIds, slots: Sequence[memoryview], after: object) -> None:
        assert after == "mark"
        for ids, slot in zip(page_ids, slots, strict=True):
            for plane, row in zip(self.planes, self.rows(slot, len(ids)), strict=True):
                row[:] = plane[ids]

    def load(self, page_ids: PageIds, slots: Sequence[memoryview], after: object) -> None:
        assert after == "mark"
        self.log.append(("load", len(slots)))
        self.fill(range(len(self.planes)), page_ids, slots)

    def decode(
        self, page_ids: PageIds, slots: Sequence[memoryview], codecs: Sequence[Codec], after: object
    ) -> dict[int, str]:
        failed: dict[int, str] = {}
        for at, (slot, codec) in enumerate(zip(slots, codecs, strict=True)):
            raw = bytearray(page_ids.shape[1] * self.bytes_per_page)
            try:
                CODECS[codec].decode(slot, raw)
                self.load(page_ids[at : at + 1], [memoryview(raw)], after)
            except FormatError as error:
                failed[at] = str(error)
        return failed

    def load_layers(
        self, page_ids: PageIds, slots: Sequence[memoryview], codecs: Sequence[Codec], after: object
    ) -> DeferredLayers:
        assert after == "mark" and set(codecs) <= {Codec.RAW}
        for plane in self.planes:
            plane[page_ids[page_ids >= 0]] = 0x3F  # numbers, but not what was there
        self.log.append(("begin", len(slots)))
        self.begun()
        return DeferredLayers(self, page_ids, slots)

    def rows(self, slot: memoryview, pages: int) -> npt.NDArray[np.uint8]:
        return np.frombuffer(slot, np.uint8).reshape(len(self.planes), pages, -1)

    def fill(self, planes: range, page_ids: PageIds, slots: Sequence[memoryview]) -> None:
        for ids, slot in zip(page_ids, slots, strict=True):
            rows, there = self.rows(slot, len(ids)), ids >= 0
            for plane in planes:
                self.planes[plane][ids[there]] = rows[plane][there]


class DeferredLayers:
    """`producer.LayerCopies`."""

    def __init__(self, pool: DeferredPool, page_ids: PageIds, slots: Sequence[memoryview]) -> None:
        self.pool, self.page_ids, self.slots, self.filled = pool, page_ids, slots, 0

    def wait_layer(self, layer: int) -> None:
        self.pool.log.append(("wait", layer))
        self._fill(layer + 1)

    def _fill(self, layers: int) -> None:
        each = self.pool.layout.plane_count // self.pool.layout.layer_pieces
        come = [at for at in range(len(self.slots)) if at not in self.pool.damaged]
        upto = max(self.filled, min(layers, self.pool.layout.layer_pieces))
        planes = range(self.filled * each, upto * each)
        self.pool.fill(planes, self.page_ids[come], [self.slots[at] for at in come])
        self.filled = upto

    def finish(self) -> dict[int, str]:
        self.pool.log.append(("finish", None))
        self._fill(1 << 30)
        return self.pool.damaged


class Deferred(DeviceMemory):
    """What the worker takes for the memory of a GPU without CuPy."""

    def __init__(self, caches: Mapping[str, torch.Tensor], log: list[tuple[str, object]], *runtime: Any) -> None:
        super().__init__(caches, Path(), *runtime)
        self.log = log

    def pool(self, pages: GroupPages) -> Any:
        return DeferredPool(pages, self.log)
