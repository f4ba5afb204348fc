"""`Runtime` by CuPy's runtime, which is CUDA's or HIP's, and the driver's library for what CuPy leaves out.

CuPy has no address ranges, no UUIDs of devices and no batched copies. These are asked of libcuda (libamdhip64 under
HIP) with ctypes, whose devices, streams and addresses are the runtime's own. Under HIP it lacks more (hip.py).
"""

from __future__ import annotations

import contextlib
import ctypes
import re
from collections.abc import Callable, Generator

import numpy as np
from cupy.cuda import runtime as api

from lmpipe.cuda import hip
from lmpipe.cuda.hip import RuntimeCalls
from lmpipe.cuda.runtime import (
    NOT_EXPORTABLE,
    NOT_PINNABLE,
    NOT_READY,
    Addresses,
    Event,
    Runtime,
    Stream,
    failure,
)
from lmpipe.errors import DeviceError

_PORTABLE = 1
"""`cudaHostRegisterPortable`, `cudaHostAllocPortable`."""
_ANY_DIRECTION = 4
"""`cudaMemcpyDefault`: by the addresses."""
_NON_BLOCKING = 1
_BLOCKING_SYNC, _NO_TIMING, _SHARED = 1, 2, 4
_LAZY_PEER_ACCESS = 1
_STREAM_ORDER = 1
"""`CU_MEMCPY_SRC_ACCESS_ORDER_STREAM`: sources are read when the stream comes to the copies."""
_LOWEST, _HIGHEST = 1 << 30, -(1 << 30)
"""Priorities; what is outside the device's range is moved to its end."""


class _Location(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int), ("id", ctypes.c_int))


class _Attributes(ctypes.Structure):
    """`CUmemcpyAttributes`."""

    _fields_ = (
        ("order", ctypes.c_int),
        ("source", _Location),
        ("destination", _Location),
        ("flags", ctypes.c_uint),
    )


class _Driver:
    """The functions of the driver's library that CuPy does not have. Raises DeviceError when there is no library."""

    def __init__(self) -> None:
        name, prefix = (hip.library_path(), "hip") if api.is_hip else ("libcuda.so.1", "cu")
        try:
            library = ctypes.CDLL(name)
        except OSError as error:
            raise DeviceError(f"the driver's library {name} cannot be loaded: {error}; install the driver") from None
        version = "" if api.is_hip else "_v2"
        try:
            self.calls: RuntimeCalls = hip.HipCalls(library, api.CUDARuntimeError) if api.is_hip else api
            self.address_range = library[f"{prefix}MemGetAddressRange{version}"]
            self.uuid = library[f"{prefix}DeviceGetUuid{version}"]
        except AttributeError as error:  # the name, or the linker's text
            lacks = str(error).rpartition(" ")[2]
            raise DeviceError(f"the driver's library {name} has no {lacks}: install a newer driver or ROCm") from None
        self.batch: Callable[..., int] | None = None
        if not api.is_hip:
            with contextlib.suppress(AttributeError):  # from driver 570 on (CUDA 12.8)
                self.batch = library["cuMemcpyBatchAsync"]


class CupyRuntime:
    """A device of this process."""

    def __init__(self, number: int, driver: _Driver) -> None:
        """Use `open`."""
        self.number, self._driver = number, driver
        self.uuid = _uuid(driver, number)
        with self._doing("starting to use the device"):
            api.memGetInfo()  # makes the context

    @contextlib.contextmanager
    def _doing(self, doing: str, mend: str = "") -> Generator[None]:
        with _translated(doing, mend):
            api.setDevice(self.number)  # of this thread
            yield

    def memory(self) -> tuple[int, int]:
        with self._doing("asking for the device's memory"):
            return api.memGetInfo()

    def allocation(self, address: int) -> tuple[int, int]:
        base, nbytes = ctypes.c_size_t(), ctypes.c_size_t()
        with self._doing("finding the allocation of an address"):
            status = self._driver.address_range(ctypes.byref(base), ctypes.byref(nbytes), ctypes.c_size_t(address))
        if status:
            raise failure(status, "MemGetAddressRange", f"{address:#x} is no memory of the device")
        return base.value, nbytes.value

    def export_memory(self, base: int) -> bytes:
        with self._doing("exporting pages", NOT_EXPORTABLE):
            return api.ipcGetMemHandle(base)

    def open_memory(self, handle: bytes) -> int:
        with self._doing("opening an engine's pages"):
            return api.ipcOpenMemHandle(handle, _LAZY_PEER_ACCESS)

    def close_memory(self, base: int) -> None:
        with self._doing("closing an engine's pages"):
            api.ipcCloseMemHandle(base)

    def export_event(self, event: Event) -> bytes:
        with self._doing("exporting an event"):
            return self._driver.calls.ipcGetEventHandle(event)

    def open_event(self, handle: bytes) -> Event:
        with self._doing("opening an engine's event"):
            return Event(self._driver.calls.ipcOpenEventHandle(handle))

    def new_stream(self, *, urgent: bool) -> Stream:
        with self._doing("making a stream"):
            return Stream(self._driver.calls.streamCreateWithPriority(_NON_BLOCKING, _HIGHEST if urgent else _LOWEST))

    def free_stream(self, stream: Stream) -> None:
        with self._doing("freeing a stream"):
            api.streamDestroy(stream)

    def new_event(self, *, shared: bool = False, timed: bool = False) -> Event:
        flags = _BLOCKING_SYNC | (0 if timed else _NO_TIMING) | (_SHARED if shared else 0)
        with self._doing("making an event"):
            return Event(api.eventCreateWithFlags(flags))

    def free_event(self, event: Event) -> None:
        with self._doing("freeing an event"):
            api.eventDestroy(event)

    def record(self, event: Event, stream: Stream) -> None:
        with self._doing("recording an event"):
            api.eventRecord(event, stream)

    def wait(self, stream: Stream, event: Event) -> None:
        with self._doing("waiting for an event"):
            api.streamWaitEvent(stream, event, 0)

    def reached(self, event: Event) -> bool:
        with self._doing("looking at an event"):
            status = api.eventQuery(event)
        if status not in (0, NOT_READY):
            raise failure(status, "cudaEventQuery", "looking at an event")
        return not status

    def elapsed_ms(self, begin: Event, end: Event) -> float:
        with self._doing("reading the times of events"):
            return api.eventElapsedTime(begin, end)

    def synchronize(self, event: Event) -> None:
        with self._doing("copying"):
            api.eventSynchronize(event)

    def finish(self, stream: Stream) -> None:
        with self._doing("copying"):
            api.streamSynchronize(stream)

    def pin(self, address: int, nbytes: int) -> None:
        with self._doing("pinning memory", NOT_PINNABLE):
            self._driver.calls.hostRegister(address, nbytes, _PORTABLE)

    def unpin(self, address: int) -> None:
        with self._doing("unpinning memory"):
            self._driver.calls.hostUnregister(address)

    def new_pinned(self, nbytes: int) -> int:
        with self._doing("taking pinned memory", NOT_PINNABLE):
            return api.hostAlloc(nbytes, _PORTABLE)

    def free_pinned(self, address: int) -> None:
        with self._doing("freeing pinned memory"):
            api.freeHost(address)

    def copy(self, dst: Addresses, src: Addresses, nbytes: Addresses, stream: Stream) -> None:
        if not len(dst):
            return
        with self._doing("copying"):
            if self._driver.batch is not None and len(dst) > 1:
                _copy_batch(self._driver.batch, dst, src, nbytes, stream)
                return
            for to, come_from, size in zip(dst.tolist(), src.tolist(), nbytes.tolist(), strict=True):
                api.memcpyAsync(to, come_from, size, _ANY_DIRECTION, stream)

    def copy_rows(
        self, dst: int, dst_pitch: int, src: int, src_pitch: int, row_bytes: int, rows: int, stream: Stream
    ) -> None:
        with self._doing("copying"):
            self._driver.calls.memcpy2DAsync(dst, dst_pitch, src, src_pitch, row_bytes, rows, _ANY_DIRECTION, stream)


def _copy_batch(batch: Callable[..., int], dst: Addresses, src: Addresses, nbytes: Addresses, stream: Stream) -> None:
    arrays = [np.ascontiguousarray(array, np.uint64) for array in (dst, src, nbytes)]
    attributes, first, failed = _Attributes(order=_STREAM_ORDER), ctypes.c_size_t(0), ctypes.c_size_t(0)
    status = batch(
        *(ctypes.c_void_p(array.ctypes.data) for array in arrays),
        ctypes.c_size_t(len(dst)),
        ctypes.byref(attributes),
        ctypes.byref(first),
        ctypes.c_size_t(1),
        ctypes.byref(failed),
        ctypes.c_void_p(stream),
    )
    if status:
        raise failure(status, "cuMemcpyBatchAsync", f"copying {len(dst)} pieces")


def open_device(name: str) -> Runtime:
    """The device with this index or UUID, as a topology names it.

    Raises:
        DeviceError: there is none, or no driver.
    """
    with _translated("looking for GPUs"):
        count = api.getDeviceCount()
    driver = _Driver()
    uuids = [_uuid(driver, number) for number in range(count)]
    if re.fullmatch("[0-9]+", name) and int(name) < count:
        return CupyRuntime(int(name), driver)
    for number, uuid in enumerate(uuids):
        if uuid.partition("-")[2] == name.partition("-")[2].lower():  # MIG- and GPU- alike
            return CupyRuntime(number, driver)
    raise DeviceError(f"no GPU {name} here; these are visible: {', '.join(uuids) or 'none'}")


@contextlib.contextmanager
def _translated(doing: str, mend: str = "") -> Generator[None]:
    try:
        yield
    except api.CUDARuntimeError as error:
        raise failure(error.status, str(error), doing, mend) from None


def _uuid(driver: _Driver, number: int) -> str:
    """As nvidia-smi writes it, or rocminfo. A runtime's number of a device is the driver's."""
    raw = (ctypes.c_ubyte * 16)()
    if status := driver.uuid(ctypes.byref(raw), ctypes.c_int(number)):
        raise failure(status, "DeviceGetUuid", f"asking device {number} for its UUID")
    if api.is_hip:
        return hip.uuid_name(bytes(raw), lambda: api.deviceGetPCIBusId(number))
    digits = bytes(raw).hex()
    return f"GPU-{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"
