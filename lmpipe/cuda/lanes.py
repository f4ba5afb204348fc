"""Orders of work on a device: a lane does its work in the order given, lanes beside each other run at once.

On a GPU a lane is a CUDA stream and an event one of CUDA's. In memory of the host, where Triton interprets, work is
done when it is given. Knows nothing of what the work is.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol, cast

import torch

from lmpipe.cuda.timeline import Mark, Timeline
from lmpipe.spans import Spans

SAVES, LOADS = 0, -1
"""Priorities, as CUDA has them: 0 is the lowest there is, and the engine's own; a request waits for a load."""


class Event(Protocol):
    """A place in a lane's work."""

    def query(self) -> bool:
        """Whether all work before it is done."""
        ...

    def synchronize(self) -> None:
        """Wait on the host until it is."""
        ...


class Lane(Protocol):
    """Work in order. Any thread may add to it, one at a time."""

    def run(self, work: Callable[[], None]) -> None:
        """Add what `work` launches; torch's current stream is the lane's while it does so."""
        ...

    def wait(self, event: Event) -> None:
        """Work that is added from now on begins after the event."""
        ...

    def record(self) -> Event:
        """The event after all work that was added until now."""
        ...

    def mark(self) -> Mark:
        """As `record`, for the time at which the device comes there."""
        ...

    def empty(self, nbytes: int) -> torch.Tensor:
        """Memory, uint8 `[nbytes]`, for work of this lane alone; usable in and out of torch's inference mode."""
        ...


class StreamMark:
    """A timing event of CUDA in a stream."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._event = torch.cuda.Event(enable_timing=True)
        self._event.record(stream)

    def query(self) -> bool:
        """Whether the device has come there."""
        return self._event.query()

    def elapsed_ms(self, later: StreamMark) -> float:
        """On the device."""
        return self._event.elapsed_time(later._event)

    def free(self) -> None:
        """Torch does, when nobody has it."""


class StreamLane:
    """A CUDA stream of its own."""

    def __init__(self, device: torch.device, priority: int) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device, priority=priority)

    def run(self, work: Callable[[], None]) -> None:
        """Launch on the stream, the device made the current one."""
        with torch.cuda.stream(self._stream):
            work()

    def wait(self, event: Event) -> None:
        """An event of any stream, or one that another process exported."""
        self._stream.wait_event(cast(torch.cuda.Event, event))

    def record(self) -> torch.cuda.Event:
        """One whose `synchronize` sleeps: threads that wait here have no processor of their own."""
        event = torch.cuda.Event(blocking=True)
        event.record(self._stream)
        return event

    def mark(self) -> StreamMark:
        """In the stream."""
        return StreamMark(self._stream)

    def empty(self, nbytes: int) -> torch.Tensor:
        """Allocated on the stream: torch's allocator may give out what others have freed but still use."""
        with torch.cuda.stream(self._stream), torch.inference_mode(False):
            return torch.empty(nbytes, dtype=torch.uint8, device=self._device)


class _Done:
    """An event that has come."""

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        return


class HostMark:
    """The time at which it was made: work of the host is done by then."""

    def __init__(self) -> None:
        self._at_ns = time.monotonic_ns()

    def query(self) -> bool:
        """It is."""
        return True

    def elapsed_ms(self, later: HostMark) -> float:
        """On the host."""
        return (later._at_ns - self._at_ns) / 1e6

    def free(self) -> None:
        """Nothing is kept."""


class HostLane:
    """Does work at once."""

    def run(self, work: Callable[[], None]) -> None:
        """Do it."""
        work()

    def wait(self, event: Event) -> None:
        """Wait for it."""
        event.synchronize()

    def record(self) -> Event:
        """One that has come."""
        return _Done()

    def mark(self) -> HostMark:
        """Now."""
        return HostMark()

    def empty(self, nbytes: int) -> torch.Tensor:
        """Memory of the host."""
        with torch.inference_mode(False):
            return torch.empty(nbytes, dtype=torch.uint8)


def lane_of(device: torch.device, priority: int) -> Lane:
    """A new lane of a device."""
    return StreamLane(device, priority) if device.type == "cuda" else HostLane()


def timeline_of(spans: Spans, device: torch.device, lanes: Callable[[torch.device, int], Lane]) -> Timeline | None:
    """What a device does, in the trace; None: none is recorded."""
    if not spans.recording:
        return None
    name = f"GPU {device.index}" if device.type == "cuda" else "host"
    return Timeline(spans, name, lanes(device, LOADS).mark)
