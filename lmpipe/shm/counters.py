"""Counters: one segment for each process, written by it alone and read by anyone. Knows no name's meaning."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lmpipe.errors import SegmentError
from lmpipe.shm.descriptor import WORD_BYTES, SegmentKind, counters_offset
from lmpipe.shm.segment import Segment, words_of


class Counters:
    """This process's counters, kept after its death until somebody removes the file. Any thread may add."""

    def __init__(self, segment: Segment, names: Sequence[str]) -> None:
        """Use `create`."""
        self.segment = segment
        self.names = tuple(names)
        self.index = {name: at for at, name in enumerate(names)}
        """Name to number, for loops that count the same thing again and again."""
        self._words = words_of(segment, counters_offset(len(segment.json)), len(names))

    @classmethod
    def create(cls, path: Path, names: Sequence[str], *, prefault: bool = True) -> Counters:
        """Make a counter segment with all counters 0.

        Raises:
            SegmentError: as `Segment.create`, or names are doubled or none.
        """
        if not names or len(set(names)) != len(names):
            raise SegmentError(f"{path}: counters need names, each its own")
        text = json.dumps(list(names)).encode()
        nbytes = counters_offset(len(text)) + len(names) * WORD_BYTES
        segment = Segment.create(path, SegmentKind.COUNTERS, nbytes, count=len(names), json=text, prefault=prefault)
        return cls(segment, names)

    def add(self, name: str | int, n: int = 1) -> None:
        """Add to a counter, by name or by its number in `index`; atomic, so that worker threads may count too."""
        self._words.fetch_add(name if isinstance(name, int) else self.index[name], n & _MASK)

    def set(self, name: str | int, value: int) -> None:
        """Set a gauge; below zero is fine."""
        self._words.store(name if isinstance(name, int) else self.index[name], value & _MASK)

    def get(self, name: str | int) -> int:
        """The present value."""
        word = self._words.load(name if isinstance(name, int) else self.index[name])
        return word - (word >> 63 << 64)

    @staticmethod
    def read(path: Path) -> dict[str, int]:
        """All counters of a process, by name.

        Raises:
            SegmentError: there is no such segment, or it is damaged.
        """
        with Segment.attach(path, SegmentKind.COUNTERS, readonly=True) as segment:
            try:
                names = [str(name) for name in json.loads(segment.json)]
            except (ValueError, TypeError) as error:
                raise SegmentError(f"{path}: its names are no JSON list") from error
            if len(names) != segment.count:
                raise SegmentError(f"{path}: has {segment.count} counters and {len(names)} names")
            values = words_of(segment, counters_offset(len(segment.json)), len(names)).snapshot()
            return dict(zip(names, values.astype(np.int64).tolist(), strict=True))

    def close(self, *, unlink: bool = False) -> None:
        """Unmap; `unlink` removes the file as well."""
        if unlink:
            self.segment.unlink()
        if not self.segment.closed:
            del self._words  # it keeps the mapping
            self.segment.close()


_MASK = (1 << 64) - 1
