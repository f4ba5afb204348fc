"""Models with several cache groups, with a latent for each token, with adapters; blocks and steps of other sizes; and
what is refused. Tokens are those of an engine without lmpipe.
"""

from __future__ import annotations

import gc
import json
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vllm
from cached import CHUNK, ask, connector, idle, only, producers, ready, scramble, settled, tiers, tokens
from harness import Engine
from processes import EngineProcess
from vllm.distributed.kv_transfer import kv_transfer_state
from vllm.distributed.parallel_state import cleanup_dist_env_and_memory
from vllm.lora.request import LoRARequest
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec, MambaSpec

from lmpipe.bench import vllm_models
from lmpipe.engines.vllm.geometry import groups_of
from lmpipe.engines.vllm.settings import check, settings_of
from lmpipe.errors import UnsupportedError
from lmpipe.producer import LoadResult
from lmpipe.testing import Node


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    with Node(tiers(tmp_path_factory.mktemp("tiers"))) as node:
        yield node


def right(model: Path, prompts: list[list[int]], max_tokens: int = 8, **overrides: Any) -> list[list[int]]:
    """The tokens without lmpipe, and without vLLM's own prefix cache."""
    with Engine(model, enable_prefix_caching=False, **overrides) as engine:
        return engine.generate(prompts, max_tokens)


def whole_again(engine: Engine) -> bool:
    """Whether every block has come free."""
    idle(engine)
    return engine.free_blocks == engine.scheduler.kv_cache_manager.block_pool.num_gpu_blocks - 1


def fail(engine: Engine, monkeypatch: pytest.MonkeyPatch, group: int, come: int) -> None:
    """From now on only `come` chunks of every load of a cache group come; where the rest belongs there is rubbish."""
    worker = producers(engine)[1 + group]
    load = worker.load

    def some(found: Any, pool: Any, blocks: Any, **how: Any) -> LoadResult:
        for cache in engine.kv_caches.values():
            cache[blocks[come:][blocks[come:] >= 0].tolist()] = 3.0
        if come:
            load(found, pool, blocks[:come], **how)
        found.release()
        return LoadResult(come * CHUNK, come, 0, {}, "injected", 0.0)

    monkeypatch.setattr(worker, "load", some)


# Hybrid: two cache groups, one of them with a window.


def test_hybrid(node: Node, hybrid: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tokens(5 * CHUNK + 9)
    forks = [whole[:length] + tokens(20) for length in (CHUNK, 2 * CHUNK + 7, 3 * CHUNK, 5 * CHUNK)]
    wanted = right(hybrid, [whole, *forks])
    with ready(Engine(hybrid, connector(node))) as engine:
        assert len(producers(engine)) == 3
        assert ask(engine, [whole]) == (wanted[:1], [0])
        settled(engine, "ssd", prompt=whole)
        for tier in ("dram", "ssd"):
            only(node, tier)
            engine.reset_prefix_cache()
            assert ask(engine, [whole]) == (wanted[:1], [5 * CHUNK])
        for fork, want, hit in zip(forks, wanted[1:], (1, 2, 3, 5), strict=True):
            engine.reset_prefix_cache()
            assert ask(engine, [fork]) == ([want], [hit * CHUNK])
        engine.reset_prefix_cache()
        assert ask(engine, [whole, *forks])[0] == wanted
        for group, come in ((0, 0), (0, 3), (1, 0), (1, 4)):
            with monkeypatch.context() as patch:
                fail(engine, patch, group, come)
                engine.reset_prefix_cache()
                assert ask(engine, [whole]) == (wanted[:1], [0])
        settled(engine)
        engine.reset_prefix_cache()
        assert ask(engine, [whole]) == (wanted[:1], [5 * CHUNK])
        scramble(engine, whole)
        engine.reset_prefix_cache()
        assert ask(engine, [whole])[0] != wanted[:1]
        producers(engine)[1].invalidate(producers(engine)[1].prompt(whole))
        assert whole_again(engine)


@pytest.mark.parametrize("window", [32, 160], ids=["window<chunk", "window>chunk"])
def test_windows_and_chunks(node: Node, tmp_path: Path, window: int) -> None:
    """Chunks that decoding completes: where the window is smaller, their first blocks are gone by then."""
    model = vllm_models.write_hybrid(tmp_path / "model", window=window)
    steps: dict[str, Any] = {"max_num_batched_tokens": 96}
    prompt = tokens(4 * CHUNK + 30)
    answer = right(model, [prompt], 2 * CHUNK, **steps)
    turns = [[*prompt, *answer[0], *tokens(9)], prompt[: CHUNK + 1] + tokens(30)]
    wanted = right(model, turns, **steps)
    with ready(Engine(model, connector(node), **steps)) as engine:
        assert ask(engine, [prompt], 2 * CHUNK) == (answer, [0])
        settled(engine)
        engine.reset_prefix_cache()
        hits = [(4 if window < CHUNK else 6) * CHUNK, CHUNK]
        for turn, want, hit in zip(turns, wanted, hits, strict=True):
            assert ask(engine, [turn]) == ([want], [hit])
            settled(engine)
            engine.reset_prefix_cache()
        assert ask(engine, turns)[0] == wanted
        assert whole_again(engine)


@pytest.mark.parametrize("free_deadline_ms", [20_000, 0], ids=["in time", "too late"])
def test_blocks_that_slide_out_of_a_window_while_they_are_copied(
    node: Node, hybrid: Path, free_deadline_ms: int
) -> None:
    """What another request writes into them must not be saved under the first one's keys."""
    few: dict[str, Any] = {"num_gpu_blocks_override": 36, "max_model_len": 512}
    prompt, other = tokens(4 * CHUNK), tokens(3 * CHUNK + 1)
    forks = [prompt[: n * CHUNK] + tokens(20) for n in (1, 2, 3, 4)]
    wanted = right(hybrid, [prompt, other, *forks], **few)
    with ready(Engine(hybrid, connector(node, free_deadline_ms=free_deadline_ms), **few)) as engine:
        node.kill("gather", signal.SIGSTOP)
        try:
            engine.add_request(prompt, 8)
            engine.step()
            for _ in range(2):
                engine.step()
            second = engine.add_request(other, 8)
            for _ in range(3):
                engine.step()
        finally:
            node.kill("gather", signal.SIGCONT)
        assert engine.drain()[second] == wanted[1]
        ready(engine)
        settled(engine)
        for fork, want, hit in zip(forks, wanted[2:], (1, 2, 3, 4), strict=True):
            engine.reset_prefix_cache()
            got, cached = ask(engine, [fork])
            assert got == [want]
            assert cached == [hit * CHUNK] or free_deadline_ms == 0
            settled(engine)
        assert whole_again(engine)


def test_all_layers_with_a_window(node: Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One group, of which only the last blocks are loaded: a load that fails leaves nothing to go on from."""
    model = vllm_models.write_llama(tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    config |= {"layer_types": ["sliding_attention"] * config["num_hidden_layers"], "sliding_window": 80}
    (model / "config.json").write_text(json.dumps(config))
    prompt = tokens(5 * CHUNK + 3)
    wanted = right(model, [prompt])
    with ready(Engine(model, connector(node))) as engine:
        assert len(producers(engine)) == 2
        assert ask(engine, [prompt]) == (wanted, [0])
        settled(engine)
        engine.reset_prefix_cache()
        assert ask(engine, [prompt]) == (wanted, [5 * CHUNK])
        for come in (0, 4):
            with monkeypatch.context() as patch:
                fail(engine, patch, 0, come)
                engine.reset_prefix_cache()
                assert ask(engine, [prompt])[0] == wanted
        assert whole_again(engine)


# Steps and blocks of other sizes.


@pytest.mark.parametrize("step", [128, 96])
def test_chunked_prefill(node: Node, llama: Path, plain: EngineProcess, step: int) -> None:
    """Also steps that end within a chunk, and prompts that share a step."""
    prompts = [tokens(length) for length in (5 * CHUNK + 40, 2 * CHUNK, 3 * CHUNK - 1)]
    wanted = plain.generate(prompts, 8)
    with ready(Engine(llama, connector(node), max_num_batched_tokens=step)) as engine:
        assert ask(engine, prompts) == (wanted, [0, 0, 0])
        settled(engine)
        engine.reset_prefix_cache()
        assert ask(engine, prompts) == (wanted, [5 * CHUNK, 2 * CHUNK, 2 * CHUNK])
        longer = [prompt + tokens(3 * CHUNK) for prompt in prompts]
        want = plain.generate(longer, 8)
        for _ in range(2):
            engine.reset_prefix_cache()
            assert ask(engine, longer)[0] == want
            settled(engine)
        assert whole_again(engine)


@pytest.mark.parametrize(("block", "chunk"), [(64, 64), (96, 96), (128, 128)])
def test_blocks_and_chunks(node: Node, llama: Path, block: int, chunk: int) -> None:
    """A chunk is whole blocks, as many as the node's chunk needs. Blocks are multiples of 32 on CPUs."""
    prompts = [tokens(length) for length in (2 * chunk + 9, 3 * chunk, chunk - 1)]
    wanted = right(llama, prompts, block_size=block)
    with ready(Engine(llama, connector(node), block_size=block)) as engine:
        assert {producer.chunk_tokens for producer in producers(engine)} == {chunk}
        assert ask(engine, prompts) == (wanted, [0, 0, 0])
        settled(engine)
        engine.reset_prefix_cache()
        assert ask(engine, prompts)[0] == wanted
        engine.reset_prefix_cache()
        assert ask(engine, prompts[:1]) == (wanted[:1], [2 * chunk])


# Adapters.


def test_adapters(node: Node, llama: Path, lora: Path, tmp_path: Path) -> None:
    prompt = tokens(3 * CHUNK + 5)
    same = tmp_path / "same"
    same.mkdir()
    for file in lora.iterdir():
        (same / file.name).write_bytes(file.read_bytes())
    other = vllm_models.write_lora(tmp_path / "other", seed=99)
    adapters = {
        "none": None,
        "first": LoRARequest("first", 1, str(lora)),
        "same files": LoRARequest("elsewhere", 2, str(same)),
        "other weights": LoRARequest("first", 3, str(other)),
    }
    with_lora: dict[str, Any] = {"enable_lora": True, "max_lora_rank": 8, "max_loras": 3}
    with Engine(llama, enable_prefix_caching=False, **with_lora) as engine:
        wanted = {name: engine.generate([prompt], 8, adapter) for name, adapter in adapters.items()}
    assert wanted["first"] == wanted["same files"]
    assert len({str(tokens) for tokens in wanted.values()}) == 3
    with ready(Engine(llama, connector(node), **with_lora)) as engine:
        for hits in ({"same files": 3 * CHUNK}, dict.fromkeys(adapters, 3 * CHUNK)):
            for name, adapter in adapters.items():
                engine.reset_prefix_cache()
                assert ask(engine, [prompt], lora=adapter) == (wanted[name], [hits.get(name, 0)]), name
                settled(engine)


# What is refused.


def test_state_that_is_no_attention(node: Node, tmp_path: Path) -> None:
    """A model whose cache is a running state; vLLM has no kernel for it here, but makes its cache."""
    mamba = {
        "architectures": ["MambaForCausalLM"],
        "model_type": "mamba",
        "torch_dtype": "float32",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "state_size": 16,
        "conv_kernel": 4,
        "time_step_rank": 8,
        "vocab_size": 512,
        "layer_norm_epsilon": 1e-5,
        "hidden_act": "silu",
    }
    (tmp_path / "config.json").write_text(json.dumps(mamba))
    refused(tmp_path, connector(node), "MambaSpec.*run this model without the connector", load_format="dummy")


def test_a_group_that_is_no_attention() -> None:
    spec = MambaSpec(block_size=32, shapes=((4, 4),), dtypes=(torch.float32,))
    config = KVCacheConfig(4, [], [KVCacheGroupSpec(["a", "b"], spec)])
    with pytest.raises(UnsupportedError, match=r"cache group 0 \(a, b, …\) is a MambaSpec"):
        groups_of(config, {}, 0, "")


def test_mla_on_a_processor_is_refused(node: Node, mla: Path) -> None:
    """vLLM's prefill ignores what is cached there: wrong tokens otherwise, and without a word."""
    refused(mla, connector(node), "MLA prefill on CPUs ignores what is cached.*without the connector")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"kv_load_failure_policy": "fail"}, 'set "kv_load_failure_policy": "recompute"'),
        ({"kv_connector_extra_config": {"lmpipe.nod": "x"}}, r"nod.*known: lmpipe\.node, lmpipe\.name"),
        ({"kv_connector_extra_config": {"lmpipe.pages": "mine"}}, "mine"),
        ({"kv_connector_extra_config": {"lmpipe.copy_threads": 0}}, "copy_threads"),
    ],
)
def test_settings_that_are_refused(node: Node, llama: Path, change: dict[str, Any], said: str) -> None:
    refused(llama, connector(node) | change, said)


def test_a_version_that_was_not_tested(node: Node, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "__version__", "0.33.1")
    check(_config(extra={"lmpipe.any_version": True}), settings_of(_config(extra={"lmpipe.any_version": True})))
    refused(llama, connector(node), r"vLLM 0\.33\.1 was not tested.*0\.32\.x.*any_version")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"parallel_config.pipeline_parallel_size": 2}, "use tensor parallelism"),
        ({"parallel_config.decode_context_parallel_size": 2}, "context parallel"),
        ({"parallel_config.prefill_context_parallel_size": 2}, "context parallel"),
        ({"speculative_config": SimpleNamespace(method="eagle")}, "'eagle'.*ngram or suffix"),
        ({"device_config.device_type": "xpu"}, "runs on CPUs and on GPUs"),
    ],
)
def test_configurations_that_are_refused(change: dict[str, Any], said: str) -> None:
    check(_config(), settings_of(_config()))
    check(_config(speculative_config=SimpleNamespace(method="ngram")), settings_of(_config()))
    with pytest.raises(UnsupportedError, match=said):
        check(_config(**change), settings_of(_config()))


def _config(*, extra: dict[str, Any] | None = None, **changes: Any) -> Any:
    """As much of a VllmConfig as is looked at."""
    parallel = {"pipeline": 1, "decode_context": 1, "prefill_context": 1}
    config = SimpleNamespace(
        kv_transfer_config=SimpleNamespace(kv_connector_extra_config=extra or {}, kv_load_failure_policy="recompute"),
        parallel_config=SimpleNamespace(**{f"{name}_parallel_size": size for name, size in parallel.items()}),
        speculative_config=None,
        device_config=SimpleNamespace(device_type="cpu"),
        model_config=SimpleNamespace(use_mla=False),
        scheduler_config=SimpleNamespace(enable_chunked_prefill=True),
    )
    for path, value in changes.items():
        *outer, name = path.split(".")
        setattr(getattr(config, outer[0]) if outer else config, name, value)
    return config


def refused(model: Path, transfer: dict[str, Any], said: str, **overrides: Any) -> None:
    """The engine does not start, says why, and leaves nothing behind."""
    with pytest.raises(UnsupportedError, match=said):
        Engine(model, transfer, **overrides)
    agent = kv_transfer_state._KV_CONNECTOR_AGENT
    if agent is not None:
        agent.shutdown()
        kv_transfer_state._KV_CONNECTOR_AGENT = None
    cleanup_dist_env_and_memory()
    gc.collect()
