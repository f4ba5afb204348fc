"""SIGKILL of any process while a load or a save waits for it: the wait ends with its reason, long before the deadline,
and hits are back with the next life. The process is stopped first, so that something surely waits for it.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
from rig import WAIT_S, Engine, all_tiers, assert_nothing_leaks, until, until_whole

from lmpipe.handles import Tier
from lmpipe.keys import Prompt
from lmpipe.launch.claim import WorkerNote
from lmpipe.producer import LoadResult
from lmpipe.producer import link as link_module
from lmpipe.testing import Node

DEADLINE_S = 30.0
LONG_BEFORE_S = DEADLINE_S / 2
CHUNKS = 8
LEASES = 8
SILENT_BEAT_MS = 60_000
"""So rare that no heartbeat is what tells of a death."""


@pytest.fixture(scope="module", params=["raw", "zstd"])
def node(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Node]:
    with Node(all_tiers(tmp_path_factory.mktemp("remote"), codec=request.param)) as node:
        yield node


@pytest.fixture
def engine(node: Node, request: pytest.FixtureRequest) -> Iterator[Engine]:
    with Engine(node.run_dir, tenant=request.node.name) as engine:
        until_whole(node, engine)
        yield engine


def lying_in(engine: Engine, tier: Tier, seed: int) -> Prompt:
    """A prompt that only this tier has."""
    prompt = engine.prompt(seed, CHUNKS)
    assert engine.save(prompt).wait(0)
    assert engine.producer.flush(prompt, tiers=("ssd", "remote"))
    engine.drop_from(prompt, *(Tier.DRAM, Tier.SSD)[: 1 if tier is Tier.SSD else 2])
    return prompt


def load_while(node: Node, engine: Engine, prompt: Prompt, victim: str, *, stop: bool = True) -> LoadResult:
    """Load while a process is stopped, and kill it when the load has surely been asked for."""
    pid = node.kill(victim, signal.SIGSTOP if stop else signal.SIGCONT)
    with ThreadPoolExecutor(1) as pool:
        loading: Future[LoadResult] = pool.submit(engine.load, prompt, deadline_ms=1000 * DEADLINE_S)
        until(lambda: engine.producer._link._answers, "the load has been asked for")
        time.sleep(0.1)  # and goes as far as it can
        assert not loading.done()
        node.kill(victim)
        result = loading.result(WAIT_S)
    node.wait_restarted(victim, pid)
    return result


@pytest.mark.parametrize(
    ("victim", "tier"),
    [
        ("gather", Tier.SSD),
        ("gather", Tier.REMOTE),
        ("compress", Tier.SSD),
        ("compress", Tier.REMOTE),
        ("persist", Tier.SSD),
        ("persist", Tier.REMOTE),
        ("replicate", Tier.REMOTE),
    ],
)
def test_a_load_ends_with_the_stage_that_it_waits_for(node: Node, engine: Engine, victim: str, tier: Tier) -> None:
    if victim not in node.topology.stages:
        pytest.skip("raw chunks need no compress")
    prompt, other = lying_in(engine, tier, 1), engine.prompt(2, CHUNKS)
    assert engine.save(other).wait(0)
    result = load_while(node, engine, prompt, victim)
    assert (result.chunks, result.reason) == (0, f"{victim} died")
    assert result.seconds < LONG_BEFORE_S
    assert engine.load(other).by_tier == {Tier.DRAM: CHUNKS}
    until_whole(node, engine)
    until(lambda: engine.load(prompt).chunks == CHUNKS, "it is loaded with the next life")
    assert_nothing_leaks(node, LEASES)


def test_an_answer_lost_on_its_way_costs_one_load(node: Node, engine: Engine) -> None:
    """replicate is asked, and answers only when the persist between is another one."""
    prompt = lying_in(engine, Tier.REMOTE, 1)
    node.kill("replicate", signal.SIGSTOP)
    result = load_while(node, engine, prompt, "persist", stop=False)
    assert (result.chunks, result.reason) == (0, "persist died")
    node.kill("replicate", signal.SIGCONT)
    until_whole(node, engine)
    until(lambda: engine.load(prompt).chunks == CHUNKS, "it is loaded")
    assert_nothing_leaks(node, LEASES)


def test_what_lies_in_dram_is_loaded_though_the_rest_of_the_prompt_is_not(node: Node, engine: Engine) -> None:
    prompt = lying_in(engine, Tier.SSD, 1)
    assert engine.load(prompt).chunks == CHUNKS
    engine.drop_from(prompt, Tier.DRAM, first=3)
    result = load_while(node, engine, prompt, "persist")
    assert (result.chunks, result.reason, result.by_tier) == (3, "persist died", {Tier.DRAM: 3})
    until_whole(node, engine)


def test_no_load_is_asked_of_a_stage_that_is_dead(node: Node, engine: Engine) -> None:
    prompt = lying_in(engine, Tier.SSD, 1)
    pid = node.kill("persist")
    results: list[LoadResult] = []

    def loaded() -> bool:
        results.append(engine.load(prompt, deadline_ms=1000 * DEADLINE_S))
        return results[-1].chunks == CHUNKS

    until(loaded, "persist is back", DEADLINE_S)
    node.wait_restarted("persist", pid)
    assert all(result.seconds < LONG_BEFORE_S for result in results)
    until_whole(node, engine)


def test_a_producer_needs_no_heartbeat_to_notice_and_to_come_back() -> None:
    """Saves of mapped pages hold the engine's blocks back until they are answered."""
    changes = {"tiers": {"ssd": None}, "heartbeat_ms": SILENT_BEAT_MS, "watchdog_ms": 10 * SILENT_BEAT_MS}
    with Node(changes) as node, Engine(node.run_dir, pages_in=node.directory) as engine:
        link, prompt = engine.producer._link, engine.prompt(1, CHUNKS)
        assert link_module.MISSED_BEATS * link._beat_s > WAIT_S
        assert engine.save(prompt).wait(0)
        pid = node.kill("gather", signal.SIGSTOP)
        ids = engine.prefill(engine.prompt(2, CHUNKS))
        ticket = engine.send(engine.prompt(2, CHUNKS), ids)
        time.sleep(0.1)
        assert not ticket.done
        node.kill("gather")
        assert ticket.wait(WAIT_S) is False
        assert (ticket.dropped, ticket.copied.is_set()) == ({"gather died": CHUNKS}, True)
        engine.memory.free(ids)
        assert engine.load(prompt).chunks == CHUNKS, "DRAM hits need nobody"
        node.wait_restarted("gather", pid)
        assert engine.producer.wait_ready(WAIT_S)
        note = WorkerNote.read(node.paths.up("gather"))
        assert note is not None and link.registered is not None and link.registered.session == note.session
        assert engine.save(engine.prompt(2, CHUNKS)).wait(0)
        assert engine.load(engine.prompt(2, CHUNKS)).chunks == CHUNKS
        assert_nothing_leaks(node, 0)
