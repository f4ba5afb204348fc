"""The vectors of a payload: which layer, head and token each belongs to, and so how many bits. Knows no codec's bytes.

A vector is `head_dim` consecutive numbers. Vectors keep the payload's order, whatever its layout.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt

from lmpipe import native
from lmpipe.codecs.header import DTYPES, HEADER_BYTES, Header
from lmpipe.codecs.source import Source
from lmpipe.errors import CannotEncode, FormatError, LayoutError
from lmpipe.handles import Codec
from lmpipe.layout import ITEM_BYTES, KVLayout

SCALE_BYTES = 4
"""Of a rotated vector: fp16 scale, fp16 minimum."""
PLAIN_BITS, EXACT_BITS = 4, 8

Bits = npt.NDArray[np.uint8]
"""Bits of the codes of each vector, in the payload's order."""


def describe(
    codec: Codec, raw_bytes: int, source: Source, *, sink_tokens: int = 0, edge_layers: int = 0, extra_bytes: int = 0
) -> tuple[KVLayout, Header]:
    """The layout of a payload of so many bytes and its header, `payload_bytes` still 0.

    Raises:
        CannotEncode: its vectors are not known, or not of numbers that can be computed with.
    """
    layout = source.layout
    if layout is None:
        raise CannotEncode("the layout of the chunk is not known")
    if problem := _problem(layout):
        raise CannotEncode(problem)
    try:
        pages = layout.chunk_pages(source.chunk_tokens)
    except LayoutError as error:
        raise CannotEncode(str(error)) from None
    if layout.chunk_bytes(source.chunk_tokens) != raw_bytes:
        raise CannotEncode(f"{raw_bytes} bytes are no chunk of {source.chunk_tokens} tokens")
    header = Header(
        codec, raw_bytes, 0, layout.dtype, layout, pages, source.position, sink_tokens, edge_layers, extra_bytes
    )
    return layout, header


def described(codec: Codec, src: memoryview, raw_bytes: int) -> tuple[KVLayout, Header, memoryview]:
    """Layout, header, and what follows it, of an encoded chunk.

    Raises:
        FormatError: it is damaged, or not of this codec.
    """
    header = Header.unpack(src, codec, raw_bytes)
    if header.layout is None:
        raise FormatError("an encoded chunk of numbers says nothing of their layout")
    if problem := _problem(header.layout):
        raise FormatError(f"an encoded chunk: {problem}")
    return header.layout, header, src[HEADER_BYTES:]


def _problem(layout: KVLayout) -> str:
    if layout.opaque_page_bytes or layout.page[-1] != "dim":
        return f"the numbers of a vector do not lie side by side in pages {layout.page}"
    if layout.dtype not in DTYPES:
        return f"numbers of type {layout.dtype} (possible: {', '.join(DTYPES[1:])})"
    if layout.head_dim > native.MAX_HEAD_DIM:
        return f"head_dim {layout.head_dim} is over {native.MAX_HEAD_DIM}"
    return ""


def vector_count(layout: KVLayout, raw_bytes: int) -> int:
    """Vectors of a payload."""
    return raw_bytes // (layout.head_dim * ITEM_BYTES[layout.dtype])


def require_gain(encoded_bytes: int, raw_bytes: int) -> None:
    """Raise CannotEncode where encoding would not make a chunk smaller: where vectors are short, scales weigh more."""
    if encoded_bytes >= raw_bytes:
        raise CannotEncode(f"{raw_bytes} bytes would become {encoded_bytes}")


def require_room(encoded_bytes: int, dst: memoryview) -> None:
    """Raise ValueError where a destination is too short."""
    if len(dst) < encoded_bytes:
        raise ValueError(f"{encoded_bytes} bytes do not fit a buffer of {len(dst)}")


def bits_of(layout: KVLayout, header: Header, table: bytes = b"") -> Bits:
    """How many bits each vector of a chunk gets; the array is shared: read only.

    Args:
        layout: of the chunk.
        header: of the chunk: it has the sink tokens and edge layers, which get 8.
        table: bits by `[layer][kv][head]`; empty: 4 for all.
    """
    sink_tokens = header.sink_tokens if header.position == 0 else 0
    return _bits(layout, header.pages, sink_tokens, header.edge_layers, table)


@lru_cache(maxsize=16)
def _bits(layout: KVLayout, pages: int, sink_tokens: int, edge_layers: int, table: bytes) -> Bits:
    extents = {
        "layer": layout.layers,
        "kv": layout.kv,
        "page": pages,
        "token": layout.page_tokens,
        "head": layout.kv_heads,
    }
    order = [*layout.planes, "page", *layout.page[:-1]]

    def index(axis: str) -> npt.NDArray[np.int64]:
        return np.arange(extents[axis]).reshape([-1 if other == axis else 1 for other in order])

    layer, token = index("layer"), index("page") * layout.page_tokens + index("token")
    exact = (np.minimum(layer, layout.layers - 1 - layer) < edge_layers) | (token < sink_tokens)
    plain: Bits | int = PLAIN_BITS
    if table:
        shape = layout.layers, layout.kv, layout.kv_heads
        plain = np.frombuffer(table, np.uint8).reshape(shape)[layer, index("kv"), index("head")]
    chosen = np.where(exact, EXACT_BITS, plain).astype(np.uint8)
    bits = np.broadcast_to(chosen, [extents[axis] for axis in order]).ravel()
    bits.setflags(write=False)
    return bits


def rotated_bytes(layout: KVLayout, bits: Bits) -> int:
    """Bytes of the body that `native.rotated_encode` writes."""
    return len(bits) * SCALE_BYTES + int(bits.sum(dtype=np.int64)) * -(-layout.head_dim // 8)
