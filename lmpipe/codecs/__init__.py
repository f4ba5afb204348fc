"""Codecs: one file each, encode and decode side by side, buffers owned by the caller. Knows no slot and no tier."""

from __future__ import annotations

from typing import Protocol

from lmpipe.codecs.raw import RawCodec
from lmpipe.codecs.zstd import ZstdCodec
from lmpipe.handles import Codec


class ChunkCodec(Protocol):
    """How a chunk's bytes are written smaller. Instances hold no state: any thread may use them.

    `item_bytes` is the size of one number of the KV cache (2 for bf16); it need not divide the payload.
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
    def lossless(self) -> bool:
        """Whether decoding gives back every bit."""
        ...

    def bound(self, raw_bytes: int) -> int:
        """Bytes that `dst` of `encode` must have at least."""
        ...

    def encode(self, src: memoryview, dst: memoryview, item_bytes: int) -> int:
        """Write `src` into `dst`; the number of bytes written.

        Raises:
            ValueError: `dst` is shorter than the result.
        """
        ...

    def decode(self, src: memoryview, dst: memoryview, item_bytes: int) -> None:
        """Inverse of `encode`: fills `dst`, whose length is the payload's before encoding.

        Raises:
            FormatError: `src` is damaged, or holds a payload of another length. `dst` may be partly written.
        """
        ...


CODECS: dict[Codec, ChunkCodec] = {codec.number: codec for codec in (RawCodec(), ZstdCodec())}


def codec_named(name: str) -> ChunkCodec:
    """The codec that a topology names.

    Raises:
        KeyError: there is none of that name.
    """
    return {codec.name: codec for codec in CODECS.values()}[name]
