"""The built-in load of `lmpipe profile` with pages on a device, on a real node, and what its traces say of the device.

Without --gpu the device is fake, and its clock is not the host's.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_runtime import FakeRuntime

from lmpipe import KVLayout
from lmpipe.bench import engine_load
from lmpipe.bench.gpu_load import exported_pages
from lmpipe.bench.load_pages import LoadPages, PagesOf, host_pages
from lmpipe.spans import Spans, read_trace
from lmpipe.testing import Node

HERE = Path(__file__).parent
LAYOUT = KVLayout.paged(2, 1, 32, "bfloat16", 16)
SIZES: dict[str, Any] = {
    "tiers": {"ssd": None, "dram": {"capacity": "4MiB", "slots": 128}},
    "chunk_tokens": 64,
    "engines": {"devices": [0]},
    "profile": {"trace": True},
    "heartbeat_ms": 100,
}


class Turns(threading.Event):
    """Set after so many looks."""

    def __init__(self, turns: int) -> None:
        super().__init__()
        self._left = turns

    def wait(self, timeout: float | None = None) -> bool:
        self._left -= 1
        return self._left < 0


def device_spans(path: Path) -> dict[tuple[str, str], int]:
    """Bytes by (track, name)."""
    events = read_trace(path)
    tracks = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    found: dict[tuple[str, str], int] = {}
    for event in events:
        if event["ph"] == "X" and event["tid"] in tracks:
            key = tracks[event["tid"]].split(",")[0], event["name"]
            found[key] = found.get(key, 0) + event["args"]["bytes"]
    return found


def fake_pages(runtime: FakeRuntime) -> PagesOf:
    """In memory of the fake device."""
    stream = runtime.new_stream(urgent=True)

    @contextmanager
    def made(layout: KVLayout, pages: int, spans: Spans) -> Generator[LoadPages]:
        shape = layout.plane_count, pages, layout.page_bytes
        there = runtime.view(runtime.malloc(math.prod(shape)), math.prod(shape)).reshape(shape)
        with exported_pages(runtime, torch.from_numpy(there), layout, spans, lambda: stream) as pages_there:
            # Nobody else looks at this process's part of the device.
            yield replace(pages_there, mark=lambda: (pages_there.mark(), runtime.finish(stream)))

    return made


def test_saves_by_ipc_and_loads_by_kernels_are_in_the_traces(
    tmp_path: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_load, "LAYOUT", LAYOUT)
    monkeypatch.setattr(engine_load, "CHUNKS", 2)
    pages_of, loads = None, "GPU 0: loads" if device.type == "cuda" else "host: loads"
    if device.type == "cuda":
        pytest.importorskip("cupy")
    else:
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(HERE / "fake_site"), str(HERE)]))
        monkeypatch.setenv("LMPIPE_FAKE_DEVICES", str(tmp_path))
        pages_of = fake_pages(FakeRuntime(tmp_path))
    trace = tmp_path / "engine.trace.json"
    with Node(SIZES) as node:
        assert engine_load.serve(node.run_dir, trace, Turns(12), pages_of) == 0
        gather = node.paths.trace("gather")
        until(lambda: ("GPU 0: saves by IPC", "copy to host") in device_spans(gather))
        saved = device_spans(gather)["GPU 0: saves by IPC", "copy to host"]
    engine = device_spans(trace)
    assert saved % LAYOUT.chunk_bytes(64) == 0
    assert engine[loads, "scatter"] == engine[loads, "copy from host"] > 0
    assert {track for track, _ in engine} == {loads}, "gather reads the pages"


def until(reached: Callable[[], object]) -> None:
    """Spans are written once a heartbeat."""
    end_s = time.monotonic() + 30
    while not reached():
        assert time.monotonic() < end_s
        time.sleep(0.01)


def test_without_a_gpu_the_pages_lie_in_memory_of_the_host(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    no: Callable[[], bool] = lambda: False  # noqa: E731
    monkeypatch.setattr(torch.cuda, "is_available", no)
    assert engine_load.pages_for(()) is host_pages
    assert not capsys.readouterr().err
    assert engine_load.pages_for(("0",)) is host_pages
    assert "no torch that sees a GPU" in capsys.readouterr().err
