"""Numbers of 8 bits: e4m3 with a power of two for each vector; docs/decisions/0011-codec-formats.md has the bytes."""

from __future__ import annotations

from dataclasses import replace

from lmpipe import native
from lmpipe.codecs.header import DTYPES, HEADER_BYTES
from lmpipe.codecs.source import ANY, Source
from lmpipe.codecs.vectors import describe, described, require_gain, require_room, vector_count
from lmpipe.errors import CannotEncode, FormatError
from lmpipe.handles import Codec, Fidelity
from lmpipe.layout import KVLayout


class Fp8Codec:
    """A byte per number and one per vector.

    A number x comes back with an error of at most |x| / 16; or max / 237000, where that is more, max being the largest
    magnitude in its vector; or 2**-136 (fp16: 2**-25).
    """

    number = Codec.FP8
    name = "fp8"
    fidelity = Fidelity.FP8
    numeric = True

    def bound(self, raw_bytes: int, source: Source = ANY) -> int:
        """No more than the payload: what does not get smaller is refused."""
        if source is ANY:
            return raw_bytes
        layout, _ = describe(self.number, raw_bytes, source)
        return min(_encoded_bytes(layout, raw_bytes), raw_bytes)

    def encode(self, src: memoryview, dst: memoryview, source: Source) -> int:
        """Exponents, then codes."""
        layout, header = describe(self.number, len(src), source)
        end = _encoded_bytes(layout, len(src))
        require_gain(end, len(src))
        require_room(end, dst)
        dtype = DTYPES.index(layout.dtype)
        if not native.fp8_encode(src, dtype, layout.head_dim, dst[HEADER_BYTES:end]):
            raise CannotEncode("a number is NaN or infinite")
        dst[:HEADER_BYTES] = replace(header, payload_bytes=end - HEADER_BYTES).pack()
        return end

    def decode(self, src: memoryview, dst: memoryview) -> None:
        """Codes times a power of two."""
        layout, header, body = described(self.number, src, len(dst))
        vectors = vector_count(layout, len(dst))
        expected = vectors * (1 + layout.head_dim)
        if len(body) != expected or header.extra_bytes:
            raise FormatError(f"{vectors} fp8 vectors in {len(body)} bytes where {expected} were expected")
        if not native.fp8_decode(body, DTYPES.index(layout.dtype), layout.head_dim, dst):
            raise FormatError("an exponent of an fp8 vector is out of range")


def _encoded_bytes(layout: KVLayout, raw_bytes: int) -> int:
    return HEADER_BYTES + vector_count(layout, raw_bytes) * (1 + layout.head_dim)
