"""Where pages lie on a GPU: views as vLLM makes them for each of its layouts, read as its kernels read them."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest
import torch
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheTensor,
    KVQuantMode,
    MLAAttentionSpec,
    SlidingWindowSpec,
    compute_layout_strides,
    create_kv_cache_views,
)
from vllm.v1.kv_cache_layout import KVCacheLayout

from lmpipe import native
from lmpipe.engines.vllm.geometry import DENSE, GroupPages, groups_of
from lmpipe.errors import UnsupportedError

BLOCKS, LAYERS, BLOCK = 6, 3, 16


def attention(**changes: Any) -> FullAttentionSpec:
    return FullAttentionSpec(
        **{"block_size": BLOCK, "num_kv_heads": 2, "head_size": 8, "dtype": torch.bfloat16, **changes}
    )


def registered(
    spec: Any, layout: KVCacheLayout, kernel_block: int | None = None, backends: set[str] | None = None
) -> tuple[torch.Tensor, dict[str, torch.Tensor], GroupPages]:
    """The buffer, the views that are registered, and what is made of them."""
    names = [f"layer.{number}" for number in range(LAYERS)]
    strides = compute_layout_strides(spec, BLOCKS, LAYERS, layout)
    nbytes = LAYERS * BLOCKS * spec.page_size_bytes
    raw = torch.randint(-128, 128, (nbytes,), dtype=torch.int8)
    placed = KVCacheTensor(nbytes, names, layer_stride=strides[0], block_stride=strides[1])
    views = create_kv_cache_views(raw, spec, BLOCKS, layout, placed, kernel_block)
    config = KVCacheConfig(BLOCKS, [placed], [KVCacheGroupSpec(names, spec)])
    caches = dict(zip(names, views, strict=True))
    (group,) = groups_of(config, caches, 0, "isa", {"FLASH_ATTN"} if backends is None else backends)
    return raw, caches, group


def payload_of(raw: torch.Tensor, group: GroupPages, ids: np.ndarray) -> np.ndarray:
    """A chunk of these pages, as it is saved."""
    region = native.Region((ctypes.c_uint8 * len(raw)).from_address(raw.data_ptr()))
    planes = len(group.offsets)
    offsets = group.offsets - np.uint64(raw.data_ptr())
    sizes = np.full(planes, group.layout.page_bytes, np.uint64)
    strides = np.full(planes, group.stride, np.uint64)
    pool = native.PagePool([region], np.zeros(planes, np.uint32), offsets, strides, sizes, group.pages)
    payload = np.empty(len(ids) * planes * group.layout.page_bytes, np.uint8)
    native.Copier(1).gather(pool, ids[None].astype(np.int32), native.Region(payload.data), np.zeros(1, np.uint64))
    return payload


def as_kernels_read(caches: dict[str, torch.Tensor], ids: np.ndarray, ratio: int, sides: int) -> np.ndarray:
    """[layer][K|V][page][token][head][dim][item byte]: `kv_cache.transpose(1, 2).split(head_size, dim=-1)`."""
    numbers: list[torch.Tensor] = []
    for view in caches.values():
        blocks = [int(page) * ratio + part for page in ids for part in range(ratio)]
        tokens = view.transpose(1, 2)[blocks]
        both = torch.stack(tokens.chunk(sides, dim=-1)).contiguous()
        numbers.append(both.view(torch.uint8).view(sides, len(ids), BLOCK, view.shape[1], -1, view.element_size()))
    return torch.stack(numbers).numpy()


@pytest.mark.parametrize("layout", KVCacheLayout, ids=lambda layout: layout.name)
@pytest.mark.parametrize(("heads", "dtype"), [(2, torch.bfloat16), (1, torch.float32)], ids=["bf16", "one-head"])
def test_numbers_are_where_the_layout_says(layout: KVCacheLayout, heads: int, dtype: torch.dtype) -> None:
    raw, caches, group = registered(attention(num_kv_heads=heads, dtype=dtype), layout)
    ids = np.array([4, 0, 5, 2])
    assert not group.layout.opaque_page_bytes
    there = group.layout.canonical(payload_of(raw, group, ids), len(ids) * BLOCK)
    assert np.array_equal(there, as_kernels_read(caches, ids, 1, 2))
    neighbours = layout.name in ("BLHNC", "BLNHC") or (layout.name == "BHLNC" and heads == 1)
    assert group.layout.layer_pieces == (1 if neighbours else LAYERS)
    assert group.layers == tuple(caches)


def test_blocks_that_are_several_of_the_kernels() -> None:
    """Tokens of a page are in order where they are outermost; else the page is bytes."""
    raw, caches, group = registered(attention(), KVCacheLayout.LBNHC, BLOCK // 2)
    ids = np.array([1, 3])
    there = group.layout.canonical(payload_of(raw, group, ids), len(ids) * BLOCK)
    assert np.array_equal(there, as_kernels_read(caches, ids, 2, 2))
    _, _, group = registered(attention(), KVCacheLayout.LBHNC, BLOCK // 2)
    assert group.layout.opaque_page_bytes == 2 * 2 * BLOCK * 8 * 2


def test_a_latent() -> None:
    spec = MLAAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=24, dtype=torch.bfloat16)
    raw, caches, group = registered(spec, KVCacheLayout.LBNHC, backends={"FLASHMLA"})
    ids = np.array([3, 2])
    there = group.layout.canonical(payload_of(raw, group, ids), len(ids) * BLOCK)
    assert (group.layout.kv, group.layout.kv_heads, group.layout.head_dim) == (1, 1, 24)
    assert np.array_equal(there, as_kernels_read(caches, ids, 1, 1))


@pytest.mark.parametrize(
    ("spec", "backends"),
    [
        (attention(kv_quant_mode=KVQuantMode.FP8_PER_TENSOR, dtype=torch.uint8), {"FLASH_ATTN"}),
        (attention(head_size_v=16), {"FLASH_ATTN"}),
        (attention(state_content_bytes=40), {"TRITON_ATTN"}),
        (attention(), {"ROCM_AITER_FA"}),
        (attention(), {"FLASH_ATTN", "CPU_ATTN"}),
    ],
    ids=["fp8", "other V", "packed", "shuffled", "mixed"],
)
@pytest.mark.parametrize("layout", [KVCacheLayout.LBNHC, KVCacheLayout.LHBNC], ids=lambda layout: layout.name)
def test_pages_of_unknown_order_move_as_bytes(spec: Any, backends: set[str], layout: KVCacheLayout) -> None:
    raw, _, group = registered(spec, layout, backends=backends)
    assert group.layout.page == ("opaque",)
    every = payload_of(raw, group, np.arange(BLOCKS))
    assert sorted(every.tolist()) == sorted(raw.view(torch.uint8).tolist())


def test_orders_are_apart() -> None:
    """What was laid out otherwise, or sees other tokens, is another layout."""
    window = SlidingWindowSpec(block_size=BLOCK, num_kv_heads=2, head_size=8, dtype=torch.bfloat16, sliding_window=64)
    specs = [(attention(), layout) for layout in KVCacheLayout] + [(window, KVCacheLayout.LBNHC)]
    layouts = {registered(spec, layout)[2].layout.layout_id() for spec, layout in specs}
    layouts.add(registered(attention(), KVCacheLayout.LBNHC, backends=set())[2].layout.layout_id())
    assert len(layouts) == 8 - 1  # LHBNC and BHLNC are the same chunks
    assert registered(window, KVCacheLayout.LBNHC)[2].windowed


def test_what_cannot_be_read_is_refused() -> None:
    _, caches, _ = registered(attention(), KVCacheLayout.LBNHC)
    config = KVCacheConfig(BLOCKS, [], [KVCacheGroupSpec(list(caches), attention())])
    torn = {name: torch.as_strided(view, view.shape, (256, 8, 32, 1)) for name, view in caches.items()}
    with pytest.raises(UnsupportedError, match=r"not contiguous.*set VLLM_KV_CACHE_LAYOUT"):
        groups_of(config, torn, 0, "", {"FLASH_ATTN"})
    with pytest.raises(UnsupportedError, match=r"a cache of shape \(2, 6"):
        groups_of(config, {name: view.expand(2, *view.shape) for name, view in caches.items()}, 0, "")


def test_the_backends_that_are_known_exist() -> None:
    assert set(AttentionBackendEnum.__members__) >= DENSE
