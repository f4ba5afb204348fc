"""The engines themselves, without lmpipe: what the other tests here rely on."""

from __future__ import annotations

import urllib.error
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import Engine, EngineProcess, ServerProcess, prompt
from vllm.lora.request import LoRARequest

PROMPTS = [prompt(300, 1), prompt(1000, 2)]


@pytest.fixture(scope="module")
def engine(llama: Path) -> Iterator[Engine]:
    with Engine(llama) as engine:
        yield engine


@pytest.fixture(scope="module")
def tokens(engine: Engine) -> list[list[int]]:
    """What the Llama says to PROMPTS."""
    return engine.generate(PROMPTS)


def test_tokens_repeat_with_and_without_the_prefix_cache(engine: Engine, tokens: list[list[int]]) -> None:
    outputs = engine.outputs(PROMPTS)
    assert [list(output.outputs[0].token_ids) for output in outputs] == tokens
    assert [output.num_cached_tokens for output in outputs] == [288, 992]
    assert engine.reset_prefix_cache()
    assert engine.generate(PROMPTS) == tokens
    assert len({*tokens[0], *tokens[1]}) > 16  # a model that says the same all the time proves nothing


def test_scrambled_kv_changes_tokens(engine: Engine, tokens: list[list[int]]) -> None:
    engine.scramble()
    assert all(wrong != right for wrong, right in zip(engine.generate(PROMPTS), tokens, strict=True))
    assert engine.reset_prefix_cache()
    assert engine.generate(PROMPTS) == tokens


def test_steps(engine: Engine, tokens: list[list[int]]) -> None:
    free = engine.free_blocks
    name = engine.add_request(PROMPTS[0])
    assert engine.step() == {name: tokens[0][:1]}
    assert engine.free_blocks < free
    assert engine.drain() == {name: tokens[0]}
    gone = engine.add_request(PROMPTS[1])
    engine.step()
    engine.abort(gone)
    assert engine.drain() == {}
    assert engine.free_blocks == free


def test_a_process(llama: Path, tokens: list[list[int]]) -> None:
    with EngineProcess(llama) as process:
        assert process.generate_with_hits(PROMPTS) == (tokens, [0, 0])
        assert process.generate_with_hits(PROMPTS) == (tokens, [288, 992])
        process.ask(PROMPTS, 2000)
        process.kill()
        with pytest.raises(EOFError):
            process.answer()


def test_two_ranks(llama: Path, tokens: list[list[int]]) -> None:
    with EngineProcess(llama, tensor_parallel_size=2) as process:
        assert process.generate(PROMPTS) == tokens
        assert len(process.members()) >= 3


def test_server(llama: Path, tokens: list[list[int]]) -> None:
    with ServerProcess(llama) as server:
        assert [server.complete(prompt) for prompt in PROMPTS] == tokens
        assert "vllm:prefix_cache_queries_total" in server.metrics()
        with pytest.raises(urllib.error.HTTPError):
            server.complete(prompt(5000))


# From here on engines start in this process; the one above is shut down when the first of these asks for its own.


@pytest.fixture
def alone(engine: Engine) -> None:
    """Engines with different models must not be open at once."""
    engine.close()


@pytest.mark.usefixtures("alone")
def test_hybrid(hybrid: Path) -> None:
    with Engine(hybrid) as engine:
        groups = engine.scheduler.kv_cache_config.kv_cache_groups
        assert [type(group.kv_cache_spec).__name__ for group in groups] == ["SlidingWindowSpec", "FullAttentionSpec"]
        tokens = engine.generate(PROMPTS)
        engine.scramble()
        assert all(wrong != right for wrong, right in zip(engine.generate(PROMPTS), tokens, strict=True))


@pytest.mark.usefixtures("alone")
def test_mla(mla: Path) -> None:
    with Engine(mla) as engine:
        tokens = engine.generate(PROMPTS)
        assert {tensor.shape[2:] for tensor in engine.kv_caches.values()} == {(576,)}
        name = engine.add_request(PROMPTS[1])
        engine.step()
        engine.scramble()
        assert engine.drain()[name] != tokens[1]


@pytest.mark.usefixtures("alone")
def test_lora(llama: Path, lora: Path) -> None:
    with Engine(llama, enable_lora=True, max_lora_rank=8) as engine:
        plain = engine.generate(PROMPTS)
        adapted = engine.generate(PROMPTS, lora=LoRARequest("adapter", 1, str(lora)))
        assert all(one != other for one, other in zip(plain, adapted, strict=True))
        assert engine.generate(PROMPTS) == plain


@pytest.mark.usefixtures("alone")
def test_a_connector_of_vllm(llama: Path, tmp_path: Path) -> None:
    store = {"kv_connector": "ExampleConnector", "kv_connector_extra_config": {"shared_storage_path": str(tmp_path)}}
    with Engine(llama, store) as engine:
        assert engine.scheduler_connector is not engine.worker_connector
        tokens = engine.generate(PROMPTS)
        with pytest.raises(RuntimeError, match="EngineProcess"):
            Engine(llama, store)
    with Engine(llama, store) as engine:
        outputs = engine.outputs(PROMPTS)
        assert [list(output.outputs[0].token_ids) for output in outputs] == tokens
        assert [output.num_cached_tokens for output in outputs] == [288, 992]
    assert engine.worker_connector is None
