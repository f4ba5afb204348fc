"""An exact request never computes on KV that lost something in a codec, nor on what was computed on such."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from lmpipe.cli import main
from lmpipe.engines import attach
from lmpipe.handles import Fidelity, Tier
from lmpipe.testing import Node
from tests.engines.tiny import CHUNK, build, prompt_of

STORED, LONG = 4 * CHUNK, 10 * CHUNK


@pytest.fixture(scope="module")
def lossy() -> Iterator[Node]:
    """A node whose SSD tier keeps 4 bits of a number."""
    with Node({"tiers": {"ssd": {"codec": "int4h"}}, "chunk_tokens": CHUNK}) as started:
        yield started


def attached(node: Node, model: Any, request: pytest.FixtureRequest, **options: Any) -> Any:
    attachment = attach(model, node.run_dir, cache_salt=request.node.nodeid, save_answers=False, **options)
    request.addfinalizer(attachment.detach)
    assert attachment.producer is not None and attachment.producer.wait_ready(20)
    return attachment


def kv_of(model: Any, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    """The KV of the prompt after one token was generated: (layers, K or V, heads, tokens, dims)."""
    options |= {"max_new_tokens": 1, "do_sample": False, "return_dict_in_generate": True}
    layers = model.generate(ids, **options).past_key_values.layers
    return torch.stack([torch.stack((layer.keys[0], layer.values[0])) for layer in layers])[..., : ids.shape[1] - 1, :]


def put_below(node: Node, attachment: Any, ids: torch.Tensor) -> None:
    """Leave what is saved of a prompt to the SSD tier alone."""
    prompt = attachment.producer.prompt(ids[0].numpy())
    assert attachment.flush(20) and attachment.producer.flush(prompt, tiers=[Tier.SSD])
    assert main(["clear", str(node.run_dir), "--tier=dram"]) == 0
    assert attachment.producer.lookup(prompt).by_tier == {Tier.SSD: len(prompt.keys)}


def test_one_request_at_a_time(lossy: Node, request: pytest.FixtureRequest) -> None:
    model, ids = build("llama"), prompt_of(LONG + 1)
    right = kv_of(model, ids)
    attachment = attached(lossy, model, request)
    kv_of(model, ids[:, :STORED])
    put_below(lossy, attachment, ids[:, :STORED])

    rough = kv_of(model, ids)
    assert (attachment.last.hit_tokens, attachment.last.fidelity) == (STORED, Fidelity.INT4H)
    assert attachment.last.saved_tokens == LONG - STORED and attachment.flush(20)
    later = slice(STORED, LONG)
    assert (rough[..., later, :] - right[..., later, :]).abs().max() > 1e-3, "or nothing below proves anything"

    exact = kv_of(model, ids, lmpipe_exact=True)
    assert (attachment.last.hit_tokens, attachment.last.fidelity) == (0, Fidelity.EXACT)
    assert torch.equal(exact, right) and attachment.last.saved_tokens == LONG and attachment.flush(20)

    for options in ({"lmpipe_exact": True}, {}):  # better KV is there for everybody now
        warm = kv_of(model, ids, **options)
        assert (attachment.last.hit_tokens, attachment.last.fidelity) == (LONG, Fidelity.EXACT)
        assert torch.equal(warm, right)


def test_a_model_that_is_exact(lossy: Node, request: pytest.FixtureRequest) -> None:
    model, ids = build("llama"), prompt_of(LONG + 1, seed=3)
    right = kv_of(model, ids)
    attachment = attached(lossy, model, request)
    kv_of(model, ids)
    put_below(lossy, attachment, ids[:, :LONG])
    attachment.detach()
    attachment = attached(lossy, model, request, exact=True)
    assert torch.equal(kv_of(model, ids), right) and attachment.last.hit_tokens == 0
    assert attachment.flush(20)
    assert torch.equal(kv_of(model, ids), right) and attachment.last.hit_tokens == LONG


def test_in_a_batch_each_row_is_saved_as_what_it_was_computed_on(lossy: Node, request: pytest.FixtureRequest) -> None:
    model, ids = build("llama"), prompt_of(LONG + 1, seed=5, rows=2)
    attachment = attached(lossy, model, request)
    kv_of(model, ids[:1, :STORED])
    put_below(lossy, attachment, ids[:1, :STORED])
    kv_of(model, ids[1:, :STORED])
    assert attachment.flush(20)
    kv_of(model, ids)
    assert (attachment.last.hit_tokens, attachment.last.fidelity) == (2 * STORED, Fidelity.INT4H)
    assert attachment.flush(20)
    prompts = [attachment.producer.prompt(row.numpy()) for row in ids]
    exact = [attachment.producer.lookup(prompt, first_chunk=STORED // CHUNK, exact=True) for prompt in prompts]
    assert [found.tokens for found in exact] == [0, LONG - STORED]


def test_the_argument_is_ours_only_while_attached(lossy: Node, request: pytest.FixtureRequest) -> None:
    model, ids = build("llama"), prompt_of(20)
    attachment = attached(lossy, model, request)
    kv_of(model, ids, lmpipe_exact=True)
    with torch.autocast("cpu"):  # without the cache, and without the argument
        kv_of(model, ids, lmpipe_exact=True)
    assert "autocast" in attachment.last.reason
    attachment.detach()
    with pytest.raises(ValueError, match="lmpipe_exact"):
        kv_of(model, ids, lmpipe_exact=True)
