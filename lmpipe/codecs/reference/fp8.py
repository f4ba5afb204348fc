"""`fp8` in plain torch: the oracle of the native kernel and of the GPU kernel. No production module imports it."""

from __future__ import annotations

from dataclasses import replace

import torch

from lmpipe.codecs.reference.numbers import numbers_of, raw_of
from lmpipe.codecs.source import Source
from lmpipe.codecs.vectors import describe, described
from lmpipe.errors import CannotEncode
from lmpipe.handles import Codec

LARGEST_FRACTION = 464 / 512
"""e4m3 rounds 464 to its largest number, 448; as `frexp` has it."""


def encode(raw: bytes, source: Source) -> bytes:
    """The whole encoded chunk."""
    layout, header = describe(Codec.FP8, len(raw), source)
    exponents, codes = encode_vectors(numbers_of(raw, layout))
    body = exponents.numpy().tobytes() + codes.numpy().tobytes()
    return replace(header, payload_bytes=len(body)).pack() + body


def decode(stored: bytes, raw_bytes: int) -> bytes:
    """Inverse of `encode`, of what is not damaged."""
    layout, _, body = described(Codec.FP8, memoryview(stored), raw_bytes)
    octets = torch.frombuffer(bytearray(body), dtype=torch.uint8)
    vectors = len(octets) // (layout.head_dim + 1)
    return raw_of(decode_vectors(octets[:vectors], octets[vectors:].reshape(vectors, -1)), layout.dtype)


def encode_vectors(numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(exponents [vectors] u8, codes [vectors, head_dim] u8) of numbers [vectors, head_dim] fp32."""
    if not numbers.isfinite().all():
        raise CannotEncode("a number is NaN or infinite")
    fraction, exponent = torch.frexp(numbers.abs().amax(1))
    exponent = (exponent + (fraction > LARGEST_FRACTION) + 127 - 9).clamp(min=1)
    exponent[fraction == 0] = 0
    scaled = numbers * power(127 - exponent)
    return exponent.to(torch.uint8), scaled.to(torch.float8_e4m3fn).view(torch.uint8)


def decode_vectors(exponents: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """[vectors, head_dim] fp32."""
    factor = power(exponents.to(torch.int32) - 127)
    factor[exponents == 0] = 0
    return codes.view(torch.float8_e4m3fn).to(torch.float32) * factor


def power(exponent: torch.Tensor) -> torch.Tensor:
    """2**exponent [vectors] as an fp32 column, exactly."""
    return torch.ldexp(torch.ones(len(exponent)), exponent).unsqueeze(1)
