"""The index: rows, generations, full maps, and readers that live in other processes."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmpipe.errors import SegmentError
from lmpipe.handles import CHUNK, ChunkRecords, Tier
from lmpipe.index import IndexReader, IndexWriter
from lmpipe.index_row import RECORD_BYTES, index_key, index_keys, is_complete, merge_shard, row_records
from lmpipe.shm.node import NodeWords

MAP_BYTES = 1 << 20
GOLDEN = Path(__file__).parent / "golden"


def records(count: int, *, shard: int = 0, shards: int = 1, seed: int = 0) -> ChunkRecords:
    made = np.zeros(count, CHUNK)
    noise = np.random.default_rng(seed).integers(0, 256, (count, 16), np.uint8)
    made["key"] = noise.view("V16").reshape(-1)
    made["anchor"] = np.ascontiguousarray(noise[:, :4]).view("V4").reshape(-1)
    made["position"], made["shard"], made["shards"] = np.arange(count), shard, shards
    made["raw_bytes"] = made["nbytes"] = 4096
    return made


@pytest.fixture
def run_dir() -> Iterator[Path]:
    path = Path(f"/dev/shm/lmpipe-test-{os.getpid()}-{secrets.token_hex(4)}")
    (path / "index").mkdir(parents=True, mode=0o700)
    yield path
    shutil.rmtree(path)


@pytest.fixture
def node(run_dir: Path) -> Iterator[NodeWords]:
    run_dir.chmod(0o700)
    words = NodeWords.create(run_dir / "node.shm")
    yield words
    words.close()


@pytest.fixture
def writer(run_dir: Path, node: NodeWords) -> Iterator[IndexWriter]:
    made = IndexWriter(run_dir, Tier.DRAM, MAP_BYTES, node)
    yield made
    made.close()


@pytest.fixture
def reader(run_dir: Path, node: NodeWords) -> Iterator[IndexReader]:
    made = IndexReader(run_dir, Tier.DRAM, MAP_BYTES, node)
    yield made
    made.close()


FORKING_READER = """
import os, sys
from pathlib import Path
from lmpipe.handles import Tier
from lmpipe.index import IndexReader
from lmpipe.shm.node import NodeWords
run_dir, key, forks = Path(sys.argv[1]), bytes.fromhex(sys.argv[2]), int(sys.argv[3])
node = NodeWords.attach(run_dir / "node.shm")
reader = IndexReader(run_dir, Tier.DRAM, int(sys.argv[4]), node)
assert len(reader.run([key])) == 1
for _ in range(forks):
    pid = os.fork()
    if not pid:
        status = 1
        try:
            assert len(reader.run([key])) == 1 and not reader.errors
            status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
reader.run([key])
assert len(reader.run([key])) == 1 and reader.errors <= 1, reader.errors
os._exit(0)
"""


def forking_reader(run_dir: Path, key: bytes, forks: int) -> None:
    arguments = [str(run_dir), key.hex(), str(forks), str(MAP_BYTES)]
    subprocess.run([sys.executable, "-c", FORKING_READER, *arguments], check=True, timeout=60)


def test_a_run_ends_at_the_first_miss(writer: IndexWriter, reader: IndexReader) -> None:
    rows = records(200)
    keys = index_keys(rows)
    assert writer.put_records(rows)
    assert reader.run(keys) == []  # not published
    writer.publish()
    assert reader.run(keys) == [row.tobytes() for row in rows]
    assert writer.delete([keys[130]]) == 1
    assert len(reader.run(keys)) == 130
    assert len(reader.run(keys, 131)) == 69
    assert reader.run(keys, 200) == reader.run([]) == []
    assert writer.count() == 199 and writer.get(keys[0]) == rows[0].tobytes()
    assert reader.errors == 0


def test_scan_gives_every_row_once_in_order(writer: IndexWriter) -> None:
    rows = records(100)
    writer.put_records(rows)
    scanned = [key for batch in writer.scan(7) for key, _ in batch]
    assert scanned == sorted(index_keys(rows))
    assert list(writer.scan()) and scanned


def test_space_is_taken_at_the_start(writer: IndexWriter, run_dir: Path) -> None:
    for name in ("data.mdb", "lock.mdb"):
        status = (run_dir / "index" / "dram-1" / name).stat()
        assert status.st_blocks * 512 >= status.st_size and status.st_mode & 0o077 == 0
    assert (run_dir / "index" / "dram-1" / "data.mdb").stat().st_size == MAP_BYTES


def test_no_room_says_what_to_do_and_leaves_nothing(run_dir: Path, node: NodeWords) -> None:
    with pytest.raises(SegmentError, match=r"no room for the ssd index: \d+ bytes.*map_bytes"):
        IndexWriter(run_dir, Tier.SSD, 1 << 50, node)
    assert list((run_dir / "index").iterdir()) == []


def test_a_new_generation_replaces_the_old_one(
    run_dir: Path, node: NodeWords, writer: IndexWriter, reader: IndexReader
) -> None:
    rows = records(3)
    keys = index_keys(rows)
    writer.put_records(rows)
    writer.publish()
    assert len(reader.run(keys)) == 3
    (run_dir / "index" / "dram-2").mkdir()  # an unpublished one of a dead writer
    second = IndexWriter(run_dir, Tier.DRAM, MAP_BYTES, node)
    second.put_records(rows[:1])
    assert len(reader.run(keys)) == 3
    second.publish()
    assert len(reader.run(keys)) == 1
    assert [path.name for path in (run_dir / "index").iterdir()] == ["dram-2"]
    second.close()
    second.close()
    assert len(reader.run(keys)) == 1  # the rows outlive their writer
    with pytest.raises(SegmentError, match="closed"):
        second.count()


def test_a_full_map_is_an_answer_and_deletes_still_work(writer: IndexWriter) -> None:
    stored: list[bytes] = []
    for seed in range(1000):
        rows = records(64, seed=seed)
        if not writer.put_records(rows):
            break
        stored += index_keys(rows)
    assert writer.count() == len(stored) > 3000
    for at in range(0, len(stored), 512):
        part = stored[at : at + 512]
        assert writer.delete(part) == len(part)
    writer.tick()
    assert writer.count() == 0
    assert writer.put_records(records(64))


def test_a_pinned_snapshot_cannot_wedge_the_writer(writer: IndexWriter) -> None:
    """A reader stopped inside a transaction keeps all old pages: puts end, deletes are owed and paid when it goes."""
    keys: list[bytes] = []
    with writer.environment.begin():
        for seed in range(1000):
            rows = records(64, seed=seed)
            if not writer.put_records(rows):
                break
            keys += index_keys(rows)
        for at in range(0, len(keys), 16):
            writer.delete(keys[at : at + 16])
        assert writer.count() > 0
    for _ in range(5):
        writer.tick()
    assert writer.count() == 0


def test_lookup_errors_are_misses(run_dir: Path, node: NodeWords, writer: IndexWriter) -> None:
    rows = records(4)
    writer.put_records(rows)
    writer.publish()
    writer.close()
    data = run_dir / "index" / "dram-1" / "data.mdb"
    good = data.read_bytes()
    data.write_bytes(b"\xff" * len(good))
    reader = IndexReader(run_dir, Tier.DRAM, MAP_BYTES, node)
    assert reader.run(index_keys(rows)) == [] and reader.errors == 1
    data.write_bytes(good)
    assert len(reader.run(index_keys(rows))) == 4 and reader.errors == 1
    node.set_index_generation(Tier.DRAM, 9)
    assert reader.run(index_keys(rows)) == [] and reader.errors == 2
    reader.close()
    reader.close()


def test_trouble_is_an_index_that_is_there_and_cannot_be_opened(
    run_dir: Path, node: NodeWords, writer: IndexWriter
) -> None:
    def trouble() -> str:
        reader = IndexReader(run_dir, Tier.DRAM, MAP_BYTES, node)
        try:
            return reader.trouble()
        finally:
            reader.close()

    assert trouble() == ""  # nothing is published
    writer.publish()
    assert trouble() == ""
    writer.close()
    (directory,) = (run_dir / "index").iterdir()
    locks = directory / "lock.mdb"
    locks.unlink()
    locks.mkdir()
    assert "Is a directory" in trouble()
    shutil.rmtree(directory)
    assert trouble() == ""  # as when a node starts anew


def test_two_readers_and_the_writer_share_one_process(
    run_dir: Path, node: NodeWords, writer: IndexWriter, reader: IndexReader
) -> None:
    other = IndexReader(run_dir, Tier.DRAM, MAP_BYTES, node)
    rows = records(2)
    writer.put_records(rows)
    writer.publish()
    assert len(reader.run(index_keys(rows))) == len(other.run(index_keys(rows))) == 2
    other.close()
    assert len(reader.run(index_keys(rows))) == 2 and writer.count() == 2


def test_a_forked_child_opens_its_own(writer: IndexWriter, run_dir: Path) -> None:
    rows = records(1)
    writer.put_records(rows)
    writer.publish()
    forking_reader(run_dir, index_keys(rows)[0], forks=2)


def test_tick_clears_readers_that_died(writer: IndexWriter, run_dir: Path) -> None:
    rows = records(1)
    writer.put_records(rows)
    writer.publish()
    for _ in range(2):
        forking_reader(run_dir, index_keys(rows)[0], forks=0)
    assert writer.environment.info()["num_readers"] > 0
    assert writer.tick() > 0
    assert writer.tick() == 0


def test_the_fork_of_a_writer_leaves_it_alone(writer: IndexWriter, reader: IndexReader) -> None:
    rows = records(1)
    writer.put_records(rows)
    writer.publish()
    assert len(reader.run(index_keys(rows))) == 1
    before = writer.environment.readers()
    pid = os.fork()
    if not pid:
        status = 1
        try:
            with pytest.raises(SegmentError, match="fork"):
                writer.count()
            status = 0 if reader.run(index_keys(rows)) == [] else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert writer.environment.readers() == before
    assert len(reader.run(index_keys(rows))) == 1 and writer.put_records(records(5)) and reader.errors == 0


@given(order=st.permutations(range(5)), again=st.integers(0, 4))
def test_shards_stand_sorted_and_the_newest_counts(order: list[int], again: int) -> None:
    row = None
    for shard in order:
        assert row is None or not is_complete(row)
        row = merge_shard(row, records(1, shard=shard, shards=5).tobytes())
    assert row is not None and is_complete(row)
    newer = records(1, shard=again, shards=5)
    newer["place"] = 77
    row = merge_shard(row, newer.tobytes())
    found = row_records(row)
    assert found["shard"].tolist() == list(range(5))
    assert found["place"].tolist() == [77 if shard == again else 0 for shard in range(5)]


def test_golden_row() -> None:
    """The row format on disk and in every engine's eyes: change it only with a new index directory name."""
    made = records(2, shard=1, shards=2)[:1]
    for place, name in enumerate(n for n in CHUNK.names or () if n not in ("key", "anchor", "shard", "shards")):
        made[name] = place + 1
    made["key"], made["anchor"] = np.void(bytes(range(16))), np.void(b"\xa0\xa1\xa2\xa3")
    first = made.copy()
    first["shard"] = 0
    row = merge_shard(merge_shard(None, made.tobytes()), first.tobytes())
    golden = GOLDEN / "index_row_2_shards.bin"
    assert golden.read_bytes() == index_key(row[:RECORD_BYTES]) + row
    assert index_keys(row_records(row))[0] == bytes.fromhex("a0a1a2a3") + bytes(range(16))
