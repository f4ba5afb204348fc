"""The machine's clock is set, forward and back, while a node runs: TTLs end and stay ended, deadlines know no clock."""

from __future__ import annotations

from pathlib import Path

from io_faults import IoFaults
from rig import CALM, Engine, EngineProcess, all_tiers, until

from lmpipe.handles import Tier
from lmpipe.testing import Node

CHUNKS = 4
TTL_S, HOUR_S = 600, 3600


def test_a_clock_that_is_set_ends_ttls_and_nothing_else(faults: IoFaults) -> None:
    with (
        Node(CALM) as node,
        EngineProcess(node, tenant="ttl", ttl_s=TTL_S) as engine,
        EngineProcess(node, tenant="ever") as other,
    ):
        for each in (engine, other):
            assert each.ask("save", seed=1, chunks=CHUNKS)["saved"] == CHUNKS
            assert each.ask("load", seed=1, chunks=CHUNKS)["chunks"] == CHUNKS
        faults.set(f"clock any step={HOUR_S}")
        assert engine.ask("found", seed=1, chunks=CHUNKS) == 0, "it is over"
        assert engine.ask("save", seed=1, chunks=CHUNKS)["saved"] == CHUNKS, "so it is not known any more"
        assert engine.ask("load", seed=1, chunks=CHUNKS)["chunks"] == CHUNKS
        faults.set(f"clock any step={-HOUR_S}")
        assert engine.ask("load", seed=1, chunks=CHUNKS)["chunks"] == CHUNKS
        assert engine.ask("save", seed=2, chunks=CHUNKS)["saved"] == CHUNKS
        assert engine.ask("load", seed=2, chunks=CHUNKS)["chunks"] == CHUNKS
        faults.set(f"clock any step={2 * HOUR_S}")
        assert engine.ask("found", seed=1, chunks=CHUNKS) == engine.ask("found", seed=2, chunks=CHUNKS) == 0
        faults.clear()
        assert engine.ask("found", seed=1, chunks=CHUNKS) == 0, "what was over stays over"
        for step_s in (HOUR_S, -HOUR_S, 0):
            there = other.ask("save", seed=1, chunks=CHUNKS)  # what follows may have evicted it
            assert there["saved"] + there["known"] == CHUNKS
            faults.set(f"clock any step={step_s}")
            assert other.ask("load", seed=1, chunks=CHUNKS)["chunks"] == CHUNKS
            done = other.ask("churn", seed=step_s, prompts=10, chunks=CHUNKS, seconds=0.3)
            assert done["saved"] + done["known"] and not done["dropped"]
        assert node.status().state == "ready"
        assert [process.restarts for process in node.status().processes] == [0] * len(node.status().processes)


def test_what_is_over_in_a_tier_does_not_stand_in_the_way_of_the_same_chunks(tmp_path: Path) -> None:
    """Neither there nor in the tiers below: saved again, they are persisted again, and found after DRAM is gone."""
    with Node(all_tiers(tmp_path)) as node, Engine(node.run_dir, ttl_s=2) as short, Engine(node.run_dir) as long:
        prompt = short.prompt(1, CHUNKS)
        assert short.save(prompt).saved == CHUNKS
        assert short.producer.flush(prompt, tiers=[Tier.SSD, Tier.REMOTE])
        until(lambda: long.found(prompt) == 0, "the chunks expire")
        assert long.save(prompt).saved == CHUNKS
        assert long.producer.flush(prompt, tiers=[Tier.SSD, Tier.REMOTE])
        long.drop_from(prompt, Tier.DRAM)
        assert long.load(prompt).by_tier == {Tier.SSD: CHUNKS}
        long.drop_from(prompt, Tier.DRAM, Tier.SSD)
        assert long.load(prompt).by_tier == {Tier.REMOTE: CHUNKS}
