"""fp8: e4m3 with a power of two per vector, computed on bits, so that it needs no GPU that knows the format."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lmpipe.codecs.header import HEADER_BYTES, Header
from lmpipe.codecs.vectors import require_gain
from lmpipe.cuda.numbers import finite, nearest_integer, to_float, to_word
from lmpipe.cuda.pages import DevicePages
from lmpipe.cuda.vectors import Vectors, vector_pointers
from lmpipe.errors import FormatError
from lmpipe.handles import Codec
from lmpipe.layout import ITEM_BYTES

_SMALLEST_NORMAL = tl.constexpr(0x3C800000)
"""2^-6, as fp32."""
_LAST_ROUNDED_DOWN = tl.constexpr(0x680000)
"""Mantissa of 464, which is rounded to 448, the largest number of e4m3."""
_TOP_EXPONENT = tl.constexpr(247)
"""Of vectors that hold the largest number of fp32."""


def header(pages: DevicePages, page_count: int, position: int = 0) -> Header:
    """Header of a chunk of `page_count` pages. `position`: its index in the prompt."""
    layout = pages.layout
    raw = layout.plane_count * page_count * layout.page_bytes
    payload = _payload_bytes(raw // ITEM_BYTES[layout.dtype], layout.head_dim)
    return Header(Codec.FP8, raw, payload, layout.dtype, layout, page_count, position)


def encode(pages: DevicePages, ids: torch.Tensor, dst: torch.Tensor, *, programs: int) -> torch.Tensor:
    """Write what follows the header into `dst`, bytes on the device: `header().payload_bytes` of them.

    Returns int32 `[1]` on the device: other than 0 where the chunk cannot be encoded (NaN, infinities) and stays raw.

    Raises:
        CannotEncode: pages do not consist of vectors of numbers, or would not become smaller.
        ValueError: `dst` is shorter than the result.
    """
    vectors = Vectors.of(pages, ids)
    payload = _payload_bytes(vectors.count * vectors.dim, vectors.dim)
    require_gain(HEADER_BYTES + payload, vectors.raw_bytes)
    if len(dst) < payload:
        raise ValueError(f"{payload} bytes do not fit a buffer of {len(dst)}")
    refused = torch.zeros(1, dtype=torch.int32, device=dst.device)
    vectors.launch(_encode, programs, dst, refused)
    return refused


def decode(head: Header, src: torch.Tensor, pages: DevicePages, ids: torch.Tensor, *, programs: int) -> torch.Tensor:
    """Fill pages from what follows the header of an encoded chunk, bytes on the device.

    Returns int32 `[1]` on the device: other than 0 where the chunk is damaged.

    Raises:
        FormatError: the chunk is damaged, or of another shape than the pages.
    """
    vectors = Vectors.of(pages, ids)
    vectors.require(head, src)
    if head.payload_bytes != _payload_bytes(vectors.count * vectors.dim, vectors.dim) or head.extra_bytes:
        raise FormatError(f"{vectors.count} fp8 vectors in {head.payload_bytes} bytes")
    damaged = torch.zeros(1, dtype=torch.int32, device=src.device)
    vectors.launch(_decode, programs, src, damaged)
    return damaged


def _payload_bytes(numbers: int, dim: int) -> int:
    return numbers // dim + numbers


@triton.jit
def _to_e4m3(number: tl.tensor):
    """Of magnitude 464 or less; rounded to nearest even."""
    bits = number.to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20).to(tl.int32) - (120 << 3)
    small = nearest_integer(tl.abs(number) * 512.0)
    code = tl.where(magnitude >= _SMALLEST_NORMAL, normal, small)
    return (code | ((bits >> 24) & 0x80).to(tl.int32)).to(tl.uint8)


@triton.jit
def _from_e4m3(code: tl.tensor):
    magnitude = code.to(tl.int32) & 0x7F
    normal = ((magnitude << 20) + (120 << 23)).to(tl.float32, bitcast=True)
    number = tl.where(magnitude >= 8, normal, magnitude.to(tl.float32) * 0.001953125)
    # By its bit: Triton's minus is a difference from zero, which makes a zero of minus zero.
    signed = number.to(tl.uint32, bitcast=True) | ((code.to(tl.uint32) & 0x80) << 24)
    return signed.to(tl.float32, bitcast=True)


@triton.jit
def _encode(
    bases: tl.tensor,
    page_ids: tl.tensor,
    page_stride: tl.tensor,
    pages: tl.tensor,
    vectors: tl.tensor,
    out: tl.tensor,
    refused: tl.tensor,
    DTYPE: tl.constexpr,
    WORD: tl.constexpr,
    ITEM: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    PER_PAGE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    TILE: tl.constexpr,
):
    dim = tl.arange(0, PADDED)[None, :]
    first = tl.program_id(0) * TILE
    while first < vectors:
        vector = first + tl.arange(0, TILE)
        live = vector < vectors
        where, there = vector_pointers(
            bases, page_ids, page_stride, pages, vector, live, WORD, ITEM, DIM, PADDED, PER_PAGE, ALIGNMENT
        )
        word = tl.load(where, mask=there, other=0)
        good = finite(word, DTYPE)
        tl.store(refused, 1, mask=tl.min(tl.min(good.to(tl.int32), axis=1), axis=0) == 0)
        number = to_float(tl.where(good, word, 0), DTYPE)
        largest = tl.max(number.to(tl.uint32, bitcast=True).to(tl.int32) & 0x7FFFFFFF, axis=1)
        exponent = (largest >> 23) - 8 + ((largest & 0x7FFFFF) > _LAST_ROUNDED_DOWN).to(tl.int32)
        exponent = tl.where(largest == 0, 0, tl.maximum(exponent, 1))
        factor = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
        code = _to_e4m3(number * factor[:, None])
        tl.store(out + vector, exponent.to(tl.uint8), mask=live)
        tl.store(out + vectors + vector[:, None] * DIM + dim, code, mask=live[:, None] & (dim < DIM))
        first += tl.num_programs(0) * TILE


@triton.jit
def _decode(
    bases: tl.tensor,
    page_ids: tl.tensor,
    page_stride: tl.tensor,
    pages: tl.tensor,
    vectors: tl.tensor,
    src: tl.tensor,
    damaged: tl.tensor,
    DTYPE: tl.constexpr,
    WORD: tl.constexpr,
    ITEM: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    PER_PAGE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    TILE: tl.constexpr,
):
    dim = tl.arange(0, PADDED)[None, :]
    first = tl.program_id(0) * TILE
    while first < vectors:
        vector = first + tl.arange(0, TILE)
        live = vector < vectors
        where, there = vector_pointers(
            bases, page_ids, page_stride, pages, vector, live, WORD, ITEM, DIM, PADDED, PER_PAGE, ALIGNMENT
        )
        exponent = tl.load(src + vector, mask=live, other=0).to(tl.int32)
        tl.store(damaged, 1, mask=tl.max(exponent, axis=0) > _TOP_EXPONENT)
        factor = (exponent << 23).to(tl.float32, bitcast=True)
        code = tl.load(src + vectors + vector[:, None] * DIM + dim, mask=live[:, None] & (dim < DIM), other=0)
        tl.store(where, to_word(_from_e4m3(code) * factor[:, None], DTYPE), mask=there)
        first += tl.num_programs(0) * TILE
