"""AMD's runtime where CuPy's build for ROCm has no more than a stub that refuses: by the library itself, with ctypes.

CuPy refuses events of other processes, pinning of memory that is there, and pitched copies; HIP has them all. The names
and arguments are CuPy's, so that either serves. Constants are CUDA's, which HIP shares. Imports no CuPy.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

LIBRARY = "libamdhip64.so"
_EVENT_HANDLE_BYTES = 64


class RuntimeCalls(Protocol):
    """Calls that CuPy has under CUDA alone."""

    def streamCreateWithPriority(self, flags: int, priority: int) -> int: ...

    def ipcGetEventHandle(self, event: int) -> bytes: ...

    def ipcOpenEventHandle(self, handle: bytes) -> int: ...

    def hostRegister(self, ptr: int, size: int, flags: int) -> None: ...

    def hostUnregister(self, ptr: int) -> None: ...

    def memcpy2DAsync(
        self, dst: int, dpitch: int, src: int, spitch: int, width: int, height: int, kind: int, stream: int
    ) -> None: ...


class EventHandle(ctypes.Structure):
    """`hipIpcEventHandle_t`; C passes it by value."""

    _fields_ = (("reserved", ctypes.c_char * _EVENT_HANDLE_BYTES),)


_FUNCTIONS = (
    "hipStreamCreateWithPriority",
    "hipIpcGetEventHandle",
    "hipIpcOpenEventHandle",
    "hipHostRegister",
    "hipHostUnregister",
    "hipMemcpy2DAsync",
)


class HipCalls:
    """These calls under HIP."""

    def __init__(self, library: ctypes.CDLL, failed: Callable[[int], Exception]) -> None:
        """`failed` makes the error of a status.

        Raises:
            AttributeError: the library lacks one of them.
        """
        self._functions = {name: library[name] for name in _FUNCTIONS}
        self._failed = failed

    def _call(self, name: str, *args: object) -> None:
        if status := self._functions[name](*args):
            raise self._failed(status)

    def streamCreateWithPriority(self, flags: int, priority: int) -> int:
        stream = ctypes.c_void_p()
        self._call("hipStreamCreateWithPriority", ctypes.byref(stream), ctypes.c_uint(flags), ctypes.c_int(priority))
        return stream.value or 0

    def ipcGetEventHandle(self, event: int) -> bytes:
        handle = EventHandle()
        self._call("hipIpcGetEventHandle", ctypes.byref(handle), ctypes.c_void_p(event))
        return bytes(handle)

    def ipcOpenEventHandle(self, handle: bytes) -> int:
        event = ctypes.c_void_p()
        self._call("hipIpcOpenEventHandle", ctypes.byref(event), EventHandle.from_buffer_copy(handle))
        return event.value or 0

    def hostRegister(self, ptr: int, size: int, flags: int) -> None:
        self._call("hipHostRegister", ctypes.c_void_p(ptr), ctypes.c_size_t(size), ctypes.c_uint(flags))

    def hostUnregister(self, ptr: int) -> None:
        self._call("hipHostUnregister", ctypes.c_void_p(ptr))

    def memcpy2DAsync(
        self, dst: int, dpitch: int, src: int, spitch: int, width: int, height: int, kind: int, stream: int
    ) -> None:
        sizes = (ctypes.c_void_p(src), *(ctypes.c_size_t(size) for size in (spitch, width, height)))
        target = ctypes.c_void_p(dst), ctypes.c_size_t(dpitch)
        self._call("hipMemcpy2DAsync", *target, *sizes, ctypes.c_int(kind), ctypes.c_void_p(stream))


def library_path(maps: Path = Path("/proc/self/maps")) -> str:
    """The library that CuPy has loaded, under whatever version: a process must not have two. Else its plain name."""
    found = re.search(rf"^\S+ \S+ \S+ \S+ \S+ +(/\S*/{re.escape(LIBRARY)}\S*)$", maps.read_text(), re.MULTILINE)
    return found[1] if found else LIBRARY


def uuid_name(raw: bytes, bus: Callable[[], str]) -> str:
    """A device as rocminfo calls it: HIP has the 16 digits of its serial number as text. A device without one goes by
    its place on the PCI bus.
    """
    return f"GPU-{raw.decode() if re.fullmatch(b'[0-9a-f]{16}', raw) else bus()}"
