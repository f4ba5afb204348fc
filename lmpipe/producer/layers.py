"""A load into pages on a device that goes on beside the engine's work, with a place to wait for each layer.

    load = producer.load_layers(found, pool, page_ids)      # returns at once
    for layer in range(layers):
        load.wait_layer(layer)                              # the stream waits, not the host
        …launch the layer…
    result = load.result()                                  # waits; what did not come has to be computed again

Whoever begins a load takes its result, whatever happens in between: the holds live until then.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

from lmpipe.handles import Tier
from lmpipe.producer.pools import LayerCopies


@dataclass(frozen=True, slots=True)
class LoadResult:
    """What a load brought: an unbroken run of `tokens` from the start of the prompt; pages after it hold nothing of
    meaning.
    """

    tokens: int
    chunks: int
    nbytes: int
    by_tier: dict[Tier, int]
    reason: str
    """Why it is less than was found; empty when it is not."""
    seconds: float
    """0 where nobody waited for the end alone."""
    fidelity: int = 0
    """Of the least exact chunk of them (`handles.Fidelity`); what is computed on them is no more exact."""


class LayerLoad:
    """One such load. Any thread may call."""

    def __init__(self, copies: LayerCopies | None, end: Callable[[], LoadResult]) -> None:
        """`copies`: under way; None: nothing is. `end` waits for them and releases what they needed; called once."""
        self._copies, self._end = copies, end
        self._result: LoadResult | None = None
        self._lock = threading.Lock()

    @classmethod
    def over(cls, result: LoadResult) -> LayerLoad:
        """A load that has ended already."""
        return cls(None, lambda: result)

    def wait_layer(self, layer: int) -> None:
        """What the calling thread's current stream is given from now on begins when layer `layer`, counted from 0, is
        in the pages; all earlier ones are by then. Any number of streams may wait, as often as they like.

        Where layers cannot come one by one (encoded chunks, pages that hold all layers) it waits for all of them.
        """
        copies = self._copies
        if copies is not None:
            copies.wait_layer(layer)

    def result(self) -> LoadResult:
        """Wait on the host until nothing is under way, and release the holds. May be called again."""
        with self._lock:
            if self._result is None:
                try:
                    self._result = self._end()
                except BaseException:
                    self._result = LoadResult(0, 0, 0, {}, "the copies failed", 0.0)
                    raise
                finally:
                    self._copies = None
            return self._result
