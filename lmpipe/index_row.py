"""A row of the index: chunk records of the shards that are there, sorted by shard, under anchor ‖ key. Knows no LMDB.

anchor 4 B ‖ key 16 B  ->  72 B record of a shard ‖ 72 B record of the next one ‖ …
"""

from __future__ import annotations

from itertools import takewhile

import numpy as np

from lmpipe.handles import CHUNK, ChunkRecords
from lmpipe.keys import ANCHOR_BYTES, KEY_BYTES

INDEX_KEY_BYTES = ANCHOR_BYTES + KEY_BYTES
RECORD_BYTES = CHUNK.itemsize
_SHARD_AT = 24
_SHARDS_AT = 26
_ONE_RECORD = frozenset({RECORD_BYTES})


def merge_shard(old: bytes | None, record: bytes) -> bytes:
    """The row `old` with this shard's 72-byte record added or replaced."""
    if not old or (len(old) == RECORD_BYTES and old[_SHARD_AT:_SHARDS_AT] == record[_SHARD_AT:_SHARDS_AT]):
        return record
    parts = {int.from_bytes(r[_SHARD_AT:_SHARDS_AT], "little"): r for r in _split(old)}
    parts[int.from_bytes(record[_SHARD_AT:_SHARDS_AT], "little")] = record
    return b"".join(parts[shard] for shard in sorted(parts))


def is_complete(row: bytes) -> bool:
    """Whether every shard of the chunk is there: only then may the row be used."""
    return len(row) == RECORD_BYTES * int.from_bytes(row[_SHARDS_AT : _SHARDS_AT + 2], "little")


def row_records(row: bytes) -> ChunkRecords:
    """The chunk records of a row, sorted by shard."""
    return np.frombuffer(row, CHUNK)


def index_key(record: bytes) -> bytes:
    """anchor ‖ key of a 72-byte chunk record."""
    return record[KEY_BYTES:INDEX_KEY_BYTES] + record[:KEY_BYTES]


def index_keys(records: ChunkRecords) -> list[bytes]:
    """anchor ‖ key of every record."""
    raw = np.ascontiguousarray(records).view(np.uint8).reshape(len(records), RECORD_BYTES)
    flat = np.concatenate((raw[:, KEY_BYTES:INDEX_KEY_BYTES], raw[:, :KEY_BYTES]), axis=1).tobytes()
    return [flat[at : at + INDEX_KEY_BYTES] for at in range(0, len(flat), INDEX_KEY_BYTES)]


def rows_only(values: list[bytes]) -> list[bytes]:
    """The values before the first that is not made of records."""
    if _ONE_RECORD.issuperset(map(len, values)):
        return values
    return list(takewhile(lambda value: value and len(value) % RECORD_BYTES == 0, values))


def _split(row: bytes) -> list[bytes]:
    return [row[at : at + RECORD_BYTES] for at in range(0, len(row), RECORD_BYTES)]
