"""Loads that the forward of their own step computes on, while it runs: on a GPU, layer by layer.

`start_load_kv` begins them; before each attention layer vLLM calls `wait_for_layer_load`, which has the GPU wait, not
the host; after the forward the results are taken. A replayed CUDA graph of the whole model calls back nobody: then all
layers are waited for before it. A layer that computed without having waited may have read what was not there, so its
load counts as failed.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace

from lmpipe.engines.vllm.orders import LoadOrder
from lmpipe.producer import LayerLoad, LoadResult

log = logging.getLogger("lmpipe.vllm")


@dataclass(frozen=True, slots=True)
class _UnderWay:
    order: LoadOrder
    load: LayerLoad


class InStepLoads:
    """Those of one step at a time. vLLM may call back from a thread for each half of a batch."""

    def __init__(self, layers: Mapping[str, int]) -> None:
        """`layers`: the place of each layer in the cache group."""
        self._layers = dict(layers)
        self._under_way: list[_UnderWay] = []
        self._waited: set[int] = set()
        self._by_layer = True

    def add(self, order: LoadOrder, load: LayerLoad) -> None:
        """A load has begun."""
        self._under_way.append(_UnderWay(order, load))

    def begun(self, *, by_layer: bool) -> None:
        """All of the step's have. `by_layer`: whether its layers will call back."""
        if self._under_way and not (by_layer and self._by_layer):
            self._wait(len(self._layers) - 1)
            self._waited.update(self._layers.values())

    def wait_layer(self, name: str) -> None:
        """Before a layer is computed. One that has no pages of its own reads those of an earlier one."""
        if self._under_way:
            layer = self._layers.get(name)
            self._wait(len(self._layers) - 1 if layer is None else layer)
            self._waited.update(() if layer is None else (layer,))

    def _wait(self, layer: int) -> None:
        for each in self._under_way:
            each.load.wait_layer(layer)

    def results(self) -> list[tuple[LoadOrder, LoadResult]]:
        """After the forward was given to the device, or has failed: wait for the copies."""
        ended = [(each.order, each.load.result()) for each in self._under_way]
        if ended and len(self._waited) < len(self._layers):
            log.warning("layers did not wait for their KV: what was loaded is computed, and the next load waited for")
            self._by_layer = False
            ended = [(order, replace(result, tokens=0, chunks=0, reason=_UNWAITED)) for order, result in ended]
        self._under_way.clear()
        self._waited.clear()
        return ended


_UNWAITED = "not every layer waited for it"
