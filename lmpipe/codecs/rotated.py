"""Rotated vectors in codes of few bits: what `int4h` and `adaptive` share. docs/decisions/0011 has the bytes.

The rotation spreads a large number over its block, so that the codes' range serves all. It is orthogonal: the sum of
the squares of the errors is that of the rotated vector, where with L steps (15 of 4 bits)

    |error of a rotated number| <= scale / 2
    scale <= (max - min + |min| / 1024 + 2**-24) / L * (1 + 2**-10) + 2**-24

max and min being those of the rotated vector. So the root mean square of the errors of a vector is at most scale / 2;
beside it there is rounding, to the dtype in the end and in fp32 before, of up to 2**-20 of the vector's length.
"""

from __future__ import annotations

from dataclasses import replace

from lmpipe import native
from lmpipe.codecs.header import DTYPES, HEADER_BYTES, Header
from lmpipe.codecs.vectors import bits_of, require_gain, require_room, rotated_bytes
from lmpipe.errors import CannotEncode, FormatError
from lmpipe.layout import KVLayout


def encoded_bytes(layout: KVLayout, header: Header, table: bytes = b"") -> int:
    """What `encode_rotated` writes; no more than the payload: what does not get smaller is refused."""
    end = HEADER_BYTES + len(table) + rotated_bytes(layout, bits_of(layout, header, table))
    return min(end, header.raw_bytes)


def encode_rotated(src: memoryview, dst: memoryview, layout: KVLayout, header: Header, table: bytes = b"") -> int:
    """Header, table, body; the bytes written.

    Raises:
        ValueError: `dst` is shorter.
        CannotEncode: as `ChunkCodec.encode`.
    """
    bits = bits_of(layout, header, table)
    start = HEADER_BYTES + len(table)
    end = start + rotated_bytes(layout, bits)
    require_gain(end, len(src))
    require_room(end, dst)
    if not native.rotated_encode(src, DTYPES.index(layout.dtype), layout.head_dim, bits, dst[start:end]):
        raise CannotEncode("a number is NaN or infinite, or a vector's minimum or scale does not fit fp16")
    dst[:start] = replace(header, payload_bytes=end - HEADER_BYTES).pack() + table
    return end


def decode_rotated(body: memoryview, dst: memoryview, layout: KVLayout, header: Header, table: bytes = b"") -> None:
    """Inverse of `encode_rotated`.

    Raises:
        FormatError: the body is of another length, or its scales are damaged.
    """
    bits = bits_of(layout, header, table)
    expected = rotated_bytes(layout, bits)
    if len(body) != expected:
        raise FormatError(f"{len(bits)} rotated vectors in {len(body)} bytes where {expected} were expected")
    if not native.rotated_decode(body, DTYPES.index(layout.dtype), layout.head_dim, bits, dst):
        raise FormatError("a scale or minimum of a rotated vector is not finite")
