"""What a record must be to serve a producer. Knows no tier and no index."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from lmpipe.handles import CHUNK, ChunkRecords, Fidelity

ANY_FIDELITY = (1 << 16) - 1
"""Of who takes chunks however much they have lost."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a row must be to serve a producer: its own shard, layout and size, exact enough and not expired."""

    layout: int
    chunk_bytes: int
    shard: int
    shards: int
    max_fidelity: int = Fidelity.EXACT
    """The most that it may have lost."""
    _pattern: npt.NDArray[np.uint64] = field(init=False, repr=False)
    _mask: npt.NDArray[np.uint64] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        pattern, mask = np.zeros(1, CHUNK), np.zeros(1, CHUNK)
        fixed = {"layout": self.layout, "raw_bytes": self.chunk_bytes, "shard": self.shard, "shards": self.shards}
        for name, value in fixed.items():
            pattern[name], mask[name] = value, np.iinfo(CHUNK[name]).max
        object.__setattr__(self, "_pattern", pattern.view(np.uint64))
        object.__setattr__(self, "_mask", mask.view(np.uint64))

    def usable(self, records: ChunkRecords, now_s: float) -> npt.NDArray[np.bool_] | None:
        """(n,) which of the records are fit to be loaded; None: all are, which one pass over the bytes tells."""
        words = records.view(np.uint64).reshape(len(records), CHUNK.itemsize // 8)
        unlike = (words ^ self._pattern) & self._mask
        fidelity, expires = records["fidelity"], records["expires_at"]
        if not (unlike.any() or fidelity.any() or expires.any()):
            return None
        return ~unlike.any(axis=1) & (fidelity <= self.max_fidelity) & ((expires == 0) | (expires > now_s))

    def completing(self, records: ChunkRecords, now_s: float) -> npt.NDArray[np.bool_]:
        """(n,) which of the records, of any shard, let a row count as complete.

        A foreign shard may have any layout and size: cache groups differ. The own one has to be usable.
        """
        expires = records["expires_at"]
        fit = (records["shards"] == self.shards) & (records["shard"] < self.shards)
        fit &= (records["fidelity"] <= self.max_fidelity) & ((expires == 0) | (expires > now_s))
        own = records["shard"] == self.shard
        fit &= ~own | ((records["layout"] == self.layout) & (records["raw_bytes"] == self.chunk_bytes))
        return fit
