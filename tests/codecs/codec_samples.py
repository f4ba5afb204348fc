"""What each codec is tried with: an instance that encodes, and payloads that it takes."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import strategies as st

from lmpipe.codecs import ANY, CODECS, ChunkCodec, Source
from lmpipe.codecs.adaptive import AdaptiveCodec
from lmpipe.codecs.calibration import Calibration
from lmpipe.handles import Codec
from lmpipe.layout import KVLayout

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
LAYERS, HEADS, HEAD_DIM, PAGE_TOKENS = 3, 2, 16, 4


def calibration(layout: KVLayout, seed: int = 0) -> Calibration:
    """Of any bits."""
    shape = layout.layers, layout.kv, layout.kv_heads
    bits = np.random.default_rng(seed).choice([3, 4, 8], size=shape).tolist()
    distortions = np.zeros([*shape, 3]).tolist()
    return Calibration(1, "any", *shape, layout.head_dim, 4.0, bits, distortions)


def layout_of(dtype: str = "bfloat16", head_dim: int = HEAD_DIM) -> KVLayout:
    """Three layers of two heads, in pages of four tokens."""
    return KVLayout.paged(LAYERS, HEADS, head_dim, dtype, PAGE_TOKENS)


ENCODERS: dict[Codec, ChunkCodec] = {**CODECS, Codec.ADAPTIVE: AdaptiveCodec(calibration(layout_of()))}


def stored(numbers: np.ndarray, dtype: str) -> bytes:
    """Numbers as a payload has them, rounded to the dtype."""
    rounded = torch.from_numpy(np.ascontiguousarray(numbers, np.float32)).to(DTYPES[dtype])
    return rounded.view(torch.uint8).numpy().tobytes()


def loaded(raw: bytes, dtype: str) -> np.ndarray:
    """Inverse of `stored`: float64."""
    return torch.frombuffer(bytearray(raw), dtype=DTYPES[dtype]).to(torch.float64).numpy()


def normal(layout: KVLayout, tokens: int, seed: int = 0) -> bytes:
    """Numbers whose spread differs by channel and by vector, as in KV."""
    rng = np.random.default_rng(seed)
    vectors = layout.layers * layout.kv * layout.kv_heads * tokens
    spread = np.exp(rng.normal(size=layout.head_dim)) * np.exp(2 * rng.normal(size=(vectors, 1)))
    return stored(np.clip(rng.normal(size=(vectors, layout.head_dim)) * spread, -2000, 2000), layout.dtype)


def sample(codec: ChunkCodec, dtype: str = "bfloat16", tokens: int = 16, seed: int = 0) -> tuple[bytes, Source]:
    """A payload of this codec, and what its encoder is told of it."""
    layout = layout_of(dtype)
    return normal(layout, tokens, seed), Source(layout, tokens, seed % 2) if codec.numeric else ANY


def payloads(codec: ChunkCodec, max_bytes: int = 5000) -> st.SearchStrategy[tuple[bytes, Source]]:
    """Any bytes, where a codec takes any; else numbers."""
    if not codec.numeric:
        return st.binary(max_size=max_bytes).map(lambda raw: (raw, ANY))
    return st.builds(
        lambda dtype, pages, seed: sample(codec, dtype, pages * PAGE_TOKENS, seed),
        st.sampled_from(list(DTYPES)),
        st.integers(1, 5),
        st.integers(0, 1 << 32),
    )
