"""What a model keeps in a transformers cache, and whether that can be cached rightly. Knows no pages and no requests.

A `DynamicLayer` keeps keys and values as `[batch, kv_heads, tokens, head_dim]`.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Protocol, cast, runtime_checkable

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from lmpipe.errors import LayoutError, UnsupportedError
from lmpipe.layout import KVLayout

PROBE = ((0, 1, 2, 3), (0, 1, 4, 5))
"""Two prompts with a common prefix of two tokens."""


@runtime_checkable
class Wrapper(Protocol):
    """PEFT's wrapper around a model."""

    def get_base_model(self) -> object:
        """The model inside."""
        ...


@dataclass(frozen=True, slots=True)
class CacheShape:
    """What a model's cache is made of, read from its tensors. `devices`: one for each layer."""

    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    devices: tuple[torch.device, ...]

    @property
    def layers(self) -> int:
        """Number of layers."""
        return len(self.devices)

    def layout(self) -> KVLayout:
        """The chunk layout.

        Raises:
            UnsupportedError: a dtype that chunks cannot have.
        """
        try:
            return KVLayout.dense(self.layers, self.kv_heads, self.head_dim, str(self.dtype).removeprefix("torch."))
        except LayoutError as error:
            raise UnsupportedError(str(error)) from error


Layers = list[tuple[torch.Tensor, torch.Tensor]]
"""Keys and values of every layer, each `[batch, kv_heads, tokens, head_dim]`."""


def full_layers(cache: DynamicCache) -> Layers:
    """What every layer keeps.

    Raises:
        UnsupportedError: a layer that does not keep the full attention's KV, or has none yet.
    """
    found: Layers = []
    for index, layer in enumerate(cache.layers):
        # Not isinstance: what derives from DynamicLayer (sliding, quantised, hybrid…) keeps something else.
        if type(layer) is not DynamicLayer:
            raise UnsupportedError(
                f"layer {index} has a {type(layer).__name__}; only full attention (DynamicLayer) is supported"
            )
        if layer.keys is None or layer.values is None or not layer.keys.numel():
            raise UnsupportedError(f"layer {index} keeps no KV in the cache")
        found.append((layer.keys, layer.values))
    return found


class _Config(Protocol):
    def get_text_config(self, decoder: bool) -> object: ...


def require_text_decoder(model: PreTrainedModel) -> None:
    """Refuse by what the model says of itself, before it is run.

    Raises:
        UnsupportedError: not a decoder-only text model in one process.
    """
    config = model.config
    if not model.can_generate():
        raise UnsupportedError(f"{type(model).__name__} cannot generate")
    if config.is_encoder_decoder:
        raise UnsupportedError("encoder-decoder models")
    if cast(_Config, config).get_text_config(decoder=True) is not config:
        raise UnsupportedError("models of more than text: their positions and placeholders are not covered by keys")
    if (
        torch.distributed.is_available()
        and torch.distributed.is_initialized()
        and torch.distributed.get_world_size() > 1
    ):
        raise UnsupportedError("a model spread over several processes (torch.distributed)")
    if "attention_mask" not in inspect.signature(model.forward).parameters:
        raise UnsupportedError("the model's forward takes no attention_mask")


@torch.no_grad()
def probe(model: PreTrainedModel) -> CacheShape:
    """Run two tiny prompts and look at the cache they leave.

    Raises:
        UnsupportedError: the model does not fill a `DynamicCache`, not with equal layers, or not causally (a prefix's
        KV changes with
            what follows it).
    """
    cache = DynamicCache(config=model.config)
    for index, layer in enumerate(cache.layers):
        if type(layer) is not DynamicLayer:
            raise UnsupportedError(
                f"layer {index} has a {type(layer).__name__}; only full attention (DynamicLayer) is supported"
            )
    vocabulary = int(model.config.to_dict()["vocab_size"])
    ids = torch.tensor(PROBE, device=model.device) % vocabulary
    try:
        model(input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=cache, use_cache=True)
    except (RuntimeError, ValueError, TypeError, AttributeError, LookupError, NotImplementedError) as error:
        raise UnsupportedError(f"the model cannot run with a DynamicCache: {error}") from error
    layers = full_layers(cache)
    first = layers[0][0]
    for index, (keys, values) in enumerate(layers):
        if (
            keys.shape != values.shape
            or keys.shape != first.shape
            or keys.dtype != first.dtype
            or values.dtype != first.dtype
        ):
            raise UnsupportedError(
                f"layer {index}: keys {tuple(keys.shape)} and values {tuple(values.shape)} differ from layer 0's"
            )
        if keys.ndim != 4 or keys.shape[0] != 2 or keys.shape[2] != len(PROBE[0]):
            raise UnsupportedError(
                f"layer {index} keeps {tuple(keys.shape)}, not [batch, heads, tokens, dim] of all tokens"
            )
        for tensor in (keys, values):
            one, other = tensor[0, :, :2].float(), tensor[1, :, :2].float()
            if not torch.allclose(one, other, rtol=1e-2, atol=1e-2 * float(one.abs().max()) + 1e-6):
                raise UnsupportedError(f"layer {index}: the KV of a prefix changes with what follows it (not causal)")
    return CacheShape(first.shape[1], first.shape[3], first.dtype, tuple(keys.device for keys, _ in layers))
