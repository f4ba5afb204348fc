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


@pytest.mark.parametrize("mapped", [False, True], ids=["private", "mapped"])
def test_pressure_leaves_the_head_of_what_came_in_several_saves(mapped: bool) -> None:
    """As a prompt comes that is prefilled in parts; and what is known already counts as used."""
    with Node({**DRAM_ONLY, "tiers": {"dram": {"capacity": CAPACITY, "slots": 256}, "ssd": None}}) as node:
        engine = Engine(node.run_dir, pages_in=node.directory if mapped else None)
        room = CAPACITY // engine.producer.chunk_bytes
        old, between, new = engine.prompt(1, room // 2), engine.prompt(2, room // 4), engine.prompt(3, room // 2)
        for chunks in range(room // 16, len(old.keys) + 1, room // 16):
            assert engine.save(engine.prompt(1, chunks)).wait(0)
        assert engine.save(between).wait(0)
        assert engine.save(engine.prompt(1, len(old.keys))).wait(0), "all of it is known"
        assert engine.save(new).wait(0)
        assert engine.found(between) == 0 < engine.found(old) < len(old.keys) + 1
        assert engine.load(old).chunks == engine.found(old)
        engine.close()
