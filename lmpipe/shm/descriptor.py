"""The byte layouts of everything that lies in shared memory. Offsets in bytes, integers little-endian, words 64 bits
and atomic.

Every segment begins with one page:

      0 magic "LMPSEG" 0 0 | 8 version u32 | 12 kind u32 | 16 id 16 B
     32 segment bytes u64 | 40 ready u64 (1 when formatted)
     48 slots u64 (slot segments), entries u64 (holds), words u64 (counters)
     56 grants u64 (holds) | 64 JSON bytes u64 (counters)

Slot segment (the arena, a ring):

      0        4096                      4096 + slots·128, rounded up to a page
      +--------+-------------------------+---------------------------------------------+
      | header | slot headers            | payloads, page-aligned, any size            |
      +--------+-------------------------+---------------------------------------------+

Slot header, two cache lines; the first holds what changes:

      0 state word   generation << 8 | state      atomic; generations start at 1
      8 owner        session that holds the lease, or held it last
     16 pending      bit per tier that has still to take the chunk, atomic
     24 offset       payload, from the segment's start
     32 capacity     bytes the payload may use
     40 chunk record 72 B (handles.py)
    112 checksum     xxh3-128 of the payload, zero when not known
    128

The record of a slot may be read only under a hold or a lease; its bytes are ordinary memory, fenced by the state
word. Of a FREE slot only the generation means anything: a lease writes the rest of the header first and the state
word last, a free writes the state word first and nothing after it. Death between any two of these stores leaves a
header that is either not in use or complete.

Hold segment, one for each session: entries of two words, then grant words:

      0 hold word    slot << 32 | generation (low 32 bits); 0: free
      8 request      who asked

A grant word holds the id of the save that may still read the engine's pages, or 0. The engine revokes by storing 0.

      0        4096                 4096 + entries·16         + grants·8
      +--------+--------------------+-------------------------+
      | header | entries            | grant words             |
      +--------+--------------------+-------------------------+

Node segment, one for each node: the index generation of each tier (which environment directory is current), then the
epoch.

Counter segment, one for each process: names as a JSON list, then one word for each name, written by that process only.

      0        4096                 4096 + JSON bytes, rounded up to a page
      +--------+--------------------+-------------------------+
      | header | names              | words, signed           |
      +--------+--------------------+-------------------------+

Pages segment: an engine's own pages behind the header; where each lies is told when the engine registers.
"""

from __future__ import annotations

import struct
from enum import IntEnum

import numpy as np

from lmpipe.handles import BLOCK_BYTES, CHUNK, round_up

MAGIC = b"LMPSEG\0\0"
SEGMENT_VERSION = 1


class SegmentKind(IntEnum):
    """What a segment holds."""

    SLOTS = 1
    HOLDS = 2
    NODE = 3
    COUNTERS = 4
    PAGES = 5


HEADER_BYTES = BLOCK_BYTES
H_MAGIC, H_VERSION, H_KIND, H_ID, H_BYTES, H_READY, H_COUNT, H_GRANTS, H_JSON = 0, 8, 12, 16, 32, 40, 48, 56, 64
HEADER = struct.Struct("<8sII16sQQQQQ")
assert HEADER.size == H_JSON + 8

WORD_BYTES = 8

SLOT_HEADER_BYTES = 128
S_WORD, S_OWNER, S_PENDING, S_OFFSET, S_CAPACITY, S_RECORD, S_CHECKSUM = 0, 8, 16, 24, 32, 40, 112
CHECKSUM_BYTES = 16
assert S_RECORD + CHUNK.itemsize == S_CHECKSUM
assert S_CHECKSUM + CHECKSUM_BYTES == SLOT_HEADER_BYTES

SLOT_HEADER = np.dtype(
    {
        "names": ["word", "owner", "pending", "offset", "capacity", "record", "checksum"],
        "formats": ["<u8", "<u8", "<u8", "<u8", "<u8", CHUNK, f"V{CHECKSUM_BYTES}"],
        "offsets": [S_WORD, S_OWNER, S_PENDING, S_OFFSET, S_CAPACITY, S_RECORD, S_CHECKSUM],
        "itemsize": SLOT_HEADER_BYTES,
    }
)
"""The slot header for NumPy. Words that another process may change meanwhile are read with `native.Words` instead."""

GENERATION_SHIFT = 8
STATE_MASK = 0xFF
GENERATION_MASK = 0xFFFFFFFF

HOLD_BYTES = 16

PENDING_SSD = 1
PENDING_REMOTE = 2

NODE_WORDS = 64
N_INDEX_DRAM, N_INDEX_SSD, N_INDEX_REMOTE, N_EPOCH = 0, 1, 2, 3


def payload_offset(slots: int) -> int:
    """Where the payloads of a slot segment begin."""
    return round_up(HEADER_BYTES + slots * SLOT_HEADER_BYTES)


def grants_offset(entries: int) -> int:
    """Where the grant words of a hold segment begin."""
    return HEADER_BYTES + entries * HOLD_BYTES


def counters_offset(json_bytes: int) -> int:
    """Where the words of a counter segment begin."""
    return round_up(HEADER_BYTES + json_bytes)
