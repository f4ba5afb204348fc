"""`int4h` and `adaptive` in plain torch: the oracle of the native kernel and of the GPU kernel. No production module
imports it.

Every operation of fp32 is rounded by itself, in the order that docs/decisions/0011-codec-formats.md states.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from lmpipe.codecs.header import Header
from lmpipe.codecs.reference.numbers import numbers_of, raw_of
from lmpipe.codecs.source import Source
from lmpipe.codecs.vectors import bits_of, describe, described
from lmpipe.errors import CannotEncode
from lmpipe.handles import Codec
from lmpipe.layout import KVLayout

WIDEST_BLOCK = 128


def encode_int4h(raw: bytes, source: Source, sink_tokens: int = 4, edge_layers: int = 0) -> bytes:
    """The whole encoded chunk."""
    layout, header = describe(Codec.INT4H, len(raw), source, sink_tokens=sink_tokens, edge_layers=edge_layers)
    return _encode(raw, layout, header, b"")


def encode_adaptive(raw: bytes, source: Source, table: bytes, sink_tokens: int = 4) -> bytes:
    """The whole encoded chunk; `table` has the bits of `[layer][kv][head]`."""
    layout, header = describe(Codec.ADAPTIVE, len(raw), source, sink_tokens=sink_tokens, extra_bytes=len(table))
    return _encode(raw, layout, header, table)


def decode(codec: Codec, stored: bytes, raw_bytes: int) -> bytes:
    """Inverse of both, of what is not damaged."""
    layout, header, rest = described(codec, memoryview(stored), raw_bytes)
    table, body = bytes(rest[: header.extra_bytes]), bytearray(rest[header.extra_bytes :])
    bits = torch.tensor(bits_of(layout, header, table))
    halves = torch.frombuffer(body, dtype=torch.float16)[: 2 * len(bits)]
    codes = codes_of(bytes(body[4 * len(bits) :]), bits, layout.head_dim)
    return raw_of(decode_vectors(halves[: len(bits)], halves[len(bits) :], codes), layout.dtype)


def _encode(raw: bytes, layout: KVLayout, header: Header, table: bytes) -> bytes:
    bits = torch.tensor(bits_of(layout, header, table))
    scales, minima, codes = encode_vectors(numbers_of(raw, layout), bits)
    body = scales.numpy().tobytes() + minima.numpy().tobytes() + planes_of(codes, bits)
    return replace(header, payload_bytes=len(table) + len(body)).pack() + table + body


def encode_vectors(numbers: torch.Tensor, bits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(scales [vectors] fp16, minima [vectors] fp16, codes [vectors, head_dim] u8) of numbers [vectors, head_dim] fp32.

    `bits` has shape [vectors].
    """
    if not numbers.isfinite().all():
        raise CannotEncode("a number is NaN or infinite")
    block = block_of(numbers.shape[1])
    rotated = butterflies(numbers, [1 << i for i in range(block.bit_length() - 1)]) * factor(block)
    levels = (2.0**bits - 1).to(torch.float32)
    minima = half_below(rotated.amin(1) + 0.0)
    scales = half_above((rotated.amax(1) + 0.0 - minima.to(torch.float32)) / levels)
    if not (minima.isfinite() & scales.isfinite()).all():
        raise CannotEncode("a minimum or a scale does not fit fp16")
    base, step = minima.to(torch.float32).unsqueeze(1), scales.to(torch.float32).unsqueeze(1)
    codes = ((rotated - base) * torch.where(step == 0, step, 1.0 / step)).round()
    return scales, minima, codes.to(torch.uint8)


def decode_vectors(scales: torch.Tensor, minima: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """[vectors, head_dim] fp32."""
    block = block_of(codes.shape[1])
    low = (minima.to(torch.float32) * factor(block)).unsqueeze(1)
    step = (scales.to(torch.float32) * factor(block)).unsqueeze(1)
    return butterflies(low + step * codes.to(torch.float32), [block >> i for i in range(1, block.bit_length())])


def block_of(head_dim: int) -> int:
    """The largest power of two that divides `head_dim`, at most 128."""
    return math.gcd(head_dim, WIDEST_BLOCK)


def factor(block: int) -> torch.Tensor:
    """1 / sqrt(block), rounded to fp32 once."""
    return torch.tensor(1 / math.sqrt(block), dtype=torch.float32)


def butterflies(numbers: torch.Tensor, strides: list[int]) -> torch.Tensor:
    """(a + b, a - b) of all pairs that lie a stride apart, stride after stride."""
    for stride in strides:
        pair = numbers.reshape(len(numbers), -1, 2, stride)
        a, b = pair[:, :, 0], pair[:, :, 1]
        numbers = torch.stack((a + b, a - b), 2).reshape(numbers.shape)
    return numbers


def half_below(x: torch.Tensor) -> torch.Tensor:
    """The largest fp16 that is at most x."""
    half = x.to(torch.float16)
    return torch.where(half.to(torch.float32) > x, torch.nextafter(half, torch.full_like(half, -math.inf)), half)


def half_above(x: torch.Tensor) -> torch.Tensor:
    """The smallest fp16 that is at least x."""
    half = x.to(torch.float16)
    return torch.where(half.to(torch.float32) < x, torch.nextafter(half, torch.full_like(half, math.inf)), half)


def planes_of(codes: torch.Tensor, bits: torch.Tensor) -> bytes:
    """Codes [vectors, head_dim] as bit planes, vector after vector."""
    vectors, head_dim = codes.shape
    plane_bytes = -(-head_dim // 8)
    padded = torch.zeros(vectors, plane_bytes * 8, dtype=torch.int64)
    padded[:, :head_dim] = codes
    bit = padded.unsqueeze(1) >> torch.arange(8).reshape(8, 1) & 1
    planes = (bit.reshape(vectors, 8, plane_bytes, 8) << torch.arange(8)).sum(3).to(torch.uint8)
    return planes[torch.arange(8) < bits.unsqueeze(1)].numpy().tobytes()


def codes_of(stored: bytes, bits: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Inverse of `planes_of`: [vectors, head_dim] u8."""
    plane_bytes = -(-head_dim // 8)
    planes = torch.zeros(len(bits), 8, plane_bytes, dtype=torch.int64)
    octets = torch.frombuffer(bytearray(stored), dtype=torch.uint8).to(torch.int64)
    planes[torch.arange(8) < bits.unsqueeze(1)] = octets.reshape(-1, plane_bytes)
    bit = (planes.unsqueeze(3) >> torch.arange(8) & 1).reshape(len(bits), 8, -1)
    return (bit << torch.arange(8).reshape(8, 1)).sum(1)[:, :head_dim].to(torch.uint8)
