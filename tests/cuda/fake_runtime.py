"""`Runtime` without a GPU: files stand for device memory, processes see each other's by handles as CUDA documents it.

What CUDA's documentation says of a call, this one does: a handle cannot be opened by its exporter, nor when that is
dead; opening twice gives the same address and wants two closes; memory without a legacy handle is not exported;
registering memory twice is refused; a copy may not cross the border of two registrations; after a fault every call
fails. Streams do nothing before somebody looks at an event or waits, so that who forgets to finds no bytes.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import secrets
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lmpipe.cuda import runtime as rt
from lmpipe.cuda.runtime import Addresses, Event, Stream, failure

_HANDLE = struct.Struct("<16s16s32x")
STUCK_S = 60.0


class _Mapping:
    """A file of the fake device, mapped."""

    def __init__(self, path: Path, nbytes: int = 0) -> None:
        with path.open("r+b" if not nbytes else "x+b") as file:
            if nbytes:
                file.truncate(nbytes)
            self.map = mmap.mmap(file.fileno(), 0)
        self.bytes = np.frombuffer(self.map, np.uint8)
        self.base, self.nbytes = self.bytes.ctypes.data, len(self.map)


@dataclass
class _Allocation:
    id: bytes
    mapping: _Mapping
    exportable: bool = True
    opened: int = 0

    def has(self, address: int, nbytes: int = 1) -> bool:
        return self.mapping.base <= address and address + nbytes <= self.mapping.base + self.mapping.nbytes


class _EventState:
    """How often it was recorded, and the last record that was reached: two words of a file."""

    def __init__(self, directory: Path, id: bytes, *, make: bool = False) -> None:
        self.id = id
        self.words = _Mapping(directory / f"event-{id.hex()}", 16 if make else 0).bytes.view(np.uint64)


@dataclass
class _StreamState:
    operations: list[Callable[[], object]] = field(default_factory=list)
    """Each done when it does not return False."""
    lock: threading.Lock = field(default_factory=threading.Lock)


class FakeRuntime:
    """A device as one process sees it. Two of one directory are two processes, in one or in several real ones."""

    def __init__(self, directory: Path, number: int = 0, *, pin_limit: int = 1 << 40) -> None:
        self.directory, self.number, self.pin_limit = directory, number, pin_limit
        self.uuid = f"GPU-00000000-0000-0000-0000-{number:012d}"
        self.process = secrets.token_bytes(16)
        (directory / f"process-{self.process.hex()}").write_text(str(os.getpid()))
        self.opens = self.pageable = self.copies = self.pitched = self.waits = 0
        """Handles mapped; copies of memory that is not pinned; linear, pitched copies; streams waiting for events."""
        self._fault = 0
        self._allocations: dict[int, _Allocation] = {}
        self._closed: list[tuple[int, _Mapping]] = []
        self._events: dict[int, _EventState] = {}
        self._reached_ns: dict[int, int] = {}
        """Of timed events, on the device's clock; 0: not yet."""
        self._streams: dict[int, _StreamState] = {}
        self._pins: dict[int, int] = {}
        self._pinned: dict[int, npt.NDArray[np.uint8]] = {}
        self._names = iter(range(1, 1 << 62))

    # What tests do, as a program or a machine would.

    def malloc(self, nbytes: int, *, exportable: bool = True) -> int:
        """cudaMalloc; not `exportable`: mapped by cuMemMap, as expandable segments are."""
        id = secrets.token_bytes(16)
        mapping = _Mapping(self.directory / f"memory-{id.hex()}", nbytes)
        self._allocations[mapping.base] = _Allocation(id, mapping, exportable)
        return mapping.base

    def view(self, address: int, nbytes: int) -> npt.NDArray[np.uint8]:
        """Bytes of the device."""
        allocation = self._of(address, nbytes)
        assert allocation is not None
        return allocation.mapping.bytes[address - allocation.mapping.base :][:nbytes]

    def launch(self, stream: Stream, kernel: Callable[[], object]) -> None:
        """Work for a stream."""
        self._streams[stream].operations.append(kernel)

    def die(self) -> None:
        """The process is no more; whoever opened its memory keeps it."""
        (self.directory / f"process-{self.process.hex()}").unlink(missing_ok=True)

    def clock_ns(self) -> int:
        """The device's own: it began at another time than the host's, and goes faster by one in a thousand."""
        return 7_000_000_000 + time.monotonic_ns() * 1001 // 1000

    def fault(self, status: int = rt.ILLEGAL_ADDRESS) -> None:
        """From here on every call fails."""
        self._fault = status

    @property
    def open_now(self) -> int:
        """Allocations of others that are mapped, counted as often as they were opened."""
        return sum(allocation.opened for allocation in self._allocations.values())

    @property
    def pinned_now(self) -> int:
        """Bytes registered."""
        return sum(self._pins.values())

    @property
    def streams_and_events(self) -> int:
        """Not freed yet."""
        return len(self._streams) + len(self._events)

    # The runtime.

    def _check(self, doing: str, status: int = 0) -> None:
        if status := self._fault or status:
            raise failure(status, "fake", doing)

    def _of(self, address: int, nbytes: int = 1) -> _Allocation | None:
        return next((found for found in self._allocations.values() if found.has(address, nbytes)), None)

    def _lives(self, process: bytes) -> bool:
        try:
            os.kill(int((self.directory / f"process-{process.hex()}").read_text()), 0)
        except (FileNotFoundError, ProcessLookupError):
            return False
        return True

    def memory(self) -> tuple[int, int]:
        self._check("memory")
        return 1 << 30, 2 << 30

    def allocation(self, address: int) -> tuple[int, int]:
        found = self._of(address)
        self._check("finding the allocation of an address", rt.INVALID_VALUE if found is None else 0)
        assert found is not None
        return found.mapping.base, found.mapping.nbytes

    def export_memory(self, base: int) -> bytes:
        found = self._allocations.get(base)
        self._check("exporting", rt.INVALID_VALUE if found is None else 0)
        assert found is not None
        if not found.exportable:
            raise failure(rt.INVALID_VALUE, "fake", "exporting pages", rt.NOT_EXPORTABLE)
        return _HANDLE.pack(found.id, self.process)

    def open_memory(self, handle: bytes) -> int:
        id, process = _HANDLE.unpack(handle)
        self._check("opening", rt.UNINITIALIZED if process == self.process else 0)
        self._check("opening", 0 if self._lives(process) else rt.INVALID_HANDLE)
        for found in self._allocations.values():
            if found.id == id:
                found.opened += 1
                return found.mapping.base
        self.opens += 1
        mapping = _Mapping(self.directory / f"memory-{id.hex()}")
        self._allocations[mapping.base] = _Allocation(id, mapping, False, 1)
        return mapping.base

    def close_memory(self, base: int) -> None:
        found = self._allocations.get(base)
        self._check("closing", rt.INVALID_VALUE if found is None or not found.opened else 0)
        assert found is not None
        found.opened -= 1
        if not found.opened:
            del self._allocations[base]
            self._closed.append((base, found.mapping))

    def export_event(self, event: Event) -> bytes:
        self._check("exporting an event", 0 if event in self._events else rt.INVALID_HANDLE)
        return _HANDLE.pack(self._events[event].id, self.process)

    def open_event(self, handle: bytes) -> Event:
        id, process = _HANDLE.unpack(handle)
        self._check("opening an event", 0 if self._lives(process) else rt.INVALID_HANDLE)
        event = Event(next(self._names))
        self._events[event] = _EventState(self.directory, id)
        return event

    def new_stream(self, *, urgent: bool) -> Stream:
        self._check("making a stream")
        stream = Stream(next(self._names))
        self._streams[stream] = _StreamState()
        return stream

    def free_stream(self, stream: Stream) -> None:
        self._drain(self._streams[stream], lambda: False)
        del self._streams[stream]

    def new_event(self, *, shared: bool = False, timed: bool = False) -> Event:
        self._check("making an event", rt.INVALID_VALUE if shared and timed else 0)
        event = Event(next(self._names))
        if timed:
            self._reached_ns[event] = 0
        self._events[event] = _EventState(self.directory, secrets.token_bytes(16), make=True)
        return event

    def free_event(self, event: Event) -> None:
        self._check("freeing an event", 0 if event in self._events else rt.INVALID_HANDLE)
        del self._events[event]
        self._reached_ns.pop(event, None)

    def record(self, event: Event, stream: Stream) -> None:
        self._check("recording")
        words = self._events[event].words
        words[0] += np.uint64(1)
        record = int(words[0])

        def reached() -> None:
            words[1] = record
            if event in self._reached_ns:
                self._reached_ns[event] = self.clock_ns()

        self.launch(stream, reached)

    def wait(self, stream: Stream, event: Event) -> None:
        self._check("waiting")
        self.waits += 1
        words = self._events[event].words
        record = int(words[0])
        self.launch(stream, lambda: bool(words[1] >= record))

    def reached(self, event: Event) -> bool:
        words = self._events[event].words
        record = int(words[0])
        for stream in list(self._streams.values()):
            self._drain(stream, lambda: words[1] >= record)
        return bool(words[1] >= record)

    def elapsed_ms(self, begin: Event, end: Event) -> float:
        times_ns = [self._reached_ns.get(event) for event in (begin, end)]
        self._check("reading times", rt.INVALID_HANDLE if None in times_ns else rt.NOT_READY if 0 in times_ns else 0)
        began_ns, ended_ns = (time_ns or 0 for time_ns in times_ns)
        return float(np.float32((ended_ns - began_ns) / 1e6))

    def synchronize(self, event: Event) -> None:
        _until(lambda: self.reached(event))

    def finish(self, stream: Stream) -> None:
        _until(lambda: self._drain(self._streams[stream], lambda: False))

    def _drain(self, stream: _StreamState, enough: Callable[[], object]) -> bool:
        """Do what can be done; whether all of it is."""
        self._check("copying")
        with stream.lock:
            while stream.operations and not enough() and stream.operations[0]() is not False:
                stream.operations.pop(0)
        self._check("copying")
        return not stream.operations

    def pin(self, address: int, nbytes: int) -> None:
        overlaps = any(address < start + size and start < address + nbytes for start, size in self._pins.items())
        self._check("pinning", rt.ALREADY_PINNED if overlaps else 0)
        if self.pinned_now + nbytes > self.pin_limit:
            raise failure(rt.OUT_OF_MEMORY, "fake", "pinning memory", rt.NOT_PINNABLE)
        self._pins[address] = nbytes

    def unpin(self, address: int) -> None:
        self._check("unpinning", 0 if address in self._pins else rt.NOT_PINNED)
        del self._pins[address]

    def new_pinned(self, nbytes: int) -> int:
        memory = np.zeros(nbytes, np.uint8)
        self._pinned[memory.ctypes.data] = memory
        self._pins[memory.ctypes.data] = nbytes
        return memory.ctypes.data

    def free_pinned(self, address: int) -> None:
        self.unpin(address)
        del self._pinned[address]

    def copy(self, dst: Addresses, src: Addresses, nbytes: Addresses, stream: Stream) -> None:
        self._check("copying")
        for to, come_from, size in zip(dst.tolist(), src.tolist(), nbytes.tolist(), strict=True):
            self.copies += 1
            self._move(to, come_from, size, stream)

    def copy_rows(
        self, dst: int, dst_pitch: int, src: int, src_pitch: int, row_bytes: int, rows: int, stream: Stream
    ) -> None:
        self.pitched += 1
        self._host(dst, (rows - 1) * dst_pitch + row_bytes)
        for row in range(rows):
            self._move(dst + row * dst_pitch, src + row * src_pitch, row_bytes, stream)

    def _move(self, dst: int, src: int, nbytes: int, stream: Stream) -> None:
        for address in (dst, src):
            if self._of(address, nbytes) is None:
                self._host(address, nbytes)

        def move() -> None:
            for base, mapping in self._closed:
                if any(base <= address < base + mapping.nbytes for address in (dst, src)):
                    self.fault()
                    return
            ctypes.memmove(dst, src, nbytes)

        self.launch(stream, move)

    def _host(self, address: int, nbytes: int) -> None:
        """Host memory is in one registration, or in none."""
        touched = [
            start <= address and address + nbytes <= start + size
            for start, size in self._pins.items()
            if address < start + size and start < address + nbytes
        ]
        self._check("copying across registrations", rt.INVALID_VALUE if touched and touched != [True] else 0)
        self.pageable += not touched


def _until(reached: Callable[[], object]) -> None:
    end_s = time.monotonic() + STUCK_S
    while not reached():
        if time.monotonic() > end_s:
            raise AssertionError("a stream waits for an event that nobody reaches")
        time.sleep(0.0005)
