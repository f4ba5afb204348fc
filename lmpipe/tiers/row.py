"""One row of the DRAM tier: a chunk with all its shards, where each lies and who hears of it. Knows no arena."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

import numpy as np

from lmpipe.handles import CHUNK, Codec, SessionId

_NUMBERS = struct.Struct("<28xHH8xIIQ4xI8x")
"""Of a chunk record (handles.py): codec, fidelity, raw_bytes, nbytes, place, expires_at."""
assert _NUMBERS.size == CHUNK.itemsize


@dataclass(slots=True)
class Row:
    """One chunk in DRAM. `records`, `slots` and `savers` are by shard."""

    key: bytes
    shards: int
    tick: int
    slots: dict[int, int] = field(default_factory=dict[int, int])
    records: dict[int, bytes] = field(default_factory=dict[int, bytes])
    savers: dict[int, SessionId] = field(default_factory=dict[int, SessionId])
    """The session that hears what becomes of the shard below; 0: none."""
    pinned_until_s: float = 0.0
    stays_raw: set[int] = field(default_factory=set[int])
    """Shards that are not to be encoded again unasked: it was tried, or they are wanted as they are."""

    @property
    def value(self) -> bytes:
        """The row as the index stores it: the shards' records in order."""
        return b"".join(self.records[shard] for shard in sorted(self.records))

    def is_held(self, held: frozenset[int]) -> bool:
        """Whether any shard's slot is among these hold words."""
        return any(place_of(record) in held for record in self.records.values())

    def may_go(self, now_s: float, held: frozenset[int]) -> bool:
        """Whether eviction may take it: neither pinned nor held."""
        return self.pinned_until_s <= now_s and not (held and self.is_held(held))

    @property
    def namespace(self) -> int:
        """The namespace id of its shards."""
        return int(np.frombuffer(next(iter(self.records.values())), CHUNK)[0]["namespace"])


def place_of(record: bytes) -> int:
    """`Slot.place` of a 72-byte record."""
    return _NUMBERS.unpack(record)[4]


def fidelity_of(record: bytes) -> int:
    """How exact the chunk is (`handles.Fidelity`)."""
    return _NUMBERS.unpack(record)[1]


def encoded_away(record: bytes) -> int | None:
    """Bytes that an encoded chunk would take more if it were raw; None: it is raw."""
    codec, _, raw_bytes, nbytes, _, _ = _NUMBERS.unpack(record)
    return None if codec == Codec.RAW else raw_bytes - nbytes


def expires_at(record: bytes) -> int:
    """When the time that its saver gave the chunk is over, in seconds since 1970; 0: never."""
    return _NUMBERS.unpack(record)[5]
