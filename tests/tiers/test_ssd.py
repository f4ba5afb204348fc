"""The SSD tier: what is acknowledged is found again, whatever happened to the files."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import numpy as np
import pytest
from stored_chunks import chunks, node_words, payloads, same

from lmpipe import native
from lmpipe.errors import FormatError, NodeError
from lmpipe.handles import BLOCK_BYTES, ChunkRecords, Extent, Tier, round_up
from lmpipe.index import IndexWriter
from lmpipe.index_row import index_keys, row_records
from lmpipe.shm.node import NodeWords
from lmpipe.tiers import ChunkGone, Recovered
from lmpipe.tiers.format import SEALED_AT
from lmpipe.tiers.segment_file import OpenSegment, aligned, segment_path
from lmpipe.tiers.ssd import FlushPolicy, SsdTier

SEGMENT_BYTES = 64 * BLOCK_BYTES
CAPACITY_BYTES = 6 * SEGMENT_BYTES


class Opened(SsdTier):
    """A tier with what it recovered."""

    found: Recovered
    index: IndexWriter

    def crash(self) -> None:
        """As SIGKILL leaves it: no footer, the lock gone."""
        if self._open is not None:
            self._open.close()
        self._hashers.shutdown()
        os.close(self._lock_file)


Open = Callable[..., AbstractContextManager[Opened]]


@pytest.fixture
def node() -> Iterator[tuple[Path, NodeWords]]:
    with node_words() as made:
        yield made


@pytest.fixture
def tier_at(tmp_path: Path, node: tuple[Path, NodeWords]) -> Open:
    """Opens the tier in one and the same directory."""

    @contextmanager
    def opened(
        flush: FlushPolicy = "interval", capacity: int = CAPACITY_BYTES, map_bytes: int = 1 << 20, crash: bool = False
    ) -> Iterator[Opened]:
        index = IndexWriter(node[0], Tier.SSD, map_bytes, node[1])
        try:
            made = Opened(tmp_path / "ssd", capacity, flush, SEGMENT_BYTES, index, clock=lambda: clock[0])
            made.index = index
            try:
                made.found = made.recover()
                yield made
            finally:
                made.crash() if crash else made.close()
        finally:
            index.close()

    return opened


clock = [0.0]


def save(tier: SsdTier, records: ChunkRecords) -> ChunkRecords:
    written = tier.write(records, payloads(records))
    assert not written.reason and len(written.records) == len(records)
    settled = tier.settle()
    assert not settled.reason and settled.records.tobytes() == written.records.tobytes()
    return settled.records


def loads(tier: SsdTier, record: np.void) -> bool:
    """True: found with the right bytes, False: a miss. Wrong bytes fail the test."""
    stored = tier.find(record)
    if stored is None:
        return False
    into = aligned(round_up(int(record["nbytes"])))
    tier.read(stored, into)
    assert same(record, into)
    return True


@pytest.mark.parametrize("flush", ["none", "interval", "each"])
@pytest.mark.parametrize("nbytes", [1, 4096, 5000, 60_000])
def test_saved_is_loaded_now_and_after_a_clean_restart(tier_at: Open, flush: FlushPolicy, nbytes: int) -> None:
    records = chunks(3, nbytes)
    with tier_at(flush) as tier:
        assert tier.write(records[:1], payloads(records[:1])).records["place"][0] == Extent(1, 1).place
        assert not loads(tier, records[0])  # no row before it is settled
        tier.settle()
        save(tier, records[1:])
        assert all(loads(tier, record) for record in records)
    with tier_at(flush) as tier:
        assert tier.found == Recovered(3, 3, 0)
        assert all(loads(tier, record) for record in records)
        assert not loads(tier, chunks(1, nbytes, seed=9)[0])


def test_a_chunk_whose_time_is_over_is_written_again(tier_at: Open) -> None:
    short, long = chunks(1), chunks(1)
    short["expires_at"] = long["saved_at"] = short["saved_at"] + 10
    with tier_at() as tier:
        save(tier, short)
        assert not tier.has(short[0]) and not tier.has(long[0])
        save(tier, long)
        assert tier.has(short[0]) and tier.has(long[0])
    with tier_at() as tier:
        assert tier.has(long[0]) and loads(tier, long[0])


@pytest.mark.parametrize("nbytes", [(8 << 20) + 1, 20 << 20])
def test_large_chunks_go_in_parts(tmp_path: Path, node: tuple[Path, NodeWords], nbytes: int) -> None:
    index = IndexWriter(node[0], Tier.SSD, 1 << 20, node[1])
    tier = SsdTier(tmp_path / "ssd", 1 << 30, "none", 64 << 20, index)
    tier.recover()
    records = chunks(2, nbytes)
    save(tier, records)
    assert loads(tier, records[0]) and loads(tier, records[1])
    place = Extent.from_place(int(tier.find(records[1])["place"]))  # type: ignore[index]
    with segment_path(tmp_path / "ssd", 1).open("r+b") as file:
        file.seek(place.offset_bytes + BLOCK_BYTES + nbytes - 2)
        file.write(b"\x01\x02")
    with pytest.raises(FormatError, match="checksum of piece"):
        loads(tier, records[1])
    tier.close()
    index.close()


def test_after_a_crash_records_are_found_without_a_footer(tier_at: Open) -> None:
    records = chunks(30, 9000)
    with tier_at(crash=True) as tier:
        save(tier, records)
    with tier_at() as tier:
        assert (tier.found.rows, tier.found.damaged) == (30, 0)
        assert all(loads(tier, record) for record in records)
    with tier_at() as tier:
        assert tier.found == Recovered(30, 30, 0)


def test_a_torn_tail_is_dropped(tier_at: Open, tmp_path: Path) -> None:
    records = chunks(5, 9000)
    with tier_at(crash=True) as tier:
        places = [Extent.from_place(int(place)) for place in save(tier, records)["place"]]
    path = segment_path(tmp_path / "ssd", 1)
    with path.open("r+b") as file:  # the last payload did not reach the disk, the one before lost its record
        file.seek(places[4].offset_bytes + 2 * BLOCK_BYTES)
        file.write(bytes(BLOCK_BYTES))
    with tier_at(crash=True) as tier:
        assert tier.found.rows == 4 and tier.found.damaged == 1
        assert [loads(tier, record) for record in records] == [True] * 4 + [False]
        save(tier, records[4:])
        assert loads(tier, records[4])
    data = bytearray(path.read_bytes())
    del data[-BLOCK_BYTES // 2 :]
    data[places[2].offset_bytes + 100] ^= 1
    path.write_bytes(data)
    with tier_at() as tier:  # without its footer the file is read up to the first bad record
        assert [loads(tier, record) for record in records] == [True, True, False, False, True]


def test_a_file_that_is_none_is_left_alone(tier_at: Open, tmp_path: Path) -> None:
    with tier_at() as tier:
        save(tier, chunks(2))
    strange = segment_path(tmp_path / "ssd", 2)
    strange.write_bytes(b"not ours" * 4096)
    with tier_at() as tier:
        assert tier.found == Recovered(2, 2, 1)
        assert int(save(tier, chunks(1, seed=1))["place"][0]) >> 32 == 3
    assert strange.exists()


def test_files_of_another_version_are_refused_and_left(tier_at: Open, tmp_path: Path) -> None:
    """They may be all that a newer lmpipe has; as damage they would be given up for room one day."""
    with tier_at() as tier:
        records = save(tier, chunks(2))
    path = segment_path(tmp_path / "ssd", 1)
    ours = path.read_bytes()
    head = ours[:8] + b"\2\0\0\0" + ours[12:SEALED_AT]
    path.write_bytes(theirs := head + native.xxh3_128(head) + ours[BLOCK_BYTES:])
    with (
        pytest.raises(NodeError, match="version 2, this lmpipe reads 1; use the lmpipe that wrote it, or give"),
        tier_at(),
    ):
        pass
    assert path.read_bytes() == theirs
    path.write_bytes(ours)
    with tier_at() as tier:
        assert all(loads(tier, record) for record in records)


def test_the_newest_record_counts(tier_at: Open) -> None:
    records = chunks(2)
    with tier_at(crash=True) as tier:
        first = save(tier, records)
        second = save(tier, records[:1])
        assert second["place"][0] > first["place"][0]
    with tier_at() as tier:
        assert tier.found.rows == 2 and tier.found.records == 3
        assert tier.find(records[0])["place"] == second["place"][0]  # type: ignore[index]


def test_shards_come_back_as_one_row(tier_at: Open) -> None:
    with tier_at(crash=True) as tier:
        for shard in (1, 0, 2):
            save(tier, chunks(4, shard=shard, shards=3))
    with tier_at() as tier:
        assert tier.found == Recovered(4, 12, 0)
        row = tier.index.get(index_keys(chunks(1))[0])
        assert row is not None and row_records(row)["shard"].tolist() == [0, 1, 2]
        assert all(loads(tier, chunks(1, shard=shard, shards=3)[0]) for shard in range(3))


def test_a_shard_that_goes_at_once_takes_its_row_along_and_no_other_is_acknowledged(tier_at: Open) -> None:
    """The first file is given up for room before it was settled; one of its chunks has its other shard in the last."""
    halves = [chunks(1, 16_000, shard=shard, shards=2) for shard in range(2)]
    rest = chunks(CAPACITY_BYTES // 20_480, 16_000, seed=1)
    with tier_at() as tier:
        for records in (halves[0], rest, halves[1]):
            assert not tier.write(records, payloads(records)).reason
        assert tier.index.count() == 0
        settled = tier.settle()
        stored = [tier.find(record) for record in settled.records]
        assert len(settled.records) and all(record is not None for record in stored), "what is acknowledged is there"
        assert tier.find(halves[0][0]) is None and tier.find(halves[1][0]) is None
        assert settled.reason == "evicted at once"


def test_shards_that_come_at_different_times_make_one_row(tier_at: Open) -> None:
    with tier_at() as tier:
        save(tier, chunks(3, shard=1, shards=2))
        assert not loads(tier, chunks(1, shard=0, shards=2)[0]) and loads(tier, chunks(1, shard=1, shards=2)[0])
    with tier_at() as tier:
        save(tier, chunks(4, shard=0, shards=2))
        rows = [tier.index.get(key) for key in index_keys(chunks(4))]
        assert [row_records(row)["shard"].tolist() for row in rows if row] == [[0, 1]] * 3 + [[0]]
        assert all(loads(tier, chunks(1, shard=shard, shards=2)[0]) for shard in range(2))


def test_capacity_is_kept_by_whole_files_oldest_first(tier_at: Open, tmp_path: Path) -> None:
    evicted: list[bytes] = []
    with tier_at() as tier:
        for seed in range(12):
            records = chunks(10, 16_000, seed=seed)
            written = tier.write(records, payloads(records))
            assert not written.reason
            settled = tier.settle()
            evicted += [record["key"].tobytes() for part in (written, settled) for record in part.evicted]
            assert tier.used_bytes <= CAPACITY_BYTES
        everything = np.concatenate([chunks(10, 16_000, seed=seed) for seed in range(12)])
        found = [loads(tier, record) for record in everything]
        assert evicted and evicted == [record["key"].tobytes() for record in everything[: len(evicted)]]
        assert found == [False] * len(evicted) + [True] * (120 - len(evicted))
        assert tier.index.count() == sum(found)
        assert sum(path.stat().st_size for path in (tmp_path / "ssd").glob("*.seg")) == tier.used_bytes
    with tier_at(capacity=3 * SEGMENT_BYTES) as tier:  # a smaller one from now on
        assert tier.used_bytes <= 3 * SEGMENT_BYTES
        assert loads(tier, everything[-1]) and 0 < tier.found.rows < sum(found)


def test_a_file_that_went_under_a_reader_is_a_miss(tier_at: Open, tmp_path: Path) -> None:
    records = chunks(1)
    with tier_at() as tier:
        stored = save(tier, records)[0]
        segment_path(tmp_path / "ssd", 1).unlink()
        with pytest.raises(ChunkGone):
            tier.read(stored, aligned(8192))


def test_damage_is_never_served_and_drops_the_row(tier_at: Open, tmp_path: Path) -> None:
    records = chunks(2, 9000)
    with tier_at() as tier:
        stored = save(tier, records)
        with segment_path(tmp_path / "ssd", 1).open("r+b") as file:
            file.seek(Extent.from_place(int(stored["place"][0])).offset_bytes + BLOCK_BYTES + 8999)
            file.write(b"\0")
        with pytest.raises(FormatError, match=r"00000001.seg: block 1: checksum of piece 0 of 1 differs"):
            loads(tier, records[0])
        assert not loads(tier, records[0]) and loads(tier, records[1])
        other = stored[1].copy()
        other["place"] = stored["place"][0]
        with pytest.raises(FormatError, match="another chunk"):
            tier.read(other, aligned(12288))
        assert loads(tier, records[1])


def test_another_layout_or_codec_is_a_miss(tier_at: Open) -> None:
    records = chunks(1)
    with tier_at() as tier:
        save(tier, records)
        for name in ("layout", "codec", "nbytes", "shards"):
            other = records.copy()
            other[name] += 1
            assert tier.find(other[0]) is None
        assert tier.find(records[0]) is not None


def test_invalidated_chunks_stay_away(tier_at: Open) -> None:
    mine, yours = chunks(8, namespace=7), chunks(8, seed=1, namespace=8)
    with tier_at(crash=True) as tier:
        save(tier, mine)
        save(tier, yours)
        assert tier.invalidate(0, mine[:3]) == 3
        assert tier.invalidate(0, mine[:3]) == 0
        save(tier, mine[:1])  # known again, after the tombstone
        tier.write(yours[:0], [])
        assert tier.invalidate(8, yours[:0]) == 8
    for crash in (True, False):
        with tier_at(crash=crash) as tier:
            assert [loads(tier, record) for record in mine] == [True, False, False, True, True, True, True, True]
            assert not any(loads(tier, record) for record in yours)
    with tier_at() as tier:
        assert tier.invalidate(0, mine[:0]) == 6
        assert tier.used_bytes == 0
        save(tier, yours)
    with tier_at() as tier:
        assert tier.found.rows == 8 and loads(tier, yours[0])


def test_what_is_written_but_not_settled_is_invalidated_too(tier_at: Open) -> None:
    records = chunks(2)
    with tier_at() as tier:
        tier.write(records, payloads(records))
        assert tier.invalidate(7, records[:0]) == 2
        assert len(tier.settle().records) == 2  # they were in, and are answered for
        assert not loads(tier, records[0])


def test_a_failing_disk_makes_it_read_only_for_a_while(tier_at: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    records = chunks(6)
    with tier_at("each") as tier:
        save(tier, records[:2])
        for code in (errno.EIO, errno.EROFS, errno.ENOSPC):
            clock[0] += 100

            def broken(*_: object, code: int = code) -> None:
                raise OSError(code, os.strerror(code))

            with monkeypatch.context() as patch:
                patch.setattr(OpenSegment, "append", broken)
                patch.setattr(OpenSegment, "seal", broken)
                written = tier.write(records[2:3], payloads(records[2:3]))
                assert errno.errorcode[code] in written.reason and written.down and not len(written.records)
                assert tier.read_only == written.reason
                assert loads(tier, records[0])
            assert tier.write(records[2:3], payloads(records[2:3])).reason == tier.read_only  # not yet tried again
        clock[0] += 100
        save(tier, records[2:])
        assert not tier.read_only and all(loads(tier, record) for record in records)


def test_a_flush_that_fails_acknowledges_nothing(tier_at: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    records = chunks(2)
    clock[0] += 100
    with tier_at() as tier:
        tier.write(records, payloads(records))

        def broken(_: object) -> None:
            raise OSError(errno.EIO, "no")

        with monkeypatch.context() as patch:
            patch.setattr(OpenSegment, "flush", broken)
            settled = tier.settle()
        assert (
            not len(settled.records) and settled.reason == "EIO: no" and settled.down and tier.find(records[0]) is None
        )
        clock[0] += 100
        save(tier, records)


def test_a_full_disk_costs_nothing_that_is_stored(tier_at: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(directory: Path, number: int, nbytes: int) -> OpenSegment:
        raise OSError(errno.ENOSPC, "full")

    stored, more = chunks(40, seed=1), chunks(1)
    with tier_at() as tier:
        save(tier, stored)
    with tier_at() as tier:
        with monkeypatch.context() as patch:
            patch.setattr(OpenSegment, "create", full)
            for _ in range(3):
                clock[0] += 100
                written = tier.write(more, payloads(more))
                assert written.down and written.reason == tier.read_only == "ENOSPC: full"
                assert not len(written.records) and not len(written.evicted)
        assert all(loads(tier, record) for record in stored)
        clock[0] += 100
        save(tier, more)
        assert not tier.read_only and all(loads(tier, record) for record in stored)


def test_a_full_index_costs_the_oldest_file_too(tier_at: Open) -> None:
    with tier_at(map_bytes=160 << 10) as tier:
        for seed in range(60):
            records = chunks(20, 1, seed=seed)
            tier.write(records, payloads(records))
            assert not tier.settle().reason
        assert loads(tier, records[19]) and not loads(tier, chunks(20, 1, seed=0)[0])


def test_a_chunk_larger_than_a_segment_is_refused(tier_at: Open) -> None:
    records = chunks(1, SEGMENT_BYTES)
    with tier_at() as tier:
        written = tier.write(records, payloads(records))
        assert "larger than a segment" in written.reason and not written.down and not tier.read_only


def test_memory_must_be_aligned(tier_at: Open) -> None:
    records = chunks(1)
    with tier_at() as tier:
        with pytest.raises(ValueError, match="page-aligned"):
            tier.write(records, [aligned(12288)[8:]])
        with pytest.raises(ValueError, match="page-aligned"):
            tier.read(save(tier, records)[0], aligned(12288)[8:])


def test_one_node_one_directory(tier_at: Open, tmp_path: Path) -> None:
    with tier_at() as tier:
        assert (tmp_path / "ssd").stat().st_mode & 0o777 == 0o700
        with pytest.raises(NodeError, match=rf"in use by another node \(process {os.getpid()}\)"):
            SsdTier(tmp_path / "ssd", 1 << 20, "none", 1 << 18, tier.index)
        save(tier, chunks(1))
        assert all(path.stat().st_mode & 0o077 == 0 for path in (tmp_path / "ssd").iterdir())
