"""Re-encoding over a real arena and a real index, job by job: what is encoded, what stays, death at every step."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import secrets
import shutil
from collections import Counter, deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from lmpipe import messages as m
from lmpipe.books import LayoutBook
from lmpipe.bus import Peer
from lmpipe.codecs import CODECS, ChunkCodec, Source, codec_named
from lmpipe.codecs.zstd import ZstdCodec
from lmpipe.errors import CannotEncode, FormatError
from lmpipe.handles import CHUNK, Codec, Fidelity, SessionId, Slot, Tier
from lmpipe.index import IndexReader, IndexWriter
from lmpipe.layout import KVLayout
from lmpipe.lifecycle import SlotEvent, SlotState
from lmpipe.rundir import RunDir
from lmpipe.shm.descriptor import SegmentKind
from lmpipe.shm.node import NodeWords
from lmpipe.shm.segment import Segment
from lmpipe.shm.slots import SlotOwner
from lmpipe.stages.base import Context
from lmpipe.stages.gather.recoding import Coding, Recoder
from lmpipe.tiers.dram import DramTier

ENGINE, GATHER = SessionId(5), SessionId(6)
LAYOUT = KVLayout.paged(2, 2, 64, "float16", 16)
RAW_BYTES = LAYOUT.chunk_bytes(16)
CHUNKS = 24
PEER = Peer("save", b"asks")


@dataclasses.dataclass(frozen=True)
class Half:
    """A codec that takes half the bytes, of `number` and `fidelity`; it has to know the layout, and may refuse."""

    number: Codec = Codec.FP8
    name: str = "half"
    fidelity: Fidelity = Fidelity.FP8
    numeric: bool = True
    refuses: bool = False

    def bound(self, raw_bytes: int) -> int:
        return raw_bytes // 2

    def encode(self, src: memoryview, dst: memoryview, source: Source) -> int:
        if self.refuses:
            raise CannotEncode("not these")
        assert source == Source(LAYOUT, 16, source.position), "it is told what it encodes"
        dst[: len(src) // 2] = np.frombuffer(src, np.uint8)[::2].tobytes()
        return len(src) // 2

    def decode(self, src: memoryview, dst: memoryview) -> None:
        if bytes(src[:4]) == b"bad!":
            raise FormatError("bad")
        np.frombuffer(dst, np.uint8)[:] = np.repeat(np.frombuffer(src, np.uint8), 2)


class Hands:
    """A Context whose jobs run when they are told to."""

    def __init__(self) -> None:
        self.jobs: deque[tuple[Callable[[], Any], Callable[[Any], None], Callable[[Exception], None]]] = deque()
        self.counts: Counter[str] = Counter()
        self.said: list[m.Message] = []
        self.session = type("Session", (), {"id": GATHER})

    def submit(self, fn: Any, done: Any, failed: Any, name: str, **_: int) -> None:
        self.jobs.append((fn, done, failed))

    def run(self) -> None:
        """The job that waits, and what follows it."""
        fn, done, failed = self.jobs.popleft()
        try:
            result = fn()
        except Exception as error:  # noqa: BLE001 - as the pool does
            failed(error)
        else:
            done(result)

    def count(self, name: str, n: int = 1) -> None:
        self.counts[name] += n

    def reply(self, peer: Peer, message: m.Message) -> bool:
        self.said.append(message)
        return True


class Bench:
    """A DRAM tier of 24 raw chunks, and what re-encodes it. `wanted` is the topology's codec."""

    def __init__(self, path: Path) -> None:
        self.path, self.hands, self.words = path, Hands(), set[int]()
        self.wanted: ChunkCodec = codec_named("zstd")
        self.exact = False
        self.book = LayoutBook(RunDir(path))
        self.node = NodeWords.create(path / "node.shm")
        self.arena = SlotOwner.create(path / "arena.shm", CHUNKS * RAW_BYTES, 64)
        self.reader = IndexReader(path, Tier.DRAM, 1 << 20, self.node)
        self._begin()

    def _begin(self) -> None:
        self.index = IndexWriter(self.path, Tier.DRAM, 1 << 20, self.node)
        self.tier = DramTier(self.arena, self.index, self, lambda: 0.0)
        named = {codec.name: codec for codec in (*CODECS.values(), Half())}
        coding = Coding(True, lambda _: self.wanted, named.__getitem__, lambda _: self.exact, self.book)
        self.recoder = Recoder(cast(Context, self.hands), self.tier, coding)

    def held(self) -> frozenset[int]:
        return frozenset(self.words)

    def save(self, chunks: range, pending: int = 0, fidelity: int = 0, saver: SessionId = ENGINE) -> None:
        slots: list[int] = []
        for position in chunks:
            slot = self.tier.reserve(RAW_BYTES, ENGINE)
            assert slot is not None and self.arena.advance(slot, SlotEvent.OPEN)
            record = np.zeros(1, CHUNK)
            record["key"], record["anchor"] = position.to_bytes(16, "little"), b"same"
            record["position"], record["shards"], record["layout"] = position, 1, LAYOUT.layout_id()
            record["raw_bytes"] = record["nbytes"] = RAW_BYTES
            record["place"] = slot.place
            record["fidelity"], record["namespace"] = fidelity, 7
            self.arena.payload(slot.index, RAW_BYTES)[:] = content(position)
            self.arena.set_record(slot.index, record[0])
            self.arena.advance(slot, SlotEvent.CLOSE)
            slots.append(slot.index)
        self.tier.commit(slots, pending, saver)

    def key(self, position: int) -> bytes:
        return b"same" + position.to_bytes(16, "little")

    def record(self, position: int) -> np.void | None:
        """What a lookup finds."""
        rows = self.reader.run([self.key(position)])
        return np.frombuffer(rows[0], CHUNK)[0] if rows else None

    def codec(self, position: int) -> int:
        found = self.record(position)
        assert found is not None, f"chunk {position} is not found"
        return int(found["codec"])

    def is_whole(self, position: int) -> bool:
        """Whether what is found lies where the row says, and is the chunk."""
        found = self.record(position)
        assert found is not None, f"chunk {position} is not found"
        slot = Slot.from_place(int(found["place"]))
        assert self.arena.state(slot.index) == (slot.generation, SlotState.COMMITTED)
        assert self.arena.record(slot.index).tobytes() == found.tobytes()
        raw = bytearray(RAW_BYTES)
        CODECS[Codec(int(found["codec"]))].decode(self.arena.payload(slot.index, int(found["nbytes"])), memoryview(raw))
        return bytes(raw) == content(position)

    def turn(self) -> None:
        """Work until nothing is left."""
        self.recoder.add(self.tier.take_cleaned())
        self.recoder.retry()
        self.recoder.retry()
        while self.recoder.step() or self.hands.jobs:
            if self.hands.jobs:
                self.hands.run()

    def order(self, codec: str, namespace: int = 0) -> m.Message:
        self.recoder.order(PEER, m.Recode(ENGINE, 9, codec, namespace))
        self.turn()
        return self.hands.said.pop()

    def die_and_come_back(self) -> None:
        """As after SIGKILL: what is in shared memory is all there is."""
        self.index.close()
        self.arena.close()
        self.hands = Hands()
        self.arena = SlotOwner(Segment.attach(self.path / "arena.shm", SegmentKind.SLOTS))
        self._begin()
        found = self.arena.recover(lambda _: False, self.held(), 3)
        self.tier.load_rows(found.committed, found.doomed)
        self.index.publish()

    def close(self) -> None:
        self.hands.jobs.clear()
        del self.recoder
        self.reader.close()
        self.index.close()
        self.arena.close()
        self.node.close()


def content(position: int) -> bytes:
    """Half of it is zeros."""
    made = np.zeros(RAW_BYTES, np.uint8)
    made[::2] = np.random.default_rng(position).integers(0, 256, RAW_BYTES // 2, np.uint8)
    return made.tobytes()


@pytest.fixture
def bench() -> Iterator[Bench]:
    path = Path(f"/dev/shm/lmpipe-test-{os.getpid()}-{secrets.token_hex(4)}")
    for part in ("index", "layouts"):
        (path / part).mkdir(parents=True, mode=0o700)
    path.chmod(0o700)
    made = Bench(path)
    made.index.publish()
    yield made
    assert made.tier.audit() == []
    made.close()
    shutil.rmtree(path)


def test_clean_chunks_are_encoded_and_their_raw_slots_go(bench: Bench) -> None:
    bench.save(range(10))
    bench.turn()
    assert [bench.codec(at) for at in range(10)] == [Codec.ZSTD] * 10
    assert all(bench.is_whole(at) for at in range(10))
    assert bench.arena.used_bytes < 0.8 * 10 * RAW_BYTES
    assert bench.tier.encoded_chunks == 10 and bench.hands.counts["encoded_chunks"] == 10
    stored = bench.hands.counts["encoded_bytes"]
    assert bench.tier.saved_bytes == 10 * RAW_BYTES - stored == bench.hands.counts["encode_raw_bytes"] - stored
    bench.tier.drop(bench.tier.keys())
    assert (bench.tier.encoded_chunks, bench.tier.saved_bytes, bench.arena.used_bytes) == (0, 0, 0)


def test_nothing_is_encoded_where_the_topology_says_raw(bench: Bench) -> None:
    bench.wanted = codec_named("raw")
    bench.save(range(3))
    bench.turn()
    assert [bench.codec(at) for at in range(3)] == [Codec.RAW] * 3


def test_what_a_tier_below_waits_for_stays_raw_until_it_has_it(bench: Bench) -> None:
    bench.save(range(2), pending=3)
    bench.turn()
    assert bench.codec(0) == Codec.RAW
    answer = bench.order("zstd")
    assert isinstance(answer, m.Recoded) and answer.left == {"a tier below has still to take them": 2}
    row = bench.tier.row(bench.key(0))
    assert row is not None
    place = Slot(row.slots[0], bench.arena.state(row.slots[0])[0]).place
    bench.tier.answered(bench.key(0), 0, place, 1)
    bench.turn()
    assert bench.codec(0) == Codec.RAW
    bench.tier.answered(bench.key(0), 0, place, 2)
    bench.turn()
    assert (bench.codec(0), bench.codec(1)) == (Codec.ZSTD, Codec.RAW)


def test_a_reader_keeps_the_slot_that_it_holds(bench: Bench) -> None:
    bench.save(range(2))
    before = bench.record(0)
    assert before is not None
    old = Slot.from_place(int(before["place"]))
    bench.words.add(old.place)
    bench.turn()
    assert (bench.codec(0), bench.codec(1)) == (Codec.RAW, Codec.ZSTD), "those that nobody holds come first"
    assert isinstance(bench.order("zstd"), m.Recoded)
    assert bench.codec(0) == Codec.ZSTD and bench.is_whole(0)
    assert bytes(bench.arena.payload(old.index, RAW_BYTES)) == content(0)
    assert bench.arena.state(old.index) == (old.generation, SlotState.DOOMED)
    bench.words.clear()
    bench.tier.tick()
    assert bench.arena.state(old.index)[1] is SlotState.FREE


def test_what_was_held_is_encoded_later(bench: Bench) -> None:
    bench.save(range(1))
    found = bench.record(0)
    assert found is not None
    bench.words.add(int(found["place"]))
    bench.turn()
    bench.words.clear()
    bench.recoder.retry()
    bench.turn()
    assert bench.codec(0) == Codec.ZSTD


@pytest.mark.parametrize("meanwhile", ["dropped", "evicted and saved again"])
@pytest.mark.parametrize("jobs", [1, 2])
def test_a_chunk_that_goes_meanwhile_is_gone(bench: Bench, meanwhile: str, jobs: int) -> None:
    bench.save(range(1))
    bench.recoder.add(bench.tier.take_cleaned())
    bench.recoder.step()
    if jobs == 2:
        bench.hands.run()
    bench.tier.drop([bench.key(0)])
    if meanwhile != "dropped":
        bench.save(range(1), pending=1)
    while bench.hands.jobs:
        bench.hands.run()
    bench.tier.tick()
    if meanwhile == "dropped":
        assert bench.record(0) is None and bench.arena.used_bytes == 0
    else:
        assert bench.codec(0) == Codec.RAW and bench.is_whole(0) and bench.arena.used_bytes == RAW_BYTES


def test_numbers_wait_for_their_layout(bench: Bench) -> None:
    bench.wanted = Half()
    bench.save(range(2))
    bench.turn()
    answer = bench.order("half")
    assert isinstance(answer, m.Recoded) and sum(answer.left.values()) == 2
    bench.recoder.retry()
    bench.turn()
    assert bench.codec(0) == Codec.RAW
    bench.book.enter(LAYOUT)
    bench.recoder.retry()
    bench.turn()
    found = bench.record(1)
    assert found is not None
    assert (int(found["codec"]), int(found["fidelity"])) == (Codec.FP8, Fidelity.FP8)


def test_what_was_brought_up_waits_until_it_has_been_fetched(bench: Bench) -> None:
    bench.save(range(1), saver=SessionId(0))
    bench.recoder.add(bench.tier.take_cleaned())
    assert not bench.recoder.step() and not bench.hands.jobs
    bench.recoder.retry()
    assert not bench.recoder.step() and not bench.hands.jobs
    bench.turn()
    assert bench.codec(0) == Codec.ZSTD


def test_what_cannot_be_encoded_is_not_tried_again(bench: Bench) -> None:
    bench.book.enter(LAYOUT)
    bench.wanted = Half(refuses=True)
    bench.save(range(1))
    bench.turn()
    bench.recoder.add([(bench.key(0), 0)])
    bench.turn()
    assert bench.hands.counts["left_chunks"] == 1 and bench.codec(0) == Codec.RAW


def test_nor_what_does_not_shrink(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.content", lambda at: np.random.default_rng(at).bytes(RAW_BYTES))
    bench.save(range(1))
    bench.turn()
    bench.recoder.add([(bench.key(0), 0)])
    bench.turn()
    assert bench.hands.counts["left_chunks"] == 1 and bench.codec(0) == Codec.RAW and bench.is_whole(0)


def test_there_and_back_by_order(bench: Bench) -> None:
    bench.wanted = codec_named("raw")
    bench.save(range(4))
    there = bench.order("zstd", namespace=7)
    assert isinstance(there, m.Recoded) and (there.recoded, there.before_bytes, there.left) == (4, 4 * RAW_BYTES, {})
    assert all(bench.codec(at) == Codec.ZSTD and bench.is_whole(at) for at in range(4))
    assert bench.order("zstd") == m.Recoded(GATHER, 9, 0, 0, 0, {})
    assert bench.order("raw", namespace=8) == m.Recoded(GATHER, 9, 0, 0, 0, {})
    bench.wanted = codec_named("zstd")
    back = bench.order("raw")
    assert isinstance(back, m.Recoded) and (back.recoded, back.after_bytes) == (4, 4 * RAW_BYTES)
    bench.recoder.add([(bench.key(at), 0) for at in range(4)])
    bench.turn()
    assert all(bench.codec(at) == Codec.RAW and bench.is_whole(at) for at in range(4)), "it stays as it was ordered"


def test_an_order_that_cannot_be(bench: Bench) -> None:
    answer = bench.order("gzip")
    assert isinstance(answer, m.Refused) and "no codec 'gzip'" in answer.reason


def test_an_answer_names_no_more_reasons_than_fit(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.save(range(CHUNKS))
    monkeypatch.setattr(ZstdCodec, "encode", _refuse)
    answer = bench.order("zstd")
    assert (
        isinstance(answer, m.Recoded) and sum(answer.left.values()) == CHUNKS and answer.left["for other reasons"] == 8
    )
    assert m.decode(m.encode(answer)) == answer


def _refuse(codec: object, src: memoryview, dst: memoryview, source: Source) -> int:
    raise CannotEncode(f"chunk {source.position} " + "x" * 1000)


def test_fidelity_is_never_better_than_it_was(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CODECS, Codec.FP8, Half())
    bench.book.enter(LAYOUT)
    bench.save(range(1))
    bench.save(range(1, 2), fidelity=Fidelity.INT4H)
    bench.exact = True
    answer = bench.order("half")
    assert isinstance(answer, m.Recoded) and answer.left == {"they are wanted exact": 2}
    bench.exact = False
    for codec in ("half", "raw", "zstd"):
        assert isinstance(bench.order(codec), m.Recoded)
        found = [bench.record(at) for at in range(2)]
        assert [int(r["fidelity"]) for r in found if r is not None] == [Fidelity.FP8, Fidelity.INT4H], codec
    assert isinstance(bench.order("raw"), m.Recoded)
    assert isinstance(bench.order("half"), m.Recoded)
    monkeypatch.setitem(CODECS, Codec.INT4H, Half(Codec.INT4H, "other", Fidelity.INT4H))
    bench.wanted = CODECS[Codec.INT4H]
    bench.turn()
    assert bench.codec(0) == Codec.FP8


def test_a_damaged_chunk_is_left_and_said(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CODECS, Codec.FP8, Half())
    bench.book.enter(LAYOUT)
    bench.wanted = Half()
    bench.save(range(1))
    bench.turn()
    found = bench.record(0)
    assert found is not None
    bench.arena.payload(int(found["place"]) >> 32)[:4] = b"bad!"
    answer = bench.order("raw")
    assert isinstance(answer, m.Recoded) and answer.left == {"damaged: bad": 1}
    assert bench.codec(0) == Codec.FP8


def test_encoding_gives_up_what_was_wanted_least_but_nothing_that_is_pending(bench: Bench) -> None:
    bench.save(range(CHUNKS - 1))
    bench.save(range(100, 101), pending=1)
    bench.turn()
    assert bench.codec(100) == Codec.RAW
    there = [at for at in range(CHUNKS - 1) if bench.record(at) is not None]
    assert len(there) >= CHUNKS - 3 and all(bench.is_whole(at) for at in there)
    assert sum(bench.codec(at) == Codec.ZSTD for at in there) == len(there)


def test_a_full_index_leaves_the_chunk_as_it_was(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.save(range(1))
    monkeypatch.setattr(bench.index, "put", lambda rows: False)
    bench.turn()
    assert bench.codec(0) == Codec.RAW and bench.is_whole(0)
    assert bench.arena.used_bytes == RAW_BYTES and bench.tier.encoded_chunks == 0


class Death(Exception):
    """Where gather is killed."""


STEPS = [
    ("arena", "lease"),
    ("arena", "advance"),
    ("arena", "set_record"),
    ("index", "put"),
    ("arena", "free"),
]


@pytest.mark.parametrize("wanted", [codec_named("zstd"), Half()], ids=["lossless", "lossy"])
@pytest.mark.parametrize("nth", range(4))
@pytest.mark.parametrize(("whose", "step"), STEPS)
@pytest.mark.parametrize("after", [False, True])
def test_death_at_any_step_leaves_one_chunk_that_is_right(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, wanted: ChunkCodec, whose: str, step: str, nth: int, after: bool
) -> None:
    monkeypatch.setitem(CODECS, Codec.FP8, Half())
    bench.book.enter(LAYOUT)
    bench.wanted = wanted
    bench.save(range(3))
    owner = getattr(bench, whose)
    real, calls = getattr(owner, step), 0

    def fatal(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == nth + 1 and not after:
            raise Death
        result = real(*args, **kwargs)
        if calls == nth + 1:
            raise Death
        return result

    monkeypatch.setattr(owner, step, fatal)
    with contextlib.suppress(Death):
        bench.turn()
    monkeypatch.setattr(owner, step, real)
    bench.die_and_come_back()
    assert len(bench.tier) == 3
    for at in range(3):
        assert bench.is_whole(at) if wanted.fidelity == Fidelity.EXACT else bench.record(at) is not None
    used = [slot for slot in range(bench.arena.slots) if bench.arena.state(slot)[1] is not SlotState.FREE]
    assert len(used) == 3 and all(bench.arena.state(slot)[1] is SlotState.COMMITTED for slot in used)
    assert all(not bench.arena.pending(slot) for slot in used), "what was encoded waits for nobody"
    bench.turn()
    assert [bench.codec(at) for at in range(3)] == [wanted.number] * 3
