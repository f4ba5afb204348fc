"""Raw payloads: pages of many chunks copied into payloads on the device, and back, in one launch.

A page is bytes here, so every layout is the same work: rows of words, each within one page of one plane. Words are as
wide as addresses allow, and threads move four at a time where pages and payloads lie at multiples of 16 bytes.
Everything runs on torch's current stream, and nothing waits for it.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from lmpipe.cuda.pages import WIDEST_ACCESS, DevicePages

_TILE_WORDS = 4096
"""Words that a program holds at once: 16 KiB in flight from each hide the memory's latency also when few run."""
_LEAST_ROWS = 2
"""Of a program: of a single row Triton (3.7.1) makes scalars, and fails on what is said of their alignment."""
_WARPS = 8
_LEAST_WORDS = 32
"""A row shorter than this is padded rather than cut where a page has no larger power of two in it."""
_WORDS = {4: tl.uint32, 2: tl.uint16, 1: tl.uint8}


def gather(
    pages: DevicePages, ids: torch.Tensor, payloads: torch.Tensor, *, planes: range | None = None, programs: int
) -> None:
    """Copy pages into payloads. An id of -1 gives zeros.

    Args:
        pages: of the engine.
        ids: int32 `[chunks, pages of a chunk]`, from `DevicePages.ids`.
        payloads: uint8 `[chunks, planes x pages of a chunk x page_bytes]` on the device, each row without gaps.
        planes: those to copy, consecutive ones; all if it is not given. One layer's are `DevicePages.layer`.
        programs: that run at most. Few leave multiprocessors to the engine.

    Raises:
        ValueError: the payloads are of another shape, or there is more to do than one launch can count.
    """
    _launch(_gather, pages, ids, payloads, planes, programs)


def scatter(
    pages: DevicePages, ids: torch.Tensor, payloads: torch.Tensor, *, planes: range | None = None, programs: int
) -> None:
    """Inverse of `gather`. An id of -1 leaves its page out.

    Raises:
        ValueError: as `gather`.
    """
    _launch(_scatter, pages, ids, payloads, planes, programs)


def _launch(
    kernel: triton.JITFunction[None],
    pages: DevicePages,
    ids: torch.Tensor,
    payloads: torch.Tensor,
    planes: range | None,
    programs: int,
) -> None:
    wanted = range(pages.layout.plane_count) if planes is None else planes
    chunks, count = ids.shape
    page_bytes = pages.layout.page_bytes
    if payloads.shape != (chunks, len(wanted) * count * page_bytes) or payloads.stride(1) != 1:
        raise ValueError(
            f"payloads must be {chunks} rows of {len(wanted)} x {count} x {page_bytes} bytes, got {payloads.shape}"
        )
    if wanted.step != 1 or not 0 <= wanted.start <= wanted.stop <= pages.layout.plane_count:
        raise ValueError(f"planes {wanted} are not consecutive ones of {pages.layout.plane_count}")
    here = math.gcd(pages.alignment, page_bytes)
    there = math.gcd(WIDEST_ACCESS, page_bytes, payloads.data_ptr(), payloads.stride(0))
    item = math.gcd(4, here, there)
    words = page_bytes // item
    block = _block(words)
    segments = triton.cdiv(words, block)
    rows, tile = chunks * len(wanted) * count * segments, _TILE_WORDS // block
    if rows + programs * tile >= 1 << 31:
        raise ValueError(f"{chunks} chunks of {count} pages are too many for one launch")
    if not rows:
        return
    kernel[(min(programs, triton.cdiv(rows, tile)),)](
        pages.bases[wanted.start : wanted.stop],
        ids,
        pages.page_stride,
        count,
        len(wanted),
        rows,
        payloads,
        payloads.stride(0),
        WORD=_WORDS[item],
        ITEM=item,
        WORDS=words,
        BLOCK=block,
        SEGMENTS=segments,
        ROWS=tile,
        PAGE_ALIGNMENT=here,
        PAYLOAD_ALIGNMENT=there,
        num_warps=_WARPS,
    )


def _block(words: int) -> int:
    """Words of a row: a power of two that divides the page's, or where that is small, one that has room for all."""
    divisor = words & -words
    return min(_TILE_WORDS // _LEAST_ROWS, divisor if divisor >= _LEAST_WORDS else triton.next_power_of_2(words))


@triton.jit
def _places(
    bases: tl.tensor,
    page_ids: tl.tensor,
    page_stride: tl.tensor,
    pages: tl.tensor,
    planes: tl.tensor,
    rows: tl.tensor,
    payloads: tl.tensor,
    chunk_stride: tl.tensor,
    row: tl.tensor,
    WORD: tl.constexpr,
    ITEM: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCK: tl.constexpr,
    SEGMENTS: tl.constexpr,
    PAGE_ALIGNMENT: tl.constexpr,
    PAYLOAD_ALIGNMENT: tl.constexpr,
):
    """(words in the pages, whether there is a page, words in the payloads, whether there are any), [rows, BLOCK]."""
    live = row < rows
    page = row // SEGMENTS % pages
    plane = row // SEGMENTS // pages % planes
    chunk = row // SEGMENTS // pages // planes
    base = tl.load(bases + plane, mask=live, other=0)
    page_id = tl.load(page_ids + chunk * pages + page, mask=live, other=-1)
    in_page = base + page_id.to(tl.int64) * page_stride
    in_payload = chunk.to(tl.int64) * chunk_stride + (plane * pages + page).to(tl.int64) * WORDS * ITEM
    word = (row % SEGMENTS * BLOCK)[:, None] + tl.arange(0, BLOCK)[None, :]
    start = tl.multiple_of(in_page[:, None].to(tl.pointer_type(WORD)), [PAGE_ALIGNMENT, PAGE_ALIGNMENT])
    out = (payloads + in_payload)[:, None].to(tl.pointer_type(WORD))
    out = tl.multiple_of(out, [PAYLOAD_ALIGNMENT, PAYLOAD_ALIGNMENT])
    inside = live[:, None] & (word < WORDS)
    return start + word, inside & (page_id >= 0)[:, None], out + word, inside


@triton.jit
def _gather(
    bases: tl.tensor,
    page_ids: tl.tensor,
    page_stride: tl.tensor,
    pages: tl.tensor,
    planes: tl.tensor,
    rows: tl.tensor,
    payloads: tl.tensor,
    chunk_stride: tl.tensor,
    WORD: tl.constexpr,
    ITEM: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCK: tl.constexpr,
    SEGMENTS: tl.constexpr,
    ROWS: tl.constexpr,
    PAGE_ALIGNMENT: tl.constexpr,
    PAYLOAD_ALIGNMENT: tl.constexpr,
):
    first = tl.program_id(0) * ROWS
    while first < rows:
        row = first + tl.arange(0, ROWS)
        page, there, payload, inside = _places(
            bases, page_ids, page_stride, pages, planes, rows, payloads, chunk_stride, row,
            WORD, ITEM, WORDS, BLOCK, SEGMENTS, PAGE_ALIGNMENT, PAYLOAD_ALIGNMENT,
        )  # fmt: skip
        tl.store(payload, tl.load(page, mask=there, other=0), mask=inside)
        first += tl.num_programs(0) * ROWS


@triton.jit
def _scatter(
    bases: tl.tensor,
    page_ids: tl.tensor,
    page_stride: tl.tensor,
    pages: tl.tensor,
    planes: tl.tensor,
    rows: tl.tensor,
    payloads: tl.tensor,
    chunk_stride: tl.tensor,
    WORD: tl.constexpr,
    ITEM: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCK: tl.constexpr,
    SEGMENTS: tl.constexpr,
    ROWS: tl.constexpr,
    PAGE_ALIGNMENT: tl.constexpr,
    PAYLOAD_ALIGNMENT: tl.constexpr,
):
    first = tl.program_id(0) * ROWS
    while first < rows:
        row = first + tl.arange(0, ROWS)
        page, there, payload, _ = _places(
            bases, page_ids, page_stride, pages, planes, rows, payloads, chunk_stride, row,
            WORD, ITEM, WORDS, BLOCK, SEGMENTS, PAGE_ALIGNMENT, PAYLOAD_ALIGNMENT,
        )  # fmt: skip
        tl.store(page, tl.load(payload, mask=there, other=0), mask=there)
        first += tl.num_programs(0) * ROWS
