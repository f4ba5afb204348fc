"""A prompt is saved in pieces, and still its tail goes before its head."""

from __future__ import annotations

import pytest
from rig import DRAM_ONLY, Engine

from lmpipe.testing import Node

CAPACITY = 1 << 20


@pytest.mark.parametrize("mapped", [False, True], ids=["private", "mapped"])
def test_pressure_leaves_the_head(mapped: bool) -> None:
    with Node({**DRAM_ONLY, "tiers": {"dram": {"capacity": CAPACITY, "slots": 256}, "ssd": None}}) as node:
        engine = Engine(node.run_dir, pages_in=node.directory if mapped else None)
        room = CAPACITY // engine.producer.chunk_bytes
        assert room >= 32, "the arena holds many pieces of eight chunks"
        old, new = engine.prompt(1, room * 5 // 8), engine.prompt(2, room // 2)
        assert engine.save(old).wait(0) and engine.found(old) == len(old.keys)
        assert engine.save(new).wait(0) and engine.found(new) == len(new.keys)
        left = engine.found(old)
        assert 0 < left < len(old.keys)
        assert engine.load(old).chunks == left
        engine.close()
