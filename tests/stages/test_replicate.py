"""replicate alone: the last stage."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from chain import Chain, a_chain, keys, of

from lmpipe.handles import Tier
from lmpipe.messages import Invalidate, Invalidated, Loaded, LoadFailed, Persisted, SaveDropped, no_chunks
from lmpipe.tiers.remote_object import RemoteTier


@pytest.fixture
def chain(tmp_path: Path) -> Iterator[Chain]:
    with a_chain(tmp_path, ["replicate"]) as made:
        made.run()
        yield made


def test_a_chunk_goes_out_and_comes_back(chain: Chain) -> None:
    records = chain.committed(6, 33_000)
    chain.save(records)
    heard = chain.run()
    assert keys(of(heard, Persisted)) == {record["key"].tobytes() for record in records}
    assert {message.tier for message in of(heard, Persisted)} == {Tier.REMOTE}
    chain.evict(records)
    asked = chain.load(chain.stored("replicate", records), writer="replicate")
    assert len(keys(of(chain.run(), Loaded))) == 6 and chain.landed(asked)
    assert not chain.seats["replicate"].stage.busy()


def test_every_chunk_is_answered_once(chain: Chain) -> None:
    records = chain.committed(4, 5000)
    chain.save(records[:2])
    chain.run()
    chain.evict(records[2:3])
    chain.save(records)
    heard = chain.run()
    assert sum(len(message.chunks) for message in of(heard, Persisted)) == 3
    (dropped,) = of(heard, SaveDropped)
    assert "evicted" in dropped.reason and len(dropped.chunks) == 1
    assert chain.seats["replicate"].counts["written_chunks"] == 3


def test_a_restart_lists_the_store(chain: Chain) -> None:
    records = chain.committed(3, 5000)
    chain.save(records)
    chain.run()
    chain.stop("replicate")
    chain.start("replicate")
    chain.run()
    asked = chain.load(chain.stored("replicate", records), writer="replicate")
    assert len(keys(of(chain.run(), Loaded))) == 3 and chain.landed(asked)


def test_a_missing_object_is_a_failed_load(chain: Chain) -> None:
    records = chain.committed(2, 5000)
    chain.save(records)
    chain.run()
    stored = chain.stored("replicate", records)
    for path in (chain.root / "objects").rglob("*-*"):
        path.unlink()
    chain.load(stored, writer="replicate")
    heard = chain.run()
    assert len(of(heard, LoadFailed)) == 2 and "no more" in of(heard, LoadFailed)[0].reason
    assert not len(chain.stored("replicate", records))
    assert chain.seats["replicate"].counts["corrupt_chunks"] == 0


def test_a_store_that_is_down_drops_with_its_reason(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    def down(*_: object, **__: object) -> None:
        raise OSError("cable cut")

    monkeypatch.setattr("lmpipe.tiers.remote_object.obstore.put", down)
    records = chain.committed(5, 5000)
    chain.save(records)
    heard = chain.run()
    assert sum(len(message.chunks) for message in of(heard, SaveDropped)) == 5
    assert {message.reason for message in of(heard, SaveDropped)} == {"cable cut"}
    assert all(message.again for message in of(heard, SaveDropped)), "it may take them another time"
    chain.run()
    assert chain.seats["replicate"].counts["store_down"] == 1


def test_invalidation_is_in_order_with_saves(chain: Chain) -> None:
    records = chain.committed(3, 5000)
    chain.save(records[:2])
    chain.send("save", Invalidate(1, 8, 7, [Tier.REMOTE], no_chunks()))
    chain.save(records[2:])
    heard = chain.run()
    assert of(heard, Invalidated)[0].removed == 2
    assert len(chain.stored("replicate", records)) == 1


def test_what_is_invalidated_while_the_store_is_listed_does_not_come_back(
    chain: Chain, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = chain.committed(3, 5000)
    chain.save(records)
    chain.run()
    chain.stop("replicate")
    chain.start("replicate")
    seat, list_store = chain.seats["replicate"], RemoteTier._list

    def list_slowly(tier: RemoteTier, prefix: str) -> list[tuple[str, int]]:
        found = list_store(tier, prefix)
        monkeypatch.setattr(RemoteTier, "_list", list_store)
        while seat.turn():  # the stage goes on before what was listed is entered
            continue
        return found

    monkeypatch.setattr(RemoteTier, "_list", list_slowly)
    chain.send("save", Invalidate(1, 8, 7, [Tier.REMOTE], no_chunks()))
    heard = chain.run()
    assert of(heard, Invalidated)[0].removed == 3
    assert not len(chain.stored("replicate", records))
