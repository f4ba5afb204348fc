"""Tiers: where chunks are kept, one file each. Knows no messages, no sockets and no engine."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from lmpipe.clock import wall_s
from lmpipe.errors import LmpipeError
from lmpipe.handles import CHUNK, ChunkRecords

_SAME = ("shard", "shards", "layout", "codec", "fidelity", "raw_bytes", "nbytes")


def is_same(stored: np.void, asked: np.void) -> bool:
    """Whether a stored record of the same key is the very chunk that is asked for, whose bytes may pass for it."""
    return all(stored[name] == asked[name] for name in _SAME)


def is_as_good(stored: np.void, offered: np.void) -> bool:
    """Whether a stored record of the same key makes it needless to store the one that is offered: nothing more exact is
    given up for it, and nothing equal that is still valid is written again.
    """
    if has_expired(int(stored["expires_at"]), int(offered["saved_at"])):
        return False
    if any(stored[name] != offered[name] for name in ("shard", "shards", "layout", "raw_bytes")):
        return False
    return bool(stored["fidelity"] < offered["fidelity"]) or is_same(stored, offered)


def has_expired(expires_at: int, saved_at: int = 0) -> bool:
    """Whether the time that its saver gave a chunk is over: lookups pass it by, so it must not stand in the way of the
    same chunk saved at `saved_at`, by the clock of that saver, which may be ahead of this process's.
    """
    return expires_at != 0 and expires_at <= max(wall_s(), saved_at)


class ChunkGone(LmpipeError):
    """The record names a place that holds the chunk no longer: a miss, and nobody's fault."""


class TierDown(LmpipeError):
    """The tier cannot be asked at present (its text says why): a miss, or a dropped save."""


@dataclass(frozen=True, slots=True)
class Stored:
    """What became of a write or a commit."""

    records: ChunkRecords = field(default_factory=lambda: np.empty(0, CHUNK))
    """Those that are in, with `place` set."""
    reason: str = ""
    """Why the others are not."""
    evicted: ChunkRecords = field(default_factory=lambda: np.empty(0, CHUNK))
    """Chunks the tier gave up to make room: their rows are gone."""
    down: bool = False
    """Whether `reason` is the tier's own trouble, so that they may be offered again."""


@dataclass(frozen=True, slots=True)
class Recovered:
    """What a tier found when it was opened."""

    rows: int
    """Rows in the index now."""
    records: int
    """Records found, with those replaced or invalidated since."""
    damaged: int
    """Parts that could not be read: torn tails, files or objects that are not what they should be."""
    unindexed: int = 0
    """Chunks that found no room in the index."""
