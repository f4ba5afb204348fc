"""Where gather reads an engine's pages: the protocol of its readers, and the one for mapped segments of the host.

Readers of pages on a GPU are in cuda/readers.py, which only the launcher knows.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from lmpipe import messages as m
from lmpipe import native
from lmpipe.errors import LayoutError
from lmpipe.shm.descriptor import SegmentKind
from lmpipe.shm.segment import Segment

QUANTUM_BYTES = 32 << 20

Offsets = npt.NDArray[np.uint64]


class PageReader(Protocol):
    """One engine's pages."""

    @property
    def lane(self) -> str:
        """Copies of one lane take turns."""
        ...

    @property
    def quantum_bytes(self) -> int:
        """What one engine's saves may copy before the next engine has its turn: some milliseconds' worth."""
        ...

    def gather(self, page_ids: m.PageIds, offsets: Offsets) -> None:
        """Copy chunks, (chunks, pages of a chunk), to these offsets of the arena. Runs on a worker thread.

        Every byte is there when it returns, and nothing is under way any more when it raises.
        """
        ...

    def close(self) -> None:
        """Let go of the pages, now or when the copy under way ends."""
        ...


OpenDevicePages = Callable[[m.DeviceSource, Callable[[], bool]], PageReader]
"""Opens pages on a GPU; the second argument says whether the engine lives. Raises DeviceError."""


class PageReaders:
    """Makes the readers of one gather. `devices`: None where the topology names no GPU."""

    def __init__(self, arena: native.Region, copier: native.Copier, devices: OpenDevicePages | None = None) -> None:
        self._arena, self._copier, self._devices = arena, copier, devices

    def open(
        self, source: m.PageSource | m.DeviceSource, planes: int, page_bytes: int, alive: Callable[[], bool]
    ) -> PageReader:
        """A reader of pages that have to be of this layout.

        Raises:
            LayoutError, SegmentError, DeviceError: they are not, or cannot be reached; the text says why.
        """
        if len(source.plane_offset) != planes or np.any(source.page_bytes != page_bytes):
            raise LayoutError(
                f"pages: {len(source.plane_offset)} planes, the layout has {planes} with pages of {page_bytes} bytes"
            )
        if isinstance(source, m.PageSource):
            return MappedReader(source, self._arena, self._copier)
        if self._devices is None:
            raise LayoutError(f"pages on {source.device}, and the topology names no GPU: add it to engines.devices")
        return self._devices(source, alive)


class MappedReader:
    """Pages in a segment, mapped read-only and described to the copier, which checks every bound."""

    lane, quantum_bytes = "host", QUANTUM_BYTES

    def __init__(self, source: m.PageSource, arena: native.Region, copier: native.Copier) -> None:
        self._arena, self._copier = arena, copier
        self._segment = Segment.attach(
            Path(source.segment), SegmentKind.PAGES, id=bytes.fromhex(source.segment_id), readonly=True
        )
        planes = len(source.plane_offset)
        try:
            self._pool: native.PagePool | None = native.PagePool(
                [self._segment.region],
                np.zeros(planes, np.uint32),
                source.plane_offset,
                source.page_stride,
                source.page_bytes,
                source.pages,
            )
        except ValueError as error:
            self._segment.close()
            raise LayoutError(f"pages: {error}") from error

    def gather(self, page_ids: m.PageIds, offsets: Offsets) -> None:
        """As `PageReader` has it."""
        pool = self._pool
        if pool is None:
            raise LayoutError("the engine has gone")
        self._copier.gather(pool, page_ids, self._arena, offsets)

    def close(self) -> None:
        """Unmap; a copy under way keeps its map until it ends."""
        self._pool = None
        self._segment.close()
