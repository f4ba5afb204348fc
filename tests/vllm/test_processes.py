"""Engines in processes of their own: what one has saved the next one hits, and what one leaves is nobody's trouble."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from cached import CHUNK, ask, connector, ready, settled, stats, tiers, tokens, until
from harness import Engine
from processes import EngineProcess, ServerProcess

from lmpipe.bench import vllm_models
from lmpipe.cli import main
from lmpipe.errors import SegmentError
from lmpipe.launch.overview import EngineView, overview
from lmpipe.shm.pages import PageSegment
from lmpipe.testing import Node


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    with Node(tiers(tmp_path_factory.mktemp("tiers"))) as node:
        yield node


def segments(node: Node) -> list[Path]:
    """Where engines on this node have their KV cache."""
    return sorted(node.paths.pages.glob("*.pages"))


def sessions(node: Node) -> int:
    """Sessions of the node's processes and of engines."""
    return len(list(node.paths.sessions.glob("*.lock")))


def rows(node: Node, tier: str) -> int:
    """Chunks in a tier, a row for each shard."""
    return next(view.rows for view in overview(node.info).tiers if view.tier == tier)


def steady(node: Node, tier: str) -> int:
    """The rows of a tier, when no more come."""
    seen = [-1]

    def same() -> bool:
        seen.append(rows(node, tier))
        time.sleep(0.2)
        return rows(node, tier) == seen[-1]

    until(same, f"{tier} is at rest")
    return seen[-1]


def hits(engine: EngineProcess, prompts: list[list[int]], wanted: list[list[int]], chunks: int) -> None:
    """The tokens are right all the time, and soon `chunks` chunks of each prompt are not computed."""

    def right() -> bool:
        engine.reset_prefix_cache()
        got, cached = engine.generate_with_hits(prompts, 8)
        assert got == wanted
        return cached == [chunks * CHUNK] * len(prompts)

    until(right, "what was saved is hit")


@pytest.fixture
def restarted(tmp_path: Path) -> Iterator[Node]:
    """A node that its test restarts."""
    with Node(tiers(tmp_path)) as node:
        yield node


def test_one_after_another_and_at_once(restarted: Node, llama: Path, plain: EngineProcess) -> None:
    node = restarted
    nobody = sessions(node)
    prompts = [tokens(3 * CHUNK + n) for n in (1, 5)]
    wanted = plain.generate(prompts, 8)
    with EngineProcess(llama, connector(node, name="one")) as one:
        assert one.generate_with_hits(prompts, 8) == (wanted, [0, 0])
        hits(one, prompts, wanted, 3)
    assert not segments(node)
    steady(node, "ssd")
    node.restart(keep_dram=False)
    with EngineProcess(llama, connector(node), wait=False) as two, EngineProcess(llama, connector(node)) as three:
        two.wait()
        hits(two, prompts, wanted, 3)  # from the SSD
        hits(three, prompts, wanted, 3)
        more = [tokens(2 * CHUNK + 9) for _ in range(6)]
        right = plain.generate(more, 8)
        for engine in (two, three):
            engine.ask(more, 8)
        assert [engine.answer()[0] for engine in (two, three)] == [right, right]
        alternating = tokens(CHUNK + 3)
        for engine in (two, three) * 2:
            alternating += tokens(CHUNK)
            assert engine.generate([alternating], 8) == plain.generate([alternating], 8)
        hits(two, more, right, 2)
        # One is killed in the middle of requests; the other one has the machine and the cache for itself.
        assert len(segments(node)) == 2
        three.ask([tokens(3000) for _ in range(4)], 500)
        until(lambda: rows(node, "dram") >= 2 * 6 + 20, "it is at work")
        three.kill()
        fresh = [tokens(4 * CHUNK + 2) for _ in range(3)]
        right = plain.generate(fresh, 8)
        assert two.generate_with_hits(fresh, 8) == (right, [0, 0, 0])
        hits(two, fresh, right, 4)
        two.kill()
    with Engine(llama, connector(node)) as four:
        assert len(segments(node)) == 1  # those of the killed were removed by who came next, or by the node
        assert ask(ready(four), fresh) == (right, [4 * CHUNK] * 3)
    until(lambda: sessions(node) == nobody, "sessions of the killed are gone")


def test_other_engines_do_not_hit(node: Node, llama: Path, plain: EngineProcess, tmp_path: Path) -> None:
    """Blocks of another size, numbers of another kind, weights of another seed: the same tokens under other keys."""
    prompt = tokens(5 * CHUNK + 1)
    wanted = plain.generate([prompt], 8)
    with Engine(llama, connector(node)) as engine:
        assert ask(ready(engine), [prompt]) == (wanted, [0])
        settled(engine)
    other = vllm_models.write_llama(tmp_path / "other", seed=7)
    renamed = vllm_models.write_llama(tmp_path / "renamed")
    for model, change, hit in (
        (llama, {"block_size": 64}, 0),
        (llama, {"dtype": "bfloat16"}, 0),
        (other, {}, 0),
        (renamed, {}, 5 * CHUNK),
    ):
        with Engine(model, enable_prefix_caching=False, **change) as engine:
            right = engine.generate([prompt], 8)
        with Engine(model, connector(node), **change) as engine:
            assert ask(ready(engine), [prompt]) == (right, [hit])
            settled(engine)
            engine.reset_prefix_cache()
            if not change:
                assert ask(engine, [prompt]) == (right, [5 * CHUNK])
    assert right == wanted


def test_two_ranks(node: Node, llama: Path, plain: EngineProcess) -> None:
    prompts = [tokens(4 * CHUNK + n) for n in (1, 30)]
    wanted = plain.generate(prompts, 8)
    with Engine(llama, connector(node)) as one:
        assert ask(ready(one), prompts[:1]) == (wanted[:1], [0])
        settled(one)
    ranks: dict[str, Any] = {"tensor_parallel_size": 2}
    with EngineProcess(llama, connector(node, load_deadline_ms=2000), **ranks) as two:
        assert two.generate_with_hits(prompts, 8) == (wanted, [0, 0])  # not what one rank has saved
        hits(two, prompts, wanted, 4)
        only_of_two = tokens(4 * CHUNK + 1)
        want = plain.generate([only_of_two], 8)
        two.generate([only_of_two], 8)
        hits(two, [only_of_two], want, 4)
    steady(node, "ssd")
    with EngineProcess(llama, connector(node, load_deadline_ms=1000), **ranks) as two:
        hits(two, prompts, wanted, 4)
        assert main(["clear", str(node.run_dir), "--tier=dram"]) == 0
        node.kill("persist", signal.SIGSTOP)  # what is found does not come
        try:
            two.reset_prefix_cache()
            assert two.generate(prompts, 8) == wanted
        finally:
            node.kill("persist", signal.SIGCONT)
        hits(two, prompts, wanted, 4)
    with Engine(llama, connector(node)) as one:
        assert ask(ready(one), [only_of_two]) == (want, [0])


def test_private_pages(
    node: Node, llama: Path, plain: EngineProcess, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """By choice, and where there is no room for pages in shared memory; with preemptions."""
    few: dict[str, Any] = {"num_gpu_blocks_override": 61, "max_model_len": 1024}

    def no_room(*_: Any, **__: Any) -> PageSegment:
        raise SegmentError("no room for pages: injected")

    for settings in ({"pages": "private"}, {}):
        prompts = [tokens(4 * CHUNK + 10 * n) for n in range(7)]
        wanted = plain.generate(prompts, 120)
        with monkeypatch.context() as patch:
            patch.setattr(PageSegment, "create", no_room)
            engine = ready(Engine(llama, connector(node, **settings), **few))
        with engine:
            assert not segments(node)
            for _ in range(2):
                assert ask(engine, prompts, 120)[0] == wanted
                settled(engine)
                engine.reset_prefix_cache()
            hit = ask(engine, prompts[:1], 120)
            assert hit == (wanted[:1], [4 * CHUNK])
            assert stats(engine)["saved_chunks"] >= 7 * 4
    assert [record.message for record in caplog.records if "pages stay private" in record.message] == [
        "pages stay private, this process copies saves itself: no room for pages: injected"
    ]


def test_server(node: Node, llama: Path, plain: EngineProcess, capsys: pytest.CaptureFixture[str]) -> None:
    shared = tokens(4 * CHUNK)
    prompts = [shared + tokens(10 + n) for n in range(4)]
    wanted = plain.generate(prompts, 8)
    with ServerProcess(llama, connector(node, name="server")) as server, ThreadPoolExecutor(2) as clients:
        assert list(clients.map(lambda prompt: server.complete(prompt, 8), prompts)) == wanted
        assert len(segments(node)) == 1
        until(lambda: counted(server, "vllm:lmpipe_saved_chunks_total") >= 4, "all is saved")
    until(lambda: not segments(node), "the pages are gone: vLLM may kill a worker before it has shut down")
    assert server.process.returncode == 0
    with ServerProcess(llama, connector(node, name="server")) as server, ThreadPoolExecutor(2) as clients:
        until(lambda: engine_of(node, "server.rank0"), "it is registered")
        assert list(clients.map(lambda prompt: server.complete(prompt, 8), prompts)) == wanted
        assert counted(server, "vllm:lmpipe_hit_chunks_dram_total") >= 4
        assert counted(server, "vllm:lmpipe_loaded_bytes_total") > 0
        assert counted(server, "vllm:external_prefix_cache_hits_total") >= 4 * CHUNK
        until(lambda: (view := engine_of(node, "server.rank0")) and view.hit_chunks["dram"] >= 4, "status counts hits")
        capsys.readouterr()
        assert main(["status", str(node.run_dir), "--json"]) == 0
        shown = json.loads(capsys.readouterr().out)
        assert any(view["name"].startswith("server.rank0") and view["loaded_bytes"] for view in shown["engines"])
    until(lambda: not segments(node), "the pages are gone")


def engine_of(node: Node, name: str) -> EngineView | None:
    """How `lmpipe status` shows an engine's producer."""
    return next((view for view in overview(node.info).engines if view.name.startswith(name)), None)


def counted(server: ServerProcess, name: str) -> float:
    """A counter of the server, summed over its labels."""
    lines = [line for line in server.metrics().splitlines() if line.startswith((f"{name}{{", f"{name} "))]
    return sum(float(line.rpartition(" ")[2]) for line in lines)
