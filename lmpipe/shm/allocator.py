"""Byte ranges of one memory: which are free, and who gets the next. Private to its process, knows no slots and no
shared memory.

Address-ordered first fit: of all free ranges that are large enough the one at the lowest address, so that the high
end stays whole. Sizes are rounded up to classes, so that a hole left by one chunk fits the next of about its size:
raw chunks are all alike, encoded ones are not.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable

from lmpipe.handles import BLOCK_BYTES, round_up

CLASSES_PER_DOUBLING = 8


def size_class(nbytes: int) -> int:
    """Bytes that are taken for `nbytes`: a multiple of 4 KiB, at most an eighth more than the next one above `nbytes`.

    Classes are the powers of two with seven steps between each two, as far as steps of 4 KiB allow.
    """
    step = (1 << (nbytes.bit_length() - 1)) // CLASSES_PER_DOUBLING
    return round_up(nbytes, max(step, BLOCK_BYTES))


class Ranges:
    """Free ranges of [start, start + nbytes). Neighbouring free ranges are always one."""

    def __init__(self, start: int, nbytes: int) -> None:
        self.start = start
        self.nbytes = nbytes
        self.free_bytes = nbytes
        self._offsets = [start] if nbytes else []
        self._sizes = {start: nbytes} if nbytes else {}
        # By size: no free range at a lower address holds as much. Without it a search would walk all the small
        # holes at the low end each time; there are as many entries as size classes in use.
        self._none_below: dict[int, int] = {}

    @property
    def largest(self) -> int:
        """The longest free range."""
        return max(self._sizes.values(), default=0)

    def free_ranges(self) -> list[tuple[int, int]]:
        """(offset, bytes) of every free range, in order of address."""
        return [(offset, self._sizes[offset]) for offset in self._offsets]

    def take(self, nbytes: int) -> int | None:
        """Offset of `nbytes` taken, or None when no free range is long enough."""
        offsets, sizes = self._offsets, self._sizes
        for at in range(bisect_left(offsets, self._none_below.get(nbytes, 0)), len(offsets)):
            offset = offsets[at]
            size = sizes[offset]
            if size >= nbytes:
                self._none_below[nbytes] = offset
                del sizes[offset]
                if size > nbytes:
                    offsets[at] = offset + nbytes
                    sizes[offset + nbytes] = size - nbytes
                else:
                    del offsets[at]
                self.free_bytes -= nbytes
                return offset
        self._none_below[nbytes] = self.start + self.nbytes
        return None

    def give(self, offset: int, nbytes: int) -> None:
        """Return a range that was taken; it grows together with its free neighbours.

        Raises:
            ValueError: some of it is free already or lies outside.
        """
        offsets, sizes = self._offsets, self._sizes
        at = bisect_left(offsets, offset)
        before = offsets[at - 1] if at else -1
        after = offsets[at] if at < len(offsets) else self.start + self.nbytes
        if nbytes <= 0 or offset < self.start or offset + nbytes > after or (at and before + sizes[before] > offset):
            raise ValueError(f"{nbytes} bytes at {offset} are not all taken")
        self.free_bytes += nbytes
        first, end = offset, offset + nbytes
        low = high = at
        if at and before + sizes[before] == offset:
            first, low = before, at - 1
        if at < len(offsets) and after == end:
            end, high = after + sizes[after], at + 1
        for merged in offsets[low:high]:
            del sizes[merged]
        offsets[low:high] = [first]
        sizes[first] = end - first
        for size, none_below in self._none_below.items():
            if size <= end - first and first < none_below:
                self._none_below[size] = first

    @classmethod
    def around(cls, start: int, nbytes: int, taken: Iterable[tuple[int, int]]) -> Ranges:
        """What is free when the (offset, bytes) of `taken`, which do not overlap, are not."""
        ranges = cls(start, 0)
        ranges.nbytes = nbytes
        at = start
        for offset, size in [*sorted(taken), (start + nbytes, 0)]:
            if offset > at:
                ranges._offsets.append(at)
                ranges._sizes[at] = offset - at
                ranges.free_bytes += offset - at
            at = offset + size
        return ranges
