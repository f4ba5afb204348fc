"""Processes that can open nothing more: calls return, nothing wrong is loaded, with descriptors all is as before."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from rig import Engine, EngineProcess, all_tiers, assert_nothing_leaks, until, until_whole

from lmpipe.testing import Node

CHUNKS = 6
LEASES = 8
FEWEST = 12
"""poll() takes no more descriptors than a process may have."""


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    changes = all_tiers(tmp_path_factory.mktemp("remote"), dram="1MiB")
    changes["tiers"]["dram"]["slots"] = 64
    changes["tiers"]["ssd"] |= {"capacity": "4MiB", "segment": "1MiB"}
    with Node(changes) as node:
        yield node


@contextmanager
def none_left(pid: int) -> Iterator[None]:
    """A process that gets no new descriptor."""
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    used = {int(entry.name) for entry in Path(f"/proc/{pid}/fd").iterdir()}
    first_free = next(number for number in range(1 << 20) if number not in used)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (max(first_free, FEWEST), before[1]))
    try:
        yield
    finally:
        if Path(f"/proc/{pid}").exists():
            resource.prlimit(pid, resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize("victim", ["gather", "compress", "persist", "replicate"])
def test_a_worker_without_descriptors_costs_what_it_would_have_done(node: Node, victim: str) -> None:
    """It may fail or be started again; nobody else notices more than misses. Engines come and go meanwhile."""
    with Engine(node.run_dir, tenant=victim) as engine, EngineProcess(node, tenant=victim) as other:
        until_whole(node, engine)
        with none_left(node.pid(victim)):
            other.tell("churn", seed=1, prompts=20, chunks=CHUNKS, seconds=0.6, deadline_ms=300)
            for seed in range(8):
                prompt = engine.prompt(seed, CHUNKS)
                ids = engine.prefill(prompt)
                ticket = engine.send(prompt, ids)
                if not ticket.wait(2.0):
                    engine.producer.cancel(ticket)
                    until(ticket.copied.is_set)
                engine.memory.free(ids)
                engine.load(prompt, deadline_ms=300)  # compares every byte
            with Engine(node.run_dir, tenant=victim, wait_s=0.5) as late:
                late.load(late.prompt(1, CHUNKS), deadline_ms=300)
            other.hear()
        until_whole(node, engine)
        seeds = iter(range(100, 10_000))
        until(lambda: _goes_through(engine, next(seeds)), "all is as before")
    assert_nothing_leaks(node, LEASES)


def _goes_through(engine: Engine, seed: int) -> bool:
    prompt = engine.prompt(seed, CHUNKS)
    if not engine.save(prompt).wait(0) or not engine.producer.flush(prompt, tiers=("ssd", "remote"), timeout_s=1):
        return False
    return engine.load(prompt).chunks == CHUNKS


@pytest.mark.parametrize("mapped", [False, True])
def test_an_engine_without_descriptors_goes_on(node: Node, mapped: bool) -> None:
    with EngineProcess(node, mapped=mapped, tenant=f"engine {mapped}") as engine:
        assert engine.ask("save", seed=1, chunks=CHUNKS)["saved"] == CHUNKS
        with none_left(engine.pid):
            assert engine.ask("load", seed=1, chunks=CHUNKS)["chunks"] == CHUNKS, "what is mapped needs none"
            engine.ask("churn", seed=1, prompts=20, chunks=CHUNKS, seconds=0.4, deadline_ms=300)
            pid = node.kill("gather")
            node.wait_restarted("gather", pid)
            engine.ask("churn", seed=2, prompts=20, chunks=CHUNKS, seconds=0.4, deadline_ms=300)
        until(lambda: engine.ask("save", seed=3, chunks=1)["dropped"] == {}, "it is there again")
        assert engine.ask("load", seed=3, chunks=1)["chunks"] == 1
    assert_nothing_leaks(node, LEASES)
