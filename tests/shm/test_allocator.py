"""The allocator against a bitmap of blocks."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmpipe.handles import BLOCK_BYTES
from lmpipe.shm.allocator import Ranges, size_class

START = 3 * BLOCK_BYTES
BLOCKS = 64


@given(st.integers(1, 1 << 33))
def test_a_size_class_wastes_at_most_an_eighth(nbytes: int) -> None:
    size = size_class(nbytes)
    assert size % BLOCK_BYTES == 0
    assert nbytes <= size <= max(nbytes + BLOCK_BYTES, nbytes * 9 // 8 + 1)
    assert size_class(size) == size


@given(st.integers(1, 1 << 33), st.integers(1, 1 << 33))
def test_size_classes_are_monotone(a: int, b: int) -> None:
    assert size_class(min(a, b)) <= size_class(max(a, b))


def test_eight_classes_to_a_doubling() -> None:
    classes = {size_class(nbytes) for nbytes in range((1 << 20) + 1, (1 << 21) + 1, BLOCK_BYTES // 2)}
    assert len(classes) == 8


@settings(max_examples=300)
@given(st.lists(st.one_of(st.integers(1, 20), st.integers(-40, -1)), max_size=60))
def test_ranges_are_apart_counted_and_coalesce(steps: list[int]) -> None:
    """Positive: take so many blocks. Negative: give one of those taken back."""
    ranges = Ranges(START, BLOCKS * BLOCK_BYTES)
    owner = [0] * BLOCKS
    taken: list[tuple[int, int]] = []
    for step in steps:
        if step > 0:
            offset = ranges.take(step * BLOCK_BYTES)
            first_fit = next((b for b in range(BLOCKS - step + 1) if not any(owner[b : b + step])), None)
            if offset is None:
                assert first_fit is None
                continue
            block = (offset - START) // BLOCK_BYTES
            assert block == first_fit
            owner[block : block + step] = [1] * step
            taken.append((offset, step))
        elif taken:
            offset, blocks = taken.pop(-step % len(taken))
            ranges.give(offset, blocks * BLOCK_BYTES)
            block = (offset - START) // BLOCK_BYTES
            owner[block : block + blocks] = [0] * blocks
        assert ranges.free_bytes == owner.count(0) * BLOCK_BYTES == sum(size for _, size in ranges.free_ranges())
        assert ranges.free_ranges() == _free_runs(owner)
        assert ranges.largest == max((size for _, size in _free_runs(owner)), default=0)
    same = Ranges.around(START, BLOCKS * BLOCK_BYTES, [(offset, n * BLOCK_BYTES) for offset, n in taken])
    assert same.free_ranges() == ranges.free_ranges() and same.free_bytes == ranges.free_bytes
    for offset, blocks in taken:
        ranges.give(offset, blocks * BLOCK_BYTES)
    assert ranges.free_ranges() == [(START, BLOCKS * BLOCK_BYTES)]


def _free_runs(owner: list[int]) -> list[tuple[int, int]]:
    runs: list[tuple[int, int]] = []
    for block, taken in enumerate(owner):
        if taken:
            continue
        if runs and runs[-1][0] + runs[-1][1] == START + block * BLOCK_BYTES:
            runs[-1] = (runs[-1][0], runs[-1][1] + BLOCK_BYTES)
        else:
            runs.append((START + block * BLOCK_BYTES, BLOCK_BYTES))
    return runs


@pytest.mark.parametrize(("offset", "blocks"), [(0, 1), (0, 2), (1, 1), (3, 1), (-1, 1), (63, 2), (2, 0)])
def test_what_is_not_taken_cannot_be_given(offset: int, blocks: int) -> None:
    ranges = Ranges(START, BLOCKS * BLOCK_BYTES)
    for _ in range(4):
        assert ranges.take(BLOCK_BYTES) is not None
    ranges.give(START, BLOCK_BYTES)
    ranges.give(START + 3 * BLOCK_BYTES, BLOCK_BYTES)
    if (offset, blocks) == (1, 1):
        ranges.give(START + BLOCK_BYTES, BLOCK_BYTES)
    before = ranges.free_ranges()
    with pytest.raises(ValueError, match="not all taken"):
        ranges.give(START + offset * BLOCK_BYTES, blocks * BLOCK_BYTES)
    assert ranges.free_ranges() == before
