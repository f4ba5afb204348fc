"""Engines whose pages hold numbers as models have them, so that codecs have something to work on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rig import CALM, Engine, Memory

from lmpipe.layout import KVLayout

LAYOUT = KVLayout.paged(4, 2, 64, "bfloat16", 4)
LARGEST_ERROR = {"fp8": 0.0625, "int4h": 0.25}
"""Of a vector, against its length: a coarse look that it is the same one; the codecs' own tests state the bounds."""


class Numbers(Memory):
    """KV as models have it: normally distributed, larger in some channels. It may come back with some error."""

    error = 0.0

    def content(self, key: npt.NDArray[np.uint8], pages: int) -> npt.NDArray[np.uint8]:
        rng = np.random.default_rng(int.from_bytes(key.tobytes(), "little"))
        shape = (self.layout.plane_count, pages, self.layout.page_bytes // 128, 64)
        numbers = rng.standard_normal(shape, np.float32) * np.repeat(np.float32([0.5, 1, 2, 8]), 16)
        halves = (numbers.view(np.uint32) >> 16).astype(np.uint16)
        return halves.view(np.uint8).reshape(*shape[:2], self.layout.page_bytes)

    def wrong(self, keys: npt.NDArray[np.uint8], page_ids: npt.NDArray[np.int32]) -> list[int]:
        if not self.error:
            return super().wrong(keys, page_ids)
        pairs = enumerate(zip(keys, page_ids, strict=False))
        return [at for at, (key, ids) in pairs if self._error_of(key, ids) > self.error]

    def _error_of(self, key: npt.NDArray[np.uint8], ids: npt.NDArray[np.int32]) -> float:
        is_, was = _numbers(self.memory[:, ids]), _numbers(self.content(key, len(ids)))
        return float((np.linalg.norm(is_ - was, axis=1) / np.linalg.norm(was, axis=1)).max())


def _numbers(pages: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """(vectors, 64)"""
    halves = np.ascontiguousarray(pages).view(np.uint16)
    return (halves.astype(np.uint32) << 16).view(np.float32).reshape(-1, 64)


class NumbersEngine(Engine):
    """An engine whose memory holds numbers; what it loads may be as wrong as a codec makes it."""

    def __init__(self, run_dir: Path, codec: str, **options: Any) -> None:
        super().__init__(run_dir, layout=LAYOUT, **options)
        self.memory.close()
        self.memory = Numbers(LAYOUT, 2048)
        self.memory.error = LARGEST_ERROR.get(codec, 0.0)


def dram(codec: str, capacity: str = "8MiB") -> dict[str, Any]:
    return {"tiers": {"ssd": None, "dram": {"codec": codec, "capacity": capacity, "slots": 512}}, **CALM}
