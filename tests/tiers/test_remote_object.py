"""The remote tier over a directory; the same calls go to any store that obstore knows."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import obstore
import pytest
from hypothesis import given
from hypothesis import strategies as st
from obstore.store import MemoryStore
from stored_chunks import chunks, node_words, payload, same

from lmpipe import native
from lmpipe.errors import FormatError, TopologyError
from lmpipe.handles import BLOCK_BYTES, ChunkRecords, Tier
from lmpipe.index import IndexWriter
from lmpipe.index_row import index_keys, row_records
from lmpipe.shm.node import NodeWords
from lmpipe.tiers import ChunkGone, TierDown
from lmpipe.tiers.breaker import FAILURES
from lmpipe.tiers.format import SEALED_AT
from lmpipe.tiers.object_name import object_name, parse_name
from lmpipe.tiers.remote_object import RemoteTier, open_store

CAPACITY_BYTES = 1 << 20


class Opened(RemoteTier):
    index: IndexWriter


@pytest.fixture
def node() -> Iterator[tuple[Path, NodeWords]]:
    with node_words() as made:
        yield made


class Tiers:
    """Opens the tier again and again, each time with a new index generation."""

    def __init__(self, root: Path, node: tuple[Path, NodeWords]) -> None:
        self.root, self.node, self.clock = root, node, 0.0
        self.indexes: list[IndexWriter] = []

    def open(self, url: str | None = None, capacity: int = CAPACITY_BYTES, recover: bool = True) -> Opened:
        self.indexes.append(IndexWriter(self.node[0], Tier.REMOTE, 1 << 20, self.node[1]))
        store = open_store(url or f"file://{self.root}", 0.5)
        tier = Opened(store, capacity, self.indexes[-1], clock=lambda: self.clock)
        tier.index = self.indexes[-1]
        if recover:
            tier.recover()
        return tier

    def files(self) -> list[Path]:
        return sorted(path for path in self.root.rglob("*") if path.is_file())


@pytest.fixture
def tiers(tmp_path: Path, node: tuple[Path, NodeWords]) -> Iterator[Tiers]:
    made = Tiers(tmp_path / "objects", node)
    yield made
    for index in made.indexes:
        index.close()


def save(tier: RemoteTier, records: ChunkRecords) -> None:
    for record in records:
        stored = tier.put(record, payload(record))
        assert not stored.reason and len(stored.records) == 1


def loads(tier: RemoteTier, record: np.void) -> bool:
    stored = tier.find(record)
    if stored is None:
        return False
    into = memoryview(bytearray(int(record["nbytes"])))
    tier.get(stored, into)
    assert same(record, into)
    return True


def test_saved_is_loaded_now_and_after_a_listing(tiers: Tiers) -> None:
    records = chunks(5, 300_000 // 5)
    records["place"] = 12345  # where it lay in DRAM
    tier = tiers.open()
    save(tier, records)
    save(tier, records)  # known: nothing happens
    assert len(tiers.files()) == 5
    assert tier.used_bytes == sum(path.stat().st_size for path in tiers.files()) == 5 * (60_000 + BLOCK_BYTES)
    assert all(loads(tier, record) for record in records)
    again = tiers.open()
    assert again.used_bytes == tier.used_bytes
    assert all(loads(again, record) for record in records)
    assert not loads(again, chunks(1, seed=4)[0])


def test_a_chunk_whose_time_is_over_is_stored_again(tiers: Tiers) -> None:
    short, long = chunks(1), chunks(1)
    short["expires_at"] = long["saved_at"] = short["saved_at"] + 10
    tier = tiers.open()
    for records in (short, long):
        save(tier, records)
        assert tier.find(records[0])["expires_at"] == records["expires_at"][0]  # type: ignore[index]
    save(tier, short)
    for opened in (tier, tiers.open()):
        assert opened.find(short[0])["expires_at"] == 0, "what is valid is known"  # type: ignore[index]
        assert loads(opened, long[0])


def test_shards_share_a_row(tiers: Tiers) -> None:
    tier = tiers.open()
    for shard in (1, 0):
        save(tier, chunks(2, shard=shard, shards=2))
    for opened in (tier, tiers.open()):
        row = opened.index.get(index_keys(chunks(1))[0])
        assert row is not None and row_records(row)["shard"].tolist() == [0, 1]
        assert all(loads(opened, chunks(1, shard=shard, shards=2)[0]) for shard in range(2))


def test_shards_that_come_at_different_times_and_from_different_nodes_make_one_row(tiers: Tiers) -> None:
    one, two = tiers.open(), tiers.open()
    save(one, chunks(2, shard=0, shards=2))
    save(two, chunks(2, shard=1, shards=2))
    assert not loads(one, chunks(1, shard=1, shards=2)[0])
    three = tiers.open()
    for key in index_keys(chunks(2)):
        assert row_records(three.index.get(key) or b"")["shard"].tolist() == [0, 1]
    assert all(loads(three, chunks(1, shard=shard, shards=2)[0]) for shard in range(2))


def test_two_nodes_on_one_store(tiers: Tiers) -> None:
    records = chunks(2)
    one, two = tiers.open(), tiers.open()
    save(one, records)
    save(two, records)
    assert len(tiers.files()) == 2
    one.invalidate(0, records[:1])
    with pytest.raises(ChunkGone):
        loads(two, records[0])  # the row was a hint
    assert not loads(two, records[0]) and loads(two, records[1])


def test_capacity_is_kept_oldest_first(tiers: Tiers) -> None:
    records = chunks(30, 50_000)
    records["saved_at"] += np.arange(30, dtype=np.uint32)
    tier = tiers.open()
    evicted: list[bytes] = []
    for record in records:
        stored = tier.put(record, payload(record))
        evicted += [gone["key"].tobytes() for gone in stored.evicted]
        assert tier.used_bytes <= CAPACITY_BYTES
    assert evicted == [record["key"].tobytes() for record in records[: len(evicted)]]
    assert [loads(tier, record) for record in records] == [False] * len(evicted) + [True] * (30 - len(evicted))
    small = tiers.open(capacity=200_000)
    save(small, chunks(1, seed=3))
    assert small.used_bytes <= 200_000 and loads(small, records[-1]) and not loads(small, records[10])
    refused = small.put(chunks(1, 300_000)[0], memoryview(bytes(300_000)))
    assert "larger than the tier" in refused.reason and not refused.down


def test_capacity_is_kept_of_what_is_found(tiers: Tiers) -> None:
    records = chunks(5, 60_000)
    records["saved_at"] = range(5)
    save(tiers.open(), records)
    small = tiers.open(capacity=200_000)
    assert small.used_bytes == 3 * (60_000 + BLOCK_BYTES) <= 200_000 and len(tiers.files()) == 3
    assert [loads(small, record) for record in records] == [False, False, True, True, True]


def test_capacity_is_kept_by_threads_that_store_at_the_same_time(tiers: Tiers, monkeypatch: pytest.MonkeyPatch) -> None:
    tier, together = tiers.open(capacity=200_000), threading.Barrier(4)
    put, most = obstore.put, [0]

    def put_together(*args: Any, **options: Any) -> Any:
        together.wait(10)  # room was made for each by now, and none is counted
        return put(*args, **options)

    save(tier, chunks(3, 50_000))
    monkeypatch.setattr("lmpipe.tiers.remote_object.obstore.put", put_together)

    def store(record: np.void) -> None:
        assert not tier.put(record, payload(record)).reason
        most[0] = max(most[0], tier.used_bytes)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(store, chunks(8, 40_000, seed=2)))
    assert 0 < most[0] <= 200_000
    assert tier.used_bytes == sum(path.stat().st_size for path in tiers.files()) <= 200_000


@pytest.mark.parametrize("at", [100, 4090, BLOCK_BYTES, BLOCK_BYTES + 4999])
def test_damage_is_never_served_and_is_removed(tiers: Tiers, at: int) -> None:
    records = chunks(2)
    tier = tiers.open()
    save(tier, records)
    path = tiers.root / object_name(records[0])
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    with pytest.raises(FormatError, match=r"object .*(checksum|not zero)"):
        loads(tier, records[0])
    assert not loads(tier, records[0]) and not path.exists() and loads(tier, records[1])
    (tiers.root / object_name(records[1])).write_bytes(bytes(100))
    with pytest.raises(FormatError, match="100 bytes"):
        loads(tier, records[1])


def test_an_object_of_another_version_is_a_miss_and_stays(tiers: Tiers) -> None:
    record = chunks(1)[0]
    tier = tiers.open()
    save(tier, chunks(1))
    path = tiers.root / object_name(record)
    ours = path.read_bytes()
    head = ours[:8] + b"\2\0\0\0" + ours[12:SEALED_AT]
    path.write_bytes(theirs := head + native.xxh3_128(head) + ours[BLOCK_BYTES:])
    with pytest.raises(FormatError, match="version 2, this lmpipe reads 1"):
        loads(tier, record)
    assert not loads(tier, record) and path.read_bytes() == theirs


def test_a_swapped_object_is_seen(tiers: Tiers) -> None:
    records = chunks(2)
    tier = tiers.open()
    save(tier, records)
    (tiers.root / object_name(records[1])).replace(tiers.root / object_name(records[0]))
    with pytest.raises(FormatError, match="another chunk"):
        loads(tier, records[0])


def test_strange_objects_are_left_alone(tiers: Tiers) -> None:
    save(tiers.open(), chunks(2))
    (tiers.root / "notes.txt").write_text("mine")
    again = tiers.open(recover=False)
    found = again.recover()
    assert (found.rows, found.damaged) == (2, 1)
    again.invalidate(0, chunks(0))
    assert [path.name for path in tiers.files()] == ["notes.txt"]


def test_invalidation_reaches_the_store(tiers: Tiers) -> None:
    mine, yours = chunks(4, namespace=7), chunks(3, seed=1, namespace=8)
    tier = tiers.open()
    save(tier, mine)
    save(tier, yours)
    assert tier.invalidate(8, mine[:0]) == 3
    assert tier.invalidate(0, mine[:1]) == 1
    assert len(tiers.files()) == 3 and tier.used_bytes == 3 * (5000 + BLOCK_BYTES)
    again = tiers.open()
    assert [loads(again, record) for record in mine] == [False, True, True, True]
    assert not any(loads(again, record) for record in yours)


def test_a_store_that_is_down_is_an_answer(tiers: Tiers, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("AWS_ACCESS_KEY_ID", "x"), ("AWS_SECRET_ACCESS_KEY", "y"), ("AWS_REGION", "r")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
    tier = tiers.open("s3://bucket/prefix", recover=False)
    with pytest.raises(TierDown):
        tier.recover()
    record = chunks(1)[0]
    for _ in range(FAILURES):
        assert tier.put(record, payload(record)).reason
    refused = tier.put(record, payload(record))
    assert refused.reason == tier.down and refused.down
    assert tier.find(record) is None
    with pytest.raises(TierDown):
        tier.get(record, memoryview(bytearray(5000)))
    assert tier.invalidate(7, chunks(0)) == 0


def test_what_could_not_be_deleted_is_deleted_later(tiers: Tiers, monkeypatch: pytest.MonkeyPatch) -> None:
    records = chunks(3)
    tier = tiers.open()
    save(tier, records)

    def down(*_: object, **__: object) -> None:
        raise OSError("cable cut")

    with monkeypatch.context() as patch:
        patch.setattr("lmpipe.tiers.remote_object.obstore.delete", down)
        patch.setattr("lmpipe.tiers.remote_object.obstore.list", down)
        assert tier.invalidate(7, chunks(0)) == 3
    assert len(tiers.files()) == 3 and not loads(tier, records[0])
    tiers.clock += 1000
    tier.tick()
    assert tiers.files() == []


def test_a_late_listing_adds_to_what_was_saved_meanwhile(tiers: Tiers) -> None:
    save(tiers.open(), chunks(2))
    late = tiers.open(recover=False)
    fresh = chunks(1, seed=9)
    save(late, fresh)
    late.recover()
    assert late.index.count() == 3 and loads(late, fresh[0]) and loads(late, chunks(2)[1])
    assert late.used_bytes == 3 * (5000 + BLOCK_BYTES)


def test_a_memory_store_behaves_the_same(tiers: Tiers, node: tuple[Path, NodeWords]) -> None:
    index = IndexWriter(node[0], Tier.REMOTE, 1 << 20, node[1])
    tier = RemoteTier(MemoryStore(), CAPACITY_BYTES, index)
    tier.recover()
    records = chunks(3)
    save(tier, records)
    assert all(loads(tier, record) for record in records)
    assert tier.invalidate(0, records) == 3
    index.close()


def test_an_unknown_url_says_so() -> None:
    with pytest.raises(TopologyError, match=r"tiers.remote.url 'gopher://hole'"):
        open_store("gopher://hole", 1.0)


@given(seed=st.integers(0, 1000), number=st.integers(0, 2**32 - 1), namespace=st.integers(0, 2**64 - 1))
def test_names_carry_the_record(seed: int, number: int, namespace: int) -> None:
    record = chunks(1, seed=seed)[0]
    record["namespace"], record["layout"], record["saved_at"], record["position"] = namespace, namespace, number, number
    assert parse_name(object_name(record), 5000 + BLOCK_BYTES).tobytes() == record.tobytes()


@given(st.text("0123456789abcdef-/", max_size=140))
def test_any_other_name_is_a_format_error(name: str) -> None:
    with pytest.raises(FormatError):
        parse_name(name, 5000)


@pytest.mark.parametrize(
    ("old", "new"), [("-1-", "-01-"), ("/0-1-", "/1-1-"), ("1388", "1389"), ("-0-0-", "-0-fffff-")]
)
def test_a_name_that_is_not_ours_to_the_letter(old: str, new: str) -> None:
    name = object_name(chunks(1)[0])
    assert old in name
    with pytest.raises(FormatError):
        parse_name(name.replace(old, new), 5000 + BLOCK_BYTES)
