"""What the codecs of this package have in common: how long a chunk becomes, encoding it, decoding it, by number."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lmpipe.codecs.header import HEADER_BYTES, Header
from lmpipe.codecs.int4h import SINK_TOKENS
from lmpipe.codecs.source import Source
from lmpipe.codecs.vectors import describe
from lmpipe.cuda import fp8, rotated, split
from lmpipe.cuda.pages import DevicePages
from lmpipe.errors import FormatError
from lmpipe.handles import Codec

ON_DEVICE = frozenset((Codec.SPLIT, Codec.FP8, Codec.INT4H, Codec.ADAPTIVE))
"""Codecs that have kernels. The others are decoded on the host."""


@dataclass(frozen=True, slots=True)
class Coder:
    """A codec of ON_DEVICE and its configuration, which only encoding needs.

    `sink_tokens` get 8 bits at the beginning of a prompt, `edge_layers` at either end of the model (`int4h`); `table`:
    bits by `[layer][kv][head]` (`adaptive`).
    """

    codec: Codec
    sink_tokens: int = SINK_TOKENS
    edge_layers: int = 0
    table: bytes = b""

    def header(self, pages: DevicePages, page_count: int, position: int, payload_bytes: int) -> Header:
        """Of the chunk at `position` of its prompt, that became `payload_bytes` long."""
        if self.codec == Codec.SPLIT:
            return split.header(pages, page_count, payload_bytes)
        if self.codec == Codec.FP8:
            return fp8.header(pages, page_count, position)
        return rotated.header(
            self.codec,
            pages,
            page_count,
            position,
            sink_tokens=self.sink_tokens,
            edge_layers=self.edge_layers,
            table=self.table,
        )

    def payload_bytes(self, pages: DevicePages, page_count: int, position: int) -> int | None:
        """Bytes that follow the header; None where the numbers decide, up to `bound`.

        Raises:
            CannotEncode: the pages do not consist of vectors of numbers.
        """
        if self.codec == Codec.SPLIT:
            return None
        layout = pages.layout
        raw = layout.plane_count * page_count * layout.page_bytes
        describe(self.codec, raw, Source(layout, page_count * layout.page_tokens, position))
        return self.header(pages, page_count, position, 0).payload_bytes

    def bound(self, pages: DevicePages, page_count: int, position: int) -> int:
        """Bytes of device memory that `encode` needs.

        Raises:
            CannotEncode: the pages do not consist of vectors of numbers.
        """
        known = self.payload_bytes(pages, page_count, position)
        return split.bound(pages, page_count) if known is None else known

    def encode(
        self, pages: DevicePages, ids: torch.Tensor, dst: torch.Tensor, position: int, *, programs: int
    ) -> torch.Tensor:
        """Write what follows the header into `dst`, bytes on the device at a multiple of 4.

        Returns int64 `[1]` on the device: the bytes written; -1 where the chunk must stay raw.

        Raises:
            CannotEncode: pages do not consist of vectors of numbers, or would not become smaller.
        """
        if self.codec == Codec.SPLIT:
            written = split.encode(pages, ids, dst, programs=programs)
            raw = pages.layout.plane_count * len(ids) * pages.layout.page_bytes
            return torch.where(written + HEADER_BYTES < raw, written, -1)
        if self.codec == Codec.FP8:
            refused = fp8.encode(pages, ids, dst, programs=programs)
            head = fp8.header(pages, len(ids), position)
        else:
            head = self.header(pages, len(ids), position, 0)
            refused = rotated.encode(head, self.table, pages, ids, dst, programs=programs)
        return torch.where(refused == 0, head.payload_bytes, -1)


def opened(encoded: memoryview, codec: Codec, raw_bytes: int) -> tuple[Header, bytes]:
    """Header of an encoded chunk, and the table of bits that one of rotated vectors may have.

    Raises:
        FormatError: it is damaged, not of this codec or length, or no kernel decodes it.
    """
    if codec not in ON_DEVICE:
        raise FormatError(f"no kernel decodes {codec.name.lower()}")
    head = Header.unpack(encoded, codec, raw_bytes)
    rotates = codec in (Codec.INT4H, Codec.ADAPTIVE)
    return head, bytes(encoded[HEADER_BYTES : HEADER_BYTES + head.extra_bytes]) if rotates else b""


def decode(
    head: Header, table: bytes, payload: torch.Tensor, pages: DevicePages, ids: torch.Tensor, *, programs: int
) -> torch.Tensor:
    """Fill pages from what follows the header, bytes on the device at a multiple of 4. `head`, `table`: of `opened`.

    Returns int32 `[1]` on the device: other than 0 where the chunk is damaged.

    Raises:
        FormatError: the chunk is damaged, or of another shape than the pages.
    """
    if head.codec == Codec.SPLIT:
        return split.decode(head, payload, pages, ids, programs=programs)
    if head.codec == Codec.FP8:
        return fp8.decode(head, payload, pages, ids, programs=programs)
    return rotated.decode(head, table, payload, pages, ids, programs=programs)
