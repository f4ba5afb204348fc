"""Layouts: byte counts, identity, and the canonical view against a plain index formula."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from lmpipe.errors import LayoutError
from lmpipe.layout import KVLayout

LLAMA = KVLayout.paged(32, 8, 128, "bfloat16", 16)


def test_bytes_of_a_llama_chunk() -> None:
    assert LLAMA.page_bytes == 32 << 10 and LLAMA.plane_count == 64
    assert LLAMA.chunk_bytes(256) == 32 << 20 and LLAMA.token_bytes == 128 << 10
    assert KVLayout.dense(32, 8, 128, "bfloat16").chunk_bytes(256) == 32 << 20


def test_the_effective_chunk_is_a_multiple_of_the_page() -> None:
    assert LLAMA.effective_chunk_tokens() == 256
    assert dataclasses.replace(LLAMA, page_tokens=48).effective_chunk_tokens() == 288
    assert dataclasses.replace(LLAMA, page_tokens=544).effective_chunk_tokens() == 544
    with pytest.raises(LayoutError, match="pages of 48"):
        dataclasses.replace(LLAMA, page_tokens=48).chunk_bytes(256)


@pytest.mark.parametrize(
    "layout",
    [
        KVLayout.paged(2, 3, 4, "float16", 2),
        KVLayout.paged(2, 3, 4, "float16", 2, order="HND"),
        KVLayout.dense(2, 3, 4, "float16"),
        KVLayout(2, 3, 4, "float16", 2, ("layer",), ("kv", "token", "head", "dim")),
        KVLayout(2, 3, 4, "float16", 2, (), ("layer", "kv", "head", "token", "dim")),
        KVLayout(2, 1, 4, "float16", 2, ("layer",), ("kv", "head", "token", "dim"), kv=1),
    ],
    ids=lambda layout: f"{layout.planes}{layout.page}",
)
def test_canonical_view(layout: KVLayout) -> None:
    tokens = 8
    pages = layout.chunk_pages(tokens)
    payload = np.arange(layout.chunk_bytes(tokens) // 2, dtype=np.uint16)
    view = layout.canonical(payload.view(np.uint8), tokens)
    assert view.shape == (layout.layers, layout.kv, pages, layout.page_tokens, layout.kv_heads, layout.head_dim, 2)
    extent = {
        "layer": layout.layers,
        "kv": layout.kv,
        "head": layout.kv_heads,
        "token": layout.page_tokens,
        "dim": layout.head_dim,
    }
    order = [*layout.planes, "page", *layout.page]
    rng = np.random.default_rng(0)
    for _ in range(50):
        at = {axis: int(rng.integers(n)) for axis, n in {**extent, "page": pages}.items()}
        flat = 0
        for axis in order:
            flat = flat * (pages if axis == "page" else extent[axis]) + at[axis]
        item = view[at["layer"], at["kv"], at["page"], at["token"], at["head"], at["dim"]]
        assert item.tobytes() == payload[flat].tobytes()


def test_identity() -> None:
    assert LLAMA.layout_id() == KVLayout.paged(32, 8, 128, "bfloat16", 16).layout_id()
    others = [
        KVLayout.dense(32, 8, 128, "bfloat16"),
        KVLayout.paged(32, 8, 128, "float16", 16),
        dataclasses.replace(LLAMA, isa="amx"),
    ]
    assert len({layout.layout_id() for layout in [LLAMA, *others]}) == 4


def test_opaque_pages_have_bytes_but_no_order() -> None:
    layout = KVLayout(4, 2, 64, "bfloat16", 128, ("layer",), ("opaque",), opaque_page_bytes=65536, isa="amx")
    assert layout.chunk_bytes(256) == 4 * 2 * 65536
    with pytest.raises(LayoutError, match="opaque"):
        layout.canonical(np.zeros(layout.chunk_bytes(256), np.uint8), 256)


@pytest.mark.parametrize(
    ("wrong", "names"),
    [
        ({"layers": 0}, "layer"),
        ({"dtype": "bf16"}, "bf16"),
        ({"planes": ("layer",)}, "partition"),
        ({"planes": ("layer", "token"), "page": ("kv", "head", "dim")}, "partition"),
        ({"opaque_page_bytes": 64}, "opaque"),
    ],
)
def test_layouts_that_cannot_exist(wrong: dict[str, object], names: str) -> None:
    with pytest.raises(LayoutError, match=names):
        dataclasses.replace(LLAMA, **wrong)
