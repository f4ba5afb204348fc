"""Vectors of `head_dim` numbers in the pages: what the numeric codecs read and write, in the payload's order."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from lmpipe import native
from lmpipe.codecs.header import Header
from lmpipe.cuda.numbers import WORDS
from lmpipe.cuda.pages import DevicePages, run_address
from lmpipe.errors import CannotEncode, FormatError
from lmpipe.layout import ITEM_BYTES

TILE_NUMBERS = 4096
"""Numbers, with what a vector is padded by, that a program holds at once."""


@dataclass(frozen=True, slots=True)
class Vectors:
    """The vectors of one chunk's pages, and how kernels walk over them. Programs take `tile` vectors at a time."""

    pages: DevicePages
    ids: torch.Tensor
    count: int
    dim: int
    padded: int
    per_page: int
    tile: int
    alignment: int

    @classmethod
    def of(cls, pages: DevicePages, ids: torch.Tensor) -> Vectors:
        """The vectors of the pages with these ids.

        Raises:
            CannotEncode: pages do not consist of vectors of numbers that codecs can read, or hold 2 GiB or more.
        """
        layout = pages.layout
        if layout.dtype not in WORDS or layout.page[-1] != "dim" or layout.head_dim > native.MAX_HEAD_DIM:
            raise CannotEncode(f"pages of {layout.dtype} with axes {layout.page} hold no vectors that can be read here")
        if layout.plane_count * len(ids) * layout.page_bytes >= 1 << 31:
            raise CannotEncode(f"{len(ids)} pages are too many for one chunk")
        vector_bytes = layout.head_dim * ITEM_BYTES[layout.dtype]
        per_page = layout.page_bytes // vector_bytes
        padded = max(8, triton.next_power_of_2(layout.head_dim))
        return cls(
            pages,
            ids,
            layout.plane_count * len(ids) * per_page,
            layout.head_dim,
            padded,
            per_page,
            max(1, TILE_NUMBERS // padded),
            math.gcd(pages.alignment, vector_bytes),
        )

    @property
    def raw_bytes(self) -> int:
        """Of the payload."""
        return self.pages.layout.plane_count * len(self.ids) * self.pages.layout.page_bytes

    def require(self, head: Header, payload: torch.Tensor) -> None:
        """Raise FormatError where an encoded chunk is not of these pages, or is damaged."""
        if (head.layout, head.pages) != (self.pages.layout, len(self.ids)):
            raise FormatError(
                f"a chunk of {head.pages} pages of {head.layout} does not fit {len(self.ids)} of the engine's"
            )
        if head.payload_bytes != len(payload):
            raise FormatError(f"an encoded chunk of {head.payload_bytes} bytes, of which there are {len(payload)}")

    def launch(
        self, kernel: triton.JITFunction[None], programs: int, *buffers: torch.Tensor | int, **more: float
    ) -> None:
        """At most `programs` programs, each of which takes every `programs`-th tile of vectors.

        No multiplication is fused with an addition: the result would be another one than the CPU's.
        """
        dtype = self.pages.layout.dtype
        kernel[(min(programs, triton.cdiv(self.count, self.tile)),)](
            self.pages.bases,
            self.ids,
            self.pages.page_stride,
            len(self.ids),
            self.count,
            *buffers,
            **more,
            DTYPE=dtype,
            WORD=WORDS[dtype],
            ITEM=ITEM_BYTES[dtype],
            DIM=self.dim,
            PADDED=self.padded,
            PER_PAGE=self.per_page,
            ALIGNMENT=self.alignment,
            TILE=self.tile,
            enable_fp_fusion=False,
        )


@triton.jit
def vector_pointers(
    bases: tl.tensor,
    page_ids: tl.tensor,
    page_stride: tl.tensor,
    pages: tl.tensor,
    vector: tl.tensor,
    live: tl.tensor,
    WORD: tl.constexpr,
    ITEM: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    PER_PAGE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
):
    """Where the words of vectors are, [vectors, PADDED], and whether they are there."""
    address, there = run_address(bases, page_ids, page_stride, pages, vector, live, PER_PAGE, DIM * ITEM)
    dim = tl.arange(0, PADDED)[None, :]
    start = tl.multiple_of(address[:, None].to(tl.pointer_type(WORD)), [ALIGNMENT, ALIGNMENT])
    return start + dim, there[:, None] & (dim < DIM)
