"""Batches share one cache tensor: padding, different prefixes, beams and samples, all with unchanged tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.engines.conftest import Attach
from tests.engines.tiny import END, PAD, build, greedy, prompt_of

FAMILIES = ("llama", "gpt2", "qwen3", "opt", "neox")
PADS = (0, 7, 30)


def padded_batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Three prompts of 70, 63 and 40 tokens, padded on the left."""
    ids = prompt_of(70, seed=3, rows=len(PADS))
    mask = torch.ones_like(ids)
    for row, pad in enumerate(PADS):
        ids[row, :pad], mask[row, :pad] = PAD, 0
    return ids, mask


@pytest.mark.parametrize("family", FAMILIES)
def test_left_padding(family: str, attached: Attach) -> None:
    model = build(family)
    ids, mask = padded_batch()
    right = greedy(model, ids, attention_mask=mask)
    attachment = attached(model, on_unsupported="raise")
    assert greedy(model, ids, attention_mask=mask) == right
    assert attachment.flush(20)
    assert greedy(model, ids, attention_mask=mask) == right
    # Columns that every row has: of 64 tokens, 7 + 48 and 30 + 32 the least is 55; padding is no hit.
    assert attachment.last.hit_tokens == 55 + 48 + 25


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_saved_alone_are_found_in_a_batch_and_back(family: str, attached: Attach) -> None:
    """Padding leaves no trace in the KV of the tokens behind it."""
    model = build(family)
    ids, mask = padded_batch()
    right = greedy(model, ids, attention_mask=mask)
    alone = [greedy(model, ids[row : row + 1, pad:]) for row, pad in enumerate(PADS)]
    attachment = attached(model)
    for row, pad in enumerate(PADS):
        assert greedy(model, ids[row : row + 1, pad:]) == alone[row]
    assert attachment.flush(20)
    assert greedy(model, ids, attention_mask=mask) == right
    assert attachment.last.hit_tokens == 55 + 48 + 25

    apart = attached(build(family), cache_salt="the other way round")
    other = apart.model
    assert greedy(other, ids, attention_mask=mask) == right
    assert apart.flush(20)
    for row, pad in enumerate(PADS):
        assert greedy(other, ids[row : row + 1, pad:]) == alone[row]
        assert apart.last.hit_tokens == (70 - pad) // 16 * 16


def test_the_mask_is_inferred_as_generate_does(attached: Attach) -> None:
    model = build("llama")
    ids, mask = padded_batch()
    right = greedy(model, ids, attention_mask=mask)
    attachment = attached(model)
    assert greedy(model, ids) == right
    assert attachment.flush(20)
    assert greedy(model, ids) == right
    assert attachment.last.hit_tokens == 55 + 48 + 25


def test_a_row_without_a_prefix_keeps_the_batch_right(attached: Attach) -> None:
    model = build("llama")
    one, other = prompt_of(64, seed=1), prompt_of(64, seed=2)
    both = torch.cat([one, other])
    right = greedy(model, both)
    attachment = attached(model)
    greedy(model, one)
    assert attachment.flush(20)
    assert greedy(model, both) == right
    assert attachment.last.hit_tokens == 0
    assert attachment.flush(20)
    assert greedy(model, both) == right
    assert attachment.last.hit_tokens == 2 * 63


def test_equal_rows_are_saved_once(attached: Attach) -> None:
    model = build("llama")
    ids = prompt_of(64).repeat(4, 1)
    right = greedy(model, ids)
    attachment = attached(model)
    assert greedy(model, ids) == right
    assert attachment.last.saved_tokens == 64
    assert attachment.flush(20)
    assert greedy(model, ids) == right
    assert attachment.last.hit_tokens == 4 * 63


def test_rows_that_end_early_are_saved_to_their_end(attached: Attach) -> None:
    """The padding behind a finished row is no part of its answer."""
    model = build("llama")
    ids = prompt_of(40, seed=8, rows=2)
    plain = greedy(model, ids, 40)
    end = plain[0][5]
    options: dict[str, Any] = {"eos_token_id": end, "pad_token_id": PAD}
    right = greedy(model, ids, 40, **options)
    assert len(right[0]) > 6 and right[0][6:] == [PAD] * len(right[0][6:])
    attachment = attached(model)
    assert greedy(model, ids, 40, **options) == right
    assert attachment.flush(20)
    follow = torch.cat([ids[:1], torch.tensor([right[0][:6]]), prompt_of(20, seed=9)], 1)
    assert greedy(model, follow) == greedy(build("llama"), follow)
    assert attachment.last.hit_tokens == 32


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("returned", [1, 3])
def test_beam_search(family: str, returned: int, attached: Attach) -> None:
    model = build(family)
    ids, mask = padded_batch()
    options: dict[str, Any] = {"attention_mask": mask, "num_beams": 3, "num_return_sequences": returned}
    right = greedy(model, ids, **options)
    attachment = attached(model, on_unsupported="raise")
    assert greedy(model, ids, **options) == right
    assert attachment.flush(20)
    assert greedy(model, ids, **options) == right
    assert attachment.last.hit_tokens == 55 + 48 + 25


def test_sampling_draws_the_same(attached: Attach) -> None:
    model = build("llama")
    ids, mask = padded_batch()

    def sample() -> list[list[int]]:
        torch.manual_seed(5)
        return model.generate(
            ids, attention_mask=mask, max_new_tokens=20, do_sample=True, num_return_sequences=2
        ).tolist()

    right = sample()
    attachment = attached(model, on_unsupported="raise")
    assert sample() == right
    assert attachment.flush(20)
    assert sample() == right
    assert attachment.last.hit_tokens == 55 + 48 + 25
    # Both answers of a prompt were saved, each under its own tokens.
    for row in (0, 1):
        follow = torch.tensor([right[row]])
        again = greedy(build("llama"), follow)
        assert attachment.flush(20)
        assert greedy(model, follow) == again
        assert attachment.last.hit_tokens >= 80 or END in right[row]
