"""KV tensors of a transformers cache as page pools: one page is one token of one head. Knows no keys and no requests.

A `DynamicLayer` grows by `torch.cat`, which makes new tensors: those handed to a save are never written again. Loads
fill fresh tensors, which then become the first state of a fresh `DynamicCache`.

Copies between tensors and the arena are made by threads of the host, for tensors in its memory, or by kernels beside
the model's work, for those on a GPU (transformers_device.py). A GPU's tensors can go through memory of the host too.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from lmpipe.engines.transformers_cache import CacheShape, Layers
from lmpipe.native import PagePool, Region
from lmpipe.producer.pools import Pool

Pages = npt.NDArray[np.int32]


class Memory(Protocol):
    """From and to where KV is copied, for one producer."""

    @property
    def device(self) -> torch.device:
        """Where tensors have to lie that are loaded into."""
        ...

    def pool(self, layers: Layers, row: int, first: int, last: int, *, writable: bool) -> Pool:
        """Columns `[first, last)` of a row, as pages from 0 on, planes (layer, kv, head); the tensors are kept alive.

        They must not change, other than by loads into a `writable` pool, as long as it is used.
        """
        ...

    def has_room(self, nbytes: int) -> bool:
        """Whether the model can have so many bytes beside what tensors in pools take."""
        ...

    def close(self) -> None:
        """The producer is closed."""
        ...


class HostMemory:
    """Memory of the host; what is saved from a device is copied here first, on the caller's thread."""

    device = torch.device("cpu")

    def pool(self, layers: Layers, row: int, first: int, last: int, *, writable: bool) -> PagePool:
        """The tensors themselves where they are on the host."""
        tensors = [
            _dense_tokens(tensor[row, :, first:last].to(self.device), writable) for pair in layers for tensor in pair
        ]
        heads, tokens, dim = tensors[0].shape
        item = tensors[0].element_size()
        regions: list[Region] = []
        offsets = np.empty((len(tensors), heads), np.uint64)
        strides = np.empty((len(tensors), heads), np.uint64)
        for index, tensor in enumerate(tensors):
            head_stride, token_stride, _ = tensor.stride()
            nbytes = ((heads - 1) * head_stride + (tokens - 1) * token_stride + dim) * item
            regions.append(Region.at(tensor.data_ptr(), nbytes, writable, tensor))
            offsets[index] = np.arange(heads, dtype=np.uint64) * np.uint64(head_stride * item)
            strides[index] = token_stride * item
        planes = len(tensors) * heads
        owner = np.repeat(np.arange(len(tensors), dtype=np.uint32), heads)
        sizes = np.full(planes, dim * item, np.uint64)
        return PagePool(regions, owner, offsets.reshape(-1), strides.reshape(-1), sizes, tokens)

    def has_room(self, nbytes: int) -> bool:
        """Memory of the host is not looked after: a device's is free once its tensors were copied here."""
        return True

    def close(self) -> None:
        """Nothing is kept."""


def _dense_tokens(tensor: torch.Tensor, writable: bool) -> torch.Tensor:
    """The tensor itself if one head's token is contiguous bytes, else (never for what `torch.cat` made) a copy."""
    if tensor.stride(2) == 1 or tensor.shape[2] == 1:
        return tensor
    assert not writable
    return tensor.contiguous()


class LoadTensors:
    """Fresh tensors for a batch's loaded prefix: `columns` tokens of every row, padding included."""

    def __init__(self, shape: CacheShape, memory: Memory, batch: int, columns: int) -> None:
        size = (batch, shape.kv_heads, columns, shape.head_dim)
        self._shape, self._memory, self._columns = shape, memory, columns
        self._layers = [(self._empty(size), self._empty(size)) for _ in range(shape.layers)]

    def _empty(self, size: tuple[int, ...]) -> torch.Tensor:
        return torch.empty(size, dtype=self._shape.dtype, device=self._memory.device)

    def pool(self, row: int) -> Pool:
        """The row's pages: page `i` is column `i`."""
        return self._memory.pool(self._layers, row, 0, self._columns, writable=True)

    def clear_padding(self, row: int, pad: int) -> None:
        """Zero the masked columns of a row: attention gives them no weight, but 0 x NaN would be NaN."""
        for keys, values in self._layers:
            keys[row, :, :pad].zero_()
            values[row, :, :pad].zero_()

    def into(self, cache: DynamicCache, columns: int, expand: int) -> None:
        """Make the first `columns` columns the state of an empty cache, every row `expand` times."""
        for layer, device, pair in zip(cache.layers, self._shape.devices, self._layers, strict=True):
            keys, values = (tensor[:, :, :columns].to(device) for tensor in pair)
            if expand > 1:
                keys, values = keys.repeat_interleave(expand, dim=0), values.repeat_interleave(expand, dim=0)
            assert type(layer) is DynamicLayer
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values


def page_ids(chunks: int, chunk_tokens: int, first: int, last: int) -> Pages:
    """(chunks, chunk_tokens): the page of each token, counted from `first`; pages from `last` on are skipped (-1)."""
    pages = np.arange(first, first + chunks * chunk_tokens, dtype=np.int32)
    pages[pages >= last] = -1
    return pages.reshape(chunks, chunk_tokens)
