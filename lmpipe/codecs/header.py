"""The 64 bytes before every encoded chunk that describe it; docs/decisions/0011-codec-formats.md has the picture.

Knows no codec but by its number.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from lmpipe.errors import CannotEncode, FormatError, LayoutError
from lmpipe.handles import Codec
from lmpipe.layout import ITEM_BYTES, KVLayout

HEADER_BYTES = 64
DTYPES = ("", "bfloat16", "float16", "float32")
"""By number; 0: bytes, of which nothing is known."""

_FORM = struct.Struct("<4sBBBBQQHBxIIII8sIHHI")
_MAGIC, _VERSION = b"LMPC", 1
_LETTERS = {"layer": "l", "kv": "k", "head": "h", "token": "t", "dim": "d"}
_AXES = {letter: axis for axis, letter in _LETTERS.items()}


@dataclass(frozen=True, slots=True)
class Header:
    """What is known of an encoded chunk. `payload_bytes`: all that follows; `extra_bytes` of it come first, a table."""

    codec: Codec
    raw_bytes: int
    payload_bytes: int
    dtype: str = ""
    layout: KVLayout | None = None
    pages: int = 0
    position: int = 0
    sink_tokens: int = 0
    edge_layers: int = 0
    extra_bytes: int = 0

    def pack(self) -> bytes:
        """64 bytes.

        Raises:
            CannotEncode: a dimension does not fit its field.
        """
        shape = _shape(self.layout) if self.layout else (0, 0, 0, 0, 0)
        axes = _axes(self.layout) if self.layout else b""
        try:
            return _FORM.pack(
                _MAGIC,
                _VERSION,
                self.codec,
                DTYPES.index(self.dtype),
                0,
                self.raw_bytes,
                self.payload_bytes,
                *shape,
                self.pages,
                axes,
                self.position,
                self.sink_tokens,
                self.edge_layers,
                self.extra_bytes,
            )
        except struct.error as error:
            raise CannotEncode(f"a dimension of the chunk does not fit the header: {error}") from None

    @classmethod
    def unpack(cls, src: memoryview, codec: Codec, raw_bytes: int) -> Header:
        """Read and check what `pack` wrote.

        Raises:
            FormatError: it is not of this codec, version or length, or says what cannot be; the text names the field.
        """
        if len(src) < HEADER_BYTES:
            raise FormatError(f"an encoded chunk of {len(src)} bytes is shorter than its header of {HEADER_BYTES}")
        magic, version, number, dtype, flags, raw, payload, *rest = _FORM.unpack_from(src)
        *shape, pages, axes, position, sink_tokens, edge_layers, extra_bytes = rest
        for field, found, expected in (
            ("magic", magic, _MAGIC),
            ("version", version, _VERSION),
            ("codec", number, int(codec)),
            ("flags", flags, 0),
            ("raw_bytes", raw, raw_bytes),
            ("payload_bytes", payload, len(src) - HEADER_BYTES),
        ):
            if found != expected:
                raise FormatError(f"{field} of an encoded chunk is {found!r} where {expected!r} was expected")
        if dtype >= len(DTYPES):
            raise FormatError(f"dtype of an encoded chunk is {dtype}: there are {len(DTYPES)}")
        if extra_bytes > payload:
            raise FormatError(f"extra_bytes of an encoded chunk is {extra_bytes}: {payload} bytes follow the header")
        name = DTYPES[int(dtype)]
        layout = _layout(shape, axes, name) if any(shape) else None
        if layout and layout.page_bytes * layout.plane_count * pages != raw_bytes:
            raise FormatError(f"the shape of an encoded chunk {shape} x {pages} pages is not of {raw_bytes} bytes")
        return cls(codec, raw, payload, name, layout, pages, position, sink_tokens, edge_layers, extra_bytes)


def _shape(layout: KVLayout) -> tuple[int, ...]:
    return layout.layers, layout.kv, layout.kv_heads, layout.page_tokens, layout.head_dim


def _axes(layout: KVLayout) -> bytes:
    return "|".join("".join(_LETTERS[axis] for axis in part) for part in (layout.planes, layout.page)).encode()


def _layout(shape: list[int], axes: bytes, dtype: str) -> KVLayout:
    layers, kv, heads, page_tokens, head_dim = shape
    planes, bar, page = axes.rstrip(b"\0").decode("latin-1").partition("|")
    if not bar or dtype not in ITEM_BYTES or not set(planes + page) <= set(_AXES):
        raise FormatError(f"axes of an encoded chunk are {axes!r}, its dtype {dtype!r}")
    try:
        return KVLayout(
            layers,
            heads,
            head_dim,
            dtype,
            page_tokens,
            tuple(_AXES[letter] for letter in planes),
            tuple(_AXES[letter] for letter in page),
            kv,
        )
    except LayoutError as error:
        raise FormatError(f"the shape of an encoded chunk: {error}") from None
