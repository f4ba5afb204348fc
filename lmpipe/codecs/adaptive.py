"""Rotated vectors in codes of as many bits as layer and head were found to need; docs/decisions/0011 has the bytes."""

from __future__ import annotations

from lmpipe.codecs.calibration import BITS, Calibration
from lmpipe.codecs.header import Header
from lmpipe.codecs.int4h import SINK_TOKENS
from lmpipe.codecs.rotated import decode_rotated, encode_rotated, encoded_bytes
from lmpipe.codecs.source import ANY, Source
from lmpipe.codecs.vectors import describe, described
from lmpipe.errors import CannotEncode, FormatError
from lmpipe.handles import Codec, Fidelity
from lmpipe.layout import KVLayout


class AdaptiveCodec:
    """3, 4 or 8 bits a number by layer, K or V, and head, and 4 bytes a vector; 8 bits for a prompt's first tokens.

    `lmpipe.codecs.rotated` states the error, with 7, 15 or 255 steps.

    Args:
        calibration: of the model whose chunks are encoded; None: this one only decodes, which needs no file.
        sink_tokens: that get 8 bits, at the beginning of a prompt.
    """

    number = Codec.ADAPTIVE
    name = "adaptive"
    fidelity = Fidelity.ADAPTIVE
    numeric = True

    def __init__(self, calibration: Calibration | None = None, sink_tokens: int = SINK_TOKENS) -> None:
        self._calibration = calibration
        self._sink_tokens = sink_tokens

    def bound(self, raw_bytes: int, source: Source = ANY) -> int:
        """No more than the payload: what does not get smaller is refused."""
        return raw_bytes if source is ANY else encoded_bytes(*self._describe(raw_bytes, source))

    def encode(self, src: memoryview, dst: memoryview, source: Source) -> int:
        """The table of bits; scales, minima, bit planes."""
        return encode_rotated(src, dst, *self._describe(len(src), source))

    def _describe(self, raw_bytes: int, source: Source) -> tuple[KVLayout, Header, bytes]:
        if self._calibration is None:
            raise CannotEncode("there is no calibration")
        table = self._calibration.table
        layout, header = describe(self.number, raw_bytes, source, sink_tokens=self._sink_tokens, extra_bytes=len(table))
        found = layout.layers, layout.kv, layout.kv_heads, layout.head_dim
        if found != self._calibration.shape:
            raise CannotEncode(
                f"the calibration is of (layers, kv, heads, head_dim) {self._calibration.shape}, the chunk of {found}"
            )
        return layout, header, table

    def decode(self, src: memoryview, dst: memoryview) -> None:
        """Steps from the minimum, rotated back."""
        layout, header, rest = described(self.number, src, len(dst))
        table = bytes(rest[: header.extra_bytes])
        if len(table) != layout.layers * layout.kv * layout.kv_heads or not set(table) <= set(BITS):
            raise FormatError(f"the table of bits of an adaptive chunk is damaged ({len(table)} bytes)")
        decode_rotated(rest[header.extra_bytes :], dst, layout, header, table)
