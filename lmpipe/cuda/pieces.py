"""A transfer of many chunks cut into pieces that fit a buffer, each a rectangle of chunks, planes and pages.

In every chunk's payload a piece is one range of bytes: all of it where that fits, else planes, else pages of a plane.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Piece:
    """`nbytes` bytes at `at` of the payload of each of `chunks`; `pages` by their place in the chunk."""

    chunks: range
    planes: range
    pages: range
    at: int
    nbytes: int


def cut(chunks: int, planes: range, pages: int, page_bytes: int, limit: int) -> Iterator[Piece]:
    """Pieces of at most `limit` bytes over all their chunks, in the order of the payload.

    Args:
        chunks: how many there are.
        planes: of them, those to move.
        pages: of a chunk.
        page_bytes: of a page in one plane.
        limit: bytes.

    Raises:
        ValueError: a single page is larger than the limit.
    """
    row = pages * page_bytes
    if page_bytes > limit:
        raise ValueError(f"a page of {page_bytes} bytes does not fit a staging buffer of {limit}")

    def piece(of: range, some: range, part: range) -> Piece:
        at = some.start * row + part.start * page_bytes
        return Piece(of, some, part, at, len(some) * len(part) * page_bytes)

    every = range(pages)
    if len(planes) * row <= limit:
        for of in _parts(range(chunks), limit // max(1, len(planes) * row)):
            yield piece(of, planes, every)
        return
    for chunk in range(chunks):
        for some in _parts(planes, max(1, limit // row)):
            for part in _parts(every, min(pages, limit // page_bytes)):
                yield piece(range(chunk, chunk + 1), some, part)


def _parts(whole: range, step: int) -> Iterator[range]:
    for first in range(whole.start, whole.stop, step):
        yield range(first, min(first + step, whole.stop))
