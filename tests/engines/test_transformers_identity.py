"""Two models share KV only if nothing that shapes it differs: config, weights, adapters, salts, tenants."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf

from lmpipe.engines.transformers_identity import ModelIdentity, config_digest
from tests.engines.conftest import Attach
from tests.engines.tiny import build, greedy, prompt_of


class Adapted(torch.nn.Module):
    """A linear layer with low-rank adapters and the attributes that PEFT's layers have."""

    def __init__(self, base_layer: torch.nn.Linear, names: tuple[str, ...]) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.active_adapters = [names[0]]
        self.disable_adapters = False
        self.merged_adapters: list[str] = []
        self.scaling = dict.fromkeys(names, 1.0)
        out, into = base_layer.weight.shape
        generator = torch.Generator().manual_seed(7)
        self.lora_A = torch.nn.ParameterDict({n: torch.randn(4, into, generator=generator) for n in names})
        self.lora_B = torch.nn.ParameterDict({n: torch.randn(out, 4, generator=generator) for n in names})

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """The base layer's output and the active adapters'."""
        result = self.base_layer(states)
        if not self.disable_adapters:
            for name in self.active_adapters:
                result = result + states @ self.lora_A[name].T @ self.lora_B[name].T * self.scaling[name]
        return result


def adapt(model: Any, *names: str) -> list[Adapted]:
    """Put adapters around every query projection."""
    layers: list[Adapted] = []
    for layer in model.model.layers:
        layer.self_attn.q_proj = Adapted(layer.self_attn.q_proj, names)
        layers.append(layer.self_attn.q_proj)
    return layers


def identity(model: Any, name: str | None = None) -> Any:
    return ModelIdentity(model, name).current()


def test_the_same_model_built_twice_is_one() -> None:
    assert identity(build("llama")) == identity(build("llama"))


def test_one_changed_weight_in_many_is_another_model() -> None:
    one, other = build("llama"), build("llama")
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight.mul_(1.001)
    assert identity(one) != identity(other)
    assert identity(one) != identity(build("llama", seed=1))


def test_weights_changed_in_place_are_seen() -> None:
    model = build("llama")
    follow = ModelIdentity(model, None)
    before = follow.current()
    assert follow.current() == before
    with torch.no_grad():
        model.lm_head.weight.add_(0.5)
    assert follow.current() != before


@pytest.mark.parametrize(
    "change",
    [
        lambda config: setattr(config, "rms_norm_eps", 1e-3),
        lambda config: config.rope_parameters.update(rope_theta=5e5),
        lambda config: setattr(config, "_attn_implementation", "eager"),
    ],
)
def test_config_and_code_path_are_part_of_it(change: Callable[[Any], None]) -> None:
    model = build("llama")
    before = identity(model)
    change(model.config)
    assert identity(model) != before


def test_names_of_files_are_not() -> None:
    model = build("llama")
    before = config_digest(model)
    model.config._name_or_path = "somewhere/else"
    assert config_digest(model) == before


def test_adapters_are_told_apart_by_weights_and_factors() -> None:
    base, model = build("llama"), build("llama")
    layers = adapt(model, "one", "two")
    follow = ModelIdentity(model, None)
    one = follow.current()
    for layer in layers:
        layer.active_adapters = ["two"]
    two = follow.current()
    for layer in layers:
        layer.scaling["two"] = 0.5
    weaker = follow.current()
    for layer in layers:
        layer.disable_adapters = True
    off = follow.current()
    assert len({one, two, weaker, off}) == 4
    # Without an adapter it is the model underneath, whatever is loaded beside it.
    assert (off.weights, off.adapter) == (identity(base).weights, "")
    with torch.no_grad():
        layers[0].lora_A["one"].mul_(2)
    for layer in layers:
        layer.disable_adapters, layer.active_adapters = False, ["one"]
    assert follow.current() not in (one, two, weaker, off)


def test_merging_behind_the_counters_is_seen() -> None:
    model = build("llama")
    layers = adapt(model, "one")
    follow = ModelIdentity(model, None)
    before = follow.current()
    for layer in layers:
        layer.base_layer.weight.data += layer.lora_B["one"] @ layer.lora_A["one"]
        layer.merged_adapters.append("one")
    merged = follow.current()
    for layer in layers:
        layer.base_layer.weight.data -= layer.lora_B["one"] @ layer.lora_A["one"]
        layer.merged_adapters.clear()
    assert merged != before
    assert follow.current().adapter == before.adapter


def test_switching_adapters_between_requests(attached: Attach) -> None:
    model, ids = build("llama"), prompt_of(50)
    layers = adapt(model, "one", "two")

    def use(name: str) -> list[list[int]]:
        for layer in layers:
            layer.active_adapters = [name]
        return greedy(model, ids)

    one, two = use("one"), use("two")
    assert one != two
    use("one")
    attachment = attached(model)
    for expected in (0, 48):
        assert use("one") == one
        assert attachment.last.hit_tokens == expected or not attachment.wait_ready(20)
        assert attachment.flush(20)
        for _ in range(2):  # the first request of a namespace may find its producer not registered yet
            assert use("two") == two
            assert attachment.wait_ready(20) and attachment.flush(20)
    assert use("two") == two and attachment.last.hit_tokens == 48


@pytest.mark.parametrize("option", ["tenant", "adapter", "cache_salt", "revision", "name"])
def test_options_keep_caches_apart(option: str, attached: Attach) -> None:
    ids = prompt_of(50)
    first, same, other = build("llama"), build("llama"), build("llama")
    options = {"cache_salt": f"apart {option}"}
    one = attached(first, **options)
    greedy(first, ids)
    assert one.flush(20)
    again = attached(same, **options)
    greedy(same, ids)
    assert again.last.hit_tokens == 48
    apart = attached(other, **(options | {option: "another"}))
    greedy(other, ids)
    assert apart.last.hit_tokens == 0


def test_other_weights_never_share(attached: Attach) -> None:
    ids = prompt_of(50)
    one, other = build("llama"), build("llama", seed=1)
    right = greedy(other, ids)
    first = attached(one, name="same name")
    greedy(one, ids)
    assert first.flush(20)
    second = attached(other, name="same name")
    assert greedy(other, ids) == right
    assert second.last.hit_tokens == 0


def test_a_model_half_on_no_device_is_refused() -> None:
    with torch.device("meta"):
        model = hf.AutoModelForCausalLM.from_config(build("llama").config)
    with pytest.raises(Exception, match="meta"):
        identity(model.eval())
