"""split: the exponents of a block of 4096 numbers in a few bits each, the rest of the numbers as it is; lossless.

Encoding takes two passes over the pages: how long each block becomes, then, when all offsets are known, the blocks.
docs/decisions/0011-codec-formats.md has the picture; windows of exponents are placed as `lmpipe.codecs.reference.split`
says.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from lmpipe.codecs.header import Header
from lmpipe.cuda.numbers import WORDS
from lmpipe.cuda.pages import DevicePages, run_address
from lmpipe.cuda.planes import load_planes, store_planes
from lmpipe.errors import CannotEncode, FormatError
from lmpipe.handles import Codec
from lmpipe.layout import ITEM_BYTES

TABLE_ROW_BYTES = 8
_BLOCK = tl.constexpr(4096)
_GROUP, _SAMPLED_GROUPS, _TOPS = tl.constexpr(64), tl.constexpr(17), tl.constexpr(64)
_RAW = tl.constexpr(255)


@dataclass(frozen=True, slots=True)
class _Blocks:
    """The blocks of one chunk's pages. Within a page, `run` numbers at a time lie in one block."""

    pages: DevicePages
    ids: torch.Tensor
    dtype: str
    numbers: int
    run: int
    runs_per_page: int

    @classmethod
    def of(cls, pages: DevicePages, ids: torch.Tensor, dtype: str) -> _Blocks | None:
        """None where pages are not of whole numbers of this type, or a chunk is too long for 32 bits."""
        if dtype not in WORDS or pages.layout.page_bytes % ITEM_BYTES[dtype]:
            return None
        per_page = pages.layout.page_bytes // ITEM_BYTES[dtype]
        numbers = pages.layout.plane_count * len(ids) * per_page
        run = math.gcd(per_page, _BLOCK.value)
        if numbers * ITEM_BYTES[dtype] >= 1 << 31:
            return None
        return cls(pages, ids, dtype, numbers, run, per_page // run)

    @property
    def count(self) -> int:
        return triton.cdiv(self.numbers, _BLOCK.value)

    @property
    def table_bytes(self) -> int:
        return self.count * TABLE_ROW_BYTES

    def launch(self, kernel: triton.JITFunction[None], programs: int, *buffers: torch.Tensor, **more: int) -> None:
        """At most `programs` programs, each of which takes every `programs`-th block."""
        item = ITEM_BYTES[self.dtype]
        kernel[(min(programs, self.count),)](
            self.pages.bases,
            self.ids,
            self.pages.page_stride,
            len(self.ids),
            self.numbers,
            *buffers,
            **more,
            DTYPE=self.dtype,
            WORD=WORDS[self.dtype],
            ITEM=item,
            RUN=self.run,
            RUNS=self.runs_per_page,
            ALIGNMENT=math.gcd(self.pages.alignment, self.run * item),
        )


def bound(pages: DevicePages, page_count: int) -> int:
    """Bytes that `dst` of `encode` must have."""
    raw = pages.layout.plane_count * page_count * pages.layout.page_bytes
    return raw + triton.cdiv(raw, 2 * _BLOCK.value) * TABLE_ROW_BYTES


def header(pages: DevicePages, page_count: int, payload_bytes: int) -> Header:
    """Header of a chunk whose encoded form has `payload_bytes`."""
    layout = pages.layout
    raw = layout.plane_count * page_count * layout.page_bytes
    blocks = triton.cdiv(raw // ITEM_BYTES[layout.dtype], _BLOCK.value)
    return Header(Codec.SPLIT, raw, payload_bytes, layout.dtype, extra_bytes=blocks * TABLE_ROW_BYTES)


def encode(pages: DevicePages, ids: torch.Tensor, dst: torch.Tensor, *, programs: int) -> torch.Tensor:
    """Write what follows the header into `dst`, bytes on the device at a multiple of 4.

    Returns the number of bytes written, int64 `[1]` on the device.

    Raises:
        CannotEncode: the pages do not hold bf16, fp16 or fp32, or 2 GiB or more.
        ValueError: `dst` is shorter than `bound`.
    """
    blocks = _Blocks.of(pages, ids, pages.layout.dtype)
    if blocks is None:
        raise CannotEncode(f"pages of {pages.layout.page_bytes} bytes of {pages.layout.dtype} cannot be split here")
    if len(dst) < bound(pages, len(ids)):
        raise ValueError(f"dst has {len(dst)} bytes, at least {bound(pages, len(ids))} are wanted")
    rows = torch.empty((blocks.count, 2), dtype=torch.int32, device=dst.device)
    blocks.launch(_measure, programs, rows)
    ends = torch.cumsum(rows[:, 0], 0)
    rows[:, 0] = ends - rows[:, 0]
    table, body = dst[: blocks.table_bytes], dst[blocks.table_bytes :]
    table.view(torch.int32).copy_(rows.view(-1))
    blocks.launch(_write, programs, rows, body)
    return ends[-1:] + blocks.table_bytes


def decode(head: Header, src: torch.Tensor, pages: DevicePages, ids: torch.Tensor, *, programs: int) -> torch.Tensor:
    """Fill pages from what follows the header of an encoded chunk, bytes on the device at a multiple of 4.

    Returns int32 `[1]` on the device: other than 0 where the chunk is damaged and some blocks are not written.

    Raises:
        FormatError: the header does not fit the pages, or the type of numbers that it names cannot be decoded here.
    """
    blocks = _Blocks.of(pages, ids, head.dtype)
    if blocks is None or blocks.numbers * ITEM_BYTES[head.dtype] != head.raw_bytes:
        raise FormatError(f"{head.raw_bytes} bytes of {head.dtype or 'no type'} cannot be decoded into these pages")
    if head.extra_bytes != blocks.table_bytes or len(src) != head.payload_bytes:
        raise FormatError(f"a table of {head.extra_bytes} bytes for {blocks.count} blocks")
    damaged = torch.zeros(1, dtype=torch.int32, device=src.device)
    table, body = src[: blocks.table_bytes], src[blocks.table_bytes :]
    blocks.launch(_read, programs, table.view(torch.int32), body, damaged, body_bytes=len(body))
    return damaged


@triton.jit
def _pointers(
    bases: tl.tensor,
    page_ids: tl.tensor,
    page_stride: tl.tensor,
    pages: tl.tensor,
    numbers: tl.tensor,
    block: tl.tensor,
    WORD: tl.constexpr,
    ITEM: tl.constexpr,
    RUN: tl.constexpr,
    RUNS: tl.constexpr,
    ALIGNMENT: tl.constexpr,
):
    """Where the words of a block are, [runs, RUN], and whether they are there. Pages consist of whole runs."""
    run = block * (_BLOCK // RUN) + tl.arange(0, _BLOCK // RUN)
    address, there = run_address(bases, page_ids, page_stride, pages, run, run < numbers // RUN, RUNS, RUN * ITEM)
    start = tl.multiple_of(address[:, None].to(tl.pointer_type(WORD)), [ALIGNMENT, ALIGNMENT])
    return start + tl.arange(0, RUN)[None, :], there[:, None]


@triton.jit
def _exponent(word: tl.tensor, DTYPE: tl.constexpr):
    if DTYPE == "bfloat16":
        exponent = (word >> 7) & 0xFF
    elif DTYPE == "float16":
        exponent = (word >> 10) & 0x1F
    else:
        exponent = (word >> 23) & 0xFF
    return exponent.to(tl.int32)


@triton.jit
def _rest_bytes(count: tl.tensor, DTYPE: tl.constexpr):
    if DTYPE == "bfloat16":
        rest = count
    elif DTYPE == "float16":
        rest = count + 3 * tl.cdiv(count, 8)
    else:
        rest = 3 * count
    return rest


@triton.jit
def _place_window(until: tl.tensor, highest: tl.tensor, WIDTH: tl.constexpr):
    """Top of the `WIDTH` exponents that hold most of the sample, of equal ones the lowest.

    `until`: [256], how many of the sample have at most that exponent. `highest`: the largest exponent in the sample.
    """
    top = highest - (_TOPS - 1) + tl.arange(0, _TOPS)
    before = tl.where(top >= WIDTH, tl.gather(until, tl.maximum(top - WIDTH, 0), 0), 0)
    inside = tl.where(top >= 0, tl.gather(until, tl.maximum(top, 0), 0) - before, 0)
    return tl.min(tl.where(inside == tl.max(inside, axis=0), top, 256), axis=0)


@triton.jit
def _measure(
    bases: tl.tensor,
    page_ids: tl.tensor,
    page_stride: tl.tensor,
    pages: tl.tensor,
    numbers: tl.tensor,
    rows: tl.tensor,
    DTYPE: tl.constexpr,
    WORD: tl.constexpr,
    ITEM: tl.constexpr,
    RUN: tl.constexpr,
    RUNS: tl.constexpr,
    ALIGNMENT: tl.constexpr,
):
    """Rows of the table, but with the length of each block where its offset belongs."""
    place = tl.arange(0, _BLOCK)
    block = tl.program_id(0)
    while block < tl.cdiv(numbers, _BLOCK):
        where, there = _pointers(bases, page_ids, page_stride, pages, numbers, block, WORD, ITEM, RUN, RUNS, ALIGNMENT)
        exponent = _exponent(tl.reshape(tl.load(where, mask=there, other=0), [_BLOCK]), DTYPE)
        count = tl.minimum(numbers - block * _BLOCK, _BLOCK)
        live = place < count
        sampled = live & (place // _GROUP % _SAMPLED_GROUPS == 0)
        until = tl.cumsum(tl.histogram(exponent, 256, mask=sampled), 0)
        highest = tl.max(tl.where(sampled, exponent, 0), axis=0)
        length = count * ITEM
        form = _RAW << 8
        for bits in tl.static_range(2, 5):
            top = _place_window(until, highest, (1 << bits) - 1)
            code = (top - exponent) & 0xFF
            escapes = tl.sum((live & (code >= (1 << bits) - 1)).to(tl.int32), axis=0)
            shorter = _rest_bytes(count, DTYPE) + bits * tl.cdiv(count, 8) + escapes
            form = tl.where(shorter < length, top | (bits << 8) | (escapes << 16), form)
            length = tl.minimum(shorter, length)
        tl.store(rows + 2 * block, length)
        tl.store(rows + 2 * block + 1, form)
        block += tl.num_programs(0)


@triton.jit
def _write(
    bases: tl.tensor,
    page_ids: tl.tensor,
    page_stride: tl.tensor,
    pages: tl.tensor,
    numbers: tl.tensor,
    rows: tl.tensor,
    body: tl.tensor,
    DTYPE: tl.constexpr,
    WORD: tl.constexpr,
    ITEM: tl.constexpr,
    RUN: tl.constexpr,
    RUNS: tl.constexpr,
    ALIGNMENT: tl.constexpr,
):
    """The blocks, as the rows of the table say."""
    place = tl.arange(0, _BLOCK)
    block = tl.program_id(0)
    while block < tl.cdiv(numbers, _BLOCK):
        where, there = _pointers(bases, page_ids, page_stride, pages, numbers, block, WORD, ITEM, RUN, RUNS, ALIGNMENT)
        word = tl.reshape(tl.load(where, mask=there, other=0), [_BLOCK]).to(tl.int32)
        count = tl.minimum(numbers - block * _BLOCK, _BLOCK)
        live = place < count
        out = body + tl.load(rows + 2 * block)
        form = tl.load(rows + 2 * block + 1)
        bits = (form >> 8) & 0xFF
        if bits == _RAW:
            for byte in tl.static_range(ITEM):
                tl.store(out + place * ITEM + byte, (word >> 8 * byte).to(tl.uint8), mask=live)
        else:
            plane_bytes = tl.cdiv(count, 8)
            codes_out = out + _rest_bytes(count, DTYPE)
            exponent = _exponent(word, DTYPE)
            escape = (1 << bits) - 1
            code = tl.where(live, tl.minimum(((form & 0xFF) - exponent) & 0xFF, escape), 0)
            _store_rest(out, word, place, count, live, DTYPE)
            _store_codes(codes_out, code, bits, plane_bytes, 4)
            escaped = live & (code == escape)
            rank = tl.cumsum(escaped.to(tl.int32), 0) - 1
            tl.store(codes_out + bits * plane_bytes + rank, exponent.to(tl.uint8), mask=escaped)
        block += tl.num_programs(0)


@triton.jit
def _read(
    bases: tl.tensor,
    page_ids: tl.tensor,
    page_stride: tl.tensor,
    pages: tl.tensor,
    numbers: tl.tensor,
    rows: tl.tensor,
    body: tl.tensor,
    damaged: tl.tensor,
    body_bytes: tl.tensor,
    DTYPE: tl.constexpr,
    WORD: tl.constexpr,
    ITEM: tl.constexpr,
    RUN: tl.constexpr,
    RUNS: tl.constexpr,
    ALIGNMENT: tl.constexpr,
):
    """Inverse of `_write`. Nothing outside the body is read, whatever the table says."""
    place = tl.arange(0, _BLOCK)
    blocks = tl.cdiv(numbers, _BLOCK)
    block = tl.program_id(0)
    while block < blocks:
        count = tl.minimum(numbers - block * _BLOCK, _BLOCK)
        plane_bytes = tl.cdiv(count, 8)
        offset = tl.load(rows + 2 * block)
        end = tl.load(rows + 2 * block + 2, mask=block + 1 < blocks, other=body_bytes)
        form = tl.load(rows + 2 * block + 1)
        bits = (form >> 8) & 0xFF
        escapes = (form >> 16) & 0xFFFF
        rest_bytes = _rest_bytes(count, DTYPE)
        coded = (bits >= 2) & (bits <= 4)
        length = tl.where(coded, rest_bytes + bits * plane_bytes + escapes, count * ITEM)
        fits = (offset >= 0) & (end <= body_bytes) & (end - offset == length) & ((block > 0) | (offset == 0))
        fits = fits & (coded | (bits == _RAW))
        live = fits & (place < count)
        out = body + offset
        word = tl.zeros([_BLOCK], tl.int32)
        if coded:
            escape = (1 << bits) - 1
            code = _load_codes(out + rest_bytes, tl.where(fits, bits, 0), plane_bytes, 4)
            escaped = live & (code == escape)
            rank = tl.cumsum(escaped.to(tl.int32), 0) - 1
            at = out + rest_bytes + bits * plane_bytes + rank
            coded_exponent = ((form & 0xFF) - code) & 0xFF
            stored = tl.load(at, mask=escaped & (rank < escapes), other=0).to(tl.int32)
            fits = fits & (tl.sum(escaped.to(tl.int32), axis=0) == escapes)
            word = _put_together(out, tl.where(escaped, stored, coded_exponent), place, count, live, DTYPE)
        else:
            for byte in tl.static_range(ITEM):
                word |= tl.load(out + place * ITEM + byte, mask=live, other=0).to(tl.int32) << 8 * byte
        where, there = _pointers(bases, page_ids, page_stride, pages, numbers, block, WORD, ITEM, RUN, RUNS, ALIGNMENT)
        tl.store(where, tl.reshape(word, [_BLOCK // RUN, RUN]).to(WORD), mask=there & fits)
        tl.store(damaged, 1, mask=fits == 0)
        block += tl.num_programs(0)


@triton.jit
def _store_codes(out: tl.tensor, code: tl.tensor, bits: tl.tensor, plane_bytes: tl.tensor, MOST: tl.constexpr):
    one = tl.zeros([1], tl.int32)
    store_planes(out + one, tl.reshape(code, [1, _BLOCK]), bits + one, plane_bytes, 1, _BLOCK, MOST)


@triton.jit
def _load_codes(out: tl.tensor, bits: tl.tensor, plane_bytes: tl.tensor, MOST: tl.constexpr):
    one = tl.zeros([1], tl.int32)
    return tl.reshape(load_planes(out + one, bits + one, plane_bytes, 1, _BLOCK, MOST), [_BLOCK])


@triton.jit
def _store_rest(
    out: tl.tensor, word: tl.tensor, place: tl.tensor, count: tl.tensor, live: tl.tensor, DTYPE: tl.constexpr
):
    """What is left of the numbers of a block without their exponents."""
    if DTYPE == "bfloat16":
        tl.store(out + place, (((word >> 8) & 0x80) | (word & 0x7F)).to(tl.uint8), mask=live)
    elif DTYPE == "float16":
        tl.store(out + place, (word & 0xFF).to(tl.uint8), mask=live)
        high = ((word >> 13) & 4) | ((word >> 8) & 3)
        _store_codes(out + count, tl.where(live, high, 0), 3, tl.cdiv(count, 8), 3)
    else:
        tl.store(out + 2 * place, (word & 0xFF).to(tl.uint8), mask=live)
        tl.store(out + 2 * place + 1, ((word >> 8) & 0xFF).to(tl.uint8), mask=live)
        high = ((word >> 24) & 0x80) | ((word >> 16) & 0x7F)
        tl.store(out + 2 * count + place, high.to(tl.uint8), mask=live)


@triton.jit
def _put_together(
    out: tl.tensor,
    exponent: tl.tensor,
    place: tl.tensor,
    count: tl.tensor,
    live: tl.tensor,
    DTYPE: tl.constexpr,
):
    """Words of a block from their exponents and what `_store_rest` wrote."""
    if DTYPE == "bfloat16":
        rest = tl.load(out + place, mask=live, other=0).to(tl.int32)
        word = ((rest & 0x80) << 8) | (exponent << 7) | (rest & 0x7F)
    elif DTYPE == "float16":
        rest = tl.load(out + place, mask=live, other=0).to(tl.int32)
        readable = tl.max(live.to(tl.int32), axis=0)
        high = _load_codes(out + count, 3 * readable, tl.cdiv(count, 8), 3)
        word = ((high & 4) << 13) | ((exponent & 0x1F) << 10) | ((high & 3) << 8) | rest
    else:
        low = tl.load(out + 2 * place, mask=live, other=0).to(tl.int32)
        middle = tl.load(out + 2 * place + 1, mask=live, other=0).to(tl.int32)
        high = tl.load(out + 2 * count + place, mask=live, other=0).to(tl.int32)
        word = ((high & 0x80) << 24) | (exponent << 23) | ((high & 0x7F) << 16) | (middle << 8) | low
    return word
