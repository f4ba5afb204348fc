"""Groups of codes as bit planes: each plane one bit of every code, least significant plane first, eight codes a byte.

A group is a row: `address` and `bits` have shape [ROWS], codes [ROWS, COLUMNS]. The bits of a row are at most `MOST`;
codes that do not belong to a row are zero.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def store_planes(
    address: tl.tensor,
    codes: tl.tensor,
    bits: tl.tensor,
    plane_bytes: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    MOST: tl.constexpr,
):
    """Write `bits` planes of `plane_bytes` bytes for each row; none where `bits` is 0."""
    eights = tl.reshape(codes, [ROWS, COLUMNS // 8, 8])
    place = tl.arange(0, 8)[None, None, :]
    byte = tl.arange(0, COLUMNS // 8)[None, :]
    for plane in tl.static_range(MOST):
        packed = tl.sum(((eights >> plane) & 1) << place, axis=2)
        wanted = (bits[:, None] > plane) & (byte < plane_bytes)
        tl.store(address[:, None] + plane * plane_bytes + byte, packed.to(tl.uint8), mask=wanted)


@triton.jit
def load_planes(
    address: tl.tensor,
    bits: tl.tensor,
    plane_bytes: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    MOST: tl.constexpr,
):
    """Inverse of `store_planes`: int32 [ROWS, COLUMNS]."""
    place = tl.arange(0, 8)[None, None, :]
    byte = tl.arange(0, COLUMNS // 8)[None, :]
    codes = tl.zeros([ROWS, COLUMNS // 8, 8], tl.int32)
    for plane in tl.static_range(MOST):
        wanted = (bits[:, None] > plane) & (byte < plane_bytes)
        packed = tl.load(address[:, None] + plane * plane_bytes + byte, mask=wanted, other=0).to(tl.int32)
        codes += ((tl.expand_dims(packed, 2) >> place) & 1) << plane
    return tl.reshape(codes, [ROWS, COLUMNS])
