"""Where the pages of a cache group lie: read off the tensors that vLLM registers, never off its configuration.

vLLM keeps the KV of all layers in one buffer and gives a view `[blocks, heads, states, content]` for each layer. A page
is one block of one layer; where the pages of all layers of a block are neighbours, they are one page. What a page holds
is opaque: on CPU keys are transposed and bf16 is tiled for AMX, so whole pages move as bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheConfig, KVCacheGroupSpec, KVCacheSpec

from lmpipe.errors import UnsupportedError
from lmpipe.layout import ITEM_BYTES, KVLayout

CACHEABLE = (
    "FullAttentionSpec",
    "SlidingWindowSpec",
    "ChunkedLocalAttentionSpec",
    "MLAAttentionSpec",
    "SlidingWindowMLASpec",
    "SinkFullAttentionSpec",
)
"""Kinds of cache whose blocks depend on nothing but the tokens up to their end."""


@dataclass(frozen=True, slots=True)
class GroupPages:
    """The pages of one cache group: page p of plane i is `page_bytes` at `offsets[i] + p * stride` of the buffer."""

    layout: KVLayout
    offsets: npt.NDArray[np.uint64]
    stride: int
    pages: int
    windowed: bool
    """Whether the engine takes blocks back from a request that still runs: its layers see the last tokens only."""


def groups_of(config: KVCacheConfig, caches: Mapping[str, torch.Tensor], base: int, isa: str) -> tuple[GroupPages, ...]:
    """The cache groups of one rank. `base`: address of the buffer; `isa`: what the order inside a page depends on.

    Raises:
        UnsupportedError: a group of a kind, or pages of a shape, that lmpipe cannot keep rightly.
    """
    for number, group in enumerate(config.kv_cache_groups):
        kind = type(group.kv_cache_spec).__name__
        if kind not in CACHEABLE:
            raise UnsupportedError(
                f"cache group {number} ({', '.join(group.layer_names[:3])}, …) is a {kind}: lmpipe keeps"
                f" {', '.join(CACHEABLE)}; run this model without the connector"
            )
        if group.is_eagle_group or group.host_resident or not group.enable_kv_transfer:
            raise UnsupportedError(f"cache group {number} belongs to a draft model or lies elsewhere")
    return tuple(_group(group, config.num_blocks, caches, base, isa) for group in config.kv_cache_groups)


def _group(group: KVCacheGroupSpec, blocks: int, caches: Mapping[str, torch.Tensor], base: int, isa: str) -> GroupPages:
    views = [_view(name, caches[name], blocks, base) for name in group.layer_names]
    page_bytes, stride = _same(group, [view[1] for view in views]), _same(group, [view[2] for view in views])
    offsets = [view[0] for view in views]
    planes: tuple[str, ...] = ("layer",)
    steps = set(np.diff(offsets).tolist())
    if len(offsets) > 1 and steps == {page_bytes} and stride >= page_bytes * len(offsets):
        planes, page_bytes, offsets = (), page_bytes * len(offsets), offsets[:1]
    spec = group.kv_cache_spec
    heads, dim = (spec.num_kv_heads, spec.head_size) if isinstance(spec, AttentionSpec) else (1, 1)
    layout = KVLayout(
        layers=len(views),
        kv_heads=heads,
        head_dim=dim,
        dtype=_dtype(caches[group.layer_names[0]].dtype),
        page_tokens=spec.block_size,
        planes=planes,
        page=("opaque",),
        kv=1 if "MLA" in type(spec).__name__ else 2,
        opaque_page_bytes=page_bytes,
        isa=f"{isa}:{type(spec).__name__}/{_window(spec)}",
    )
    return GroupPages(layout, np.array(offsets, np.uint64), stride, blocks, _window(spec) is not None)


def _view(name: str, cache: torch.Tensor, blocks: int, base: int) -> tuple[int, int, int]:
    """Offset, page bytes and stride of a layer's pages. A block of the manager may be several of the kernel's."""
    if cache.shape[0] % blocks:
        raise UnsupportedError(f"{name}: a cache of shape {tuple(cache.shape)} for {blocks} blocks")
    ratio, item = cache.shape[0] // blocks, cache.element_size()
    inner = sorted((s, n) for s, n in zip(cache.stride()[1:], cache.shape[1:], strict=True) if n > 1)
    dense = 1
    for step, extent in inner:
        if step != dense:
            raise UnsupportedError(
                f"{name}: the bytes of a block are not contiguous (shape {tuple(cache.shape)}, strides"
                f" {cache.stride()}): set VLLM_KV_CACHE_LAYOUT=LBHNC"
            )
        dense *= extent
    if ratio > 1 and cache.stride(0) != dense:
        raise UnsupportedError(f"{name}: the kernel's blocks of one block are not neighbours")
    return cache.data_ptr() - base, ratio * dense * item, ratio * cache.stride(0) * item


def _same(group: KVCacheGroupSpec, values: Sequence[int]) -> int:
    if len(set(values)) != 1:
        raise UnsupportedError(f"the layers {', '.join(group.layer_names[:3])}, … share blocks of different sizes")
    return values[0]


def _dtype(dtype: torch.dtype) -> str:
    name = str(dtype).removeprefix("torch.")
    if name not in ITEM_BYTES:
        raise UnsupportedError(f"KV of dtype {name} is not supported (known: {', '.join(ITEM_BYTES)})")
    return name


def _window(spec: KVCacheSpec) -> int | None:
    """How many tokens a layer sees at most: equal tokens have other KV behind a layer that sees less of them."""
    return getattr(spec, "sliding_window", None) or getattr(spec, "attention_chunk_size", None)


def align_tokens(groups: Sequence[GroupPages]) -> int:
    """The least number of tokens that is whole blocks in every group."""
    return math.lcm(*(group.layout.page_tokens for group in groups))
