"""The KV cache in named shared memory: vLLM's one allocation is answered with a mapped segment, nothing is patched.

Whatever goes wrong here ends in private pages, with a warning that says why: an engine starts with or without lmpipe.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from lmpipe.errors import SegmentError
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

    def _map(self, nbytes: int) -> torch.Tensor | None:
        try:
            self.segment = PageSegment.create(self._directory, HEADER_BYTES + nbytes)
        except (SegmentError, OSError) as error:
            self.reason = str(error)
            return None
        return torch.frombuffer(self.segment.segment.buf, dtype=torch.int8, count=nbytes, offset=HEADER_BYTES)


def _is_kv_cache(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    device = torch.device(kwargs.get("device") or "cpu")
    size = args[0] if len(args) == 1 else None
    return isinstance(size, int) and size >= LEAST_BYTES and kwargs.get("dtype") is torch.int8 and device.type == "cpu"
