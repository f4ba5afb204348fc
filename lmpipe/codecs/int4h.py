"""Rotated vectors in codes of 4 bits; docs/decisions/0011-codec-formats.md has the bytes."""

from __future__ import annotations

from lmpipe.codecs.rotated import decode_rotated, encode_rotated
from lmpipe.codecs.source import Source
from lmpipe.codecs.vectors import describe, described
from lmpipe.errors import FormatError
from lmpipe.handles import Codec, Fidelity

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

    def bound(self, raw_bytes: int) -> int:
        """No more than the payload: what does not get smaller is refused."""
        return raw_bytes

    def encode(self, src: memoryview, dst: memoryview, source: Source) -> int:
        """Scales, minima, bit planes."""
        layout, header = describe(
            self.number, src, source, sink_tokens=self._sink_tokens, edge_layers=self._edge_layers
        )
        return encode_rotated(src, dst, layout, header)

    def decode(self, src: memoryview, dst: memoryview) -> None:
        """Steps from the minimum, rotated back."""
        layout, header, body = described(self.number, src, len(dst))
        if header.extra_bytes:
            raise FormatError(f"an int4h chunk with a table of {header.extra_bytes} bytes")
        decode_rotated(body, dst, layout, header)
