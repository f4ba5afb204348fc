"""Pages of an engine on a device, read by gather through handles: a fake device, but all of CUDA's rules."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fake_runtime import FakeRuntime

from lmpipe import native
from lmpipe.cuda import readers, timeline
from lmpipe.cuda.ipc import Allocations, ExportedPages
from lmpipe.cuda.readers import DeviceReader, DeviceReaders
from lmpipe.cuda.runtime import NOT_SUPPORTED, STICKY, Runtime, failure
from lmpipe.errors import DeviceError, DeviceLost, ProtocolViolation
from lmpipe.messages import DeviceSource
from lmpipe.spans import Spans, read_trace

PAGE, PAGES, PLANES = 256, 16, 4
ARENA = 1 << 20
IDS = np.array([[3, 4, 5, 6], [9, 1, 14, 0]], np.int32)
OFFSETS = np.array([4096, 40960], np.uint64)
CHUNK = IDS.shape[1] * PLANES * PAGE


class EngineProcess:
    """Two allocations with two planes each, somewhere inside; pages of a plane lie close together, or a plane apart."""

    def __init__(self, directory: Path, *, apart: bool = False) -> None:
        self.runtime = FakeRuntime(directory)
        self.stride = 2 * PAGE if apart else PAGE
        bases = [self.runtime.malloc(2 * PAGES * PAGE + 512) for _ in range(2)]
        second = PAGE if apart else PAGES * PAGE
        self.addresses = [base + 256 + plane * second for base in bases for plane in range(2)]
        self.exported = ExportedPages(self.runtime, self.addresses, self.stride, PAGE, PAGES)
        self.stream = self.runtime.new_stream(urgent=True)

    def page(self, plane: int, page: int) -> np.ndarray:
        return self.runtime.view(self.addresses[plane] + page * self.stride, PAGE)

    def write(self, seed: int) -> None:
        """Fill the pages."""
        numbers = np.random.default_rng(seed)
        for plane in range(PLANES):
            for page in range(PAGES):
                self.page(plane, page)[:] = numbers.integers(0, 255, PAGE, np.uint8)

    def payload(self, chunk: np.ndarray) -> bytes:
        return b"".join(self.page(plane, page).tobytes() for plane in range(PLANES) for page in chunk.tolist())


class GatherProcess:
    """An arena and the readers of it."""

    def __init__(
        self, directory: Path, *, bounce_bytes: int = 1 << 20, pin_limit: int = 1 << 40, spans: Spans | None = None
    ) -> None:
        self.runtime = FakeRuntime(directory, pin_limit=pin_limit)
        self.memory = np.zeros(ARENA + 4096, np.uint8)
        start = -self.memory.ctypes.data % 4096
        self.arena = self.memory[start : start + ARENA]
        region = native.Region.at(self.arena.ctypes.data, ARENA, True, self.memory)
        self.readers = DeviceReaders([self.runtime], region, native.Copier(1), bounce_bytes, spans)
        self.readers.pinned.wait(10)

    def payload(self, offset: int) -> bytes:
        return self.arena[offset : offset + CHUNK].tobytes()


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path


@pytest.fixture
def gather(directory: Path) -> Iterator[GatherProcess]:
    made = GatherProcess(directory)
    yield made
    made.readers.close()
    assert (made.runtime.open_now, made.runtime.pinned_now, made.runtime.streams_and_events) == (0, 0, 0)
    assert not made.runtime.pageable, "memory that is not pinned was copied to"


def alive() -> bool:
    return True


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("group_bytes", [1, 1 << 20])
def test_pages_become_payloads(
    directory: Path, gather: GatherProcess, apart: bool, group_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "GROUP_BYTES", group_bytes)
    engine = EngineProcess(directory, apart=apart)
    engine.write(1)
    reader = gather.readers.open(engine.exported.source, alive)
    reader.gather(IDS, OFFSETS)
    assert [gather.payload(at) for at in OFFSETS.tolist()] == [engine.payload(chunk) for chunk in IDS]
    assert not gather.arena[: int(OFFSETS[0])].any(), "nothing else is written"
    assert bool(gather.runtime.pitched) == apart
    reader.close()


def test_each_allocation_is_exported_and_opened_once(directory: Path, gather: GatherProcess) -> None:
    engine = EngineProcess(directory)
    source = engine.exported.source
    assert len(source.handles) == 2 and source.plane_allocation.tolist() == [0, 0, 1, 1]
    assert source.plane_offset.tolist() == [256, 256 + PAGES * PAGE] * 2
    first, second = (gather.readers.open(source, alive) for _ in range(2))
    assert (gather.runtime.opens, gather.runtime.open_now) == (2, 2)
    first.close()
    first.close()
    second.gather(IDS, OFFSETS)
    second.close()
    assert gather.runtime.open_now == 0
    gather.readers.open(source, alive).close()
    assert gather.runtime.opens == 4, "not kept beyond the last reader"
    engine.exported.close()


def test_copies_wait_for_the_engines_event(directory: Path, gather: GatherProcess) -> None:
    """The pages are written by work that the engine's stream has not done yet when the save is sent."""
    engine = EngineProcess(directory)
    engine.write(1)
    engine.runtime.launch(engine.stream, lambda: engine.write(2))
    engine.exported.mark(engine.stream)
    reader = gather.readers.open(engine.exported.source, alive)
    copying = threading.Thread(target=reader.gather, args=(IDS, OFFSETS))
    copying.start()
    engine.runtime.finish(engine.stream)
    copying.join()
    assert gather.payload(int(OFFSETS[0])) == engine.payload(IDS[0])
    reader.close()


def test_closing_waits_for_the_copy_under_way(directory: Path, gather: GatherProcess) -> None:
    engine = EngineProcess(directory)
    engine.write(1)
    begun, go_on = threading.Event(), threading.Event()
    engine.runtime.launch(engine.stream, lambda: (begun.set(), go_on.wait(10)))
    engine.exported.mark(engine.stream)
    reader = gather.readers.open(engine.exported.source, alive)
    threads = [
        threading.Thread(target=reader.gather, args=(IDS, OFFSETS)),
        threading.Thread(target=engine.runtime.finish, args=(engine.stream,)),
    ]
    threads[1].start()
    begun.wait(10)
    threads[0].start()
    while not gather.runtime.waits:
        pass
    reader.close()
    assert gather.runtime.open_now == 2, "still mapped"
    go_on.set()
    for thread in threads:
        thread.join()
    assert gather.runtime.open_now == 0
    assert gather.payload(int(OFFSETS[0])) == engine.payload(IDS[0])
    with pytest.raises(DeviceError, match="the engine has gone"):
        reader.gather(IDS, OFFSETS)


@pytest.mark.parametrize("bounce_bytes", [CHUNK * 2, 1000, 96])
def test_what_is_not_pinned_goes_through_a_bounce_buffer(directory: Path, bounce_bytes: int) -> None:
    gather = GatherProcess(directory, bounce_bytes=bounce_bytes, pin_limit=bounce_bytes)  # room for the buffer alone
    engine = EngineProcess(directory)
    engine.write(1)
    assert not gather.readers.pinned.done_bytes
    reader = gather.readers.open(engine.exported.source, alive)
    reader.gather(IDS, OFFSETS)
    assert [gather.payload(at) for at in OFFSETS.tolist()] == [engine.payload(chunk) for chunk in IDS]
    assert not gather.runtime.pageable
    reader.close()
    gather.readers.close()
    assert not gather.runtime.pinned_now


@pytest.mark.parametrize("bounce_bytes", [0, 1000])
def test_a_trace_shows_when_the_device_copied(directory: Path, bounce_bytes: int) -> None:
    """Directly or through a bounce buffer; by the host's clock, which is not the device's."""
    spans = Spans("gather", directory / "trace.json")
    limit = {"bounce_bytes": bounce_bytes, "pin_limit": bounce_bytes} if bounce_bytes else {}
    gather, engine = GatherProcess(directory, spans=spans, **limit), EngineProcess(directory)
    reader = gather.readers.open(engine.exported.source, alive)
    before_ns = time.monotonic_ns()
    reader.gather(IDS, OFFSETS)
    after_ns = time.monotonic_ns()
    spans.flush()
    reader.close()
    gather.readers.close()
    assert not gather.runtime.streams_and_events and not spans.dropped
    (track,) = (event for event in read_trace(directory / "trace.json") if event["name"] == "thread_name")
    assert track["args"]["name"] == "GPU 0: saves by IPC"
    copies = [event for event in read_trace(directory / "trace.json") if event["ph"] == "X"]
    assert len(copies) == (1 if not bounce_bytes else 2 * -(-CHUNK // bounce_bytes))
    assert {(event["name"], event["tid"]) for event in copies} == {("copy to host", track["tid"])}
    assert sum(event["args"]["bytes"] for event in copies) == 2 * CHUNK
    slack_ns = timeline.PATIENCE_NS + (time.monotonic_ns() - before_ns) // 1000  # the clocks' rates differ by so much
    assert all(before_ns - slack_ns <= event["ts"] * 1000 <= after_ns + slack_ns for event in copies)
    spans.close()


def refused(call: Callable[[], object], text: str) -> None:
    with pytest.raises(DeviceError, match=text):
        call()


def test_what_cannot_be_exported_is_refused_with_the_setting(directory: Path) -> None:
    runtime = FakeRuntime(directory)
    expandable = runtime.malloc(4096, exportable=False)
    refused(lambda: ExportedPages(runtime, [expandable], 64, 64, 8), "expandable_segments:False.*enable_sleep_mode")
    refused(lambda: ExportedPages(runtime, [runtime.malloc(4096)], 64, 64, 65), "plane 0 runs past the 4096 bytes")
    refused(lambda: ExportedPages(runtime, [1 << 20], 64, 64, 1), "finding the allocation")


def test_what_cannot_be_opened_is_refused(directory: Path, gather: GatherProcess) -> None:
    engine = EngineProcess(directory)
    source = engine.exported.source
    other = replace(source, device="GPU-00000000-0000-0000-0000-000000000007")
    refused(lambda: gather.readers.open(other, alive), "0007, and this node serves GPU-.*0000: add it to engines.dev")
    large = replace(source, allocation_bytes=source.allocation_bytes + np.uint64(1))
    refused(lambda: gather.readers.open(large, alive), "8705 bytes was announced, the driver knows 8704")
    refused(lambda: Allocations(engine.runtime).open(source.handles[0], 1), "by the process that exported it")
    engine.runtime.die()
    refused(lambda: gather.readers.open(source, alive), "its exporter has ended")
    assert gather.runtime.open_now == 0


def test_page_ids_and_slots_are_checked(directory: Path, gather: GatherProcess) -> None:
    reader = gather.readers.open(EngineProcess(directory).exported.source, alive)
    for bad in (-1, PAGES):
        refused(lambda bad=bad: reader.gather(np.full((1, 4), bad, np.int32), OFFSETS[:1]), f"{PAGES}")
    at_the_end = np.array([ARENA - CHUNK + 1], np.uint64)
    refused(lambda: reader.gather(IDS[:1], at_the_end), "not in the arena")
    assert not gather.runtime.copies
    reader.close()


def test_what_a_dying_engine_had_counts_for_nothing(directory: Path, gather: GatherProcess) -> None:
    engine = EngineProcess(directory)
    reader = gather.readers.open(engine.exported.source, lambda: False)
    refused(lambda: reader.gather(IDS, OFFSETS), "the engine has died")
    reader.close()


def test_an_event_that_the_dead_will_not_reach(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It died while its kernels ran: no stream of gather may wait for them for ever."""
    monkeypatch.setattr(readers, "GRACE_S", 0.005)
    gather, engine = GatherProcess(directory), EngineProcess(directory)
    engine.runtime.launch(engine.stream, lambda: engine.write(2))
    engine.exported.mark(engine.stream)
    reader = gather.readers.open(engine.exported.source, lambda: False)
    with pytest.raises(DeviceLost, match="an event of an engine that has died"):
        reader.gather(IDS, OFFSETS)
    assert not gather.runtime.copies and not gather.arena.any()
    reader.close()
    gather.readers.close()


def test_nothing_is_under_way_after_a_refused_copy(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The slots are given to others then."""
    gather, engine = GatherProcess(directory), EngineProcess(directory, apart=True)
    engine.write(1)
    reader = gather.readers.open(engine.exported.source, alive)

    def refuse(*_: object) -> None:
        raise failure(NOT_SUPPORTED, "fake", "copying")

    monkeypatch.setattr(gather.runtime, "copy_rows", refuse)
    refused(lambda: reader.gather(IDS, OFFSETS), "copying: fake")
    before = gather.arena.copy()
    engine.write(2)
    monkeypatch.undo()
    reader.close()
    assert (gather.arena == before).all()
    gather.readers.close()


def test_a_sticky_error_is_for_the_process_to_end(directory: Path) -> None:
    gather, engine = GatherProcess(directory), EngineProcess(directory)
    reader: DeviceReader = gather.readers.open(engine.exported.source, alive)
    gather.runtime.fault()
    with pytest.raises(DeviceLost, match="lost to this process") as caught:
        reader.gather(IDS, OFFSETS)
    assert isinstance(caught.value, ProtocolViolation), "the runner ends the process"
    with pytest.raises(DeviceLost):
        gather.readers.open(engine.exported.source, alive)
    gather.readers.close()  # what nothing can be done about is said, and the process ends as it was to


def test_reading_after_a_close_would_be_a_fault(directory: Path) -> None:
    """The fake tells: so the tests above would notice."""
    runtime, engine = FakeRuntime(directory), EngineProcess(directory)
    base = runtime.open_memory(bytes.fromhex(engine.exported.source.handles[0]))
    runtime.close_memory(base)
    stream, one = runtime.new_stream(urgent=False), np.ones(1, np.uint64)
    runtime.copy(np.array([runtime.new_pinned(64)], np.uint64), one * np.uint64(base), one, stream)
    with pytest.raises(DeviceLost):
        runtime.finish(stream)


def test_statuses_have_their_kind() -> None:
    for status in (1, 2, 100, 201, 205, 304, 400, 712, 801):
        assert isinstance(failure(status, "name", "doing"), DeviceError)
    for status in STICKY:
        assert isinstance(failure(status, "name", "doing"), DeviceLost)
    assert str(failure(205, "cudaErrorMapBufferObjectFailed", "opening")).startswith("opening: cudaErrorMap")
    assert str(failure(1, "invalid", "pinning", "do this")).endswith(": do this")


def test_the_fake_is_a_runtime(directory: Path) -> None:
    runtime: Runtime = FakeRuntime(directory)
    assert isinstance(DeviceSource, type) and runtime.memory()[0] < runtime.memory()[1]
