"""compress above persist and replicate: encoded chunks in transit, and what happens to them when a stage dies."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from chain import GATHER, MIB, Chain, a_chain, keys, of

from lmpipe.codecs import ANY, Source, codec_named
from lmpipe.errors import CannotEncode
from lmpipe.handles import ChunkRecords, Codec, Fidelity, Slot, Tier
from lmpipe.layout import KVLayout
from lmpipe.lifecycle import SlotEvent, SlotState
from lmpipe.messages import Invalidate, Invalidated, Loaded, LoadFailed, Message, Persisted, SaveDropped, no_chunks
from lmpipe.shm.hold import Holds
from lmpipe.shm.session import Session

ALL = ["compress", "persist", "replicate"]


@pytest.fixture
def chain(tmp_path: Path) -> Iterator[Chain]:
    with a_chain(tmp_path, ALL, codec="zstd") as made:
        made.run()
        yield made


def in_use(chain: Chain, name: str) -> int:
    return chain.rings[name].used_bytes


def test_encoded_down_and_decoded_up(chain: Chain) -> None:
    records = chain.committed(40, 100_000)  # more than the ring holds at once
    chain.save(records)
    heard = chain.run()
    for tier in (Tier.SSD, Tier.REMOTE):
        part = [message for message in of(heard, Persisted) if message.tier is tier]
        answered = np.concatenate([message.chunks for message in part])
        assert sorted(answered["place"].tolist()) == sorted(records["place"].tolist())  # as gather knows them
    stored = chain.stored("persist", records)
    assert (stored["codec"] == Codec.ZSTD).all() and (stored["nbytes"] < 60_000).all()
    assert in_use(chain, "compress") == 0
    chain.evict(records)
    asked = chain.load(stored)
    heard = chain.run()
    assert len(keys(of(heard, Loaded))) == 40 and {message.segment for message in heard} == {"arena"}
    assert chain.landed(asked)
    assert in_use(chain, "persist") == 0
    assert not any(seat.stage.busy() for seat in chain.seats.values())


def test_from_the_remote_tier_as_well(chain: Chain) -> None:
    records = chain.committed(3, 100_000)
    chain.save(records)
    chain.run()
    chain.send("save", Invalidate(GATHER, 3, 7, [Tier.SSD], no_chunks()))
    assert of(chain.run(), Invalidated)[0].removed == 3
    asked = chain.load(chain.stored("replicate", records))
    assert len(keys(of(chain.run(), Loaded))) == 3 and chain.landed(asked)
    assert in_use(chain, "replicate") == 0


def test_noise_is_kept_raw(chain: Chain) -> None:
    records = chain.committed(1, 50_000)
    noise = np.random.default_rng(0).bytes(50_000)
    chain.arena.payload(int(records["place"][0]) >> 32, 50_000)[:] = noise
    chain.save(records)
    heard = chain.run()
    assert {message.tier for message in of(heard, Persisted)} == {Tier.SSD, Tier.REMOTE}
    stored = chain.stored("persist", records)
    assert int(stored["codec"][0]) == Codec.RAW and chain.seats["compress"].counts["passed_chunks"] == 1
    asked = chain.load(stored)
    assert len(of(chain.run(), Loaded)) == 1
    assert bytes(chain.arena.payload(int(asked["place"][0]) >> 32, 50_000)) == noise


def test_what_vanished_is_dropped_for_every_tier(chain: Chain) -> None:
    records = chain.committed(1, 5000)
    chain.evict(records)
    chain.save(records)
    heard = chain.run()
    assert {message.tier for message in of(heard, SaveDropped)} == {Tier.SSD, Tier.REMOTE}
    assert in_use(chain, "compress") == 0


def test_a_chunk_larger_than_the_ring(chain: Chain) -> None:
    records = chain.committed(1, 3 * MIB)
    chain.save(records)
    assert {message.reason for message in of(chain.run(), SaveDropped)} == {"larger than the ring"}


def test_a_tier_that_dies_in_between_gets_its_slots_taken_back(chain: Chain) -> None:
    records = chain.committed(4, 100_000)
    chain.save(records)
    compress = chain.seats["compress"]
    while compress.jobs or compress.counts["encoded_chunks"] != 4:
        compress.turn()  # encoded and handed on; nobody below has worked
    assert in_use(chain, "compress") > 0
    chain.stop("replicate")
    chain.stop("persist")
    chain.run()
    assert in_use(chain, "compress") == 0
    chain.start("persist")
    chain.start("replicate")
    chain.save(records)  # as gather does when the chain below is another one
    heard = chain.run() + chain.run()
    assert len(keys([message for message in of(heard, Persisted) if message.tier is Tier.SSD])) == 4


def test_a_save_that_is_asked_again_is_not_encoded_again(chain: Chain) -> None:
    records = chain.committed(1, 100_000)
    chain.save(records)
    compress = chain.seats["compress"]
    while not compress.counts["encoded_chunks"]:
        compress.turn()
    chain.save(records)
    compress.turn()
    heard = chain.run()
    assert compress.counts["encoded_chunks"] == 1 and in_use(chain, "compress") == 0
    assert sum(len(message.chunks) for message in of(heard, Persisted) if message.tier is Tier.SSD) == 2


def test_loads_under_way_fail_when_a_tier_goes(chain: Chain) -> None:
    records = chain.committed(2, 100_000)
    chain.save(records)
    chain.run()
    asked = chain.load(chain.stored("persist", records))
    chain.stop("persist")
    heard = chain.run()
    assert keys(of(heard, LoadFailed)) == {record["key"].tobytes() for record in asked}
    chain.start("persist")
    chain.run()
    assert in_use(chain, "persist") == 0
    again = chain.load(chain.stored("persist", records))
    assert len(of(chain.run(), Loaded)) == 2 and chain.landed(again)


def test_a_reader_that_dies_leaves_nothing_in_the_ring_below(chain: Chain) -> None:
    records = chain.committed(2, 100_000)
    chain.save(records)
    chain.run()
    chain.load(chain.stored("persist", records))
    persist = chain.seats["persist"]
    while persist.counts["read_chunks"] < 2:
        persist.turn()
    assert in_use(chain, "persist") > 0
    chain.stop("compress")
    chain.run()
    chain.run()
    assert in_use(chain, "persist") == 0


def test_a_held_ring_slot_is_not_used_again(chain: Chain) -> None:
    """The reader is stopped, not dead: its hold keeps the bytes, also over a restart of the ring's owner."""
    records = chain.committed(1, 100_000)
    chain.save(records)
    compress = chain.seats["compress"]
    while not compress.counts["encoded_chunks"]:
        compress.turn()
    ring = chain.rings["compress"]
    slot = next(iter(compress.stage._sent.values())).slot
    before = bytes(ring.payload(slot.index, 1000))
    with Session.create(chain.run_dir) as session:
        holds = Holds(session)
        held = holds.take(ring, np.array([slot.index], np.uint32), np.array([slot.generation], np.uint32), 1)
        assert len(held) == 1
        chain.stop("compress")
        chain.start("compress")
        chain.run()
        assert ring.state(slot.index) == (slot.generation, SlotState.DOOMED)
        chain.save(chain.committed(10, 100_000, seed=5))
        chain.run()
        assert bytes(ring.payload(slot.index, 1000)) == before
        held.release()
        chain.run()
        assert ring.state(slot.index)[1] is SlotState.FREE and ring.used_bytes == 0
        holds.close()


def test_damage_in_transit_fails_the_load(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    records = chain.committed(1, 100_000)
    chain.save(records)
    chain.run()
    asked = chain.load(chain.stored("persist", records))
    persist = chain.seats["persist"]
    while not persist.counts["read_chunks"]:
        persist.turn()
    ring = chain.rings["persist"]
    used = [at for at in range(ring.slots) if ring.state(at)[1] is SlotState.COMMITTED]
    ring.payload(used[0])[100:200] = bytes(100)
    (failed,) = of(chain.run(), LoadFailed)
    assert "zstd" in failed.reason and chain.arena.state(int(asked["place"][0]) >> 32)[1] is SlotState.WRITING
    assert ring.used_bytes == 0
    assert not chain.arena.advance(Slot.from_place(int(asked["place"][0])), SlotEvent.COMMIT)


class Coarse:
    """A codec that keeps the first half of a chunk, needs a layout for it, and refuses what begins with 255."""

    number, name, fidelity, numeric = Codec.FP8, "coarse", Fidelity.FP8, True

    def __init__(self) -> None:
        self.sources: list[Source] = []

    def bound(self, raw_bytes: int, source: Source = ANY) -> int:
        return raw_bytes // 2

    def encode(self, src: memoryview, dst: memoryview, source: Source) -> int:
        self.sources.append(source)
        if src[0] == 255:
            raise CannotEncode("not a number")
        half = len(src) // 2
        dst[:half] = src[:half]
        return half

    def decode(self, src: memoryview, dst: memoryview) -> None:
        dst[:] = bytes(src) * 2


LAYOUT = KVLayout.paged(2, 1, 64, "bfloat16", 16)
CHUNK_BYTES = LAYOUT.chunk_bytes(32)


def test_an_encoder_is_told_the_layout_and_the_position_and_its_loss_is_recorded(tmp_path: Path) -> None:
    codec = Coarse()
    with a_chain(tmp_path, ALL, codec="zstd", own={7: codec}, layout=LAYOUT) as chain:
        records = chain.committed(2, CHUNK_BYTES, position=5)
        chain.save(records)
        chain.run()
        assert codec.sources == [Source(LAYOUT, 32, 5), Source(LAYOUT, 32, 6)]
        for stage in ("persist", "replicate"):
            stored = chain.stored(stage, records)
            assert (stored["codec"] == Codec.FP8).all() and (stored["fidelity"] == Fidelity.FP8).all()
        worse = chain.committed(1, CHUNK_BYTES, seed=1, fidelity=Fidelity.ADAPTIVE)
        chain.save(worse)
        chain.run()
        assert chain.stored("persist", worse)["fidelity"].tolist() == [Fidelity.ADAPTIVE], "what it was computed on"


@pytest.mark.parametrize("why", ["no layout", "not a number"])
def test_what_a_codec_cannot_write_goes_on_raw_and_exact(tmp_path: Path, why: str) -> None:
    with a_chain(
        tmp_path, ALL, codec="zstd", own={7: Coarse()}, layout=LAYOUT if why != "no layout" else None
    ) as chain:
        records = chain.committed(1, CHUNK_BYTES)
        chain.arena.payload(int(records["place"][0]) >> 32, 1)[0] = 255
        chain.save(records)
        heard = chain.run()
        assert {message.tier for message in of(heard, Persisted)} == {Tier.SSD, Tier.REMOTE}
        stored = chain.stored("persist", records)
        assert (int(stored["codec"][0]), int(stored["fidelity"][0])) == (Codec.RAW, Fidelity.EXACT)
        counts = chain.seats["compress"].counts
        reason = "unknown_layout_chunks" if why == "no layout" else "unencodable_chunks"
        assert counts[reason] == counts["passed_chunks"] == 1 and in_use(chain, "compress") == 0


def test_a_tenant_has_a_codec_of_its_own(tmp_path: Path) -> None:
    with a_chain(tmp_path, ALL, codec="zstd", own={8: codec_named("raw")}) as chain:
        ours, theirs = chain.committed(1, 50_000), chain.committed(1, 50_000, seed=1, namespace=8)
        chain.save(ours)
        chain.save(theirs)
        chain.run()
        assert int(chain.stored("persist", ours)["codec"][0]) == Codec.ZSTD
        assert int(chain.stored("persist", theirs)["codec"][0]) == Codec.RAW
        counts = chain.seats["compress"].counts
        assert (counts["encoded_chunks"], counts["passed_chunks"]) == (1, 1)


def test_a_ring_has_room_for_as_much_as_a_codec_leaves(tmp_path: Path) -> None:
    layout = KVLayout.paged(2, 1, 128, "bfloat16", 16)
    chunk_bytes = layout.chunk_bytes(128)  # of these 16 fill the ring
    with a_chain(tmp_path, ALL, codec="int4h", layout=layout) as chain:
        records = chain.committed(24, chunk_bytes)
        numbers = np.random.default_rng(0).standard_normal(chunk_bytes // 2, np.float32)
        for place in records["place"].tolist():
            chain.arena.payload(place >> 32, chunk_bytes)[:] = (numbers.view(np.uint32) >> 16).astype("<u2").tobytes()
        chain.save(records)
        compress = chain.seats["compress"]
        for _ in range(100):
            compress.turn()  # nobody below takes anything
        assert compress.counts["encoded_chunks"] == 24
        assert chain.run() and in_use(chain, "compress") == 0


@pytest.mark.parametrize("codec", ["raw", "zstd"])
def test_a_more_exact_chunk_takes_the_place_of_a_less_exact_one_and_never_the_other_way(
    tmp_path: Path, codec: str
) -> None:
    stages = ALL if codec != "raw" else ALL[1:]
    with a_chain(tmp_path, stages, codec=codec) as chain:
        for fidelity, kept in ((200, 200), (0, 0), (200, 0), (100, 0)):
            records = chain.committed(1, 50_000, fidelity=fidelity)
            chain.save(records)
            assert {message.tier for message in of(chain.run(), Persisted)} == {Tier.SSD, Tier.REMOTE}
            for stage in ("persist", "replicate"):
                assert chain.stored(stage, records)["fidelity"].tolist() == [kept]
        exact = chain.stored("persist", records)
        stale = exact.copy()
        stale["fidelity"] = 200
        assert len(of(chain_load(chain, stale), LoadFailed)) == 1, "what is there is another chunk than was asked for"
        assert len(of(chain_load(chain, exact), Loaded)) == 1


def chain_load(chain: Chain, stored: ChunkRecords) -> list[Message]:
    chain.load(stored)
    return chain.run()
