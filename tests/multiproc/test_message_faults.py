"""Messages that are lost, doubled, late: nothing wrong is loaded, nothing stays behind, and it is counted."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from failpoint_walk import ring_in_use
from rig import Engine, all_tiers, assert_nothing_leaks, counters, until, until_whole

from lmpipe.failpoints import Control
from lmpipe.handles import Tier
from lmpipe.testing import Node

CHUNKS = 8
LEASES = 8


@pytest.fixture(scope="module", params=["raw", "zstd"])
def node(control: Control, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Node]:
    with Node(all_tiers(tmp_path_factory.mktemp("remote"), codec=request.param)) as node:
        yield node


@pytest.fixture
def engine(node: Node, control: Control, request: pytest.FixtureRequest) -> Iterator[Engine]:
    with Engine(node.run_dir, tenant=request.node.name) as engine:
        until_whole(node, engine)
        yield engine
        control.clear()
        assert_nothing_leaks(node, LEASES)
        for stage in node.topology.rings_needed:
            until(lambda s=stage: ring_in_use(node, s) == 0, f"the ring of {stage} is empty")


def test_a_slot_that_is_being_written_is_not_taken_back_for_a_question_asked_twice(
    node: Node, engine: Engine, control: Control
) -> None:
    """The second question finds the slot open: were it answered so, the slot would go to another chunk meanwhile."""
    prompts = [engine.prompt(seed, CHUNKS) for seed in range(3)]
    for prompt in prompts:
        assert engine.save(prompt).wait(0)
        assert engine.producer.flush(prompt, tiers=("ssd", "remote"))
        engine.drop_from(prompt, Tier.DRAM)
    slow = "compress.decode.opened" if "compress" in node.topology.stages else "landing.opened"
    control.arm("gather.down.Load=twice", f"{slow}=sleep:0.05")
    for prompt in prompts:
        assert engine.load(prompt).chunks == CHUNKS  # every byte is compared
    assert len(control.fired()) > len(prompts)
    assert counters(node)["gather_load_failed_chunks"] == 0
