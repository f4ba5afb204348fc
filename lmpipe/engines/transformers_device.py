"""A model whose whole KV lies on one GPU: kernels of this process copy between its tensors and the arena, on streams
beside the model's own. Imported only where there is such a model: it needs Triton, and on a GPU CuPy.

A save reads the model's own tensors after generate has returned. The pool keeps them alive until they are copied, and
lets go of them only when the copies are over, so PyTorch's allocator never gives memory away that is still read. (With
`record_stream` the memory would be freed earlier and reused later: the allocator asks for events of that stream at its
next allocations.) Tensors that are loaded into were allocated on the calling thread's stream; copies begin after an
event in it, and a load returns when they are over.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from lmpipe.cuda.arena import PinnedArena
from lmpipe.cuda.engine import EnginePages
from lmpipe.cuda.pages import DevicePages
from lmpipe.cuda.pool import DevicePool
from lmpipe.cuda.runtime import Runtime
from lmpipe.cuda.transfers import Transfers
from lmpipe.engines.tracing import engine_spans
from lmpipe.engines.transformers_cache import CacheShape, Layers
from lmpipe.layout import KVLayout


class Device:
    """What all producers of a model share."""

    def __init__(self, shape: CacheShape, run_dir: Path) -> None:
        """`shape.devices`: all the same one. Of the host's memory, where Triton interprets, nothing is pinned.
        `run_dir`: of the node, for what it wants traced.

        Raises:
            ImportError: CuPy is absent.
            DeviceError: the device cannot be used.
            UnsupportedError: a dtype that chunks cannot have.
        """
        self._layout = shape.layout()
        self._device = shape.devices[0]
        self._runtime = _runtime(self._device)
        self._spans = engine_spans(run_dir)
        self._transfers = Transfers(self._device, spans=self._spans)

    def memory(self) -> DeviceMemory:
        """For one more producer."""
        arena = None if self._runtime is None else PinnedArena(self._runtime)
        return DeviceMemory(self._layout, self._transfers, arena)

    def close(self) -> None:
        """Give the staging memory back. All memories are closed."""
        self._transfers.close()
        self._spans.close()


def _runtime(device: torch.device) -> Runtime | None:
    if device.type == "cpu":
        return None
    from lmpipe.cuda.cupy_runtime import open_device  # noqa: PLC0415  only a GPU needs CuPy

    return open_device(str(device.index))


class DeviceMemory:
    """The device's memory, seen by one producer (`transformers_memory.Memory`)."""

    def __init__(self, layout: KVLayout, transfers: Transfers, arena: PinnedArena | None) -> None:
        """Use `Device.memory`."""
        self._layout, self._transfers, self._arena = layout, transfers, arena

    @property
    def device(self) -> torch.device:
        """The one device."""
        return self._transfers.device

    def pool(self, layers: Layers, row: int, first: int, last: int, *, writable: bool) -> EnginePages:
        """The tensors themselves; copies of the columns only where tokens do not lie alike in all tensors."""
        tensors = [tensor[row, :, first:last] for pair in layers for tensor in pair]
        if len({tensor.stride()[1:] for tensor in tensors}) > 1 or tensors[0].stride(2) != 1:
            assert not writable
            tensors = [tensor.contiguous() for tensor in tensors]
        heads, tokens, _ = tensors[0].shape
        item = tensors[0].element_size()
        starts = np.array([(tensor.data_ptr(), tensor.stride(0) * item) for tensor in tensors], np.int64)
        addresses = starts[:, :1] + np.arange(heads) * starts[:, 1:]
        pages = DevicePages.at(self._layout, addresses.reshape(-1), tensors[0].stride(1) * item, tokens, tensors)
        return EnginePages(DevicePool(pages, self._transfers), self._arena)

    def has_room(self, nbytes: int) -> bool:
        """What the driver has left, or PyTorch's allocator holds without a tensor in it."""
        if self.device.type == "cpu":
            return True
        unused = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return torch.cuda.mem_get_info(self.device)[0] + unused >= nbytes

    def close(self) -> None:
        """Unpin the arena, when nobody copies any more."""
        if self._arena is not None:
            self._arena.close()
