"""Codecs: one file each, encode and decode side by side, buffers owned by the caller. Knows no slot and no tier."""

from __future__ import annotations

from typing import Protocol

from lmpipe.codecs.adaptive import AdaptiveCodec
from lmpipe.codecs.fp8 import Fp8Codec
from lmpipe.codecs.int4h import Int4hCodec
from lmpipe.codecs.raw import RawCodec
from lmpipe.codecs.source import ANY as ANY
from lmpipe.codecs.source import Source as Source
from lmpipe.codecs.split import SplitCodec
from lmpipe.codecs.zstd import ZstdCodec
from lmpipe.handles import Codec, Fidelity


class ChunkCodec(Protocol):
    """How a chunk's bytes are written smaller. Instances hold no state: any thread may use them.

    Encoded bytes describe themselves; what a codec was configured with is of no use to a decoder.
    """

    @property
    def number(self) -> Codec:
        """As stored with every chunk."""
        ...

    @property
    def name(self) -> str:
        """As the topology writes it."""
        ...

    @property
    def fidelity(self) -> Fidelity:
        """`EXACT`: decoding gives back every bit."""
        ...

    @property
    def numeric(self) -> bool:
        """Whether it has to know the order inside a page (`KVLayout.canonical`); False: bytes are bytes to it."""
        ...

    def bound(self, raw_bytes: int, source: Source = ANY) -> int:
        """Bytes that `dst` of `encode` must have at least; for a chunk of which more is known, fewer may do.

        Raises:
            CannotEncode: as `encode` would.
        """
        ...

    def encode(self, src: memoryview, dst: memoryview, source: Source) -> int:
        """Write `src` into `dst`; the number of bytes written.

        Raises:
            ValueError: `dst` is shorter than the result.
            CannotEncode: the chunk cannot be written this way (no layout, not a number, another dtype): keep it raw.
        """
        ...

    def decode(self, src: memoryview, dst: memoryview) -> None:
        """Inverse of `encode`: fills `dst`, whose length is the payload's before encoding.

        Raises:
            FormatError: `src` is damaged, or holds a payload of another length. `dst` may be partly written.
        """
        ...


CODECS: dict[Codec, ChunkCodec] = {
    codec.number: codec for codec in (RawCodec(), ZstdCodec(), SplitCodec(), Fp8Codec(), Int4hCodec(), AdaptiveCodec())
}


def codec_named(name: str) -> ChunkCodec:
    """The codec that a topology names.

    Raises:
        KeyError: there is none of that name.
    """
    return {codec.name: codec for codec in CODECS.values()}[name]
