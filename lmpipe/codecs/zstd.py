"""Lossless: bytes of equal significance side by side, then zstd.

      numbers   a0 a1 | b0 b1 | c0 c1 | tail      ITEM_BYTES = 2
      planes    a0 b0 c0 | a1 b1 c1 | tail        -> one zstd frame with content size and checksum

Exponents and signs of neighbouring numbers are alike, mantissas are noise: apart, the first compress and the second
cost little.
"""

from __future__ import annotations

import numpy as np
import zstandard

from lmpipe.codecs.source import ANY, Source
from lmpipe.errors import FormatError
from lmpipe.handles import Codec, Fidelity

ITEM_BYTES = 2
"""Of a number; of numbers of another size a lossless codec only shrinks less."""
_LEVEL = 1
_FRAME_EXTRA_BYTES = 64
_SMALL_BYTES = 128 << 10


class ZstdCodec:
    """Byte-plane transposition and zstd level 1; both run without the interpreter lock."""

    number = Codec.ZSTD
    name = "zstd"
    fidelity = Fidelity.EXACT
    numeric = False

    def bound(self, raw_bytes: int, source: Source = ANY) -> int:
        """ZSTD_compressBound (zstd.h), and room for the frame's header and checksum."""
        small = (_SMALL_BYTES - raw_bytes) >> 11 if raw_bytes < _SMALL_BYTES else 0
        return raw_bytes + (raw_bytes >> 8) + small + _FRAME_EXTRA_BYTES

    def encode(self, src: memoryview, dst: memoryview, source: Source) -> int:
        """Transpose, compress."""
        numbers = np.frombuffer(src, np.uint8)
        planes = np.empty_like(numbers)
        whole = len(numbers) // ITEM_BYTES * ITEM_BYTES
        planes[:whole].reshape(ITEM_BYTES, -1)[...] = numbers[:whole].reshape(-1, ITEM_BYTES).T
        planes[whole:] = numbers[whole:]
        frame = zstandard.ZstdCompressor(level=_LEVEL, write_checksum=True).compress(planes.data)
        if len(dst) < len(frame):
            raise ValueError(f"{len(frame)} bytes do not fit a buffer of {len(dst)}")
        dst[: len(frame)] = frame
        return len(frame)

    def decode(self, src: memoryview, dst: memoryview) -> None:
        """Decompress, transpose back."""
        try:
            # The size is checked before anything is allocated: a damaged frame may promise any.
            size = zstandard.frame_content_size(src)
            if size != len(dst):
                raise FormatError(f"zstd frame of {size} bytes where {len(dst)} were expected")
            planes = np.frombuffer(zstandard.ZstdDecompressor().decompress(src, allow_extra_data=False), np.uint8)
        except zstandard.ZstdError as error:
            raise FormatError(f"zstd frame: {error}") from None
        if len(planes) != len(dst):
            raise FormatError(f"zstd frame gave {len(planes)} bytes where {len(dst)} were expected")
        numbers = np.frombuffer(dst, np.uint8)
        whole = len(numbers) // ITEM_BYTES * ITEM_BYTES
        numbers[:whole].reshape(-1, ITEM_BYTES)[...] = planes[:whole].reshape(ITEM_BYTES, -1).T
        numbers[whole:] = planes[whole:]
