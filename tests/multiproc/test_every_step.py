"""A spread over all failpoints and over what may happen there; failpoint_walk.py walks through all of them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from failpoint_walk import Walk, steps

SEED = 1
SPREAD = (
    "producer.save.copied=kill",
    "slots.free.freed=kill",
    "dram.commit.committed=kill",
    "dram.evict.unindexed=error:EIO",
    "index.put.written=stop",
    "compress.decode.decoded=kill",
    "ssd.write.written=error:EIO",
    "ssd.settle.flushed=kill",
    "remote.put.stored=kill",
    "gather.up.Saved=drop",
    "gather.down.Save=drop",
    "persist.up.Loaded=late:0.3",
)


@pytest.fixture(scope="module")
def walk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Walk]:
    with Walk.open(tmp_path_factory.mktemp("walk"), SEED) as walk:
        yield walk


@pytest.mark.parametrize("rule", SPREAD)
def test_every_promise_holds_after_it(walk: Walk, rule: str) -> None:
    assert rule in steps()
    walk.step(rule)
