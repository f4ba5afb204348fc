"""From page ids to copies: every byte where the payload has it, in as few pieces as the pages allow."""

from __future__ import annotations

import numpy as np
import pytest

from lmpipe.cuda.copy import Copies, Planes, Rows, copies_of

PAGES = 12
NEVER = 1 << 40


def planes_of(stride: int, page_bytes: int, count: int = 3) -> tuple[np.ndarray, Planes]:
    """Memory of random bytes, and planes in it that begin one page after the other where pages are apart."""
    memory = np.random.default_rng(1).integers(0, 255, 1 << 14, np.uint8)
    step = page_bytes if stride > page_bytes else PAGES * page_bytes
    address = np.arange(count, dtype=np.uint64) * np.uint64(step) + np.uint64(64)
    return memory, Planes(address, np.full(count, stride, np.uint64), np.full(count, page_bytes, np.uint64))


def payloads_of(memory: np.ndarray, planes: Planes, page_ids: np.ndarray) -> list[bytes]:
    """What the chunks are, page by page."""
    return [
        b"".join(
            memory[at + page * stride :][:nbytes].tobytes()
            for at, stride, nbytes in zip(
                planes.address.tolist(), planes.page_stride.tolist(), planes.page_bytes.tolist(), strict=True
            )
            for page in chunk.tolist()
        )
        for chunk in page_ids
    ]


def moved(memory: np.ndarray, copies: Copies, rows: Rows, nbytes: int) -> np.ndarray:
    """What lies at destination 0 and after, once all is done; nothing is written twice."""
    found, written = np.zeros(nbytes, np.uint8), np.zeros(nbytes, np.int64)
    moves = list(zip(copies.dst.tolist(), copies.src.tolist(), copies.nbytes.tolist(), strict=True))
    for dst, src, pitch, size, count in zip(
        *(a.tolist() for a in (rows.dst, rows.src, rows.src_pitch, rows.row_bytes, rows.rows)), strict=True
    ):
        moves += [(dst + row * size, src + row * pitch, size) for row in range(count)]
    for dst, src, size in moves:
        found[dst : dst + size] = memory[src : src + size]
        written[dst : dst + size] += 1
    assert written.max() <= 1
    return found


IDS = {
    "scattered": [[3, 1, 7, 5], [0, 9, 2, 11]],
    "in a row": [[4, 5, 6, 7], [8, 9, 10, 11]],
    "partly": [[2, 3, 9, 10], [5, 4, 3, 0]],
    "one page": [[6]],
    "the same page twice": [[1, 1, 2, 2]],
}


@pytest.mark.parametrize("stride", [64, 192])
@pytest.mark.parametrize("kind", IDS)
@pytest.mark.parametrize("period", [NEVER, 100, 32])
@pytest.mark.parametrize("pitched", [True, False])
def test_every_byte_goes_where_the_payload_has_it(stride: int, kind: str, period: int, pitched: bool) -> None:
    memory, planes = planes_of(stride, 64)
    page_ids = np.array(IDS[kind], np.int32)
    nbytes = page_ids.shape[1] * planes.bytes_per_page
    at = np.arange(len(page_ids), dtype=np.uint64) * np.uint64(nbytes + 8)
    copies, rows = copies_of(planes, page_ids, at, 0, period, pitched=pitched)
    found = moved(memory, copies, rows, int(at[-1]) + nbytes)
    for start, payload in zip(at.tolist(), payloads_of(memory, planes, page_ids), strict=True):
        assert found[start : start + nbytes].tobytes() == payload
    assert ((copies.dst // np.uint64(period)) == (copies.dst + copies.nbytes - np.uint64(1)) // np.uint64(period)).all()
    ends = rows.dst + rows.rows * rows.row_bytes - np.uint64(1)
    assert (rows.dst // np.uint64(period) == ends // np.uint64(period)).all()
    assert pitched or not len(rows.dst)


def test_a_run_of_pages_is_one_copy() -> None:
    in_a_row = np.array(IDS["in a row"], np.int32)
    zero = np.array([0, 4096], np.uint64)
    _, tight = planes_of(64, 64)
    copies, rows = copies_of(tight, in_a_row, zero, 0, NEVER)
    assert (len(copies.dst), len(rows.dst)) == (6, 0)  # planes times chunks
    _, apart = planes_of(192, 64)
    copies, rows = copies_of(apart, in_a_row, zero, 0, NEVER)
    assert (len(copies.dst), len(rows.dst)) == (0, 6)
    copies, rows = copies_of(apart, in_a_row[:, :3], zero, 0, NEVER)
    assert (len(copies.dst), len(rows.dst)) == (18, 0), "too short for a call of its own"


def test_planes_may_differ() -> None:
    memory, _ = planes_of(64, 64)
    sizes = np.array([32, 64, 16], np.uint64)
    planes = Planes(np.array([0, 2000, 4000], np.uint64), np.array([32, 128, 16], np.uint64), sizes)
    page_ids = np.array(IDS["partly"], np.int32)
    nbytes = page_ids.shape[1] * planes.bytes_per_page
    copies, rows = copies_of(planes, page_ids, np.array([0, nbytes], np.uint64), 0, NEVER)
    assert moved(memory, copies, rows, 2 * nbytes).tobytes() == b"".join(payloads_of(memory, planes, page_ids))


def test_nothing_is_nothing() -> None:
    _, planes = planes_of(64, 64)
    copies, rows = copies_of(planes, np.empty((0, 4), np.int32), np.empty(0, np.uint64), 0, 64)
    assert not len(copies.dst) and not len(rows.dst)
