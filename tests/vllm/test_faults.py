"""Whatever happens to lmpipe, or to a request in the middle of something: the tokens are right, and nothing leaks."""

from __future__ import annotations

import random
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cached import CHUNK, ask, connector, idle, producers, ready, settled, tiers, tokens, until
from harness import Engine
from processes import EngineProcess

from lmpipe.cli import main
from lmpipe.producer import LoadResult
from lmpipe.testing import Node

BLOCK = 32
DEADLINE_MS = 400


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    with Node(tiers(tmp_path_factory.mktemp("tiers"), dram={"capacity": "16MiB"}, codec="zstd")) as node:
        yield node


@pytest.fixture(scope="module")
def engine(node: Node, llama: Path) -> Iterator[Engine]:
    """Few blocks, so that they are soon used again; short deadlines, so that a stopped gather is soon given up."""
    settings = connector(node, load_deadline_ms=DEADLINE_MS, free_deadline_ms=300)
    with Engine(llama, settings, num_gpu_blocks_override=61, max_model_len=1024) as engine:
        yield engine


@pytest.fixture
def whole(engine: Engine) -> Iterator[Engine]:
    """The engine on a healthy node, and what has to hold when the test is over: every block comes free again."""
    yield ready(engine)
    idle(engine)
    assert engine.free_blocks == 60


def saved(engine: Engine, prompt: list[int], tier: str, node: Node) -> None:
    """Have a prompt's chunks in one tier, and not in the engine."""
    ask(engine, [prompt], 1)
    settled(engine, tier, prompt=prompt)
    if tier == "ssd":
        assert main(["clear", str(node.run_dir), "--tier=dram"]) == 0
    engine.reset_prefix_cache()


@pytest.mark.parametrize(
    ("come", "company"), [(0, False), (1, False), (3, False), ("raise", False), (1, True), ("raise", True)]
)
def test_a_load_that_fails(
    whole: Engine, node: Node, plain: EngineProcess, monkeypatch: pytest.MonkeyPatch, come: int | str, company: bool
) -> None:
    """Alone it is made within the step that computes on it, in company beside the steps."""
    prompt = tokens(4 * CHUNK + 5)
    longer, other = prompt + tokens(2 * CHUNK), [tokens(CHUNK)] if company else []
    saved(whole, prompt, "dram", node)
    worker = producers(whole)[1]
    load = worker.load

    def fail(found: Any, pool: Any, blocks: Any, **how: Any) -> LoadResult:
        if come == "raise":
            found.release()
            raise RuntimeError("injected")
        for cache in whole.kv_caches.values():
            cache[blocks[come:].ravel().tolist()] = 3.0  # what lies there must not be attended to
        if come:
            load(found, pool, blocks[:come], **how)
        found.release()
        return LoadResult(int(come) * CHUNK, int(come), 0, {}, "injected", 0.0)

    with monkeypatch.context() as failing:
        failing.setattr(worker, "load", fail)
        found, _ = ask(whole, [longer, *other])
    assert found == plain.generate([longer, *other], 8)

    # Nothing that was computed on it is left, neither saved nor in the engine's own blocks.
    again = longer + tokens(CHUNK)
    expected = plain.generate([again], 8)
    assert ask(whole, [again])[0] == expected
    settled(whole, "dram", prompt=longer)
    whole.reset_prefix_cache()
    answer, (cached,) = ask(whole, [again])
    assert answer == expected
    assert cached >= len(longer) // CHUNK * CHUNK


def test_a_load_that_fails_for_a_request_that_was_aborted_meanwhile(
    whole: Engine, node: Node, plain: EngineProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM looks for the failed blocks of living requests only; those of others must not be shared either."""
    prompt = tokens(4 * CHUNK + 5)
    saved(whole, prompt, "dram", node)
    aborted: list[str] = []

    def fail(found: Any, pool: Any, blocks: Any, **how: Any) -> LoadResult:
        for cache in whole.kv_caches.values():
            cache[blocks.ravel().tolist()] = 3.0
        found.release()
        whole.abort(*aborted)
        return LoadResult(0, 0, 0, {}, "injected", 0.0)

    with monkeypatch.context() as failing:
        failing.setattr(producers(whole)[1], "load", fail)
        aborted.append(whole.add_request(prompt))
        whole.drain()
    assert ask(whole, [prompt])[0] == plain.generate([prompt], 8)


def test_gather_is_stopped_in_a_load(whole: Engine, node: Node, plain: EngineProcess) -> None:
    prompts = [tokens(5 * CHUNK + 1) for _ in range(3)]
    wanted = plain.generate(prompts, 8)
    for prompt in prompts:
        saved(whole, prompt, "ssd", node)
    node.kill("gather", signal.SIGSTOP)
    assert ask(whole, prompts[:1])[0] == wanted[:1]
    # Stopped while the chunks are on their way: what comes late must not reach blocks that are others' by then.
    timer = threading.Timer(DEADLINE_MS / 2000, lambda: node.kill("gather", signal.SIGCONT))
    timer.start()
    assert ask(whole, prompts[1:2])[0] == wanted[1:2]
    timer.join()
    assert ask(whole, prompts)[0] == wanted
    ready(whole)
    settled(whole)
    whole.reset_prefix_cache()
    got, cached = ask(whole, prompts)
    assert got == wanted
    assert cached[1] == 5 * CHUNK  # it came late, into DRAM; of the SSD admission may think less after this


@pytest.mark.parametrize("process", ["gather", "compress", "persist", "replicate"])
def test_a_process_is_killed_in_a_load(whole: Engine, node: Node, plain: EngineProcess, process: str) -> None:
    prompt = tokens(6 * CHUNK + 1)
    wanted = plain.generate([prompt], 8)
    saved(whole, prompt, "ssd", node)
    pid = node.kill(process, signal.SIGSTOP)
    timer = threading.Timer(0.1, lambda: node.kill(process, signal.SIGKILL))
    timer.start()
    assert ask(whole, [prompt])[0] == wanted
    timer.join()
    node.wait_restarted(process, pid)
    ready(whole)
    settled(whole)
    whole.reset_prefix_cache()
    until(lambda: producers(whole)[0].lookup(producers(whole)[0].prompt(prompt)).chunks == 6, "the chunks are back")
    assert ask(whole, [prompt])[0] == wanted


def test_kills_at_random(whole: Engine, node: Node, plain: EngineProcess) -> None:
    dice = random.Random(20261122)
    prompts = [tokens(dice.randrange(2, 8) * CHUNK + dice.randrange(CHUNK)) for _ in range(6)]
    wanted = plain.generate(prompts, 8)
    for _ in range(8):
        process = dice.choice(["gather", "persist", "compress"])
        pid = node.pid(process)
        timer = threading.Timer(dice.uniform(0.0, 0.5), lambda name: node.kill(name, signal.SIGKILL), [process])
        timer.start()
        if dice.random() < 0.7:
            whole.reset_prefix_cache()
        assert ask(whole, prompts)[0] == wanted
        timer.join()
        node.wait_restarted(process, pid)
    ready(whole)


def test_an_abort_while_a_save_is_copied(whole: Engine, node: Node, plain: EngineProcess) -> None:
    prompt, others = tokens(8 * CHUNK + 1), [tokens(7 * CHUNK + 3) for _ in range(4)]
    wanted = plain.generate([prompt, *others], 8)
    node.kill("gather", signal.SIGSTOP)
    name = whole.add_request(prompt, 200)
    while len(whole.step().get(name, ())) < 2:
        pass
    whole.abort(name)
    assert ask(whole, others)[0] == wanted[1:]  # in the blocks that were the aborted request's
    node.kill("gather", signal.SIGCONT)
    ready(whole)
    settled(whole)
    whole.reset_prefix_cache()
    assert ask(whole, [prompt, *others])[0] == wanted


def test_blocks_of_the_finished_do_not_wait_for_ever(whole: Engine, node: Node, plain: EngineProcess) -> None:
    prompt = tokens(8 * CHUNK + 1)
    wanted = plain.generate([prompt], 8)
    node.kill("gather", signal.SIGSTOP)
    assert ask(whole, [prompt])[0] == wanted
    idle(whole)
    assert whole.free_blocks == 60
    node.kill("gather", signal.SIGCONT)
    ready(whole)
    whole.reset_prefix_cache()
    assert ask(whole, [prompt])[0] == wanted


@pytest.mark.parametrize("stopped", [False, True], ids=["healthy", "stopped"])
def test_preemption(
    whole: Engine, node: Node, plain: EngineProcess, monkeypatch: pytest.MonkeyPatch, stopped: bool
) -> None:
    prompts = [tokens(4 * CHUNK + 10 * n) for n in range(7)]  # 7 x (256 + 120) tokens and more, in 60 blocks of 32
    wanted = plain.generate(prompts, 120)
    preempt, times = whole.scheduler._preempt_request, []
    monkeypatch.setattr(
        whole.scheduler, "_preempt_request", lambda *args, **how: (times.append(1), preempt(*args, **how))[1]
    )
    if stopped:
        node.kill("gather", signal.SIGSTOP)
    assert ask(whole, prompts, 120)[0] == wanted
    assert times, "nothing was preempted: this test shows nothing"
    if stopped:
        node.kill("gather", signal.SIGCONT)
        ready(whole)
    settled(whole)
    whole.reset_prefix_cache()
    assert ask(whole, prompts, 120)[0] == wanted
