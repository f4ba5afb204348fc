"""The shape of KV bytes: the only file that multiplies dimensions.

An engine keeps its KV in planes. A plane is an array of pages of equal size; the axes that select a plane come first in
a chunk's payload, then the pages of the chunk in order, then what one page holds:

    payload = [plane axes…][page 0 … page n-1][axes inside a page]

    dense (transformers)      planes (layer, kv, head)   page of one token (token, dim)
    paged NHD                 planes (layer, kv)         page (token, head, dim)
    paged HND                 planes (layer, kv)         page (head, token, dim)
    K and V in one page       planes (layer,)            page (kv, …)
    block of all layers       one plane                  page (layer, kv, …)
    MLA                       kv = 1, heads = 1
    opaque (AMX tiles)        planes of bytes            page (opaque)

Chunks keep the engine's own byte order; where it is known, `canonical` gives codecs the view
[layer][K|V][token][head][dim].
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt
import orjson

from lmpipe import native
from lmpipe.errors import LayoutError
from lmpipe.handles import LayoutId

AXES = ("layer", "kv", "head", "token", "dim")
ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1, "int8": 1, "uint8": 1}

CHUNK_TOKENS = 256
"""Default chunk size; engines whose blocks do not divide it use the next multiple of their block size."""


@dataclass(frozen=True, slots=True)
class KVLayout:
    """Shape, dtype and byte order of one engine rank's KV cache for one cache group.

    `planes` and `page` partition the axes `layer, kv, head, token, dim`, outermost first; `token` lies in the page.
    With `opaque_page_bytes` set, a page's inner order is unknown: `page` is then `("opaque",)` and only byte codecs may
    run. `isa` names the instruction set where the engine's order depends on it.

    Raises:
        LayoutError: the axes do not partition, a dimension is not positive, or the dtype is unknown.
    """

    layers: int
    kv_heads: int
    head_dim: int
    dtype: str
    page_tokens: int
    planes: tuple[str, ...]
    page: tuple[str, ...]
    kv: int = 2
    opaque_page_bytes: int = 0
    isa: str = ""

    def __post_init__(self) -> None:
        for axis in AXES:
            if self._extent(axis) < 1:
                raise LayoutError(f"the extent of {axis} must be at least 1, got {self._extent(axis)}")
        if self.dtype not in ITEM_BYTES:
            raise LayoutError(f"unknown dtype {self.dtype!r} (known: {', '.join(ITEM_BYTES)})")
        if self.opaque_page_bytes:
            if self.page != ("opaque",) or not set(self.planes) <= set(AXES) - {"token", "dim"}:
                raise LayoutError("an opaque page has page axes ('opaque',) and planes without token and dim")
            return
        axes = self.planes + self.page
        if sorted(axes) != sorted(AXES) or "token" in self.planes or "dim" in self.planes:
            raise LayoutError(
                f"planes {self.planes} and page {self.page} must partition {AXES}, token and dim in the page"
            )

    @classmethod
    def dense(cls, layers: int, kv_heads: int, head_dim: int, dtype: str) -> KVLayout:
        """Per-layer tensors `[batch, kv_heads, tokens, head_dim]`, as in Hugging Face transformers."""
        return cls(layers, kv_heads, head_dim, dtype, 1, ("layer", "kv", "head"), ("token", "dim"))

    @classmethod
    def paged(
        cls, layers: int, kv_heads: int, head_dim: int, dtype: str, page_tokens: int, *, order: str = "NHD"
    ) -> KVLayout:
        """Separate K and V pools of pages `[token, head, dim]` (NHD) or `[head, token, dim]` (HND)."""
        inner = {"NHD": ("token", "head", "dim"), "HND": ("head", "token", "dim")}.get(order)
        if inner is None:
            raise LayoutError(f"unknown page order {order!r} (known: NHD, HND)")
        return cls(layers, kv_heads, head_dim, dtype, page_tokens, ("layer", "kv"), inner)

    def _extent(self, axis: str) -> int:
        return {
            "layer": self.layers,
            "kv": self.kv,
            "head": self.kv_heads,
            "token": self.page_tokens,
            "dim": self.head_dim,
        }[axis]

    @property
    def plane_shape(self) -> tuple[int, ...]:
        """Extents of the plane axes."""
        return tuple(self._extent(axis) for axis in self.planes)

    @property
    def plane_count(self) -> int:
        """Number of planes."""
        return math.prod(self.plane_shape)

    @property
    def page_bytes(self) -> int:
        """Bytes of one page of one plane."""
        if self.opaque_page_bytes:
            return self.opaque_page_bytes
        return math.prod(self._extent(axis) for axis in self.page) * ITEM_BYTES[self.dtype]

    @property
    def token_bytes(self) -> int:
        """Bytes of one token over all planes (rounded up where a page is opaque)."""
        return -(-self.page_bytes * self.plane_count // self.page_tokens)

    def chunk_pages(self, chunk_tokens: int) -> int:
        """Pages of one chunk.

        Raises:
            LayoutError: pages do not divide the chunk.
        """
        if chunk_tokens % self.page_tokens:
            raise LayoutError(f"a chunk of {chunk_tokens} tokens does not divide into pages of {self.page_tokens}")
        return chunk_tokens // self.page_tokens

    def chunk_bytes(self, chunk_tokens: int) -> int:
        """Bytes of one chunk's payload."""
        return self.chunk_pages(chunk_tokens) * self.page_bytes * self.plane_count

    def tokens_of(self, chunk_bytes: int) -> int:
        """Inverse of `chunk_bytes`."""
        return chunk_bytes // (self.page_bytes * self.plane_count) * self.page_tokens

    def effective_chunk_tokens(self, configured: int = CHUNK_TOKENS, align_tokens: int = 1) -> int:
        """The smallest multiple of the page size, and of `align_tokens`, that is at least `configured`."""
        unit = math.lcm(self.page_tokens, align_tokens)
        return -(-configured // unit) * unit

    @property
    def layer_pieces(self) -> int:
        """Equal consecutive pieces of a payload that each belong to one layer; 1 where layers interleave."""
        return self.layers if self.planes and self.planes[0] == "layer" else 1

    def layout_id(self) -> LayoutId:
        """8 bytes of BLAKE3 over the fields as sorted JSON, as an integer."""
        fields = orjson.dumps(asdict(self), option=orjson.OPT_SORT_KEYS)
        return LayoutId(int.from_bytes(native.blake3_many(fields, len(fields)).tobytes()[:8], "little"))

    def canonical(self, payload: npt.NDArray[np.uint8], chunk_tokens: int) -> npt.NDArray[np.uint8]:
        """A payload as the view `[layer][K|V][page][token of page][head][dim][item byte]`, without a copy.

        Raises:
            LayoutError: the page's inner order is unknown.
        """
        if self.opaque_page_bytes:
            raise LayoutError("the pages of this layout are opaque: only byte codecs may run")
        inner = [self._extent(axis) for axis in self.page]
        view = payload.reshape(*self.plane_shape, self.chunk_pages(chunk_tokens), *inner, ITEM_BYTES[self.dtype])
        order = [*self.planes, "page", *self.page, "item"]
        return view.transpose([order.index(axis) for axis in ("layer", "kv", "page", "token", "head", "dim", "item")])
