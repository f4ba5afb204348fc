"""KV tensors of a transformers cache as page pools: one page is one token of one head. Knows no keys and no requests.

A `DynamicLayer` keeps keys and values as `[batch, kv_heads, tokens, head_dim]` and grows by `torch.cat`, which makes
new tensors: those handed to a save are never written again. Loads fill fresh tensors, which then become the first
state of a fresh `DynamicCache`.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, cast, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from lmpipe.errors import LayoutError, UnsupportedError
from lmpipe.layout import KVLayout
from lmpipe.native import PagePool, Region

Pages = npt.NDArray[np.int32]

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

    @property
    def in_host_memory(self) -> bool:
        """Whether copies can go straight into the engine's tensors."""
        return all(device.type == "cpu" for device in self.devices)

    def layout(self) -> KVLayout:
        """The chunk layout.

        Raises:
            UnsupportedError: a dtype that chunks cannot have.
        """
        try:
            return KVLayout.dense(self.layers, self.kv_heads, self.head_dim, str(self.dtype).removeprefix("torch."))
        except LayoutError as error:
            raise UnsupportedError(str(error)) from error


def full_layers(cache: DynamicCache) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values of every layer.

    Raises:
        UnsupportedError: a layer that does not keep the full attention's KV, or has none yet.
    """
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
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


class LoadTensors:
    """Fresh tensors for a batch's loaded prefix, in host memory: `columns` tokens of every row, padding included."""

    def __init__(self, shape: CacheShape, batch: int, columns: int) -> None:
        size = (batch, shape.kv_heads, columns, shape.head_dim)
        self._shape = shape
        self._layers = [
            (torch.empty(size, dtype=shape.dtype), torch.empty(size, dtype=shape.dtype)) for _ in range(shape.layers)
        ]
        self._columns = columns

    def pool(self, row: int) -> PagePool:
        """The row's pages: page `i` is column `i`."""
        return pool_of(self._layers, row, writable=True)

    def clear_padding(self, row: int, pad: int) -> None:
        """Zero the masked columns of a row: attention gives them no weight, but 0 x NaN would be NaN."""
        for keys, values in self._layers:
            keys[row, :, :pad].zero_()
            values[row, :, :pad].zero_()

    def into(self, cache: DynamicCache, columns: int, expand: int) -> None:
        """Make the first `columns` columns the state of an empty cache, every row `expand` times."""
        for layer, device, pair in zip(cache.layers, self._shape.devices, self._layers, strict=True):
            keys, values = (tensor[:, :, :columns].to(device) for tensor in pair)
            if expand > 1:
                keys, values = keys.repeat_interleave(expand, dim=0), values.repeat_interleave(expand, dim=0)
            assert type(layer) is DynamicLayer
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values


def saved_tensors(layers: Sequence[tuple[torch.Tensor, torch.Tensor]], row: int, first: int, last: int) -> PagePool:
    """Columns `[first, last)` of a row as pages from 0 on: the engine's own tensors where they are on the host."""
    rows = [
        (keys[row : row + 1, :, first:last].cpu(), values[row : row + 1, :, first:last].cpu())
        for keys, values in layers
    ]
    return pool_of(rows, 0, writable=False)


def pool_of(layers: Sequence[tuple[torch.Tensor, torch.Tensor]], row: int, *, writable: bool) -> PagePool:
    """A row of `[batch, heads, tokens, dim]` tensors, kept alive, as planes (layer, kv, head)."""
    tensors = [_dense_tokens(tensor, writable) for pair in layers for tensor in pair]
    _, heads, tokens, dim = tensors[0].shape
    item = tensors[0].element_size()
    regions: list[Region] = []
    offsets = np.empty((len(tensors), heads), np.uint64)
    strides = np.empty((len(tensors), heads), np.uint64)
    for index, tensor in enumerate(tensors):
        batch_stride, head_stride, token_stride, _ = tensor.stride()
        nbytes = ((heads - 1) * head_stride + (tokens - 1) * token_stride + dim) * item
        regions.append(Region.at(tensor.data_ptr() + row * batch_stride * item, nbytes, writable, tensor))
        offsets[index] = np.arange(heads, dtype=np.uint64) * np.uint64(head_stride * item)
        strides[index] = token_stride * item
    planes = len(tensors) * heads
    owner = np.repeat(np.arange(len(tensors), dtype=np.uint32), heads)
    return PagePool(
        regions, owner, offsets.reshape(-1), strides.reshape(-1), np.full(planes, dim * item, np.uint64), tokens
    )


def _dense_tokens(tensor: torch.Tensor, writable: bool) -> torch.Tensor:
    """The tensor itself if one head's token is contiguous bytes, else (never for what `torch.cat` made) a copy."""
    if tensor.stride(3) == 1 or tensor.shape[3] == 1:
        return tensor
    assert not writable
    return tensor.contiguous()


def page_ids(chunks: int, chunk_tokens: int, first: int, last: int) -> Pages:
    """(chunks, chunk_tokens): the page of each token, counted from `first`; pages from `last` on are skipped (-1)."""
    pages = np.arange(first, first + chunks * chunk_tokens, dtype=np.int32)
    pages[pages >= last] = -1
    return pages.reshape(chunks, chunk_tokens)
