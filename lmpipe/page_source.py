"""Where an engine's pages are, as it says when it registers: in a mapped segment, or on a GPU. No I/O."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import Meta

from lmpipe.errors import MessageError
from lmpipe.wire import equal

MAX_PLANES = 1 << 12
MAX_ALLOCATIONS = 1 << 10

Places = npt.NDArray[np.uint64]

_Id = Annotated[int, Meta(ge=0, le=2**63 - 1)]
_U31 = Annotated[int, Meta(ge=0, le=2**31 - 1)]
_Hex = Annotated[str, Meta(max_length=64, pattern=r"\A([0-9a-f]{2})*\Z")]


@dataclass(frozen=True, slots=True, eq=False)
class PageSource:
    """Engine pages in a mapped segment: page p of plane i: `page_bytes[i]` at `plane_offset[i] + p * page_stride[i]`.

    Sent once in a session, so its arrays travel as lists inside the header.
    """

    segment: str
    segment_id: str
    plane_offset: Places
    page_stride: Places
    page_bytes: Places
    pages: int
    memory: str = field(default="mapped", init=False)

    def __eq__(self, other: object) -> bool:
        return equal(self, other)

    __hash__ = None  # type: ignore[assignment]


@dataclass(frozen=True, slots=True, eq=False)
class DeviceSource:
    """Engine pages on a GPU: page p of plane i: `page_bytes[i]` at `plane_offset[i] + p * page_stride[i]` of the
    allocation that `handles[plane_allocation[i]]` opens, all inside its `allocation_bytes`.

    `device`: UUID, as `GPU-…`. `written_event`: handle of the event after which the pages of a save may be read.
    Handles are CUDA's (HIP's) 64 bytes in hexadecimal digits.
    """

    device: str
    handles: list[str]
    allocation_bytes: Places
    plane_allocation: Places
    plane_offset: Places
    page_stride: Places
    page_bytes: Places
    pages: int
    written_event: str
    memory: str = field(default="device", init=False)

    def __eq__(self, other: object) -> bool:
        return equal(self, other)

    __hash__ = None  # type: ignore[assignment]


_PlaneWords = Annotated[list[_Id], Meta(max_length=MAX_PLANES)]
_AllocationWords = Annotated[list[_Id], Meta(min_length=1, max_length=MAX_ALLOCATIONS)]
_DeviceHandle = Annotated[str, Meta(min_length=128, max_length=128, pattern=r"\A[0-9a-f]*\Z")]
_Uuid = Annotated[str, Meta(max_length=40, pattern=r"\AGPU-[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\Z")]


class MappedHeader(msgspec.Struct, forbid_unknown_fields=True, tag_field="memory", tag="mapped"):
    """`PageSource` in a message's header."""

    segment: Annotated[str, Meta(max_length=1024)]
    segment_id: _Hex
    plane_offset: _PlaneWords
    page_stride: _PlaneWords
    page_bytes: _PlaneWords
    pages: _U31

    def source(self) -> PageSource:
        """What it describes. Raises MessageError."""
        offset, stride, nbytes = _plane_arrays(self.plane_offset, self.page_stride, self.page_bytes)
        return PageSource(self.segment, self.segment_id, offset, stride, nbytes, self.pages)


class DeviceHeader(msgspec.Struct, forbid_unknown_fields=True, tag_field="memory", tag="device"):
    """`DeviceSource` in a message's header."""

    device: _Uuid
    handles: Annotated[list[_DeviceHandle], Meta(min_length=1, max_length=MAX_ALLOCATIONS)]
    allocation_bytes: _AllocationWords
    plane_allocation: _PlaneWords
    plane_offset: _PlaneWords
    page_stride: _PlaneWords
    page_bytes: _PlaneWords
    pages: Annotated[int, Meta(ge=1, le=2**31 - 1)]
    written_event: _DeviceHandle

    def source(self) -> DeviceSource:
        """What it describes, with every plane inside its allocation. Raises MessageError."""
        offset, stride, nbytes, allocation = _plane_arrays(
            self.plane_offset, self.page_stride, self.page_bytes, self.plane_allocation
        )
        if len(self.handles) != len(self.allocation_bytes) or len(set(self.handles)) < len(self.handles):
            raise MessageError("pages", "handles and allocation_bytes differ in length, or a handle stands twice")
        for plane, (at, start, step, size) in enumerate(
            zip(self.plane_allocation, self.plane_offset, self.page_stride, self.page_bytes, strict=True)
        ):
            if at >= len(self.handles):
                raise MessageError("pages", f"plane {plane} lies in allocation {at} of {len(self.handles)}")
            if start + (self.pages - 1) * step + size > self.allocation_bytes[at]:
                raise MessageError(
                    "pages", f"plane {plane} runs past the {self.allocation_bytes[at]} bytes of its allocation"
                )
        sizes = np.array(self.allocation_bytes, np.uint64)
        return DeviceSource(
            self.device, self.handles, sizes, allocation, offset, stride, nbytes, self.pages, self.written_event
        )


def _plane_arrays(*words: list[int]) -> list[Places]:
    arrays = [np.array(w, np.uint64) for w in words]
    if len({len(array) for array in arrays}) > 1:
        raise MessageError("pages", "plane_offset, page_stride and page_bytes differ in length")
    return arrays


def source_of(header: MappedHeader | DeviceHeader) -> PageSource | DeviceSource:
    """The source that a header describes. Raises MessageError."""
    return header.source()
