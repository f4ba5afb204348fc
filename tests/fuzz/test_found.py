"""Defects that fuzzing has found, each with an input that shows it."""

from __future__ import annotations

from pathlib import Path

import pytest

from lmpipe.errors import NodeError
from lmpipe.handles import Tier
from lmpipe.index import IndexReader, IndexWriter
from lmpipe.index_row import RECORD_BYTES
from lmpipe.launch.claim import WorkerNote
from lmpipe.shm.node import NodeWords
from lmpipe.supervisor import NodeState
from lmpipe.topology import NodeInfo

NOT_UTF8 = b'{"na\xffme": 1}'
DEEP = b'{"other": ' + b"[" * 100_000


@pytest.mark.parametrize("content", [NOT_UTF8, DEEP])
def test_a_note_that_is_none_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    """json raised UnicodeDecodeError and RecursionError, which nobody expected."""
    path = tmp_path / "node.json"
    path.write_bytes(content)
    with pytest.raises(NodeError, match=r"node\.json"):
        NodeInfo.read(tmp_path)
    assert WorkerNote.read(path) is None and NodeState.read(path) is None


@pytest.mark.parametrize("damage", [b"x", b"x" * (RECORD_BYTES - 1), b"x" * (2 * RECORD_BYTES + 8)])
def test_a_row_that_is_not_made_of_records_is_a_miss(tmp_path: Path, damage: bytes) -> None:
    """A lookup over several shards raised ValueError in the engine."""
    tmp_path.chmod(0o700)
    node = NodeWords.create(tmp_path / "node.shm")
    keys = [bytes([at]) * 20 for at in range(4)]
    writer, whole = IndexWriter(tmp_path, Tier.DRAM, 1 << 20, node), b"y" * RECORD_BYTES
    reader = IndexReader(tmp_path, Tier.DRAM, 1 << 20, node)
    writer.publish()
    assert writer.put([(key, damage if at == 2 else whole) for at, key in enumerate(keys)])
    assert reader.run(keys) == [whole, whole] and reader.run(keys, 3) == [whole] and reader.run(keys, 2) == []
    assert reader.rows(keys) == [whole, whole, None, whole]
    for part in (reader, writer, node):
        part.close()
