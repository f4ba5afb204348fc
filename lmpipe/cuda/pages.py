"""An engine's paged KV memory on a device, and where in it a part of a payload lies. Knows no codec."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl

from lmpipe.layout import KVLayout

WIDEST_ACCESS = 16
"""Bytes that a thread moves at once at most."""


@dataclass(frozen=True, slots=True)
class DevicePages:
    """The pages of one engine: plane p's page j lies `j * page_stride` bytes after `bases[p]`."""

    layout: KVLayout
    memory: tuple[torch.Tensor, ...]
    """What the planes lie in, kept alive as long as this."""
    bases: torch.Tensor
    """Their addresses, int64, on their device."""
    page_stride: int
    pages: int
    alignment: int
    """Bytes, at most 16, that divide the addresses of all pages."""

    @classmethod
    def of(cls, layout: KVLayout, planes: Sequence[torch.Tensor]) -> DevicePages:
        """The planes of `layout`, each a tensor `[pages, …]` whose pages hold `layout.page_bytes` without gaps.

        Raises:
            ValueError: planes are missing, or differ in device, number of pages or distance, or a page has gaps; the
                text names the plane.
        """
        if len(planes) != layout.plane_count:
            raise ValueError(f"{len(planes)} planes given, the layout has {layout.plane_count}")
        first = planes[0]
        stride = first.stride(0) * first.element_size()
        for number, plane in enumerate(planes):
            if plane[0].numel() * plane.element_size() != layout.page_bytes or not plane[0].is_contiguous():
                raise ValueError(f"plane {number} must have pages of {layout.page_bytes} bytes without gaps")
            if plane.stride(0) * plane.element_size() != stride or plane.shape[0] != first.shape[0]:
                raise ValueError(f"plane {number} must have as many pages as plane 0, as far apart")
            if plane.device != first.device:
                raise ValueError(f"plane {number} lies on {plane.device}, plane 0 on {first.device}")
        made = cls.at(layout, [plane.data_ptr() for plane in planes], stride, first.shape[0], planes)
        if first.is_cuda:
            torch.cuda.current_stream(first.device).synchronize()
        return made

    @classmethod
    def at(
        cls,
        layout: KVLayout,
        addresses: Sequence[int] | npt.NDArray[np.int64],
        page_stride: int,
        pages: int,
        memory: Sequence[torch.Tensor],
    ) -> DevicePages:
        """The planes of `layout` at these addresses, in `memory`, which is all on one device. Nothing is checked.

        Takes microseconds, for pages of one request: the table of addresses is copied through torch's current stream,
        and what reads it has to begin after an event there (`EnginePages.mark`).
        """
        table = np.array(addresses, np.int64)
        alignment = math.gcd(WIDEST_ACCESS, page_stride, int(np.gcd.reduce(table)))
        return cls(layout, tuple(memory), _sent(table, memory[0].device), page_stride, pages, alignment)

    @property
    def device(self) -> torch.device:
        """Where the pages are."""
        return self.bases.device

    def layer(self, layer: int) -> range:
        """The planes of a layer, where `layout.layer_pieces` says that a layer has planes of its own."""
        each = self.layout.plane_count // self.layout.layer_pieces
        return range(layer * each, (layer + 1) * each)

    def check(self, page_ids: npt.NDArray[np.int32]) -> None:
        """Raise ValueError where a page id is neither -1 nor of the pool."""
        if page_ids.size and not -1 <= page_ids.min() <= page_ids.max() < self.pages:
            raise ValueError(f"page ids must be -1 to {self.pages - 1}, got {page_ids.min()} to {page_ids.max()}")

    def ids(self, page_ids: npt.NDArray[np.int32]) -> torch.Tensor:
        """Page ids of a chunk, or of many `[chunks, pages]`, checked and on the device, through torch's current stream.

        -1: an encoder reads zeros, a decoder leaves the page out.

        Raises:
            ValueError: an id is outside the pool.
        """
        self.check(page_ids)
        return _sent(np.array(page_ids, np.int32), self.device)


def _sent(numbers: npt.NDArray[np.int32] | npt.NDArray[np.int64], device: torch.device) -> torch.Tensor:
    """On the device, through torch's current stream; nothing waits for it."""
    tensor = torch.from_numpy(numbers)  # pyright: ignore[reportUnknownMemberType]
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


@triton.jit
def run_address(
    bases: tl.tensor,
    page_ids: tl.tensor,
    page_stride: tl.tensor,
    pages: tl.tensor,
    run: tl.tensor,
    live: tl.tensor,
    RUNS: tl.constexpr,
    RUN_BYTES: tl.constexpr,
):
    """(address, whether there is something) of runs of `RUN_BYTES` bytes of a payload, `RUNS` of them in a page."""
    page = run // RUNS
    base = tl.load(bases + page // pages, mask=live, other=0)
    page_id = tl.load(page_ids + page % pages, mask=live, other=-1)
    return base + page_id.to(tl.int64) * page_stride + (run % RUNS) * RUN_BYTES, live & (page_id >= 0)
