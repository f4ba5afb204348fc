"""Where the pages of a cache group lie: read off the tensors that vLLM registers, never off its configuration.

vLLM gives a view `[blocks, heads, states, content]` for each layer, the content of a state being its K and then its V;
strides say in which order they lie (its layouts LBNHC, LBHNC, LHBNC, BLNHC, BLHNC, BHLNC). A page is one block of one
layer; where the pages of all layers of a block are neighbours, they are one page; where each head has a region of its
own, a page is one block of one head.

On CPUs a page is opaque: keys are transposed and bf16 is tiled for AMX, so whole pages move as bytes. On a GPU the
kernels of `DENSE` leave pages as the strides say, so that their order is known and codecs of numbers may run.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
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


DENSE = {
    "FLASH_ATTN",
    "FLASHINFER",
    "TRITON_ATTN",
    "FLEX_ATTENTION",
    "FLASH_ATTN_MLA",
    "FLASHINFER_MLA",
    "FLASHMLA",
    "CUTLASS_MLA",
    "TRITON_MLA",
}
"""Attention backends whose kernels read pages just as the strides of the view say."""

NUMBERS = ("float16", "bfloat16", "float32")


@dataclass(frozen=True, slots=True)
class GroupPages:
    """The pages of one cache group: page p of plane i is `page_bytes` at `offsets[i] + p * stride` of the buffer."""

    layout: KVLayout
    offsets: npt.NDArray[np.uint64]
    stride: int
    pages: int
    windowed: bool
    """Whether the engine takes blocks back from a request that still runs: its layers see the last tokens only."""
    layers: tuple[str, ...]
    """Their names, in the order of the planes."""


@dataclass(frozen=True, slots=True)
class _View:
    """One layer's pages."""

    offsets: tuple[int, ...]
    """One, or one for each head."""
    page_bytes: int
    stride: int
    order: tuple[str, ...]
    """The axes of a page, outermost first: those of `block`, `head`, `token` and `content` that it has."""


def groups_of(
    config: KVCacheConfig, caches: Mapping[str, torch.Tensor], base: int, isa: str, backends: Collection[str] = ()
) -> tuple[GroupPages, ...]:
    """The cache groups of one rank.

    Args:
        base: address of the buffer; 0 where there are several, and offsets are addresses.
        isa: what the order inside a page depends on.
        backends: names of the layers' attention backends; none where pages are opaque.

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
    dense = bool(backends) and DENSE.issuperset(backends)
    return tuple(_group(group, config.num_blocks, caches, base, isa, dense) for group in config.kv_cache_groups)


def _group(
    group: KVCacheGroupSpec, blocks: int, caches: Mapping[str, torch.Tensor], base: int, isa: str, dense: bool
) -> GroupPages:
    views = [_view(name, caches[name], blocks, base) for name in group.layer_names]
    page_bytes, stride = (
        _same(group, [view.page_bytes for view in views]),
        _same(group, [view.stride for view in views]),
    )
    first, spec = caches[group.layer_names[0]], group.kv_cache_spec
    offsets = [offset for view in views for offset in view.offsets]
    regions = _same(group, [len(view.offsets) for view in views])
    by_head = regions > 1
    planes: tuple[str, ...] = ("layer", "head") if by_head else ("layer",)
    page = _known(spec, first, views) if dense else None
    steps = set(np.diff(offsets).tolist())
    if not by_head and len(offsets) > 1 and steps == {page_bytes} and stride >= page_bytes * len(offsets):
        planes, page_bytes, offsets = (), page_bytes * len(offsets), offsets[:1]
        page = page and ("layer", *page)
    heads, dim = (spec.num_kv_heads, spec.head_size) if isinstance(spec, AttentionSpec) else (1, 1)
    layout = KVLayout(
        layers=len(views),
        kv_heads=regions if by_head else heads,
        head_dim=dim,
        dtype=_dtype(first.dtype),
        page_tokens=spec.block_size,
        planes=planes,
        page=page or ("opaque",),
        kv=1 if "MLA" in type(spec).__name__ else 2,
        opaque_page_bytes=0 if page else page_bytes,
        isa=f"{isa}:{type(spec).__name__}/{_window(spec)}",
    )
    names = tuple(group.layer_names)
    return GroupPages(layout, np.array(offsets, np.uint64), stride, blocks, _window(spec) is not None, names)


def _view(name: str, cache: torch.Tensor, blocks: int, base: int) -> _View:
    """Read a layer's view. A block of the manager may be several of the kernel's."""
    if cache.ndim != 4 or cache.shape[0] % blocks:
        raise UnsupportedError(f"{name}: a cache of shape {tuple(cache.shape)} for {blocks} blocks")
    ratio, item = cache.shape[0] // blocks, cache.element_size()
    axes = zip(cache.stride()[1:], cache.shape[1:], ("head", "token", "content"), strict=True)
    dense, order, starts = 1, tuple[str, ...](), range(1)
    for step, extent, axis in sorted(each for each in axes if each[1] > 1):
        if step == dense and len(starts) == 1:
            dense, order = dense * extent, (axis, *order)
        elif axis == "head" and step > dense and len(starts) == 1:
            starts = range(0, extent * step * item, step * item)
        else:
            raise UnsupportedError(
                f"{name}: the bytes of a block are not contiguous (shape {tuple(cache.shape)}, strides"
                f" {cache.stride()}): set VLLM_KV_CACHE_LAYOUT=LBHNC"
            )
    if ratio > 1:
        if cache.stride(0) != dense:
            raise UnsupportedError(f"{name}: the kernel's blocks of one block are not neighbours")
        order = ("block", *order)
    offsets = tuple(cache.data_ptr() - base + start for start in starts)
    return _View(offsets, ratio * dense * item, ratio * cache.stride(0) * item, order)


def _known(spec: KVCacheSpec, cache: torch.Tensor, views: Sequence[_View]) -> tuple[str, ...] | None:
    """The axes of a page, as `KVLayout` has them; None: what lies there is not K and V of numbers in a plain order."""
    if not isinstance(spec, AttentionSpec) or len({view.order for view in views}) != 1:
        return None
    latent = "MLA" in type(spec).__name__
    plain = (
        spec.kv_quant_mode == 0
        and spec.state_content_bytes is None
        and spec.tokens_per_state == 1
        and spec.head_size_v == (0 if latent else spec.head_size)
        and cache.shape[1] == spec.num_kv_heads
        and cache.shape[3] == spec.head_size + spec.head_size_v
        and _dtype(cache.dtype) in NUMBERS
    )
    order = list(views[0].order)
    if order[:2] == ["block", "head"] and cache.shape[2] > 1:
        return None  # the tokens of a page are not all of one head's
    tokens = [axis for axis in order if axis not in ("block", "content")]
    if "token" not in tokens:
        tokens.insert(0, "token")
    if "head" not in tokens and len(views[0].offsets) == 1:
        tokens.append("head")
    return (*tokens, "kv", "dim") if plain else None


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
