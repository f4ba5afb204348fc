"""Rotated vectors in codes of 4 bits; docs/decisions/0011-codec-formats.md has the bytes."""

from __future__ import annotations

from lmpipe.codecs.header import Header
from lmpipe.codecs.rotated import decode_rotated, encode_rotated, encoded_bytes
from lmpipe.codecs.source import ANY, Source
from lmpipe.codecs.vectors import describe, described
from lmpipe.errors import FormatError
from lmpipe.handles import Codec, Fidelity
from lmpipe.layout import KVLayout

SINK_TOKENS = 4


class Int4hCodec:
    """4 bits a number and 4 bytes a vector; 8 bits for a prompt's first tokens, on which much attention rests, and for
    the first and last layers if asked.

    `lmpipe.codecs.rotated` states the error, with 15 steps (255 where there are 8 bits).

    Args:
        sink_tokens: that get 8 bits, at the beginning of a prompt.
        edge_layers: that get 8 bits, at either end of the model.
    """

    number = Codec.INT4H
    name = "int4h"
    fidelity = Fidelity.INT4H
    numeric = True

    def __init__(self, sink_tokens: int = SINK_TOKENS, edge_layers: int = 0) -> None:
        self._sink_tokens = sink_tokens
        self._edge_layers = edge_layers

    def bound(self, raw_bytes: int, source: Source = ANY) -> int:
        """No more than the payload: what does not get smaller is refused."""
        return raw_bytes if source is ANY else encoded_bytes(*self._describe(raw_bytes, source))

    def encode(self, src: memoryview, dst: memoryview, source: Source) -> int:
        """Scales, minima, bit planes."""
        return encode_rotated(src, dst, *self._describe(len(src), source))

    def _describe(self, raw_bytes: int, source: Source) -> tuple[KVLayout, Header]:
        sinks, edges = self._sink_tokens, self._edge_layers
        return describe(self.number, raw_bytes, source, sink_tokens=sinks, edge_layers=edges)

    def decode(self, src: memoryview, dst: memoryview) -> None:
        """Steps from the minimum, rotated back."""
        layout, header, body = described(self.number, src, len(dst))
        if header.extra_bytes:
            raise FormatError(f"an int4h chunk with a table of {header.extra_bytes} bytes")
        decode_rotated(body, dst, layout, header)
