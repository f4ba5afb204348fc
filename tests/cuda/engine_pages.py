"""Pages of an engine on a device, and the payload that a chunk of them is."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from lmpipe.codecs.source import Source
from lmpipe.cuda.pages import DevicePages
from lmpipe.layout import ITEM_BYTES, KVLayout

POOL_PAGES = 7
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def _in_one_page(planes: tuple[str, ...], page: tuple[str, ...], layers: int, dim: int, dtype: str) -> KVLayout:
    return KVLayout(layers, 2, dim, dtype, 4, planes, page)


def layouts(dtype: str) -> dict[str, KVLayout]:
    """Small ones of all kinds, with head sizes that are no powers of two among them."""
    return {
        "NHD": KVLayout.paged(1, 3, 64, dtype, 16),
        "HND": KVLayout.paged(1, 2, 96, dtype, 8, order="HND"),
        "dense": KVLayout.dense(2, 2, 128, dtype),
        "K and V in one page": _in_one_page(("layer",), ("kv", "token", "head", "dim"), 2, 80, dtype),
        "all in one page": _in_one_page((), ("layer", "token", "kv", "head", "dim"), 2, 65, dtype),
    }


CASES = [
    (dtype, kind) for dtype in DTYPES for kind in layouts(dtype) if dtype == "bfloat16" or kind in ("HND", "dense")
]
"""(dtype, kind of layout): all kinds in bf16."""


def layout_of(case: tuple[str, str]) -> KVLayout:
    """The layout of one of CASES."""
    return layouts(case[0])[case[1]]


def source_of(layout: KVLayout, page_count: int, position: int = 0) -> Source:
    """What an encoder on the host is told of a chunk."""
    return Source(layout, page_count * layout.page_tokens, position)


def numbers(layout: KVLayout, page_count: int, seed: int = 0) -> bytes:
    """A payload as models have it: every dimension has a scale of its own."""
    random = np.random.default_rng(seed)
    count = layout.plane_count * page_count * layout.page_bytes // ITEM_BYTES[layout.dtype]
    scales = np.exp(random.standard_normal(layout.head_dim))
    values = random.standard_normal(count) * scales[np.arange(count) % layout.head_dim]
    return as_payload(torch.from_numpy(values), layout.dtype)


def as_payload(values: torch.Tensor, dtype: str) -> bytes:
    """Numbers as the bytes of a payload."""
    return values.to(DTYPES[dtype]).view(torch.uint8).numpy().tobytes()


@dataclass
class Engine:
    """A pool whose planes lie between each other, and a chunk of pages in random order."""

    pages: DevicePages
    page_ids: np.ndarray
    ids: torch.Tensor

    @classmethod
    def of(cls, layout: KVLayout, page_count: int, device: torch.device, payload: bytes = b"") -> Engine:
        """With `payload` in the chunk's pages; every other byte of the pool is 0xA5."""
        memory = torch.full((POOL_PAGES, layout.plane_count, layout.page_bytes), 0xA5, dtype=torch.uint8)
        page_ids = np.random.default_rng(1).permutation(POOL_PAGES)[:page_count].astype(np.int32)
        if payload:
            chunk = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
            memory[page_ids.tolist()] = chunk.view(layout.plane_count, page_count, -1).transpose(0, 1)
        memory = memory.to(device)
        pages = DevicePages.of(layout, [memory[:, plane] for plane in range(layout.plane_count)])
        return cls(pages, page_ids, pages.ids(page_ids))

    def buffer(self, nbytes: int) -> torch.Tensor:
        """Bytes on the device."""
        return torch.full((nbytes,), 0xA5, dtype=torch.uint8, device=self.pages.device)

    def upload(self, encoded: bytes) -> torch.Tensor:
        """Bytes on the device."""
        return torch.frombuffer(bytearray(encoded), dtype=torch.uint8).to(self.pages.device)

    def payload(self) -> bytes:
        """What the chunk's pages hold."""
        return b"".join(plane[self.page_ids.tolist()].cpu().numpy().tobytes() for plane in self.pages.memory)

    def others_untouched(self) -> bool:
        """Whether the pages of others are as they were."""
        others = np.setdiff1d(np.arange(POOL_PAGES), self.page_ids).tolist()
        return all(bool((plane[others] == 0xA5).all()) for plane in self.pages.memory)


def on_host(payload: torch.Tensor) -> bytes:
    """Bytes of the device."""
    return payload.cpu().numpy().tobytes()
