"""A rank's KV cache in memory of the host, shared where it can be: vLLM's one allocation is answered with a mapped
segment, nothing is patched.

Whatever goes wrong here ends in private pages, with a warning that says why: an engine starts with or without lmpipe.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from lmpipe import native
from lmpipe.engines.vllm.geometry import GroupPages
from lmpipe.errors import SegmentError, UnsupportedError
from lmpipe.page_source import Places
from lmpipe.producer import MappedPages
from lmpipe.shm.descriptor import HEADER_BYTES
from lmpipe.shm.pages import PageSegment

log = logging.getLogger("lmpipe.vllm")

LEAST_BYTES = 1 << 20
"""Smaller buffers that are made beside the KV cache stay where they are."""


class SharedPages(TorchFunctionMode):
    """While entered, the KV cache's `torch.zeros` comes from a segment in `directory`."""

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self._directory = directory
        self.segment: PageSegment | None = None
        self.reason = "vLLM made its KV cache otherwise than lmpipe expects"
        """Why there is no segment."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.zeros and self.segment is None and _is_kv_cache(args, kwargs):
            mapped = self._map(args[0])
            if mapped is not None:
                return mapped
        return func(*args, **kwargs)

    def close(self) -> None:
        """Give the segment back."""
        if self.segment is not None:
            self.segment.close()

    def _map(self, nbytes: int) -> torch.Tensor | None:
        try:
            self.segment = PageSegment.create(self._directory, HEADER_BYTES + nbytes)
        except (SegmentError, OSError) as error:
            self.reason = str(error)
            return None
        return torch.frombuffer(self.segment.segment.buf, dtype=torch.int8, count=nbytes, offset=HEADER_BYTES)


class HostMemory:
    """The pages of one rank, all in one buffer."""

    def __init__(self, caches: Mapping[str, torch.Tensor], shared: SharedPages | None) -> None:
        """`shared`: what the KV cache was allocated in; None: as vLLM does it.

        Raises:
            UnsupportedError: there are several buffers.
        """
        first = next(iter(caches.values()))
        self.base = first.untyped_storage().data_ptr()
        """Address of the buffer."""
        if any(cache.untyped_storage().data_ptr() != self.base for cache in caches.values()):
            raise UnsupportedError("vLLM made its KV cache of several buffers")
        self._segment, self._shift = shared.segment if shared is not None else None, 0
        if self._segment is not None:
            buffer = self._segment.segment.buf
            self._shift = HEADER_BYTES
            self.base = torch.frombuffer(buffer, dtype=torch.int8, count=1, offset=HEADER_BYTES).data_ptr()
            self._region = self._segment.segment.region
        else:
            if shared is not None:
                log.warning("pages stay private, this process copies saves itself: %s", shared.reason)
            nbytes = first.untyped_storage().nbytes()
            self._region = native.Region.at(self.base, nbytes, True, dict(caches))

    def pool(self, pages: GroupPages) -> native.PagePool:
        """For the copies that this process makes."""
        offsets, strides, sizes = self._planes(pages)
        return native.PagePool([self._region], np.zeros(len(offsets), np.uint32), offsets, strides, sizes, pages.pages)

    def source(self, pages: GroupPages) -> MappedPages | None:
        """For gather. None: it cannot read them."""
        if self._segment is None:
            return None
        return MappedPages(str(self._segment.path), self._segment.id.hex(), *self._planes(pages), pages.pages)

    def _planes(self, pages: GroupPages) -> tuple[Places, Places, Places]:
        planes = len(pages.offsets)
        strides, sizes = np.full(planes, pages.stride, np.uint64), np.full(planes, pages.layout.page_bytes, np.uint64)
        return pages.offsets + np.uint64(self._shift), strides, sizes


def _is_kv_cache(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    device = torch.device(kwargs.get("device") or "cpu")
    size = args[0] if len(args) == 1 else None
    return isinstance(size, int) and size >= LEAST_BYTES and kwargs.get("dtype") is torch.int8 and device.type == "cpu"
