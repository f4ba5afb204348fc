"""SIGSTOP in the middle of anything, and SIGCONT much later: nothing is written that is not the sleeper's any more."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from rig import BIG, Engine, EngineProcess, all_tiers, assert_nothing_leaks, slot_states, until, until_whole

from lmpipe.handles import Tier
from lmpipe.lifecycle import SlotState
from lmpipe.testing import Node

LEASES = 8


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    with Node(all_tiers(tmp_path_factory.mktemp("remote"), dram="48MiB")) as node:
        yield node


@pytest.fixture
def engine(node: Node, request: pytest.FixtureRequest) -> Iterator[Engine]:
    with Engine(node.run_dir, tenant=request.node.name) as engine:
        until_whole(node, engine)
        yield engine


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """A process that does not run. If the watchdog has killed it meanwhile, that is its right."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def test_gather_stopped_while_it_copies_pages_that_are_then_reused(node: Node) -> None:
    """The copy goes on when it wakes, over another prompt's bytes: they must not be kept under the first one's key."""
    gather, in_the_middle = node.pid("gather"), 0
    with Engine(node.run_dir, pages_in=node.directory, layout=BIG, pages=32, tenant="mapped") as engine:
        for turn in range(40):
            prompt, other = engine.prompt(1000 + turn, 12), engine.prompt(2000 + turn, 12)
            ids = engine.prefill(prompt)
            ticket = engine.send(prompt, ids)
            time.sleep(turn % 20 * 0.0005)
            with stopped(gather):
                in_the_middle += slot_states(node)[SlotState.WRITING] > 0
                ticket.revoke()
                engine.memory.fill(other.keys, ids)
            ticket.wait(20)
            assert ticket.done
            assert engine.load(prompt).chunks == ticket.saved  # compares every byte with what its key says
            engine.memory.free(ids)
            if in_the_middle >= 3:
                break
        assert in_the_middle, "gather was never stopped within a copy"
    assert_nothing_leaks(node, LEASES)


@pytest.mark.parametrize("sleeper", ["compress", "persist", "replicate"])
def test_a_tier_that_wakes_after_the_deadline_changes_no_page(node: Node, engine: Engine, sleeper: str) -> None:
    prompt = engine.save_below(1, 10)
    if sleeper == "replicate":
        engine.drop_from(prompt, Tier.SSD)
    found = engine.producer.lookup(prompt)
    assert found.chunks == 10
    ids = engine.memory.allocate(10, 16)
    engine.memory.memory[:, ids.ravel()] = 0xEE
    with stopped(node.pid(sleeper)):
        started_s = time.monotonic()
        result = engine.producer.load(found, engine.memory.pool, ids, deadline_ms=150)
        assert time.monotonic() - started_s < 5
        assert result.chunks < 10
        assert "deadline" in result.reason
        assert engine.memory.wrong(prompt.keys[: result.chunks], ids) == []
        engine.memory.fill(prompt.keys, ids)  # computed after all
        before = engine.memory.memory.copy()
    until(lambda: engine.load(prompt).by_tier == {Tier.DRAM: 10}, "the late chunks are kept, and are right")
    assert (engine.memory.memory[:, ids.ravel()] == before[:, ids.ravel()]).all()
    assert_nothing_leaks(node, LEASES)


def test_gather_asleep_costs_what_lies_below_until_the_watchdog_ends_it(node: Node, engine: Engine) -> None:
    below, here = engine.save_below(1, 4), engine.prompt(2, 4)
    assert engine.save(here).wait(0)
    gather = node.pid("gather")
    os.kill(gather, signal.SIGSTOP)
    assert engine.load(here).chunks == 4
    started_s = time.monotonic()
    assert engine.load(below, deadline_ms=300).chunks == 0
    assert time.monotonic() - started_s < 5
    ticket = engine.save(engine.prompt(3, 4))
    assert ticket.dropped, "and it says so"
    assert engine.load(here).chunks == 4
    node.wait_restarted("gather", gather)
    until_whole(node, engine)
    until(lambda: engine.save(engine.prompt(3, 4)).wait(0))
    until(lambda: engine.load(below).chunks == 4)
    assert engine.load(here).by_tier == {Tier.DRAM: 4}
    assert_nothing_leaks(node, LEASES)


def test_a_reader_asleep_keeps_what_it_holds(node: Node) -> None:
    """While it sleeps the arena is written over many times, and others still find what it holds; then even that is
    removed. What it copies is right.
    """
    with (
        EngineProcess(node, tenant="reader") as reader,
        Engine(node.run_dir, tenant="reader") as engine,
        Engine(node.run_dir, tenant="reader", layout=BIG, pages=32, pages_in=node.directory) as large,
    ):
        prompt = engine.prompt(1, 16)
        assert engine.save(prompt).wait(0)
        assert reader.ask("hold", seed=1, chunks=16) == 16
        with stopped(reader.pid):
            for turn in range(6):
                assert large.save(large.prompt(turn, 10)).saved
            assert engine.load(prompt).by_tier == {Tier.DRAM: 16}
            engine.drop_from(prompt, Tier.DRAM)
            for turn in range(6, 12):
                assert large.save(large.prompt(turn, 10)).saved
            with engine.producer.lookup(prompt) as found:
                assert Tier.DRAM not in found.by_tier
            # Chunks of the same size go where there is room first, which would be where the sleeper's lie.
            assert engine.save(engine.prompt(2, 200)).wait(0)
        assert reader.ask("load_held") == 16
    assert_nothing_leaks(node, 0)


def test_engines_stopped_at_any_moment_read_and_write_nothing_wrong(node: Node) -> None:
    seed = int.from_bytes(os.urandom(4), "little")
    print(f"seed {seed}")
    draw = random.Random(seed)
    engines = [EngineProcess(node, mapped=mapped, tenant="any moment") for mapped in (False, True)]
    for number, engine in enumerate(engines):
        engine.tell("churn", seed=seed + number, prompts=6, chunks=12, seconds=2, deadline_ms=2000)
    end_s = time.monotonic() + 2
    while time.monotonic() < end_s:
        pid = draw.choice([*(engine.pid for engine in engines), node.pid("gather"), node.pid("persist")])
        with stopped(pid):
            time.sleep(draw.random() * 0.05)
    for engine in engines:
        done = engine.hear()  # every load has been compared
        assert done["loads"] and done["saves"]
        engine.close()
    assert_nothing_leaks(node, 0)
