"""The device that a benchmark runs on: its clock, its memory, memory of the host that it reaches, and pages in it.

A CPU is a device too, on which the tests drive the benchmarks through Triton's interpreter; its figures mean nothing.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch

from lmpipe.cuda.pages import DevicePages
from lmpipe.layout import CHUNK_TOKENS, KVLayout
from lmpipe.tiers.segment_file import aligned

FULL = 8
"""Programs a multiprocessor: of 256 threads each, all that it has room for."""


@dataclass(frozen=True, slots=True)
class Device:
    """A GPU, or the CPU in its place."""

    torch: torch.device

    @property
    def is_gpu(self) -> bool:
        """Whether it is what the benchmark is about."""
        return self.torch.type == "cuda"

    @property
    def name(self) -> str:
        """As the driver calls it."""
        return torch.cuda.get_device_name(self.torch) if self.is_gpu else "no GPU"

    @property
    def programs(self) -> int:
        """That fill it."""
        if not self.is_gpu:
            return FULL
        properties = cast(Any, torch.cuda).get_device_properties(self.torch)
        return FULL * int(properties.multi_processor_count)

    def synchronize(self) -> None:
        """Wait for all its streams."""
        if self.is_gpu:
            torch.cuda.synchronize(self.torch)

    def seconds(self, step: Callable[[], object]) -> float:
        """From an idle device to an idle device, on the host's clock: launches count."""
        self.synchronize()
        began = time.perf_counter()
        step()
        self.synchronize()
        return time.perf_counter() - began

    @staticmethod
    def seconds_alone(step: Callable[[], object]) -> float:
        """On the host's clock; `step` itself waits for what it began, whatever else the device does."""
        began = time.perf_counter()
        step()
        return time.perf_counter() - began

    def free_bytes(self) -> int:
        """Of its memory."""
        return torch.cuda.mem_get_info(self.torch)[0] if self.is_gpu else 1 << 30

    def forget(self) -> None:
        """Give back what torch's allocators keep."""
        gc.collect()
        if self.is_gpu:
            torch.cuda.empty_cache()

    def numbers(self, *shape: int) -> torch.Tensor:
        """bf16, normally distributed."""
        return torch.randn(shape, dtype=torch.bfloat16, device=self.torch)

    def bytes(self, nbytes: int) -> torch.Tensor:
        """On the device, touched."""
        return torch.zeros(nbytes, dtype=torch.uint8, device=self.torch)

    def host_bytes(self, nbytes: int) -> torch.Tensor:
        """On the host, page-aligned, pinned and touched."""
        if self.is_gpu:
            return torch.zeros(nbytes, dtype=torch.uint8, pin_memory=True)
        return torch.frombuffer(aligned(nbytes), dtype=torch.uint8).zero_()


@dataclass(frozen=True, slots=True)
class Work:
    """Pages of so many tokens and a place on the host for each chunk of them. Page ids are in random order."""

    device: Device
    pages: DevicePages
    memory: torch.Tensor
    """All pages, `[planes, pages, …]`."""
    page_ids: npt.NDArray[np.int32]
    host: torch.Tensor

    @classmethod
    def of(cls, device: Device, layout: KVLayout, tokens: int) -> Work:
        """Full of numbers."""
        count = tokens // layout.page_tokens
        memory = device.numbers(layout.plane_count, count, layout.page_tokens, layout.kv_heads, layout.head_dim)
        order = np.random.default_rng(0).permutation(count).astype(np.int32)
        page_ids = order.reshape(-1, layout.chunk_pages(CHUNK_TOKENS))
        pages = DevicePages.of(layout, list(memory))
        work = cls(device, pages, memory, page_ids, device.host_bytes(len(page_ids) * layout.chunk_bytes(CHUNK_TOKENS)))
        work.host.copy_(work.flat)  # whatever is copied where, these are numbers
        return work

    @property
    def nbytes(self) -> int:
        """Of all chunks."""
        return len(self.host)

    @property
    def chunks(self) -> list[torch.Tensor]:
        """Each chunk's place on the host."""
        return list(self.host.view(len(self.page_ids), -1))

    @property
    def flat(self) -> torch.Tensor:
        """All pages as bytes."""
        return self.memory.view(-1).view(torch.uint8)


def checksum(memory: torch.Tensor) -> int:
    """Of numbers of 2 bytes `[planes, pages, …]`, each page by its place; computed where they are."""
    each = memory.view(torch.int16).flatten(2).sum(2, dtype=torch.int64)
    return int((each.flatten() * torch.arange(each.numel(), device=memory.device)).sum())
