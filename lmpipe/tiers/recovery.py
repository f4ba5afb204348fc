"""From what a tier's store holds to index rows: invalidated and replaced records go, the rest is written in key order.

Works on whole arrays: a million records take seconds, not minutes. Knows no files and no objects.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from lmpipe.handles import CHUNK, ChunkRecords
from lmpipe.index import IndexWriter
from lmpipe.index_row import RECORD_BYTES, index_keys, merge_shard

BATCH_ROWS = 8192


def forget(
    records: ChunkRecords, before: int, namespace: int | None, keys: npt.NDArray[np.uint8] | None
) -> ChunkRecords:
    """`records` without those whose `place` is below `before` and that a tombstone names.

    `keys`, shape (n, 16), or `namespace` (0: every one) says which.
    """
    old = records["place"] < before
    if keys is not None:
        named = np.isin(_sortable(records["key"]), _sortable(np.ascontiguousarray(keys).view("V16").reshape(-1)))
    else:
        named = records["namespace"] == namespace if namespace else np.ones(len(records), bool)
    return records[~(old & named)]


def newest(records: ChunkRecords) -> ChunkRecords:
    """The last record of every key and shard, sorted as the index is: by anchor, key, shard."""
    if not len(records):
        return records
    raw = np.ascontiguousarray(records).view(np.uint8).reshape(len(records), RECORD_BYTES)
    # anchor ‖ key ‖ shard as three big-endian words: they compare as the bytes do.
    names = np.concatenate((raw[:, 16:20], raw[:, :16], raw[:, [25, 24]], np.zeros((len(raw), 2), np.uint8)), axis=1)
    words = names.view(">u8").astype(np.uint64)
    order = np.lexsort((words[:, 2], words[:, 1], words[:, 0]))
    ordered = words[order]
    last = np.ones(len(order), bool)
    last[:-1] = (ordered[1:] != ordered[:-1]).any(axis=1)
    return records[order[last]]


def write_rows(index: IndexWriter, records: ChunkRecords) -> int:
    """Put rows, sorted as `newest` gives them, into an empty index; the number of records that found no room."""
    raw = records.tobytes()
    values = (raw[at : at + RECORD_BYTES] for at in range(0, len(raw), RECORD_BYTES))
    rows: list[tuple[bytes, bytes]] = []
    last = b""
    for key, value in zip(index_keys(records), values, strict=True):
        if key == last:
            rows[-1] = key, merge_shard(rows[-1][1], value)
        else:
            rows.append((key, value))
            last = key
    lost = 0
    for at in range(0, len(rows), BATCH_ROWS):
        batch = rows[at : at + BATCH_ROWS]
        if not index.put(batch):
            lost += sum(len(row) // RECORD_BYTES for _, row in batch)
    return lost


def join(parts: Sequence[ChunkRecords]) -> ChunkRecords:
    """One array; empty for no parts."""
    return np.concatenate(parts) if parts else np.empty(0, CHUNK)


def _sortable(keys: npt.NDArray[np.void]) -> npt.NDArray[np.void]:
    words = np.ascontiguousarray(keys).view(np.uint64).reshape(-1, 2)
    pairs = np.empty(len(words), [("high", np.uint64), ("low", np.uint64)])
    pairs["high"], pairs["low"] = words[:, 0], words[:, 1]
    return pairs
