"""What lmpipe asks of CUDA's runtime, or of HIP's, for one device; and what their errors mean. Imports neither.

Addresses are integers of the process's one address space: with unified addressing a copy needs no direction. A stream
runs what it is given in order, long after the call returns; only `synchronize` and `finish` wait. Every method may be
called from any thread, and raises

    DeviceError   refused; the text says what to change, the process goes on
    DeviceLost    a sticky error: the driver answers everything of this process with it from now on
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NewType, Protocol

import numpy as np
import numpy.typing as npt

from lmpipe.errors import DeviceError, DeviceLost

Stream = NewType("Stream", int)
Event = NewType("Event", int)
Addresses = npt.NDArray[np.uint64]

INVALID_VALUE, OUT_OF_MEMORY, UNINITIALIZED, MAP_FAILED = 1, 2, 201, 205
OPERATING_SYSTEM, INVALID_HANDLE, NOT_READY = 304, 400, 600
ALREADY_PINNED, NOT_PINNED, NOT_SUPPORTED = 712, 713, 801
ILLEGAL_ADDRESS = 700

STICKY = frozenset({214, 220, ILLEGAL_ADDRESS, 702, 709, 710, 714, 715, 716, 717, 718, 719, 721})
"""Statuses of which CUDA's documentation says that the process must be ended and started again: uncorrectable memory
and link errors, and what a kernel did wrong."""

_MENDS: Mapping[int, str] = {
    OUT_OF_MEMORY: "free memory of the device or of the host",
    3: "CUDA was initialised before a fork: start processes by spawn",
    35: "install a driver for this CUDA or ROCm, or a CuPy built for what the driver has",
    46: "the device is taken by one process alone: nvidia-smi -c DEFAULT",
    100: "no device is visible: look at nvidia-smi and CUDA_VISIBLE_DEVICES (rocminfo and HIP_VISIBLE_DEVICES)",
    101: "no such device is visible: look at nvidia-smi -L and CUDA_VISIBLE_DEVICES (rocminfo and HIP_VISIBLE_DEVICES)",
    UNINITIALIZED: "a handle cannot be opened by the process that exported it",
    MAP_FAILED: "its exporter has ended, or both processes do not see the same device",
    OPERATING_SYSTEM: "containers have to share what IPC needs: --ipc=host, and the same pid namespace",
    INVALID_HANDLE: "its exporter has ended or has freed it",
    ALREADY_PINNED: "the memory is pinned already",
    NOT_SUPPORTED: "this driver or system has no inter-process memory",
}


def failure(status: int, name: str, doing: str, mend: str = "") -> DeviceError | DeviceLost:
    """The error for a status other than 0. `name`: as the driver calls it; `mend`: better than the one for all."""
    if status in STICKY:
        return DeviceLost(f"{doing}: {name} ({status}): the device is lost to this process")
    mend = mend or _MENDS.get(status, "")
    return DeviceError(f"{doing}: {name} ({status}){': ' + mend if mend else ''}")


NOT_EXPORTABLE = (
    "this memory has no inter-process handle; with PyTorch set PYTORCH_CUDA_ALLOC_CONF=expandable_segments:False"
    " and leave its allocator backend native; with vLLM switch sleep mode (enable_sleep_mode) and custom allocators off"
)
NOT_PINNABLE = (
    "the driver may not pin so much; raise the limit of locked memory (ulimit -l unlimited,"
    " docker run --ulimit memlock=-1), or lower tiers.dram.capacity"
)


class Runtime(Protocol):
    """One device. A fake for tests is in tests/cuda/fake_runtime.py."""

    @property
    def uuid(self) -> str:
        """`GPU-` and the device's UUID: the same in every process, whatever devices it sees."""
        ...

    @property
    def number(self) -> int:
        """Among the devices that this process sees."""
        ...

    def memory(self) -> tuple[int, int]:
        """Bytes of the device that are free, and all."""
        ...

    # Memory and events of other processes.

    def allocation(self, address: int) -> tuple[int, int]:
        """Base and bytes of the allocation that has the address, also of one that was opened."""
        ...

    def export_memory(self, base: int) -> bytes:
        """The handle of an allocation, for other processes."""
        ...

    def open_memory(self, handle: bytes) -> int:
        """Map an allocation of another process; its base here. To be closed as often as it is opened."""
        ...

    def close_memory(self, base: int) -> None:
        """Unmap what was opened. No copy may be under way."""
        ...

    def export_event(self, event: Event) -> bytes:
        """The handle of an event that was made `shared`."""
        ...

    def open_event(self, handle: bytes) -> Event:
        """An event of another process. Ends by `free_event`."""
        ...

    # Order.

    def new_stream(self, *, urgent: bool) -> Stream:
        """A stream that waits for no other. Not `urgent`: of the least priority."""
        ...

    def free_stream(self, stream: Stream) -> None:
        """What it was given is still done."""
        ...

    def new_event(self, *, shared: bool = False, timed: bool = False) -> Event:
        """An event for which threads sleep. `shared`: it can be exported; `timed`: it notes when it is reached. Not
        both.
        """
        ...

    def free_event(self, event: Event) -> None:
        """It may not be recorded or waited for any more."""
        ...

    def record(self, event: Event, stream: Stream) -> None:
        """The event is reached when the stream has done what it was given so far."""
        ...

    def wait(self, stream: Stream, event: Event) -> None:
        """What the stream is given from now on begins after the event's latest record; never recorded: at once."""
        ...

    def reached(self, event: Event) -> bool:
        """Whether the event is reached; never waits."""
        ...

    def elapsed_ms(self, begin: Event, end: Event) -> float:
        """Between two `timed` events that were reached, on the device's clock, as fp32."""
        ...

    def synchronize(self, event: Event) -> None:
        """Sleep until the event is reached."""
        ...

    def finish(self, stream: Stream) -> None:
        """Wait until the stream has done all it was given."""
        ...

    # Host memory.

    def pin(self, address: int, nbytes: int) -> None:
        """Lock whole pages of this process for copies by the device, of every context."""
        ...

    def unpin(self, address: int) -> None:
        """End a `pin` of this very address."""
        ...

    def new_pinned(self, nbytes: int) -> int:
        """Address of pinned memory of the host."""
        ...

    def free_pinned(self, address: int) -> None:
        """Give `new_pinned` back."""
        ...

    # Copies. Memory of the host has to be pinned, each copy within one `pin`.

    def copy(self, dst: Addresses, src: Addresses, nbytes: Addresses, stream: Stream) -> None:
        """Copies in no order among each other, in one call where the runtime has batches; arrays of shape (copies,)."""
        ...

    def copy_rows(
        self, dst: int, dst_pitch: int, src: int, src_pitch: int, row_bytes: int, rows: int, stream: Stream
    ) -> None:
        """`rows` rows, so many bytes apart on either side."""
        ...
