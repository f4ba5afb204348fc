"""Readers of engines' pages on GPUs, for gather: pages by IPC to slots of the arena. They move bytes, no more.

    engine's event ─▶ reached? ─▶ stream of least priority: batched and pitched copies ─▶ own event: a thread sleeps
                      slot pinned: device ─▶ slot
                      not yet:     device ─▶ bounce buffer ─▶ slot, a window at a time

When `gather` returns, all bytes are in the slots; when it raises, no copy is under way any more: the slots may go to
somebody else. A copy whose engine died meanwhile counts for nothing. A sticky error is a `DeviceLost`, which ends the
process: its successor opens everything anew when the engines register again.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager

import numpy as np

from lmpipe import native
from lmpipe.cuda.copy import Copies, Planes, copies_of
from lmpipe.cuda.ipc import Allocations, close_source, plane_addresses
from lmpipe.cuda.pinned import Pinned
from lmpipe.cuda.runtime import Addresses, Event, Runtime, Stream
from lmpipe.cuda.timeline import RuntimeMark, Timeline
from lmpipe.errors import DeviceError, DeviceLost
from lmpipe.messages import DeviceSource, PageIds
from lmpipe.spans import Spans

BOUNCE_BYTES = 32 << 20
GROUP_BYTES = 32 << 20
"""Copies are given to the stream in groups: the device copies one while the next is made out."""
QUANTUM_BYTES = 8 * GROUP_BYTES
LOOK_S = 0.0002
"""How often it is looked whether the engine's event is reached."""
GRACE_S = 2.0
"""So long the work of an engine that has died may go on before its event counts as one that nobody will reach."""

log = logging.getLogger("lmpipe.cuda")


class DeviceReaders:
    """The devices whose engines gather serves, and the arena that their pages go to."""

    def __init__(
        self,
        runtimes: Sequence[Runtime],
        arena: native.Region,
        copier: native.Copier,
        bounce_bytes: int = BOUNCE_BYTES,
        spans: Spans | None = None,
    ) -> None:
        """Begins to pin the arena. `copier` empties bounce buffers; the trace of `spans` shows copies as devices do
        them.
        """
        self.pinned = Pinned(runtimes[0], arena, "arena")
        watched = spans if spans is not None and spans.recording else None
        self._devices = {
            runtime.uuid: _Device(runtime, arena, self.pinned, copier, bounce_bytes, watched) for runtime in runtimes
        }
        for runtime in runtimes:
            free, total = runtime.memory()
            log.info("%s: %.1f of %.1f GiB are free", runtime.uuid, free / (1 << 30), total / (1 << 30))

    def open(self, source: DeviceSource, alive: Callable[[], bool]) -> DeviceReader:
        """A reader of the pages of an engine; `alive`: whether its session is.

        Raises:
            DeviceError: they cannot be opened, or lie on a device that this gather was not given.
        """
        device = self._devices.get(source.device)
        if device is None:
            raise DeviceError(
                f"pages on {source.device}, and this node serves {', '.join(self._devices)}: add it to engines.devices"
            )
        return DeviceReader(device, source, alive)

    def close(self) -> None:
        """Give back pinned memory. All readers are closed, or the process is about to end."""
        try:
            self.pinned.close()
            for device in self._devices.values():
                device.close()
        except (DeviceError, DeviceLost) as error:  # the end of the process gives it back
            log.warning("%s", error)


class _Device:
    """What all readers of one device share. One copies at a time (`DeviceReader.lane`)."""

    def __init__(
        self,
        runtime: Runtime,
        arena: native.Region,
        pinned: Pinned,
        copier: native.Copier,
        bounce_bytes: int,
        spans: Spans | None,
    ) -> None:
        self.runtime, self.arena, self.pinned, self.copier = runtime, arena, pinned, copier
        self.allocations = Allocations(runtime)
        self.bounce_bytes = bounce_bytes
        self._bounce: native.Region | None = None
        self._timeline: Timeline | None = None
        if spans is not None:
            self._references = runtime.new_stream(urgent=True)
            self._timeline = Timeline(spans, f"GPU {runtime.number}", lambda: RuntimeMark(runtime, self._references))
            self._track = self._timeline.track("saves by IPC")

    def copying(self, stream: Stream, nbytes: int, chunks: int) -> AbstractContextManager[None]:
        """Copies that are given to the stream within it are shown in the trace."""
        if self._timeline is None:
            return contextlib.nullcontext()
        return self._timeline.work(
            self._track, "copy to host", nbytes, chunks, lambda: RuntimeMark(self.runtime, stream)
        )

    def bounce(self) -> native.Region:
        """Pinned memory for copies to what is not pinned yet."""
        if self._bounce is None:
            self._bounce = native.Region.at(self.runtime.new_pinned(self.bounce_bytes), self.bounce_bytes, True, self)
        return self._bounce

    def close(self) -> None:
        timeline, self._timeline = self._timeline, None
        if timeline is not None:
            timeline.close()
            self.runtime.free_stream(self._references)
        bounce, self._bounce = self._bounce, None
        if bounce is not None:
            self.runtime.free_pinned(bounce.address)


class DeviceReader:
    """One engine's pages."""

    def __init__(self, device: _Device, source: DeviceSource, alive: Callable[[], bool]) -> None:
        self._device, self._source, self._alive = device, source, alive
        runtime = device.runtime
        addresses = plane_addresses(source, device.allocations)
        self._planes = Planes(addresses, source.page_stride, source.page_bytes)
        with contextlib.ExitStack() as undo:
            undo.callback(close_source, source, device.allocations)
            self._written = runtime.open_event(bytes.fromhex(source.written_event))
            undo.callback(runtime.free_event, self._written)
            self._stream = runtime.new_stream(urgent=False)
            undo.callback(runtime.free_stream, self._stream)
            self._copied: Event = runtime.new_event()
            undo.callback(runtime.free_event, self._copied)
            self._undo = undo.pop_all()
        self._lock = threading.Lock()
        self._users, self._closed = 0, False

    @property
    def lane(self) -> str:
        """Copies of one lane take turns: those of a device would only share its link."""
        return self._device.runtime.uuid

    @property
    def quantum_bytes(self) -> int:
        """What is copied before other engines have their turn: so much that what goes on in between is little."""
        return QUANTUM_BYTES

    def gather(self, page_ids: PageIds, offsets: Addresses) -> None:
        """Copy chunks to the arena; all bytes are there when it returns.

        Args:
            page_ids: (chunks, pages of a chunk).
            offsets: (chunks,) where in the arena each begins.

        Raises:
            DeviceError: no page ids of this engine, no room, or the engine has died; nothing is under way any more.
            DeviceLost: a sticky error.
        """
        nbytes = page_ids.shape[1] * self._planes.bytes_per_page
        if page_ids.size and not 0 <= page_ids.min() <= page_ids.max() < self._source.pages:
            raise DeviceError(f"page ids from {page_ids.min()} to {page_ids.max()}, there are {self._source.pages}")
        if len(offsets) and int(offsets.max()) + nbytes > self._device.arena.nbytes:
            raise DeviceError(f"{nbytes} bytes at {int(offsets.max())} are not in the arena")
        with self._in_use():
            runtime = self._device.runtime
            try:
                self._wait_until_written()
                pinned = offsets + np.uint64(nbytes) <= self._device.pinned.done_bytes
                group = max(GROUP_BYTES // max(nbytes, 1), 1)
                for first in range(0, np.count_nonzero(pinned), group):
                    part = slice(first, first + group)
                    self._to_slots(page_ids[pinned][part], offsets[pinned][part])
                for ids, offset in zip(page_ids[~pinned], offsets[~pinned].tolist(), strict=True):
                    self._by_bounce(ids[None], offset, nbytes)
                self._sleep()
            except DeviceError:
                runtime.finish(self._stream)  # the slots will be others'
                raise
            if not self._alive():
                raise DeviceError("the engine has died")

    def _wait_until_written(self) -> None:
        """No copy is queued behind an event of another process: it may die before it is reached, and a stream waits for
        ever then, of which only the end of this process is rid.
        """
        runtime = self._device.runtime
        runtime.wait(self._stream, self._written)  # its latest record; later ones are of later saves
        runtime.record(self._copied, self._stream)
        dead_s = 0.0
        while not runtime.reached(self._copied):
            if dead_s > GRACE_S:
                raise DeviceLost("a stream waits for an event of an engine that has died")
            time.sleep(LOOK_S)
            dead_s += 0.0 if self._alive() else LOOK_S

    def _to_slots(self, page_ids: PageIds, offsets: Addresses) -> None:
        runtime, pinned = self._device.runtime, self._device.pinned
        payloads = offsets + np.uint64(pinned.address)
        copies, rows = copies_of(self._planes, page_ids, payloads, pinned.address, pinned.piece_bytes)
        with self._device.copying(self._stream, page_ids.size * self._planes.bytes_per_page, len(page_ids)):
            runtime.copy(copies.dst, copies.src, copies.nbytes, self._stream)
            rows.start(runtime, self._stream)

    def _by_bounce(self, page_ids: PageIds, offset: int, nbytes: int) -> None:
        """One chunk, a window of its payload at a time."""
        device = self._device
        bounce, window = device.bounce(), np.uint64(device.bounce_bytes)
        zero = np.zeros(1, np.uint64)
        copies, _ = copies_of(self._planes, page_ids, zero, 0, device.bounce_bytes, pitched=False)
        for start in range(0, nbytes, device.bounce_bytes):
            part = copies.dst // window == start // device.bounce_bytes
            there = Copies(copies.dst[part] % window + np.uint64(bounce.address), copies.src[part], copies.nbytes[part])
            size = min(device.bounce_bytes, nbytes - start)
            with device.copying(self._stream, size, 1):
                device.runtime.copy(there.dst, there.src, there.nbytes, self._stream)
            self._sleep()
            device.copier.memcpy(device.arena, offset + start, bounce, 0, size)

    def _sleep(self) -> None:
        """Until the stream has done all it was given."""
        self._device.runtime.record(self._copied, self._stream)
        self._device.runtime.synchronize(self._copied)

    @contextlib.contextmanager
    def _in_use(self) -> Generator[None]:
        with self._lock:
            if self._closed:
                raise DeviceError("the engine has gone")
            self._users += 1
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                last = self._closed and not self._users
            if last:
                self._end()

    def close(self) -> None:
        """Let go of the pages: at once, or when the copy that is under way has ended."""
        with self._lock:
            last = not self._closed and not self._users
            self._closed = True
        if last:
            self._end()

    def _end(self) -> None:
        try:
            self._undo.close()
        except DeviceError as error:
            log.warning("%s", error)
