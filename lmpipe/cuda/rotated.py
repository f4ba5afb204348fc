"""int4h and adaptive: rotated vectors as codes between a minimum and a maximum, each vector with bits of its own."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl

from lmpipe.codecs.calibration import BITS
from lmpipe.codecs.header import HEADER_BYTES, Header
from lmpipe.codecs.int4h import SINK_TOKENS
from lmpipe.codecs.vectors import SCALE_BYTES, bits_of, require_gain, rotated_bytes
from lmpipe.cuda.numbers import finite, nearest_integer, to_float, to_word
from lmpipe.cuda.pages import DevicePages
from lmpipe.cuda.planes import load_planes, store_planes
from lmpipe.cuda.vectors import Vectors, vector_pointers
from lmpipe.errors import FormatError
from lmpipe.handles import Codec
from lmpipe.layout import KVLayout

WIDEST_BLOCK = 128
"""Numbers that are rotated together, at most."""

_HALF_MAX = tl.constexpr(65504.0)
_HALF_INFINITY = tl.constexpr(0x7C00)


def header(
    codec: Codec,
    pages: DevicePages,
    page_count: int,
    position: int = 0,
    *,
    sink_tokens: int = SINK_TOKENS,
    edge_layers: int = 0,
    table: bytes = b"",
) -> Header:
    """Header of a chunk of `page_count` pages.

    Args:
        codec: INT4H or ADAPTIVE.
        position: index of the chunk in its prompt.
        sink_tokens: that get 8 bits, at the beginning of a prompt.
        edge_layers: that get 8 bits, at either end of the model; 0 for `adaptive`.
        table: bits by `[layer][kv][head]`, for `adaptive` alone.
    """
    layout = pages.layout
    raw = layout.plane_count * page_count * layout.page_bytes
    head = Header(codec, raw, 0, layout.dtype, layout, page_count, position, sink_tokens, edge_layers, len(table))
    return replace(head, payload_bytes=len(table) + rotated_bytes(layout, bits_of(layout, head, table)))


def encode(
    head: Header, table: bytes, pages: DevicePages, ids: torch.Tensor, dst: torch.Tensor, *, programs: int
) -> torch.Tensor:
    """Write what follows the header `head` into `dst`, bytes on the device: `head.payload_bytes` of them.

    Returns int32 `[1]` on the device: other than 0 where the chunk cannot be encoded (NaN, infinities, a scale or
    minimum that does not fit fp16) and stays raw.

    Raises:
        CannotEncode: pages do not consist of vectors of numbers, or would not become smaller.
        ValueError: `dst` is shorter than the result.
    """
    vectors = Vectors.of(pages, ids)
    require_gain(HEADER_BYTES + head.payload_bytes, vectors.raw_bytes)
    if len(dst) < head.payload_bytes:
        raise ValueError(f"{head.payload_bytes} bytes do not fit a buffer of {len(dst)}")
    plan = _plan_of(pages.layout, head, table, dst.device)
    dst[: len(table)].copy_(plan.table)
    refused = torch.zeros(1, dtype=torch.int32, device=dst.device)
    _launch(_encode, vectors, programs, plan, dst[len(table) :], refused)
    return refused


def decode(
    head: Header, table: bytes, src: torch.Tensor, pages: DevicePages, ids: torch.Tensor, *, programs: int
) -> torch.Tensor:
    """Fill pages from what follows the header of an encoded chunk, bytes on the device. `table`: its `extra_bytes`.

    Returns int32 `[1]` on the device: other than 0 where the chunk is damaged.

    Raises:
        FormatError: the chunk is damaged, or of another shape than the pages.
    """
    vectors = Vectors.of(pages, ids)
    vectors.require(head, src)
    layout = pages.layout
    tables = layout.layers * layout.kv * layout.kv_heads if head.codec == Codec.ADAPTIVE else 0
    if not len(table) == head.extra_bytes == tables or not set(table) <= set(BITS):
        raise FormatError(f"the table of bits of a chunk is damaged ({len(table)} bytes)")
    if head.payload_bytes != len(table) + rotated_bytes(layout, bits_of(layout, head, table)):
        raise FormatError(f"{vectors.count} rotated vectors in {head.payload_bytes} bytes")
    damaged = torch.zeros(1, dtype=torch.int32, device=src.device)
    _launch(_decode, vectors, programs, _plan_of(layout, head, table, src.device), src[len(table) :], damaged)
    return damaged


class _Plan(NamedTuple):
    """What kernels are told of the vectors of one geometry, on the device."""

    bits: torch.Tensor
    starts: torch.Tensor
    table: torch.Tensor


def _plan_of(layout: KVLayout, head: Header, table: bytes, device: torch.device) -> _Plan:
    # All chunks but a prompt's first have the same.
    plan = _plan(layout, replace(head, position=min(head.position, 1)), table, device)
    if device.type == "cuda":
        # Made on one stream and used on many: forgotten, its memory must not be given to others while one still reads.
        for tensor in plan:
            tensor.record_stream(torch.cuda.current_stream(device))
    return plan


@lru_cache(maxsize=16)
def _plan(layout: KVLayout, head: Header, table: bytes, device: torch.device) -> _Plan:
    bits = torch.tensor(bits_of(layout, head, table))
    planes = bits.to(torch.int64) * -(-layout.head_dim // 8)
    starts = len(bits) * SCALE_BYTES + planes.cumsum(0) - planes
    as_bytes = torch.tensor(list(table), dtype=torch.uint8)
    return _Plan(bits.to(device), starts.to(device), as_bytes.to(device))


def _launch(
    kernel: triton.JITFunction[None],
    vectors: Vectors,
    programs: int,
    plan: _Plan,
    body: torch.Tensor,
    flag: torch.Tensor,
) -> None:
    block = math.gcd(vectors.dim, WIDEST_BLOCK)
    factor = float(np.float32(block**-0.5))
    vectors.launch(kernel, programs, plan.bits, plan.starts, body, flag, FACTOR=factor, STEPS=block.bit_length() - 1)


@triton.jit
def _butterflies(row: tl.tensor, STRIDE: tl.constexpr, TILE: tl.constexpr, PADDED: tl.constexpr):
    """Sum and difference of the numbers that are `STRIDE` apart."""
    pairs = tl.permute(tl.reshape(row, [TILE, PADDED // (2 * STRIDE), 2, STRIDE]), [0, 1, 3, 2])
    first, second = tl.split(pairs)
    joined = tl.permute(tl.join(first + second, first - second), [0, 1, 3, 2])
    return tl.reshape(joined, [TILE, PADDED])


@triton.jit
def _half_below(number: tl.tensor):
    """The largest fp16 that is at most `number`, as bits; minus infinity below all."""
    nearest = tl.clamp(number, -_HALF_MAX, _HALF_MAX).to(tl.float16)
    bits = nearest.to(tl.uint16, bitcast=True).to(tl.int32)
    return tl.where(nearest.to(tl.float32) > number, tl.where(bits >= 0x8000, bits + 1, bits - 1), bits)


@triton.jit
def _half_above(number: tl.tensor):
    """The smallest fp16 that is at least `number`, which is not negative, as bits; infinity above all."""
    nearest = tl.minimum(number, _HALF_MAX).to(tl.float16)
    bits = nearest.to(tl.uint16, bitcast=True).to(tl.int32)
    return tl.where(nearest.to(tl.float32) < number, bits + 1, bits)


@triton.jit
def _from_half(bits: tl.tensor):
    return bits.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _store_half(out: tl.tensor, bits: tl.tensor, live: tl.tensor):
    """As two bytes: after a table of odd length halves lie at odd addresses."""
    tl.store(out, (bits & 0xFF).to(tl.uint8), mask=live)
    tl.store(out + 1, (bits >> 8).to(tl.uint8), mask=live)


@triton.jit
def _load_half(src: tl.tensor, live: tl.tensor):
    low = tl.load(src, mask=live, other=0).to(tl.int32)
    return low | (tl.load(src + 1, mask=live, other=0).to(tl.int32) << 8)


@triton.jit
def _encode(
    bases: tl.tensor,
    page_ids: tl.tensor,
    page_stride: tl.tensor,
    pages: tl.tensor,
    vectors: tl.tensor,
    each_bits: tl.tensor,
    starts: tl.tensor,
    out: tl.tensor,
    refused: tl.tensor,
    FACTOR: tl.constexpr,
    STEPS: tl.constexpr,
    DTYPE: tl.constexpr,
    WORD: tl.constexpr,
    ITEM: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    PER_PAGE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    TILE: tl.constexpr,
):
    """Scales, minima and codes into `out`. `starts`: the byte where a vector's codes begin; `STEPS` of the rotation."""
    inside = tl.arange(0, PADDED)[None, :] < DIM
    first = tl.program_id(0) * TILE
    while first < vectors:
        vector = first + tl.arange(0, TILE)
        live = vector < vectors
        where, there = vector_pointers(
            bases, page_ids, page_stride, pages, vector, live, WORD, ITEM, DIM, PADDED, PER_PAGE, ALIGNMENT
        )
        row = to_float(tl.load(where, mask=there, other=0), DTYPE)
        for step in tl.static_range(STEPS):
            row = _butterflies(row, 1 << step, TILE, PADDED)
        # What is not finite stays so in every sum and difference, and large numbers may have become so.
        good = finite(row.to(tl.uint32, bitcast=True), "float32")
        row = tl.where(good, row, 0.0)
        # Adding zero makes a zero of minus zero, which of the two a minimum is depends on the order.
        lowest = tl.min(tl.where(inside, row, float("inf")), axis=1) * FACTOR + 0.0
        highest = tl.max(tl.where(inside, row, float("-inf")), axis=1) * FACTOR + 0.0
        bits = tl.load(each_bits + vector, mask=live, other=0).to(tl.int32)
        minimum = _half_below(lowest)
        base = _from_half(minimum)
        levels = tl.where(live, (1 << bits) - 1, 1).to(tl.float32)
        scale = _half_above(tl.div_rn(highest - base, levels))
        infinite = tl.max((good == 0).to(tl.int32), axis=1)
        no_half = ((minimum & _HALF_INFINITY) == _HALF_INFINITY) | ((scale & _HALF_INFINITY) == _HALF_INFINITY)
        tl.store(refused, 1, mask=tl.max(infinite | no_half.to(tl.int32), axis=0) > 0)
        step_up = _from_half(scale)
        inverse = tl.where(step_up > 0, tl.div_rn(1.0, tl.where(step_up > 0, step_up, 1.0)), 0.0)
        code = nearest_integer((row * FACTOR - base[:, None]) * inverse[:, None]) & 0xFF
        _store_half(out + 2 * vector, scale, live)
        _store_half(out + 2 * (vectors + vector), minimum, live)
        start = tl.load(starts + vector, mask=live, other=0)
        store_planes(out + start, tl.where(inside, code, 0), bits, (DIM + 7) // 8, TILE, PADDED, 8)
        first += tl.num_programs(0) * TILE


@triton.jit
def _decode(
    bases: tl.tensor,
    page_ids: tl.tensor,
    page_stride: tl.tensor,
    pages: tl.tensor,
    vectors: tl.tensor,
    each_bits: tl.tensor,
    starts: tl.tensor,
    src: tl.tensor,
    damaged: tl.tensor,
    FACTOR: tl.constexpr,
    STEPS: tl.constexpr,
    DTYPE: tl.constexpr,
    WORD: tl.constexpr,
    ITEM: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    PER_PAGE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    TILE: tl.constexpr,
):
    """Inverse of `_encode`, the rotation in the opposite order."""
    first = tl.program_id(0) * TILE
    while first < vectors:
        vector = first + tl.arange(0, TILE)
        live = vector < vectors
        bits = tl.load(each_bits + vector, mask=live, other=0).to(tl.int32)
        start = tl.load(starts + vector, mask=live, other=0)
        scale = _load_half(src + 2 * vector, live)
        minimum = _load_half(src + 2 * (vectors + vector), live)
        no_half = ((minimum & _HALF_INFINITY) == _HALF_INFINITY) | ((scale & _HALF_INFINITY) == _HALF_INFINITY)
        tl.store(damaged, 1, mask=tl.max(no_half.to(tl.int32), axis=0) > 0)
        step_up = _from_half(scale) * FACTOR
        base = _from_half(minimum) * FACTOR
        code = load_planes(src + start, bits, (DIM + 7) // 8, TILE, PADDED, 8)
        row = base[:, None] + step_up[:, None] * code.to(tl.float32)
        for step in tl.static_range(STEPS):
            row = _butterflies(row, 1 << (STEPS - 1 - step), TILE, PADDED)
        where, there = vector_pointers(
            bases, page_ids, page_stride, pages, vector, live, WORD, ITEM, DIM, PADDED, PER_PAGE, ALIGNMENT
        )
        tl.store(where, to_word(row, DTYPE), mask=there)
        first += tl.num_programs(0) * TILE
