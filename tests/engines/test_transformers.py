"""generate gives the same tokens with and without the cache, in every family and at every boundary."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.cache_utils import DynamicLayer

from lmpipe.engines import transformers_memory
from lmpipe.handles import Tier
from tests.engines.conftest import Attach
from tests.engines.tiny import CHUNK, build, greedy, prompt_of

SUPPORTED = ("llama", "gpt2", "qwen2", "qwen3", "mistral", "gemma", "neox", "opt", "mixtral", "falcon", "bloom")


@pytest.mark.parametrize("family", SUPPORTED)
def test_every_family_cold_and_warm(family: str, attached: Attach) -> None:
    model, ids = build(family), prompt_of(100)
    right = greedy(model, ids)
    attachment = attached(model, on_unsupported="raise")
    assert greedy(model, ids) == right
    assert attachment.last.hit_tokens == 0
    assert attachment.flush(20)
    assert greedy(model, ids) == right
    assert attachment.last.hit_tokens == 96
    assert attachment.last.hit_by_tier == {Tier.DRAM: 96}


@pytest.mark.parametrize("tokens", [1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK - 1, 3 * CHUNK, 3 * CHUNK + 1])
def test_every_boundary(tokens: int, attached: Attach) -> None:
    """Prompts around chunk edges, each warm from itself, with at least one token left to compute."""
    model, ids = build("llama"), prompt_of(tokens)
    right = greedy(model, ids)
    attachment = attached(model, save_answers=False)
    assert greedy(model, ids) == right
    assert attachment.flush(20)
    assert greedy(model, ids) == right
    whole = tokens // CHUNK * CHUNK
    assert attachment.last.hit_tokens == min(whole, tokens - 1)


@pytest.mark.parametrize("shared", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 60, 64])
def test_every_shared_prefix(shared: int, attached: Attach) -> None:
    """A second prompt that agrees with the first for `shared` tokens gets their whole chunks, and no more."""
    model = build("llama")
    one, other = prompt_of(64, seed=1), prompt_of(70, seed=2)
    other[0, shared] = (one[0, shared] - 3 + 1) % 94 + 3 if shared < 64 else other[0, shared]
    other[:, :shared] = one[:, :shared]
    right = greedy(model, other)
    attachment = attached(model)
    greedy(model, one)
    assert attachment.flush(20)
    assert greedy(model, other) == right
    assert attachment.last.hit_tokens == shared // CHUNK * CHUNK


def test_a_conversation_finds_its_answers(attached: Attach) -> None:
    model = build("llama")

    def talk() -> list[list[int]]:
        history, answers = prompt_of(40), []
        for turn in range(4):
            answer = greedy(model, history, 24)
            answers += answer
            hits.append(attachment.last.hit_tokens if attachment is not None else 0)
            expected.append((history.shape[1] + len(answer[0]) - 1) // CHUNK * CHUNK)
            history = torch.cat([history, torch.tensor(answer), prompt_of(9, seed=turn + 5)], 1)
            assert attachment is None or attachment.flush(20)
        return answers

    attachment: Any = None
    hits: list[int] = []
    expected = [0]
    right = talk()
    attachment = attached(model)
    hits.clear()
    assert talk() == right
    # All that was computed the turn before: its prompt and its answer but for the last token, which has no KV yet.
    assert hits == expected[:4]


def test_answers_are_left_out_on_request(attached: Attach) -> None:
    model, ids = build("llama"), prompt_of(40)
    attachment = attached(model, save_answers=False)
    answer = greedy(model, ids, 24)
    assert attachment.last.saved_tokens == 32
    assert attachment.flush(20)
    greedy(model, torch.cat([ids, torch.tensor(answer)], 1))
    assert attachment.last.hit_tokens == 32


def test_scrambled_kv_is_noticed(attached: Attach, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: what these tests prove rests on wrong KV giving other tokens."""
    model, ids = build("llama"), prompt_of(100)
    right = greedy(model, ids)
    attachment = attached(model)
    greedy(model, ids)
    assert attachment.flush(20)
    into = transformers_memory.LoadTensors.into

    def scrambled(self: Any, cache: Any, columns: int, expand: int) -> None:
        into(self, cache, columns, expand)
        for layer in cache.layers:
            layer.values = layer.values.roll(1, dims=2)

    monkeypatch.setattr(transformers_memory.LoadTensors, "into", scrambled)
    assert greedy(model, ids) != right
    assert attachment.last.hit_tokens == 96


def test_loaded_kv_is_bit_for_bit_what_was_computed(attached: Attach) -> None:
    model, ids = build("llama"), prompt_of(97)
    attachment = attached(model)
    options: dict[str, Any] = {"max_new_tokens": 1, "return_dict_in_generate": True, "do_sample": False}
    cold = model.generate(ids, **options).past_key_values
    assert attachment.flush(20)
    warm = model.generate(ids, **options).past_key_values
    assert attachment.last.hit_tokens == 96
    for one, other in zip(cold.layers, warm.layers, strict=True):
        assert torch.equal(one.keys[:, :, :96], other.keys[:, :, :96])
        assert torch.equal(one.values[:, :, :96], other.values[:, :, :96])


def test_layers_grow_into_new_tensors() -> None:
    """What saving rests on: a DynamicLayer never writes into the tensors it has handed out."""
    layer = DynamicLayer()
    part = torch.ones(1, 2, 3, 4)
    first, _ = layer.update(part, part)
    again, _ = layer.update(part * 2, part * 2)
    assert first.data_ptr() != again.data_ptr()
    assert first.shape[2] == 3 and bool((first == 1).all())


def test_short_prompts_can_be_left_alone(attached: Attach) -> None:
    model, ids = build("llama"), prompt_of(40)
    attachment = attached(model, min_tokens=41)
    greedy(model, ids)
    assert attachment.last.reason == "short"
    assert attachment.stats().get("saves", 0) == 0


def test_half_precision_kv_travels_as_it_is(attached: Attach) -> None:
    model, ids = build("llama").to(torch.bfloat16), prompt_of(97)
    attachment = attached(model, on_unsupported="raise")
    options: dict[str, Any] = {"max_new_tokens": 1, "return_dict_in_generate": True, "do_sample": False}
    cold = model.generate(ids, **options).past_key_values
    assert attachment.flush(20)
    warm = model.generate(ids, **options).past_key_values
    assert attachment.last.hit_tokens == 96
    assert torch.equal(cold.layers[2].values[:, :, :96], warm.layers[2].values[:, :, :96])
