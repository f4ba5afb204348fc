"""The identity: bytes as the engine has them."""

from __future__ import annotations

from lmpipe.codecs.source import ANY, Source
from lmpipe.errors import FormatError
from lmpipe.handles import Codec, Fidelity


class RawCodec:
    """Encoded bytes = raw bytes."""

    number = Codec.RAW
    name = "raw"
    fidelity = Fidelity.EXACT
    numeric = False

    def bound(self, raw_bytes: int, source: Source = ANY) -> int:
        """No more than the payload."""
        return raw_bytes

    def encode(self, src: memoryview, dst: memoryview, source: Source) -> int:
        """Copy."""
        if len(dst) < len(src):
            raise ValueError(f"{len(src)} bytes do not fit a buffer of {len(dst)}")
        dst[: len(src)] = src
        return len(src)

    def decode(self, src: memoryview, dst: memoryview) -> None:
        """Copy back."""
        if len(src) != len(dst):
            raise FormatError(f"raw chunk of {len(src)} bytes where {len(dst)} were expected")
        dst[:] = src
