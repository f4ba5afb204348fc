"""A rank's KV cache on a GPU: its export to gather, for saves, and pools for the copies that this process makes.

Nothing that needs a GPU's libraries is imported before there is a KV cache on one. Why gather cannot read it is said
once, with what to change; this process then copies saves itself.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lmpipe.cuda.ipc import ExportedPages
from lmpipe.cuda.runtime import Runtime, Stream
from lmpipe.errors import DeviceError, UnsupportedError
from lmpipe.page_source import DeviceSource
from lmpipe.producer.pools import ForeignPool

if TYPE_CHECKING:  # the one imports vLLM, the other Triton
    from lmpipe.engines.vllm.geometry import GroupPages
    from lmpipe.engines.vllm.kernels import Kernels

log = logging.getLogger("lmpipe.vllm")

INSTALL = "pip install 'lmpipe[gpu]'"


class DeviceMemory:
    """The pages of one rank on one device. Used by the engine's thread."""

    base = 0
    """Offsets of pages are addresses."""

    def __init__(
        self, caches: Mapping[str, torch.Tensor], run_dir: Path, runtime: Runtime | None, lack: str = ""
    ) -> None:
        """`run_dir`: of the node. `runtime`: of the device, to export pages and pin the arena with; None for the reason
        `lack`.
        """
        self._caches, self._run_dir = list(caches.values()), run_dir
        self._runtime, self._lack = runtime, lack
        self._said: set[str] = set()
        self._exported: list[ExportedPages] = []
        self._kernels: Kernels | None = None

    @classmethod
    def of(cls, caches: Mapping[str, torch.Tensor], run_dir: Path) -> DeviceMemory:
        """By CuPy; without it nothing is exported, and the arena is not pinned."""
        try:
            from lmpipe.cuda.cupy_runtime import open_device  # noqa: PLC0415  only where there is a GPU
        except ImportError as error:
            return cls(caches, run_dir, None, f"{error}: {INSTALL}")
        try:
            return cls(caches, run_dir, open_device(str(next(iter(caches.values())).device.index)))
        except DeviceError as error:
            return cls(caches, run_dir, None, str(error))

    def pool(self, pages: GroupPages) -> ForeignPool:
        """For the copies that this process makes.

        Raises:
            UnsupportedError: there is no Triton.
        """
        if self._kernels is None:
            try:
                from lmpipe.engines.vllm.kernels import Kernels  # noqa: PLC0415  only where there is a GPU
            except ImportError as error:
                raise UnsupportedError(f"KV on a GPU is copied by Triton's kernels, and {error}: {INSTALL}") from error
            self._kernels = Kernels(self._caches, self._runtime, self._run_dir)
        return self._kernels.pool(pages)

    def source(self, pages: GroupPages) -> DeviceSource | None:
        """For gather. None: it cannot read them, which is said."""
        if self._runtime is None:
            self.say(self._lack)
            return None
        addresses = pages.offsets.tolist()
        try:
            exported = ExportedPages(self._runtime, addresses, pages.stride, pages.layout.page_bytes, pages.pages)
        except DeviceError as error:
            self.say(str(error))
            return None
        self._exported.append(exported)
        return exported.source

    def say(self, reason: str) -> None:
        """Warn that this process copies saves itself, once for each reason."""
        if reason not in self._said:
            log.warning("gather cannot read the KV cache on the GPU, this process copies saves itself: %s", reason)
        self._said.add(reason)

    def mark(self) -> None:
        """What the engine's stream was given so far has written the pages that are saved from now on."""
        for exported in self._exported:
            exported.mark(self.stream())

    def stream(self) -> Stream:
        """The engine's."""
        return Stream(torch.cuda.current_stream(self._caches[0].device).cuda_stream)

    def close(self) -> None:
        """Wait for copies, and give everything back. The producers are closed."""
        if self._kernels is not None:
            self._kernels.close()
        for exported in self._exported:
            exported.close()
        self._exported.clear()


def device_memory(caches: Mapping[str, torch.Tensor], run_dir: Path) -> DeviceMemory | None:
    """None: they are in memory of the host. `run_dir`: of the node."""
    return None if next(iter(caches.values())).device.type == "cpu" else DeviceMemory.of(caches, run_dir)
