"""A payload as numbers of fp32 and back, in plain torch. Knows no codec."""

from __future__ import annotations

import torch

from lmpipe.layout import KVLayout

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def numbers_of(raw: bytes, layout: KVLayout) -> torch.Tensor:
    """[vectors, head_dim] fp32."""
    numbers = torch.frombuffer(bytearray(raw), dtype=DTYPES[layout.dtype])
    return numbers.to(torch.float32).reshape(-1, layout.head_dim)


def raw_of(numbers: torch.Tensor, dtype: str) -> bytes:
    """Rounded to nearest even; what is too large becomes the largest finite number."""
    largest = torch.finfo(DTYPES[dtype]).max
    return numbers.clamp(-largest, largest).to(DTYPES[dtype]).view(torch.uint8).numpy().tobytes()
