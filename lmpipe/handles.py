"""Where a chunk's bytes are, and the one record that names a chunk everywhere.

The same 72 bytes stand in messages, in index rows, in slot headers and in the headers of stored records:

      0 +--------------------------------+
        | key                       16 B |  name of the content (keys.py)
     16 +----------------+---------------+
        | anchor     4 B | position  u32 |  key prefix of the chunk's group | index of the chunk in its prompt
     24 +-------+--------+-------+-------+
        | shard | shards | codec | fidel.|  u16 each
     32 +-------+--------+-------+-------+
        | layout                     u64 |
     40 +----------------+---------------+
        | raw_bytes  u32 | nbytes    u32 |  payload before encoding | as stored
     48 +----------------+---------------+
        | place                      u64 |
     56 +----------------+---------------+
        | saved_at   u32 | expires_at u32|  seconds since 1970; 0: never
     64 +----------------+---------------+
        | namespace                  u64 |  first bytes of the namespace's digest
     72 +--------------------------------+

`place` is read by tier: a slot and its generation in DRAM, a segment and its 4 KiB block on SSD, nothing for a remote
object, whose name follows from the record. All integers are little-endian. Knows no tier, no memory and no socket.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum, StrEnum
from typing import NewType

import numpy as np
import numpy.typing as npt

SessionId = NewType("SessionId", int)
"""One life of a producer or worker: a random number in [1, 2**63)."""

LayoutId = NewType("LayoutId", int)
"""First 8 bytes of the hash of a `KVLayout`."""

BLOCK_BYTES = 4096
"""Payloads, extents and the headers before them are aligned to this: O_DIRECT asks for it."""

CHUNK = np.dtype(
    {
        "names": [
            "key",
            "anchor",
            "position",
            "shard",
            "shards",
            "codec",
            "fidelity",
            "layout",
            "raw_bytes",
            "nbytes",
            "place",
            "saved_at",
            "expires_at",
            "namespace",
        ],
        # "V", not "S": NumPy strips trailing zero bytes from "S" fields.
        "formats": ["V16", "V4", "<u4", "<u2", "<u2", "<u2", "<u2", "<u8", "<u4", "<u4", "<u8", "<u4", "<u4", "<u8"],
        "offsets": [0, 16, 20, 24, 26, 28, 30, 32, 40, 44, 48, 56, 60, 64],
        "itemsize": 72,
    }
)
"""The chunk record. `raw_bytes`: payload before encoding; `nbytes`: as stored; `expires_at`: seconds since 1970, 0 for
never.
"""

ChunkRecords = npt.NDArray[np.void]
"""A one-dimensional array of dtype `CHUNK`."""


class Tier(StrEnum):
    """Where lmpipe keeps chunks, fastest first."""

    DRAM = "dram"
    SSD = "ssd"
    REMOTE = "remote"


class Codec(IntEnum):
    """Codec numbers as stored with every chunk; never reused."""

    RAW = 0
    ZSTD = 1
    SPLIT = 2
    FP8 = 3
    INT4H = 4
    ADAPTIVE = 5


class Fidelity(IntEnum):
    """How exact a chunk is: the least exact codec among itself and the prefix it was computed on."""

    EXACT = 0
    FP8 = 100
    INT4H = 200
    ADAPTIVE = 300


@dataclass(frozen=True, slots=True)
class Slot:
    """A place in the arena or in a ring, and the life of it that is meant."""

    index: int
    generation: int

    @property
    def place(self) -> int:
        """The slot as a chunk record's `place`."""
        return self.index << 32 | self.generation

    @classmethod
    def from_place(cls, place: int) -> Slot:
        """Inverse of `place`."""
        return cls(place >> 32, place & 0xFFFFFFFF)


@dataclass(frozen=True, slots=True)
class Extent:
    """A byte range of a segment file: the record header's block, the payload follows it."""

    segment: int
    block: int

    @property
    def place(self) -> int:
        """The extent as a chunk record's `place`."""
        return self.segment << 32 | self.block

    @property
    def offset_bytes(self) -> int:
        """Where the record begins in its segment file."""
        return self.block * BLOCK_BYTES

    @classmethod
    def from_place(cls, place: int) -> Extent:
        """Inverse of `place`."""
        return cls(place >> 32, place & 0xFFFFFFFF)


def round_up(nbytes: int, unit: int = BLOCK_BYTES) -> int:
    """The next multiple of `unit` at or above `nbytes`."""
    return -(-nbytes // unit) * unit
