"""Numbers such as models have in their KV, for benchmarks that have no model."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lmpipe.codecs.calibration import BITS, VERSION, Calibration
from lmpipe.layout import KVLayout

UNEVEN, EVEN = 0.8, 0.5
"""How the logarithms of the sizes of a key's channels scatter; the size of all channels of a value."""
THREE_BITS = 0.75
"""Of all heads in the calibration; the others have 4: 3.25 bits a number."""


def kv(layout: KVLayout, tokens: int, seed: int = 1) -> npt.NDArray[np.uint8]:
    """A payload of bf16: keys have channels of very different size, as real ones do; values do not."""
    random = np.random.default_rng(seed)
    even = np.full((layout.kv_heads, layout.head_dim), EVEN, np.float32)
    payload = np.empty(layout.chunk_bytes(tokens), np.uint8)
    view = layout.canonical(payload, tokens)  # [layer][K|V][page][token][head][dim][byte]
    shape = view.shape[2:-1]
    for layer in range(layout.layers):
        for part in range(layout.kv):
            spread = np.exp(random.normal(0, UNEVEN, even.shape)).astype(np.float32) if part == 0 else even
            view[layer, part] = _bf16(random.standard_normal(shape, np.float32) * spread)
    return payload


def _bf16(numbers: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """The upper halves, cut, with an axis of their two bytes."""
    return (numbers.view(np.uint32) >> 16).astype(np.uint16)[..., None].view(np.uint8)


def calibration_of(layout: KVLayout) -> Calibration:
    """A table of bits drawn by chance: as fast and as large as a measured one."""
    shape = layout.layers, layout.kv, layout.kv_heads
    bits = np.where(np.random.default_rng(3).random(shape) < THREE_BITS, BITS[0], BITS[1])
    nothing = np.zeros((*shape, len(BITS)))
    return Calibration(
        version=VERSION,
        model="drawn by chance",
        layers=layout.layers,
        kv=layout.kv,
        heads=layout.kv_heads,
        head_dim=layout.head_dim,
        budget_bits=float(bits.mean()),
        bits=bits.tolist(),
        distortions=nothing.tolist(),
    )
