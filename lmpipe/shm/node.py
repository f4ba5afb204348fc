"""The node's own words: the current index generation of each tier, and the epoch. Knows no index and no keys."""

from __future__ import annotations

from pathlib import Path

from lmpipe.handles import Tier
from lmpipe.shm.descriptor import (
    HEADER_BYTES,
    N_EPOCH,
    N_INDEX_DRAM,
    N_INDEX_REMOTE,
    N_INDEX_SSD,
    NODE_WORDS,
    WORD_BYTES,
    SegmentKind,
)
from lmpipe.shm.segment import Segment, words_of

_INDEX_WORD = {Tier.DRAM: N_INDEX_DRAM, Tier.SSD: N_INDEX_SSD, Tier.REMOTE: N_INDEX_REMOTE}


class NodeWords:
    """The node segment, in any process. Each index generation has one writer: the stage that owns the tier."""

    def __init__(self, segment: Segment) -> None:
        """Use `create` or `attach`."""
        self.segment = segment
        self._words = words_of(segment, HEADER_BYTES, NODE_WORDS)

    @classmethod
    def create(cls, path: Path) -> NodeWords:
        """Make the node segment, all words 0; raises as `Segment.create`."""
        return cls(Segment.create(path, SegmentKind.NODE, HEADER_BYTES + NODE_WORDS * WORD_BYTES, count=NODE_WORDS))

    @classmethod
    def attach(cls, path: Path) -> NodeWords:
        """Map a node's segment; raises as `Segment.attach`."""
        return cls(Segment.attach(path, SegmentKind.NODE))

    def index_generation(self, tier: Tier) -> int:
        """Which environment of the tier's index is current; 0: none yet."""
        return self._words.load(_INDEX_WORD[tier])

    def set_index_generation(self, tier: Tier, generation: int) -> None:
        """Readers switch to this environment at their next lookup."""
        self._words.store(_INDEX_WORD[tier], generation)

    @property
    def epoch(self) -> int:
        """How often everything was invalidated."""
        return self._words.load(N_EPOCH)

    def advance_epoch(self) -> int:
        """Invalidate everything once more; returns the new epoch."""
        return self._words.fetch_add(N_EPOCH, 1) + 1

    def close(self) -> None:
        """Unmap."""
        if not self.segment.closed:
            del self._words  # it keeps the mapping
            self.segment.close()
