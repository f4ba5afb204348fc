"""From page ids to copies: which bytes of a device go where, as few and as long pieces as the pages allow.

A payload holds the planes in order, and in each the chunk's pages in order (layout.py). Pages with consecutive ids are
one run: one copy where pages lie close together, rows of a pitched copy where other planes lie between them. Runs too
short for that are copied page by page; the runtime takes all copies of a transfer in one call.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lmpipe.cuda.runtime import Addresses, Runtime, Stream
from lmpipe.messages import PageIds

ROWS_AT_LEAST = 4
"""A pitched copy is a call of its own: shorter runs go into the batch."""


@dataclass(frozen=True, slots=True)
class Planes:
    """Pages as this process has them, each array (planes,): page p of plane i at `address[i] + p * page_stride[i]`."""

    address: Addresses
    page_stride: Addresses
    page_bytes: Addresses

    @property
    def bytes_per_page(self) -> int:
        """Of one page id over all planes."""
        return int(self.page_bytes.sum())


@dataclass(frozen=True, slots=True)
class Copies:
    """Linear copies, each array (copies,)."""

    dst: Addresses
    src: Addresses
    nbytes: Addresses

    def cut(self, origin: int, period: int) -> Copies:
        """The same bytes, no copy's destination crossing an address that is a multiple of `period` after `origin`."""
        dst, src, nbytes = self.dst, self.src, self.nbytes
        parts: list[tuple[Addresses, Addresses, Addresses]] = []
        while len(dst):
            room = np.uint64(period) - (dst - np.uint64(origin)) % np.uint64(period)
            head = np.minimum(nbytes, room)
            parts.append((dst, src, head))
            more = nbytes > head
            dst, src, nbytes = (dst + head)[more], (src + head)[more], (nbytes - head)[more]
        return Copies(*(np.concatenate([part[i] for part in parts] or [self.dst]) for i in range(3)))


@dataclass(frozen=True, slots=True)
class Rows:
    """Pitched copies, each array (copies,): `rows` rows of `row_bytes`, close together at `dst`, apart at `src`."""

    dst: Addresses
    src: Addresses
    src_pitch: Addresses
    row_bytes: Addresses
    rows: Addresses

    def start(self, runtime: Runtime, stream: Stream) -> None:
        """Give them to a stream."""
        columns = (self.dst, self.src, self.src_pitch, self.row_bytes, self.rows)
        for dst, src, pitch, row_bytes, rows in zip(*(column.tolist() for column in columns), strict=True):
            runtime.copy_rows(dst, row_bytes, src, pitch, row_bytes, rows, stream)


def copies_of(
    planes: Planes, page_ids: PageIds, payloads: Addresses, origin: int, period: int, *, pitched: bool = True
) -> tuple[Copies, Rows]:
    """What brings chunks to payloads.

    Args:
        page_ids: (chunks, pages of a chunk), all in the pool.
        payloads: (chunks,) where each begins.
        origin, period: no copy's destination crosses a multiple of `period` after `origin`.
        pitched: whether pitched copies may be used.
    """
    runs = _Runs.of(page_ids)
    tight = planes.page_stride == planes.page_bytes
    step = planes.page_bytes * np.uint64(page_ids.shape[1])
    begin = np.cumsum(step) - step
    copies = [_linear(planes, begin, payloads, tight, runs)]
    rows = _pitched(planes, begin, payloads, ~tight, runs)
    keep = np.zeros(len(rows.dst), np.bool_)
    if pitched:
        last = rows.dst + rows.rows * rows.row_bytes - np.uint64(1)
        keep = (rows.dst - np.uint64(origin)) // np.uint64(period) == (last - np.uint64(origin)) // np.uint64(period)
        keep &= rows.rows >= ROWS_AT_LEAST
    copies.append(_unrolled(_taken(rows, ~keep)))
    all_copies = Copies(
        np.concatenate([part.dst for part in copies]),
        np.concatenate([part.src for part in copies]),
        np.concatenate([part.nbytes for part in copies]),
    )
    return all_copies.cut(origin, period), _taken(rows, keep)


@dataclass(frozen=True, slots=True)
class _Runs:
    """Pages of a chunk with consecutive ids, each array (runs,)."""

    chunk: npt.NDArray[np.int64]
    page: Addresses
    """The first one's number in the chunk."""
    id: Addresses
    """The first one's id."""
    pages: Addresses

    @classmethod
    def of(cls, page_ids: PageIds) -> _Runs:
        chunks, pages = page_ids.shape
        begins = np.ones((chunks, pages), np.bool_)
        begins[:, 1:] = np.diff(page_ids.astype(np.int64), axis=1) != 1
        first = np.flatnonzero(begins)
        lengths = np.diff(first, append=page_ids.size)
        ids = page_ids.ravel()[first]
        return cls(first // max(pages, 1), *(a.astype(np.uint64) for a in (first % max(pages, 1), ids, lengths)))


def _linear(planes: Planes, begin: Addresses, payloads: Addresses, of: npt.NDArray[np.bool_], runs: _Runs) -> Copies:
    """Runs of planes whose pages lie close together: shape (planes * runs,)."""
    page_bytes = planes.page_bytes[of, None]
    dst = payloads[runs.chunk] + begin[of, None] + runs.page * page_bytes
    src = planes.address[of, None] + runs.id * page_bytes
    return Copies(dst.ravel(), src.ravel(), (runs.pages * page_bytes).ravel())


def _pitched(planes: Planes, begin: Addresses, payloads: Addresses, of: npt.NDArray[np.bool_], runs: _Runs) -> Rows:
    """Runs of the other planes."""
    page_bytes, stride = planes.page_bytes[of, None], planes.page_stride[of, None]
    dst = payloads[runs.chunk] + begin[of, None] + runs.page * page_bytes
    src = planes.address[of, None] + runs.id * stride
    shape = dst.shape
    spread = (np.broadcast_to(a, shape).ravel() for a in (stride, page_bytes, runs.pages))
    return Rows(dst.ravel(), src.ravel(), *spread)


def _taken(rows: Rows, which: npt.NDArray[np.bool_]) -> Rows:
    return Rows(*(a[which] for a in (rows.dst, rows.src, rows.src_pitch, rows.row_bytes, rows.rows)))


def _unrolled(rows: Rows) -> Copies:
    """Row by row."""
    counts = rows.rows.astype(np.int64)
    which = np.repeat(np.arange(len(counts)), counts)
    row = (np.arange(len(which)) - np.repeat(np.cumsum(counts) - counts, counts)).astype(np.uint64)
    row_bytes = rows.row_bytes[which]
    return Copies(rows.dst[which] + row * row_bytes, rows.src[which] + row * rows.src_pitch[which], row_bytes)
