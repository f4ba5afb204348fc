"""Lossless: exponents, which are alike, in 2 to 4 bits each; signs and mantissas, which are noise, as they are.

docs/decisions/0011-codec-formats.md has the picture; `native.split_encode` writes all of it but the header.
"""

from __future__ import annotations

from lmpipe import native
from lmpipe.codecs.header import DTYPES, HEADER_BYTES, Header
from lmpipe.codecs.source import ANY, Source
from lmpipe.errors import CannotEncode, FormatError
from lmpipe.handles import Codec, Fidelity
from lmpipe.layout import ITEM_BYTES

BLOCK_NUMBERS = 4096
TABLE_ROW_BYTES = 8
PROBE_BYTES, PROBES = 16 << 10, 4
"""Where the dtype is not known: pieces that are tried, all over the payload. A multiple of a block of any dtype."""

_MAX_RAW_BYTES = (1 << 32) - 1


class SplitCodec:
    """Each exponent coded by its distance from a top; bytes that are no bf16, fp16 or fp32 cost 64 more."""

    number = Codec.SPLIT
    name = "split"
    fidelity = Fidelity.EXACT
    numeric = False

    def bound(self, raw_bytes: int, source: Source = ANY) -> int:
        """Every block raw: header, and a row of the table for each block of the shortest numbers."""
        return HEADER_BYTES + raw_bytes + TABLE_ROW_BYTES * _blocks(raw_bytes, "bfloat16")

    def encode(self, src: memoryview, dst: memoryview, source: Source) -> int:
        """As numbers of the dtype that the layout names, or that shortens a few pieces most."""
        if len(src) > _MAX_RAW_BYTES:
            raise CannotEncode(f"a chunk of {len(src)} bytes: split has offsets of 32 bits")
        known = source.layout.dtype if source.layout else ""
        dtype = known if known in DTYPES[1:] else _probe(src)
        body = dst[HEADER_BYTES:]
        if len(dst) < HEADER_BYTES or (not dtype and len(body) < len(src)):
            raise ValueError(f"{HEADER_BYTES + len(src)} bytes do not fit a buffer of {len(dst)}")
        if dtype:
            used = native.split_encode(src, body, DTYPES.index(dtype))
        else:
            used = len(src)
            body[:used] = src
        table_bytes = TABLE_ROW_BYTES * _blocks(len(src), dtype)
        dst[:HEADER_BYTES] = Header(self.number, len(src), used, dtype, extra_bytes=table_bytes).pack()
        return HEADER_BYTES + used

    def decode(self, src: memoryview, dst: memoryview) -> None:
        """Block after block, checked before anything is read or written."""
        header = Header.unpack(src, self.number, len(dst))
        if header.extra_bytes != TABLE_ROW_BYTES * _blocks(len(dst), header.dtype):
            raise FormatError(f"extra_bytes of split is {header.extra_bytes} for {len(dst)} bytes of {header.dtype!r}")
        if not header.dtype:
            if header.payload_bytes != len(dst):
                raise FormatError(f"payload_bytes of split is {header.payload_bytes} where {len(dst)} were expected")
            dst[:] = src[HEADER_BYTES:]
        elif wrong := native.split_decode(src[HEADER_BYTES:], dst, DTYPES.index(header.dtype)):
            raise FormatError(f"split: {wrong}")


def _blocks(raw_bytes: int, dtype: str) -> int:
    return -(-(raw_bytes // ITEM_BYTES[dtype]) // BLOCK_NUMBERS) if dtype else 0


def _probe(src: memoryview) -> str:
    """The dtype that shortens a few pieces of `src` most; "" where none does."""
    step = max(len(src) // PROBES // 4 * 4, PROBE_BYTES)
    pieces = [src[at : at + PROBE_BYTES] for at in range(0, len(src), step)][:PROBES]
    scratch = bytearray(2 * PROBE_BYTES)
    lengths = {
        dtype: sum(native.split_encode(piece, scratch, number) for piece in pieces)
        for number, dtype in enumerate(DTYPES)
        if dtype
    }
    best = min(lengths, key=lambda dtype: lengths[dtype])
    return best if lengths[best] < sum(len(piece) for piece in pieces) else ""
