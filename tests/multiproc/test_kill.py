"""SIGKILL at any moment of a save or a load: the engine goes on, no byte is wrong, what was persisted is found again.

The moments are drawn anew in every run; the seed is shown when a test fails.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from rig import Engine, EngineProcess, all_tiers, assert_nothing_leaks, until, until_whole

from lmpipe.cli import main
from lmpipe.handles import Tier
from lmpipe.testing import Node

LEASES = 8
WORKERS = ["gather", "compress", "persist", "replicate"]
DEADLINE_MS = 1000
PROMPTS, CHUNKS = 12, 10
KILLS = 2


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Node]:
    """An arena of 64 chunks for prompts of 120, so that saves evict and loads come from below."""
    changes = all_tiers(tmp_path_factory.mktemp("remote"), dram="1MiB", codec=getattr(request, "param", "zstd"))
    changes["tiers"]["dram"]["slots"] = 64
    with Node(changes) as node:
        yield node
        until_whole(node)
        node.stop()
        assert "not drained" not in node.output, node.output


def seed_of(node: Node, request: pytest.FixtureRequest) -> int:
    seed = int.from_bytes(os.urandom(4), "little")
    print(f"seed {seed}")
    return seed


class Busy:
    """Engines that save and load in threads until told to stop. What one finds wrong is raised at the end."""

    def __init__(self, engines: list[Engine], seed: int) -> None:
        self.turns, self.loaded, self.saved, self.longest_s = 0, 0, 0, 0.0
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(len(engines))
        self._work_of = [(engine, random.Random(seed + number)) for number, engine in enumerate(engines)]
        self._running: list[Future[None]] = []

    def _work(self, engine: Engine, draw: random.Random) -> None:
        while not self._stop.is_set():
            self.turns += 1  # the prompts are other ones after a while, so that there is always something to save
            prompt = engine.prompt(self.turns // 20 + draw.randrange(PROMPTS), draw.randrange(1, CHUNKS + 1))
            if draw.random() < 0.5:
                self.saved += engine.save(prompt).saved
                continue
            started_s = time.monotonic()
            self.loaded += engine.load(prompt, deadline_ms=DEADLINE_MS).chunks
            self.longest_s = max(self.longest_s, time.monotonic() - started_s)

    def __enter__(self) -> Busy:
        self._running = [self._pool.submit(self._work, engine, draw) for engine, draw in self._work_of]
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._pool.shutdown()
        for work in self._running:
            work.result()


@pytest.fixture
def engines(node: Node, request: pytest.FixtureRequest) -> Iterator[list[Engine]]:
    tenant = request.node.name
    with (
        Engine(node.run_dir, tenant=tenant) as private,
        Engine(node.run_dir, tenant=tenant, pages_in=node.directory) as mapped,
    ):
        until_whole(node, private, mapped)
        yield [private, mapped]


@pytest.mark.parametrize(
    ("node", "victim"),
    [*(("zstd", worker) for worker in WORKERS), ("raw", "persist"), ("raw", "replicate")],
    indirect=["node"],
)
def test_a_worker_killed_at_any_moment_costs_a_recompute_at_most(
    node: Node, victim: str, engines: list[Engine], request: pytest.FixtureRequest
) -> None:
    seed = seed_of(node, request)
    draw = random.Random(seed)
    with Busy(engines, seed) as busy:
        for _ in range(KILLS):
            pid = node.kill(victim, signal.SIGKILL)
            node.wait_restarted(victim, pid)
            time.sleep(draw.random() * 0.2)  # any moment will do
        saved = busy.saved
        until(lambda: busy.saved > saved, "saves are taken again")
    # The promise is the deadline; the rest is what a loaded machine may take to run a thread that is due.
    assert busy.longest_s < DEADLINE_MS / 1000 + 5
    until_whole(node, *engines)
    assert_nothing_leaks(node, LEASES)


def test_what_was_persisted_is_found_again_after_any_worker_died(node: Node, engines: list[Engine]) -> None:
    engine = engines[0]
    prompt = engine.prompt(100, 20)
    assert engine.save(prompt).wait(0)
    assert engine.producer.flush(prompt, tiers=("ssd", "remote"))
    for victim in WORKERS:
        pid = node.kill(victim)
        node.wait_restarted(victim, pid)
        until_whole(node, *engines)
        until(lambda: engine.load(prompt).chunks == 20, f"all is loaded after {victim} died")


def test_what_is_pending_is_persisted_after_all_though_its_taker_died(node: Node, engines: list[Engine]) -> None:
    """The pending bits are the queue: saves made while a tier's process is dead reach it when it is back."""
    for victim in ("persist", "gather"):
        pid = node.pid(victim)
        prompt = engines[0].prompt(200 + len(victim), 12)
        ids = engines[0].prefill(prompt)
        ticket = engines[0].send(prompt, ids)
        assert ticket.wait(20)
        node.kill(victim)
        node.wait_restarted(victim, pid)
        # `flush` gives up while gather is gone; then it is asked again.
        until(lambda p=prompt: engines[0].producer.flush(p, tiers=("ssd", "remote"), timeout_s=1))
        engines[0].memory.free(ids)


@pytest.mark.parametrize("victim", ["persist", "replicate"])
def test_what_was_invalidated_does_not_come_back(node: Node, engines: list[Engine], victim: str) -> None:
    """An answer means that every tier has forgotten; with a tier dead it comes when that is back."""
    engine = engines[0]
    for turn in range(2):
        prompt = engine.prompt(300 + turn, 6)
        assert engine.save(prompt).wait(0)
        assert engine.producer.flush(prompt, tiers=("ssd", "remote"))
        pid = node.pid(victim)
        if turn % 2:
            node.kill(victim)
        removed = engine.producer.invalidate(prompt, timeout_s=20)
        if not turn % 2:
            node.kill(victim)
        node.wait_restarted(victim, pid)
        until_whole(node, *engines)
        assert removed >= 0, "it has waited for the tier that is back"
        assert engine.found(prompt) == 0
        assert engine.producer.prefetch(prompt) == 0


def test_clearing_waits_for_a_tier_that_is_away(node: Node, engines: list[Engine]) -> None:
    engine = engines[0]
    prompt = engine.prompt(310, 6)
    assert engine.save(prompt).wait(0)
    assert engine.producer.flush(prompt, tiers=("ssd", "remote"))
    pid = node.kill("persist")
    assert main(["clear", str(node.run_dir)]) == 0
    node.wait_restarted("persist", pid)
    until_whole(node, *engines)
    assert engine.found(prompt) == 0


def test_what_is_invalidated_right_after_it_was_saved_does_not_come_back(node: Node, engines: list[Engine]) -> None:
    """It may be encoded, written or sent at that moment; the invalidation must not overtake it."""
    engine = engines[0]
    prompts = [engine.prompt(500 + number, 4) for number in range(100)]
    for prompt in prompts:
        assert engine.save(prompt).wait(0)
        assert engine.producer.invalidate(prompt) >= 0
    last = engine.prompt(700, 1)  # what came before it has gone through every stage when this one has
    assert engine.save(last).wait(0)
    assert engine.producer.flush(last, tiers=("ssd", "remote"))
    assert [engine.found(prompt) for prompt in prompts] == [0] * len(prompts)


@pytest.mark.parametrize("mapped", [False, True])
def test_an_engine_killed_at_any_moment_leaves_nothing_and_its_saves_are_right(
    node: Node, engines: list[Engine], mapped: bool, request: pytest.FixtureRequest
) -> None:
    seed = seed_of(node, request)
    draw = random.Random(seed)
    for turn in range(3):
        process = EngineProcess(node, mapped=mapped, tenant=request.node.name)
        process.ask("save", seed=400, chunks=8)
        process.ask("hold", seed=400, chunks=8)
        process.tell("churn", seed=seed + turn, prompts=PROMPTS, chunks=CHUNKS, seconds=60)
        time.sleep(draw.random() * 0.3)
        process.kill()
        process.close()
    for number in range(PROMPTS):
        engines[0].load(engines[0].prompt(number, CHUNKS))  # checks every byte
    assert_nothing_leaks(node, LEASES)


def test_an_engine_that_comes_back_at_once_finds_its_place() -> None:
    """A refusal is for good, so it must not be for the place of a dead engine."""
    with Node({"tiers": {"ssd": None}, "engines": {"max_producers": 1}}) as node:
        for _ in range(3):
            with EngineProcess(node) as process:
                assert process.state == "ready"
                process.kill()


def test_the_supervisor_s_death_stops_no_engine(tmp_path: Path) -> None:
    with Node(all_tiers(tmp_path)) as node, Engine(node.run_dir) as engine:
        until_whole(node, engine)
        prompt = engine.prompt(1, 10)
        assert engine.save(prompt).wait(0)
        node.kill("supervisor")
        assert engine.load(prompt).chunks == 10
        assert engine.save(engine.prompt(2, 10)).wait(0)
        assert engine.producer.flush(prompt, tiers=("ssd", "remote"))
        node.start()
        until_whole(node, engine)
        assert engine.load(prompt).by_tier == {Tier.DRAM: 10}
        assert engine.load(engine.prompt(2, 10)).by_tier == {Tier.DRAM: 10}
        assert_nothing_leaks(node, LEASES)


def test_everything_killed_at_once_during_saves_and_loads(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    lost: dict[str, Callable[[Node], object]] = {
        "nothing": lambda node: None,
        "all of shared memory": lambda node: (node.paths.arena.unlink(), node.paths.node_shm.unlink()),
    }
    with Node(all_tiers(tmp_path)) as node, Engine(node.run_dir) as engine:
        seed = seed_of(node, request)
        kept = engine.prompt(1000, 12)
        assert engine.save(kept).wait(0)
        assert engine.producer.flush(kept, tiers=("ssd", "remote"))
        for turn, (what, lose) in enumerate(lost.items()):
            with Busy([engine], seed + turn) as busy:
                until(lambda b=busy: b.saved > 20, "some saves", 60)
                node.kill("all")
                assert engine.load(kept, deadline_ms=DEADLINE_MS).chunks in (0, 12)
                lose(node)
                node.start()
                until_whole(node, engine)
            until(lambda: engine.load(kept).chunks == 12, f"what was persisted is found without {what}")
            assert_nothing_leaks(node, LEASES)
