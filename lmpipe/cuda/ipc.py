"""Device memory of one process for another: handles out, maps in. Knows no stage and no engine.

    engine   pages ─▶ their allocations (base, handle, each once) and where in them each plane begins ─▶ `DeviceSource`
             `mark` records the event that says when the pages are written
    gather   `DeviceSource` ─▶ allocations opened, each once however many sources name it ─▶ addresses of the planes

A handle names a whole allocation of the driver, which PyTorch's caching allocator cuts into tensors; so what is opened
is larger than the pages, and every plane is checked to lie inside it: in the message against what the exporter says,
here against what the driver says. Handles of the dead cannot be opened; what is open when its exporter dies stays
mapped until it is closed, and who reads asks for the exporter's session lock afterwards.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lmpipe.cuda.runtime import Addresses, Runtime, Stream
from lmpipe.errors import DeviceError
from lmpipe.messages import DeviceSource


class ExportedPages:
    """This process's pages, for gather. The memory must stay allocated until `close`.

    Give `source` to the producer, and call `mark` before each save.
    """

    def __init__(
        self, runtime: Runtime, addresses: Sequence[int], page_stride: int, page_bytes: int, pages: int
    ) -> None:
        """Page p of plane i: `page_bytes` bytes at `addresses[i] + p * page_stride`.

        Raises:
            DeviceError: the memory has no handle, or a plane runs past its allocation.
        """
        self._runtime = runtime
        found: dict[int, int] = {}
        handles: list[str] = []
        sizes: list[int] = []
        plane_allocation: list[int] = []
        plane_offset: list[int] = []
        for plane, address in enumerate(addresses):
            base, nbytes = runtime.allocation(address)
            if address + (pages - 1) * page_stride + page_bytes > base + nbytes:
                raise DeviceError(f"plane {plane} runs past the {nbytes} bytes of its allocation")
            if base not in found:
                found[base] = len(handles)
                handles.append(runtime.export_memory(base).hex())
                sizes.append(nbytes)
            plane_allocation.append(found[base])
            plane_offset.append(address - base)
        self._written = runtime.new_event(shared=True)
        planes = len(addresses)
        self.source = DeviceSource(
            runtime.uuid,
            handles,
            np.array(sizes, np.uint64),
            np.array(plane_allocation, np.uint64),
            np.array(plane_offset, np.uint64),
            np.full(planes, page_stride, np.uint64),
            np.full(planes, page_bytes, np.uint64),
            pages,
            runtime.export_event(self._written).hex(),
        )

    def mark(self, stream: Stream) -> None:
        """What `stream` was given so far writes the pages: gather reads those of later saves after it."""
        self._runtime.record(self._written, stream)

    def close(self) -> None:
        """The event goes; gather must have no save under way. Handles need no end."""
        self._runtime.free_event(self._written)


@dataclass(slots=True)
class _Opened:
    base: int
    nbytes: int
    users: int


class Allocations:
    """Allocations of other processes on one device, each opened once. Safe to share among threads."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._opened: dict[str, _Opened] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._opened)

    def open(self, handle: str, nbytes: int) -> int:
        """Base of the allocation here. `nbytes`: what its exporter says that it has.

        Raises:
            DeviceError: it cannot be opened, or is shorter.
        """
        with self._lock:
            opened = self._opened.get(handle)
            if opened is None:
                opened = self._opened[handle] = self._map(handle)
            opened.users += 1
        if nbytes > opened.nbytes:
            self.close(handle)
            raise DeviceError(f"an allocation of {nbytes} bytes was announced, the driver knows {opened.nbytes}")
        return opened.base

    def _map(self, handle: str) -> _Opened:
        base = self._runtime.open_memory(bytes.fromhex(handle))
        try:
            start, nbytes = self._runtime.allocation(base)
        except DeviceError:
            self._runtime.close_memory(base)
            raise
        return _Opened(base, start + nbytes - base, 0)

    def close(self, handle: str) -> None:
        """One user less; the last one unmaps it."""
        with self._lock:
            opened = self._opened[handle]
            opened.users -= 1
            if opened.users:
                return
            del self._opened[handle]
            self._runtime.close_memory(opened.base)


def plane_addresses(source: DeviceSource, allocations: Allocations) -> Addresses:
    """Open all allocations of a source; where its planes begin here, shape (planes,). `close_source` ends it.

    Raises:
        DeviceError: one cannot be opened; then none stays open.
    """
    bases: list[int] = []
    try:
        for handle, nbytes in zip(source.handles, source.allocation_bytes.tolist(), strict=True):
            bases.append(allocations.open(handle, nbytes))
    except DeviceError:
        for handle in source.handles[: len(bases)]:
            allocations.close(handle)
        raise
    return np.array(bases, np.uint64)[source.plane_allocation] + source.plane_offset


def close_source(source: DeviceSource, allocations: Allocations) -> None:
    """Inverse of `plane_addresses`."""
    for handle in source.handles:
        allocations.close(handle)
