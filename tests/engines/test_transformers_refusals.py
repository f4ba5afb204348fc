"""What cannot be cached rightly is generated without the cache, said once, or raised: never silently wrong."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf

from lmpipe.engines import attach
from lmpipe.errors import UnsupportedError
from tests.engines.conftest import Attach
from tests.engines.tiny import PAD, build, greedy, prompt_of

CALLS: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "static cache": (lambda: {"cache_implementation": "static"}, "cache_implementation"),
    "offloaded cache": (lambda: {"cache_implementation": "offloaded"}, "cache_implementation"),
    "quantised cache": (lambda: {"cache_implementation": "quantized"}, "cache_implementation"),
    "no cache": (lambda: {"use_cache": False}, "use_cache=False"),
    "own cache": (lambda: {"past_key_values": hf.DynamicCache()}, "past_key_values"),
    "assistant": (lambda: {"assistant_model": build("llama", seed=3)}, "assisted"),
    "prompt lookup": (lambda: {"prompt_lookup_num_tokens": 2}, "assisted_generation"),
    "position ids": (lambda: {"position_ids": torch.arange(40)[None]}, "position_ids"),
    "attentions": (lambda: {"output_attentions": True}, "output_attentions"),
    "hidden states": (lambda: {"output_hidden_states": True}, "output_hidden_states"),
    "chunked prefill": (lambda: {"prefill_chunk_size": 16}, "prefill_chunk_size"),
    "guidance": (lambda: {"guidance_scale": 1.5}, "guidance_scale"),
    "embeddings": (lambda: {"inputs_embeds": torch.zeros(1, 40, 64)}, "inputs_embeds"),
    "soft mask": (lambda: {"attention_mask": torch.full((1, 40), 0.5)}, "other values"),
    "holes": (lambda: {"attention_mask": torch.tensor([[1] * 10 + [0] * 5 + [1] * 25])}, "holes"),
    "right padding": (lambda: {"attention_mask": torch.tensor([[1] * 30 + [0] * 10])}, "right padding"),
}


@pytest.mark.parametrize("call", CALLS)
def test_calls_are_refused_by_name(call: str, attached: Attach) -> None:
    options, words = CALLS[call]
    model = build("llama")
    attached(model, on_unsupported="raise")
    with pytest.raises(UnsupportedError, match=words):
        greedy(model, prompt_of(40), **options())


@pytest.mark.parametrize("call", ["static cache", "no cache", "own cache", "assistant", "prompt lookup", "holes"])
def test_refused_calls_run_without_the_cache(call: str, attached: Attach, caplog: pytest.LogCaptureFixture) -> None:
    options, words = CALLS[call]
    model, ids = build("llama"), prompt_of(40)
    right = greedy(model, ids, **options())
    attachment = attached(model)
    greedy(model, ids)
    assert attachment.flush(20)
    with caplog.at_level(logging.WARNING, "lmpipe.transformers"):
        assert greedy(model, ids, **options()) == right
        assert greedy(model, ids, **options()) == right
    assert words in attachment.last.reason
    assert len([record for record in caplog.records if record.name == "lmpipe.transformers"]) == 1
    assert attachment.stats()["generate_bypassed"] == 2


def test_a_generation_config_counts_like_arguments(attached: Attach) -> None:
    model = build("llama")
    attachment = attached(model)
    config = hf.GenerationConfig(max_new_tokens=4, do_sample=False, cache_implementation="static", pad_token_id=PAD)
    model.generate(prompt_of(40), generation_config=config)
    assert "cache_implementation" in attachment.last.reason
    model.generation_config.use_cache = False
    greedy(model, prompt_of(40))
    assert attachment.last.reason == "use_cache=False"


@pytest.mark.parametrize(
    ("family", "words"),
    [
        ("sliding", "SlidingWindow"),
        ("hybrid", "SlidingWindow"),
        ("mamba", "LinearAttention|attention_mask"),
        ("dynamic rope", "length of the whole prompt"),
    ],
)
def test_models_are_refused_by_name(family: str, words: str, node: Any) -> None:
    with pytest.raises(UnsupportedError, match=words):
        attach(build(family), node.run_dir, on_unsupported="raise")


@pytest.mark.parametrize("family", ["sliding", "hybrid", "mamba", "dynamic rope"])
def test_refused_models_run_without_the_cache(family: str, attached: Attach) -> None:
    model, ids = build(family), prompt_of(60)
    right = greedy(model, ids)
    attachment = attached(model)
    assert attachment.producer is None
    assert [greedy(model, ids) for _ in range(2)] == [right, right]


def test_encoder_decoders_are_refused(node: Any) -> None:
    config = hf.T5Config(vocab_size=97, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4)
    with pytest.raises(UnsupportedError, match="encoder-decoder"):
        attach(hf.T5ForConditionalGeneration(config).eval(), node.run_dir, on_unsupported="raise")


def test_a_model_that_is_not_causal_is_refused(node: Any) -> None:
    """Attention in both directions: the KV of a prefix changes with what follows, and the config need not say so."""
    model = build("llama")
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    model.model.config._attn_implementation = "eager"
    forward = model.model.layers[0].forward
    model.model.layers[0].forward = lambda states, **rest: forward(states + states.mean(1, keepdim=True), **rest)
    with pytest.raises(UnsupportedError, match="not causal"):
        attach(model, node.run_dir, on_unsupported="raise")


def test_padding_without_position_ids_is_refused(attached: Attach) -> None:
    model = build("bloom")
    attached(model, on_unsupported="raise")
    ids = prompt_of(40, rows=2)
    mask = torch.ones_like(ids)
    mask[0, :5], ids[0, :5] = 0, PAD
    with pytest.raises(UnsupportedError, match="position_ids"):
        greedy(model, ids, attention_mask=mask)


def test_training_and_autocast_go_without_the_cache(attached: Attach) -> None:
    model, ids = build("llama"), prompt_of(40)
    attachment = attached(model)
    greedy(model.train(), ids)
    assert "training mode" in attachment.last.reason
    model.eval()
    with torch.autocast("cpu", torch.bfloat16):
        greedy(model, ids)
    assert "autocast" in attachment.last.reason
    greedy(model, ids)
    assert attachment.last.reason == "miss"


def test_a_model_attached_in_training_mode_is_looked_at_later(attached: Attach) -> None:
    model, ids = build("llama").train(), prompt_of(40)
    attachment = attached(model)
    greedy(model.eval(), ids)
    assert attachment.wait_ready(20)
    greedy(model, ids)
    assert attachment.flush(20)
    greedy(model, ids)
    assert attachment.last.hit_tokens == 32


def test_a_replaced_input_preparation_goes_without_the_cache(attached: Attach) -> None:
    """What PEFT's prompt tuning does to a model."""
    model = build("llama")
    attachment = attached(model)
    model.prepare_inputs_for_generation = model.prepare_inputs_for_generation
    greedy(model, prompt_of(40))
    assert "prepare_inputs_for_generation" in attachment.last.reason


def test_errors_of_generate_stay_its_own(attached: Attach) -> None:
    model = build("llama")
    attached(model)
    with pytest.raises(ValueError, match="not_an_argument"):
        greedy(model, prompt_of(40), not_an_argument=1)
