"""Disks and stores that fail, in real processes: the tier that fails says so and takes nothing, DRAM goes on, what is
read wrong is a miss, and with the fault goes its effect.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from io_faults import IoFaults
from rig import Engine, all_tiers, assert_nothing_leaks, counters, slot_states, until, until_whole

from lmpipe.handles import Tier
from lmpipe.launch.overview import overview
from lmpipe.lifecycle import SlotState
from lmpipe.testing import Node

LEASES = 8
CHUNKS = 8
WORKERS = ["gather", "compress", "persist", "replicate"]

DISK_FULL = ("write ENOSPC", "make ENOSPC")
REMOUNTED = ("write EROFS", "make EROFS", "sync EROFS")
DYING = ("write EIO", "sync EIO", "make EIO")


@pytest.fixture(scope="module")
def remote(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("remote") / "remote"


@pytest.fixture(scope="module")
def shared(faults: IoFaults, remote: Path) -> Iterator[Node]:
    changes = all_tiers(remote.parent, codec="raw")
    changes["tiers"]["ssd"] |= {"segment": "1MiB", "capacity": "16MiB"}
    with Node(changes) as node:
        yield node


@pytest.fixture
def node(shared: Node, faults: IoFaults) -> Iterator[Node]:
    """A node that was well before, and is well again after, without any process having died."""
    until_whole(shared)
    before = [(process.pid, process.restarts) for process in shared.status().processes]
    yield shared
    faults.clear()
    assert [(process.pid, process.restarts) for process in shared.status().processes] == before
    assert_nothing_leaks(shared, LEASES)


@pytest.fixture
def engine(node: Node, request: pytest.FixtureRequest) -> Iterator[Engine]:
    with Engine(node.run_dir, tenant=request.node.name) as engine:
        until_whole(node, engine)
        yield engine


def ssd(node: Node, *rules: str) -> tuple[str, ...]:
    return tuple(f"{node.directory / 'ssd'} {rule}" for rule in rules)


def trouble(node: Node, tier: Tier) -> str:
    return next(view.trouble for view in overview(node.info).tiers if view.tier == tier)


def only_on(engine: Engine, tier: Tier, seed: int) -> None:
    """A prompt that only this tier has."""
    prompt = engine.prompt(seed, CHUNKS)
    assert engine.save(prompt).wait(0)
    assert engine.producer.flush(prompt, tiers=("ssd", "remote"))
    others = (Tier.DRAM, Tier.REMOTE) if tier is Tier.SSD else (Tier.DRAM, Tier.SSD)
    engine.drop_from(prompt, *others)


@pytest.mark.parametrize("rules", [DISK_FULL, REMOUNTED, DYING], ids=["full", "read-only", "dying"])
def test_a_disk_that_takes_nothing_costs_the_ssd_tier_and_not_dram(
    node: Node, engine: Engine, faults: IoFaults, rules: tuple[str, ...]
) -> None:
    only_on(engine, Tier.SSD, 1)
    refused = counters(node)["gather_refused_ssd_chunks"]
    faults.set(*ssd(node, *rules))
    for seed in range(2, 6):
        prompt = engine.prompt(seed, CHUNKS)
        assert engine.save(prompt).wait(0)
        assert engine.load(prompt).by_tier == {Tier.DRAM: CHUNKS}
    until(lambda: counters(node)["gather_refused_ssd_chunks"] >= refused + 4 * CHUNKS, "each is refused, and counted")
    until(lambda: trouble(node, Tier.SSD) == "read-only", "the node says so")
    assert node.status().state == "ready"
    assert engine.load(engine.prompt(1, CHUNKS)).chunks == CHUNKS, "what is stored can still be loaded"
    assert slot_states(node)[SlotState.DOOMED] == 0
    faults.clear()
    late = [engine.prompt(seed, CHUNKS) for seed in range(1, 6)]
    until(lambda: all(engine.producer.flush(prompt, tiers=("ssd",), timeout_s=0) for prompt in late), "all get in")
    until(lambda: trouble(node, Tier.SSD) == "", "the node says so")
    assert "the SSD tier takes nothing" in node.paths.log("persist").read_text()


@pytest.mark.parametrize("rule", ["read EIO", "open EIO", "read flip", "open EMFILE"])
def test_a_chunk_that_cannot_be_read_is_computed_again(node: Node, engine: Engine, faults: IoFaults, rule: str) -> None:
    only_on(engine, Tier.SSD, 1)
    prompt = engine.prompt(1, CHUNKS)
    faults.set(*ssd(node, rule))
    result = engine.load(prompt)
    # A bit that flips in what fills a block up harms nobody; what is loaded is compared byte by byte.
    assert result.chunks < (CHUNKS if rule == "read flip" else 1) and result.reason
    faults.clear()
    # A descriptor that could not be had says nothing of the chunk.
    assert engine.load(prompt).chunks == (CHUNKS if rule == "open EMFILE" else result.chunks)
    engine.save(prompt)
    assert engine.load(prompt).chunks == CHUNKS


def test_a_bit_that_is_wrong_now_and_then_never_reaches_an_engine(node: Node, engine: Engine, faults: IoFaults) -> None:
    for seed in range(6):
        only_on(engine, Tier.SSD, seed)
    faults.set(*ssd(node, "read flip%0.2"))
    loaded = [engine.load(engine.prompt(seed, CHUNKS)).chunks for seed in range(6)]  # every byte is compared
    assert sum(loaded) < 6 * CHUNKS
    assert counters(node, "persist")["persist_corrupt_chunks"]


def test_reads_and_writes_in_pieces_are_put_together(node: Node, engine: Engine, faults: IoFaults) -> None:
    faults.set(*ssd(node, "write short", "read short"))
    for seed in range(20):
        only_on(engine, Tier.SSD, seed)
    for seed in range(20):
        assert engine.load(engine.prompt(seed, CHUNKS)).chunks == CHUNKS


@pytest.mark.parametrize("rule", ["any EIO", "make ENOSPC", "write EROFS", "write short", "read short", "read flip"])
def test_a_store_that_fails_or_lies_costs_what_only_it_has(
    node: Node, engine: Engine, faults: IoFaults, remote: Path, rule: str
) -> None:
    only_on(engine, Tier.REMOTE, 1)
    only_on(engine, Tier.SSD, 2)
    faults.set(f"{remote} {rule}")
    for seed in range(3, 6):
        prompt = engine.prompt(seed, CHUNKS)
        assert engine.save(prompt).wait(0)
        assert engine.producer.flush(prompt, tiers=("ssd",))
    result = engine.load(engine.prompt(1, CHUNKS))
    assert result.chunks in ((0,) if rule in ("any EIO", "read flip") else (CHUNKS,))
    assert engine.load(engine.prompt(2, CHUNKS)).by_tier == {Tier.SSD: CHUNKS}
    faults.clear()
    late = [engine.prompt(seed, CHUNKS) for seed in range(3, 6)]
    until(lambda: all(engine.producer.flush(prompt, tiers=("remote",), timeout_s=0) for prompt in late), "all get in")
    until(lambda: trouble(node, Tier.REMOTE) == "", "the node says so")


def test_a_disk_that_fails_while_persist_starts_costs_what_it_has(
    shared: Node, faults: IoFaults, request: pytest.FixtureRequest
) -> None:
    with Engine(shared.run_dir, tenant=request.node.name) as engine:
        until_whole(shared, engine)
        only_on(engine, Tier.SSD, 1)
        prompt = engine.prompt(1, CHUNKS)
        for rule, there in (("read EIO", 0), ("make EROFS", CHUNKS)):
            faults.set(*ssd(shared, rule))
            pid = shared.kill("persist", signal.SIGKILL)
            shared.wait_restarted("persist", pid)
            until_whole(shared, engine)
            assert engine.load(prompt).chunks == there, rule
            faults.clear()
            engine.drop_from(prompt, Tier.DRAM)
        pid = shared.kill("persist", signal.SIGKILL)
        shared.wait_restarted("persist", pid)
        until_whole(shared, engine)
        assert engine.load(prompt).chunks == CHUNKS, "it was there all the time"
    assert_nothing_leaks(shared, LEASES)
