"""The copies that a worker makes itself between its KV cache on a GPU and the arena: by Triton's kernels, on streams
beside the engine's. Imported only where there is such a KV cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from lmpipe.cuda.arena import PinnedArena
from lmpipe.cuda.engine import EnginePages
from lmpipe.cuda.pages import DevicePages
from lmpipe.cuda.pool import DevicePool
from lmpipe.cuda.runtime import Runtime
from lmpipe.cuda.transfers import Transfers
from lmpipe.engines.tracing import engine_spans

if TYPE_CHECKING:  # it imports vLLM, which this does not need
    from lmpipe.engines.vllm.geometry import GroupPages


class Kernels:
    """What all cache groups of one rank share."""

    def __init__(self, caches: Sequence[torch.Tensor], runtime: Runtime | None, run_dir: Path) -> None:
        """`caches`: what the pages lie in. `runtime`: to pin the arena with; None leaves it alone, and is slower.
        `run_dir`: of the node, for what it wants traced.
        """
        self._caches, self._runtime = caches, runtime
        self._spans = engine_spans(run_dir)
        self._transfers = Transfers(caches[0].device, spans=self._spans)
        self._arenas: list[PinnedArena] = []

    def pool(self, pages: GroupPages) -> EnginePages:
        """For one group's producer."""
        there = DevicePages.at(pages.layout, pages.offsets.astype(np.int64), pages.stride, pages.pages, self._caches)
        arena = None if self._runtime is None else PinnedArena(self._runtime)
        self._arenas += [] if arena is None else [arena]
        return EnginePages(DevicePool(there, self._transfers), arena)

    def close(self) -> None:
        """Wait for copies, unpin the arena. No other begins."""
        self._transfers.close()
        self._spans.close()
        for arena in self._arenas:
            arena.close()
