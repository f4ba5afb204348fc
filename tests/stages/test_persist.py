"""persist, with and without replicate below it."""

from __future__ import annotations

import errno
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from chain import Chain, a_chain, keys, of

from lmpipe.handles import Tier
from lmpipe.lifecycle import SlotState
from lmpipe.messages import (
    Cancel,
    Evicted,
    Invalidate,
    Invalidated,
    Load,
    Loaded,
    LoadFailed,
    Persisted,
    SaveDropped,
    Touch,
    no_chunks,
)
from lmpipe.stages.persist import GRACE_S
from lmpipe.stages.reads import CAUTION, READS_AT_ONCE
from lmpipe.tiers.segment_file import OpenSegment

Open = Callable[..., AbstractContextManager[Chain]]


@pytest.fixture
def chain_of(tmp_path: Path) -> Open:
    def opened(*names: str, **options: Any) -> AbstractContextManager[Chain]:
        return a_chain(tmp_path, list(names or ("persist",)), **options)

    return opened


@pytest.mark.parametrize("flush", ["none", "interval", "each"])
def test_a_chunk_goes_down_and_comes_back(chain_of: Open, flush: str) -> None:
    with chain_of(flush=flush) as chain:
        records = chain.committed(20, 70_000)
        chain.save(records)
        heard = chain.run() + chain.run()
        assert [type(message) for message in heard if len(getattr(message, "chunks", []))] == [Persisted]
        assert heard[0].tier is Tier.SSD and heard[0].chunks.tobytes() == records.tobytes()
        assert not chain.seats["persist"].stage.busy()
        chain.evict(records)
        asked = chain.load(chain.stored("persist", records))
        heard = chain.run()
        assert len(keys(of(heard, Loaded))) == len(heard) == 20
        assert all(message.segment == "arena" for message in heard) and chain.landed(asked)
        counts = chain.seats["persist"].counts
        assert counts["written_chunks"] == counts["read_chunks"] == 20 and counts["written_bytes"] == 20 * 70_000


def test_known_and_vanished_chunks_are_answered_too(chain_of: Open) -> None:
    with chain_of() as chain:
        records = chain.committed(4, 5000)
        chain.save(records[:2])
        chain.run()
        chain.evict(records[3:])
        chain.save(records)
        heard = chain.run()
        assert keys(of(heard, Persisted)) == {record["key"].tobytes() for record in records[:3]}
        (dropped,) = of(heard, SaveDropped)
        assert dropped.tier is Tier.SSD and "evicted" in dropped.reason and len(dropped.chunks) == 1
        assert not dropped.again
        assert chain.seats["persist"].counts["written_chunks"] == 3


def test_a_slot_is_held_while_it_is_written(chain_of: Open) -> None:
    with chain_of() as chain:
        records = chain.committed(2, 5000)
        chain.save(records)
        seat = chain.seats["persist"]
        seat.stage.step(chain.now_s)
        assert [job[3] for job in seat.jobs] == ["write"]
        from_here = seat.stage._sources._holds
        assert len(from_here._sets) == 2
        chain.run()
        assert not from_here._sets


def test_deadline_cancel_stale_and_unknown(chain_of: Open) -> None:
    with chain_of() as chain:
        records = chain.committed(6, 5000)
        chain.save(records)
        chain.run()
        stored = chain.stored("persist", records)
        late = chain.load(stored[:1], deadline_ns=1)
        (failed,) = of(chain.run(), LoadFailed)
        assert failed.reason == "deadline" and failed.chunks["place"][0] == late["place"][0]
        assert chain.arena.state(int(late["place"][0]) >> 32)[1] is SlotState.LEASED  # gather's to free
        chain.load(stored)
        chain.send("load", Cancel(1, chain._next))
        heard = chain.run()
        assert {message.reason for message in of(heard, LoadFailed)} == {"cancelled"}
        assert len(of(heard, LoadFailed)) + len(of(heard, Loaded)) == 6
        assert len(of(heard, Loaded)) <= READS_AT_ONCE
        unknown = stored[:1].copy()
        unknown["layout"] += 1
        chain.load(unknown)
        (failed,) = of(chain.run(), LoadFailed)
        assert failed.reason == "not stored"


def test_a_slot_leased_to_another_is_not_touched(chain_of: Open) -> None:
    with chain_of() as chain:
        records = chain.committed(1, 5000)
        chain.save(records)
        chain.run()
        stored = chain.stored("persist", records).copy()
        stranger = chain.arena.lease(5000, 99)
        assert stranger is not None
        stored["place"] = stranger.place
        chain.send("load", Load(1, 77, stored, "arena"))
        (failed,) = of(chain.run(), LoadFailed)
        assert failed.reason == "not stored" and chain.arena.state(stranger.index)[1] is SlotState.LEASED


def test_damage_is_a_failed_load_and_the_row_goes(chain_of: Open) -> None:
    with chain_of() as chain:
        records = chain.committed(2, 5000)
        chain.save(records)
        chain.run()
        stored = chain.stored("persist", records)
        path = next((chain.root / "ssd").glob("*.seg"))
        data = bytearray(path.read_bytes())
        data[(int(stored["place"][0]) & 0xFFFFFFFF) * 4096 + 4096 + 17] ^= 4
        path.write_bytes(data)
        chain.load(stored)
        heard = chain.run()
        assert len(of(heard, Loaded)) == 1 and "checksum" in of(heard, LoadFailed)[0].reason
        assert chain.seats["persist"].counts["corrupt_chunks"] == 1
        assert len(chain.stored("persist", records)) == 1


def test_eviction_is_told(chain_of: Open) -> None:
    with chain_of(ssd_bytes=1 << 20) as chain:
        evicted: set[bytes] = set()
        for seed in range(8):
            records = chain.committed(3, 70_000, seed=seed)
            chain.save(records)
            heard = chain.run()
            assert len(keys(of(heard, Persisted))) == 3
            evicted |= keys(of(heard, Evicted))
            chain.evict(records)
        assert evicted and chain.seats["persist"].counts["evicted_chunks"] == len(evicted)


def test_invalidation_waits_for_the_saves_before_it(chain_of: Open) -> None:
    with chain_of("persist", "replicate") as chain:
        chain.run()
        records = chain.committed(3, 5000)
        chain.save(records)
        chain.send("save", Invalidate(1, 41, 7, [Tier.SSD, Tier.REMOTE], no_chunks()))
        heard = chain.run()
        (answer,) = of(heard, Invalidated)
        assert answer.ref == 41 and answer.removed == 6
        assert not len(chain.stored("persist", records)) and not len(chain.stored("replicate", records))
        chain.send("save", Invalidate(1, 42, 0, [Tier.REMOTE], records))
        (answer,) = of(chain.run(), Invalidated)
        assert answer.ref == 42 and answer.removed == 0


def test_an_invalidation_reaches_a_tier_that_was_away(chain_of: Open) -> None:
    with chain_of("persist", "replicate") as chain:
        chain.run()
        records = chain.committed(2, 5000)
        chain.save(records)
        chain.run()
        chain.stop("replicate")
        chain.send("save", Invalidate(1, 5, 7, [Tier.SSD, Tier.REMOTE], no_chunks()))
        assert not of(chain.run(), Invalidated)
        chain.start("replicate")
        heard = chain.run() + chain.run()
        assert of(heard, Invalidated)[0].removed >= 2
        assert not len(chain.stored("replicate", records)) and not list((chain.root / "objects").rglob("*-*"))


def test_both_tiers_answer_and_the_rest_is_passed_down(chain_of: Open) -> None:
    with chain_of("persist", "replicate") as chain:
        chain.run()
        records = chain.committed(5, 9000)
        chain.save(records)
        heard = chain.run()
        for tier in (Tier.SSD, Tier.REMOTE):
            part = [message for message in of(heard, Persisted) if message.tier is tier]
            assert keys(part) == {record["key"].tobytes() for record in records}
            assert sum(len(message.chunks) for message in part) == 5
        chain.send("save", Invalidate(1, 1, 0, [Tier.SSD], records[:2]))
        chain.run()
        asked = [
            chain.load(chain.stored("replicate", records[:2]), writer="replicate"),
            chain.load(chain.stored("persist", records[2:])),
        ]
        heard = chain.run()
        assert len(keys(of(heard, Loaded))) == 5 and not of(heard, LoadFailed)
        assert all(chain.landed(part) for part in asked)
        assert chain.seats["replicate"].counts["read_chunks"] == 2


def test_without_replicate_its_part_is_dropped_with_a_reason(chain_of: Open) -> None:
    with chain_of("persist", "replicate") as chain:
        chain.stop("replicate")
        records = chain.committed(2, 5000)
        chain.save(records)
        heard = chain.run()
        assert not of(heard, SaveDropped)  # it may be starting
        chain.now_s += GRACE_S
        heard += chain.run()
        (dropped,) = of(heard, SaveDropped)
        assert dropped.tier is Tier.REMOTE and dropped.reason == "replicate is down" and len(dropped.chunks) == 2
        assert dropped.again
        assert len(keys(of(heard, Persisted))) == 2
        chain.load(chain.stored("persist", records), writer="persist")
        assert len(keys(of(chain.run(), Loaded))) == 2


@pytest.mark.parametrize("broken", ["append", "flush", "seal"])
def test_what_a_failing_disk_did_not_take_may_come_again(
    chain_of: Open, broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise OSError(errno.EIO, "no")

    with chain_of(flush="each") as chain:
        records = chain.committed(90, 70_000)
        with monkeypatch.context() as patch:
            patch.setattr(OpenSegment, broken, fails)
            chain.save(records)
            heard = chain.run()
        dropped = of(heard, SaveDropped)
        assert dropped and all(message.again for message in dropped)
        assert len(keys(dropped)) + len(keys(of(heard, Persisted))) == 90
        assert len(chain.stored("persist", records)) == len(keys(of(heard, Persisted)))


def test_a_restart_finds_what_was_persisted(chain_of: Open) -> None:
    with chain_of() as chain:
        records = chain.committed(10, 30_000)
        chain.save(records)
        chain.run()
        chain.stop("persist")
        chain.start("persist")
        asked = chain.load(chain.stored("persist", records))
        assert len(keys(of(chain.run(), Loaded))) == 10 and chain.landed(asked)


def test_saves_are_left_in_the_socket_when_enough_wait(chain_of: Open) -> None:
    with chain_of() as chain:
        stage = chain.seats["persist"].stage
        records = chain.committed(200, 64)
        chain.save(records)
        assert stage.accepts_saves() and stage.busy()
        chain.save(records)
        assert not stage.accepts_saves()
        chain.run()
        assert stage.accepts_saves() and not stage.busy()


def test_what_it_does_not_know_is_counted(chain_of: Open) -> None:
    with chain_of() as chain:
        chain.send("save", Touch(1, no_chunks()))
        assert chain.seats["persist"].counts["unexpected_messages"] == 1


def test_what_cannot_be_read_in_time_fails_at_once(chain_of: Open) -> None:
    """By how fast reading was; and where nothing waits it is tried all the same, or nobody would see it has changed."""
    with chain_of() as chain:
        records = chain.committed(20, 70_000)
        chain.save(records)
        chain.run()
        rows = chain.stored("persist", records)
        chain.evict(records)
        chain.load(rows[:2])
        chain.seats["persist"].stage.step(chain.now_s)
        assert len(chain.seats["persist"].jobs) == READS_AT_ONCE
        chain.now_s += 1.0
        assert len(keys(of(chain.run(), Loaded))) == 2
        slow_bytes_per_s = 70_000
        seconds = 5
        chain.load(rows[2:], deadline_ns=int((chain.now_s + seconds) * 1e9))
        (late,) = of(chain.heard, LoadFailed)
        assert "before it" in late.reason and 0 < len(late.chunks) < 18
        in_time = 18 - len(late.chunks)
        assert in_time * 70_000 <= CAUTION * slow_bytes_per_s * seconds
        assert late.chunks["key"].tolist() == rows["key"][2 + in_time :].tolist(), "what comes first is read"
        assert len(keys(of(chain.run(), Loaded))) == in_time
        chain.load(rows[-1:], deadline_ns=int((chain.now_s + 2.0) * 1e9))
        assert len(of(chain.run(), Loaded)) == 1
        chain.load(rows[:4])
        assert not of(chain.heard, LoadFailed), "who waits as long as it takes is not told that it takes long"
        assert not of(chain.run(), LoadFailed) and not chain.seats["persist"].stage.busy()
