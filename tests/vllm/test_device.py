"""The worker's way for a KV cache on a GPU, in a real engine whose pages only a pool of the test's own reaches: loads
beside the steps, loads within a step layer by layer, and what goes wrong with them. Tokens are those without lmpipe.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cached import CHUNK, ask, connector, idle, only, producers, ready, settled, tiers, tokens, until
from device_memory import Deferred, DeferredPool
from harness import Engine
from processes import EngineProcess

from lmpipe.engines.vllm import worker as worker_module
from lmpipe.engines.vllm.connector import LMPipeConnector
from lmpipe.testing import Node

LAYERS = 4
Log = list[tuple[str, object]]


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    with Node(tiers(tmp_path_factory.mktemp("tiers"))) as node:
        yield node


@pytest.fixture(scope="module")
def log() -> Log:
    return []


@pytest.fixture(scope="module")
def engine(node: Node, llama: Path, log: Log) -> Iterator[Engine]:
    """This process copies saves; few blocks, so that they are soon used again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker_module, "device_memory", lambda caches, _: Deferred(caches, log, None))
        patch.setattr(LMPipeConnector, "save_kv_layer", lambda _, name, *__, **___: log.append(("attention", name)))
        settings = connector(node, pages="private", free_deadline_ms=300)
        with Engine(llama, settings, num_gpu_blocks_override=61, max_model_len=1024) as engine:
            yield engine


@pytest.fixture
def whole(engine: Engine, log: Log) -> Iterator[Engine]:
    """On a healthy node; afterwards every block comes free, and no copy keeps the arena."""
    yield ready(engine)
    pool_of(engine).damaged = {}
    idle(engine)
    assert engine.free_blocks == 60
    assert pool_of(engine).users == 0 and not producers(engine)[1]._loader._under_way
    log.clear()


def pool_of(engine: Engine) -> DeferredPool:
    return engine.worker_connector._worker._groups[0].pool


def saved(engine: Engine, tier: str, node: Node) -> list[int]:
    """A prompt whose chunks are in one tier, and not in the engine."""
    prompt = tokens(4 * CHUNK + 5)
    ask(engine, [prompt], 1)
    settled(engine, tier, prompt=prompt)
    only(node, tier)
    engine.reset_prefix_cache()
    return prompt


def what(log: Log, *kinds: str) -> list[tuple[str, object]]:
    """What happened of these kinds from the last load's beginning on."""
    first = max(at for at, (kind, _) in enumerate(log) if kind == "begin")
    return [each for each in log[first:] if each[0] in kinds]


def test_each_layer_waits_for_its_own(whole: Engine, node: Node, plain: EngineProcess, log: Log) -> None:
    prompt = saved(whole, "dram", node)
    log.clear()
    assert ask(whole, [prompt], 1) == (plain.generate([prompt], 1), [4 * CHUNK])
    names = list(whole.kv_caches)
    pairs = [each for at, name in enumerate(names) for each in (("wait", at), ("attention", name))]
    assert len(names) == LAYERS
    assert what(log, "wait", "attention", "finish") == [*pairs, ("finish", None)]
    marked = [kind for kind, _ in log if kind in ("mark", "begin")]
    assert marked[:2] == ["mark", "begin"], "the load begins after what the engine has ordered"


@pytest.mark.parametrize("tier", ["ssd", "remote"])
def test_what_lies_below_dram_is_loaded_beside_the_steps(
    whole: Engine, node: Node, plain: EngineProcess, log: Log, tier: str
) -> None:
    prompt = saved(whole, tier, node)
    log.clear()
    assert ask(whole, [prompt]) == (plain.generate([prompt], 8), [4 * CHUNK])
    assert "load" in dict(log) and "begin" not in dict(log)
    assert {by for kind, by in log if kind == "mark"} == {"MainThread"}, "copies begin after the engine's stream"


def test_loads_begin_after_new_pages_were_cleared(
    whole: Engine, node: Node, plain: EngineProcess, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where vLLM has the GPU do that between the beginning of a step and its loads."""
    prompt = saved(whole, "ssd", node)
    with monkeypatch.context() as patch:
        patch.setattr(worker_module.Worker, "_is_cleared_late", True)
        assert ask(whole, [prompt]) == (plain.generate([prompt], 8), [4 * CHUNK])
    assert "load" in dict(log)


def test_in_company_it_is_loaded_beside_the_steps(whole: Engine, node: Node, plain: EngineProcess, log: Log) -> None:
    prompts = [saved(whole, "dram", node), tokens(CHUNK)]
    assert ask(whole, prompts) == (plain.generate(prompts, 8), [4 * CHUNK, 0])
    assert "load" in dict(log) and "begin" not in dict(log)


def test_a_whole_graph_is_replayed_after_all_layers(
    whole: Engine, node: Node, plain: EngineProcess, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As vLLM replays one: no layer calls back."""
    prompt = saved(whole, "dram", node)
    start = LMPipeConnector.start_load_kv

    def replay(connector: LMPipeConnector, context: Any, **how: Any) -> None:
        monkeypatch.setattr(context, "attn_metadata", None)
        start(connector, context, **how)
        monkeypatch.undo()

    with monkeypatch.context() as patch:
        patch.setattr(LMPipeConnector, "wait_for_layer_load", lambda *_: None)
        patch.setattr(LMPipeConnector, "start_load_kv", replay)
        monkeypatch = pytest.MonkeyPatch()
        assert ask(whole, [prompt], 1) == (plain.generate([prompt], 1), [4 * CHUNK])
    assert what(log, "wait", "attention")[:2] == [("wait", LAYERS - 1), ("attention", next(iter(whole.kv_caches)))]


def test_layers_that_do_not_wait(
    whole: Engine, node: Node, plain: EngineProcess, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What they computed is computed again; from then on loads are waited for before the forward."""
    prompts = [saved(whole, "dram", node), saved(whole, "dram", node)]
    wanted = plain.generate(prompts, 8)
    with monkeypatch.context() as patch:
        patch.setattr(LMPipeConnector, "wait_for_layer_load", lambda *_: None)
        assert ask(whole, prompts[:1])[0] == wanted[:1]
        whole.reset_prefix_cache()
        assert ask(whole, prompts[1:]) == (wanted[1:], [4 * CHUNK])
    assert what(log, "wait") == [("wait", LAYERS - 1)]
    whole.worker_connector._worker._layers._by_layer = True


@pytest.mark.parametrize("come", [0, 1, 3, "raise"])
def test_a_load_that_fails(
    whole: Engine, node: Node, plain: EngineProcess, monkeypatch: pytest.MonkeyPatch, come: int | str
) -> None:
    prompt = saved(whole, "dram", node)
    longer = prompt + tokens(2 * CHUNK)
    with monkeypatch.context() as failing:
        if come == "raise":
            failing.setattr(pool_of(whole), "begun", broken)
        else:
            failing.setattr(pool_of(whole), "damaged", dict.fromkeys(range(int(come), 4), "injected"))
        assert ask(whole, [longer])[0] == plain.generate([longer], 8)
    again = longer + tokens(CHUNK)
    expected = plain.generate([again], 8)
    assert ask(whole, [again])[0] == expected
    settled(whole, "dram", prompt=longer)
    whole.reset_prefix_cache()
    answer, (cached,) = ask(whole, [again])
    assert answer == expected
    assert cached >= len(longer) // CHUNK * CHUNK


def broken() -> None:
    raise RuntimeError("injected")


def test_an_abort_while_layers_are_loaded(
    whole: Engine, node: Node, plain: EngineProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = saved(whole, "dram", node)
    aborted: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(pool_of(whole), "begun", lambda: whole.abort(*aborted))
        aborted.append(whole.add_request(prompt))
        whole.drain()
    assert ask(whole, [prompt])[0] == plain.generate([prompt], 8)


def test_gather_is_killed_while_layers_are_loaded(
    whole: Engine, node: Node, plain: EngineProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The slots are held by the engine's own process: nothing is lost."""
    prompt, pid = saved(whole, "dram", node), node.pid("gather")
    with monkeypatch.context() as patch:
        patch.setattr(pool_of(whole), "begun", lambda: node.kill("gather", signal.SIGKILL))
        assert ask(whole, [prompt]) == (plain.generate([prompt], 8), [4 * CHUNK])
    node.wait_restarted("gather", pid)
    until(lambda: producers(whole)[1].wait_ready(1), "it is registered again")


def test_a_forward_that_fails(
    whole: Engine, node: Node, plain: EngineProcess, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its loads end all the same, and nothing of them is kept."""
    prompt = saved(whole, "dram", node)
    connected = whole.worker_connector
    found: list[Any] = []
    with monkeypatch.context() as patch:
        load = producers(whole)[1].load_layers
        patch.setattr(
            producers(whole)[1],
            "load_layers",
            lambda what, *given, **how: (found.append(what), load(what, *given, **how))[1],
        )
        patch.setattr(LMPipeConnector, "wait_for_layer_load", lambda *_: broken())
        name = whole.add_request(prompt)
        with pytest.raises(RuntimeError, match="injected"):
            whole.drain()
    whole.abort(name)
    assert what(log, "finish") == [("finish", None)]
    assert found and found[0].holds is None and not connected._worker._layers._under_way
    whole.worker_connector._worker._layers._by_layer = True
