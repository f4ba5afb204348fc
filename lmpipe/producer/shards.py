"""Rows of several shards, put together over all tiers: one rank's shard may be in DRAM while another's is not.

A chunk is usable when every shard of it is in some tier. Each rank is given its own shard's record from the fastest
tier that has it. A tier is read once, as a column; runs of complete rows are taken from it whole, and only
where rows lack shards the columns are laid over each other. Knows no holds. Rows of one shard do not come here.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from lmpipe.handles import CHUNK, ChunkRecords
from lmpipe.index_row import RECORD_BYTES
from lmpipe.producer.rows import Rows
from lmpipe.producer.wanted import Wanted

Run = tuple[ChunkRecords, npt.NDArray[np.uint8]]
"""(n,) records and (n,) tiers, as indexes into the readers."""

_NOTHING: Run = np.empty(0, CHUNK), np.empty(0, np.uint8)


def run_of_shards(
    readers: Sequence[Rows], keys: Sequence[bytes], first: int, wanted: Wanted, now_s: float, *, own: bool
) -> Run:
    """The own shard's records and their tiers for the unbroken run from `first`.

    Args:
        readers: of each tier, fastest first.
        own: whether the own shard is enough for a row to count.
    """
    columns = [_Column(reader, keys, wanted, now_s, own=own) for reader in readers]
    parts: list[Run] = []
    at = first
    while at < len(keys):
        part = _whole(columns, at)
        if not len(part[0]):
            part = _merged(columns, at, wanted.shard, own=own)
        if not len(part[0]):
            break
        parts.append(part)
        at += len(part[0])
    if not parts:
        return _NOTHING
    return np.concatenate([records for records, _ in parts]), np.concatenate([tiers for _, tiers in parts])


class _Column:
    """What one tier has of the prompt from some chunk on, up to its first miss."""

    def __init__(self, reader: Rows, keys: Sequence[bytes], wanted: Wanted, now_s: float, *, own: bool) -> None:
        self._reader, self._keys, self._wanted, self._now_s, self._own = reader, keys, wanted, now_s, own
        self._first = self._end = -1
        self._records: ChunkRecords = np.empty(0, CHUNK)
        self._whole: npt.NDArray[np.bool_] = np.empty(0, np.bool_)
        self._have: npt.NDArray[np.bool_] = np.empty((0, wanted.shards), np.bool_)

    def has(self, at: int) -> bool:
        """Whether the tier has a row of chunk `at`, complete or not."""
        if not self._first <= at <= self._end:  # at its end it is known to miss
            self._read(at)
        return at < self._end

    def rows_from(self, at: int) -> int:
        """How many rows there are from `at` on, without a gap."""
        return self._end - at

    def whole(self, at: int) -> ChunkRecords:
        """Own records of the run of complete rows from `at` on."""
        return self._records[at - self._first :][: _leading(self._whole[at - self._first :])]

    def part(self, at: int, count: int) -> tuple[npt.NDArray[np.bool_], ChunkRecords]:
        """Of `count` rows: (count, shards) which they have, and the own records, where they have those."""
        span = slice(at - self._first, at - self._first + count)
        return self._have[span], self._records[span]

    def _read(self, at: int) -> None:
        values = self._reader.run(self._keys, at)
        self._first, self._end = at, at + len(values)
        if not values:
            return
        flat = np.frombuffer(b"".join(values), CHUNK)
        fit = self._wanted.completing(flat, self._now_s)
        rows = np.repeat(np.arange(len(values)), [len(value) // RECORD_BYTES for value in values])
        self._have = np.zeros((len(values), self._wanted.shards), np.bool_)
        self._have[rows[fit], flat["shard"][fit]] = True
        own = fit & (flat["shard"] == self._wanted.shard)
        self._records = np.zeros(len(values), CHUNK)
        self._records[rows[own]] = flat[own]
        needed = self._have[:, self._wanted.shard :][:, :1] if self._own else self._have
        self._whole = np.logical_and.reduce(needed, axis=1)


def _whole(columns: Sequence[_Column], at: int) -> Run:
    """Complete rows of the fastest tier that has anything of chunk `at`."""
    for tier, column in enumerate(columns):
        if column.has(at):
            records = column.whole(at)
            return records, np.full(len(records), tier, np.uint8)
    return _NOTHING


def _merged(columns: Sequence[_Column], at: int, shard: int, *, own: bool) -> Run:
    """Rows from chunk `at` on that are complete in all tiers together, as far as the tiers that have `at` reach."""
    involved = [(tier, column) for tier, column in enumerate(columns) if column.has(at)]
    if not involved:
        return _NOTHING
    count = min(column.rows_from(at) for _, column in involved)
    parts = [(tier, *column.part(at, count)) for tier, column in involved]
    have = np.logical_or.reduce([have for _, have, _ in parts])
    count = _leading(have[:, shard] if own else np.logical_and.reduce(have, axis=1))
    records, tiers = np.zeros(count, CHUNK), np.zeros(count, np.uint8)
    for tier, have, found in reversed(parts):  # the fastest has the last word
        mine = have[:count, shard]
        records[mine], tiers[mine] = found[:count][mine], tier
    return records, tiers


def _leading(true: npt.NDArray[np.bool_]) -> int:
    """How many are true before the first that is not."""
    return len(true) if true.all() else int(np.argmin(true))
