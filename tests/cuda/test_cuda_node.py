"""A node that serves GPUs, of real processes: only the devices are fake (fake_runtime.py)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_runtime import FakeRuntime

from lmpipe import KVLayout, native
from lmpipe.cuda.ipc import ExportedPages
from lmpipe.producer import Producer
from lmpipe.spans import read_trace
from lmpipe.testing import Node

HERE = Path(__file__).parent
LAYOUT = KVLayout.paged(2, 1, 32, "bfloat16", 16)
TOKENS, PAGES = 64, 16
IDS = np.array([[2, 3, 4, 5], [11, 0, 9, 7]], np.int32)
DRAM_ONLY: dict[str, Any] = {"tiers": {"ssd": None, "dram": {"capacity": "4MiB", "slots": 128}}, "chunk_tokens": TOKENS}


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Of the devices' memory."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(HERE / "fake_site"), str(HERE)]))
    monkeypatch.setenv("LMPIPE_FAKE_DEVICES", str(tmp_path))
    yield tmp_path


def until(reached: Callable[[], object]) -> None:
    """Wait for it: what was lost with a gather that died is noticed a heartbeat later."""
    end_s = time.monotonic() + 30
    while not reached():
        assert time.monotonic() < end_s
        time.sleep(0.01)


class Engine:
    """One rank, whose pages lie on a device."""

    def __init__(self, node: Node, directory: Path, shard: int = 0, shards: int = 1) -> None:
        self.runtime = FakeRuntime(directory, shard)
        plane = PAGES * LAYOUT.page_bytes
        self.base = self.runtime.malloc(LAYOUT.plane_count * plane)
        addresses = [self.base + i * plane for i in range(LAYOUT.plane_count)]
        self.exported = ExportedPages(self.runtime, addresses, LAYOUT.page_bytes, LAYOUT.page_bytes, PAGES)
        self.stream = self.runtime.new_stream(urgent=True)
        self.producer = Producer(
            node.run_dir, LAYOUT, model="test", pages=self.exported.source, shard=shard, shards=shards
        )
        self.memory = self.runtime.view(self.base, LAYOUT.plane_count * plane).reshape(LAYOUT.plane_count, PAGES, -1)

    def save(self, seed: int) -> bool:
        """Compute two chunks, and save them."""
        self.memory[:] = np.random.default_rng(seed).integers(0, 255, self.memory.shape, np.uint8)
        self.exported.mark(self.stream)
        self.runtime.finish(self.stream)
        return self.producer.save(self.prompt(seed), None, IDS).wait(30)

    def prompt(self, seed: int) -> Any:
        return self.producer.prompt(np.arange(2 * TOKENS) + 1000 * seed)

    def loads_what_it_saved(self, seed: int) -> bool:
        """Into memory of the host: loads to a device are another's business."""
        loaded = np.zeros_like(self.memory)
        each = np.full(LAYOUT.plane_count, LAYOUT.page_bytes, np.uint64)
        starts = np.arange(LAYOUT.plane_count, dtype=np.uint64) * each * np.uint64(PAGES)
        region = native.Region(memoryview(loaded).cast("B"))
        pool = native.PagePool([region], np.zeros(LAYOUT.plane_count, np.uint32), starts, each, each, PAGES)
        with self.producer.lookup(self.prompt(seed)) as found:
            result = self.producer.load(found, pool, IDS)
        return result.tokens == 2 * TOKENS and bool((loaded[:, IDS.ravel()] == self.memory[:, IDS.ravel()]).all())

    def is_refused(self, reason: str) -> bool:
        """Wait for it."""
        until(lambda: self.producer.state == "refused")
        return reason in self.producer.reason

    def close(self) -> None:
        self.producer.close()


def test_saves_from_two_devices_and_a_sticky_error(directory: Path) -> None:
    """Ranks as shards; a fault ends gather, whose successor opens the pages again."""
    with Node({**DRAM_ONLY, "engines": {"devices": [0, 1]}, "profile": {"trace": True}}) as node:
        engines = [Engine(node, directory, shard, 2) for shard in range(2)]
        assert all(engine.producer.wait_ready(30) for engine in engines)
        assert all(engine.save(1) for engine in engines)
        assert all(engine.loads_what_it_saved(1) for engine in engines)
        (directory / "fault-copying").touch()
        pid = gather_of(node)
        assert not engines[0].save(2)
        node.wait_restarted("gather", pid)
        for engine in engines:
            until(lambda engine=engine: engine.producer.wait_ready(1) and engine.save(3))
        assert all(engine.loads_what_it_saved(3) for engine in engines)
        said = node.paths.log("gather").read_text()
        assert "the device is lost to this process" in said
        assert "arena: 0.00 of 0.00 GiB are pinned" in said
        assert "gather: exit status 70; starting it again" in node.output
        pid = gather_of(node)
        (directory / "fault-opening").touch()
        engines.append(Engine(node, directory))
        node.wait_restarted("gather", pid)
        until(lambda: engines[-1].producer.wait_ready(1) and engines[-1].save(4))
        for engine in engines:
            engine.close()
        # What a gather that died had not flushed is not there; its successor writes into the same file.
        both = {f"GPU {device}: saves by IPC" for device in (0, 1)}
        until(lambda: both == {track for _, track in copies_in_the_trace(node)})
        until(lambda: len({process for process, _ in copies_in_the_trace(node)}) > 1)


def copies_in_the_trace(node: Node) -> set[tuple[int, str]]:
    """Which gathers copied, by their pids, and the tracks on which that is shown."""
    events = read_trace(node.paths.trace("gather"))
    tracks = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    return {(e["pid"], tracks[e["pid"], e["tid"]]) for e in events if e["name"] == "copy to host"}


def gather_of(node: Node) -> int:
    """Its pid."""
    return next(process.pid for process in node.status().processes if process.name == "gather")


ENGINE = """
import sys
from pathlib import Path
from types import SimpleNamespace
from test_cuda_node import Engine
engine = Engine(SimpleNamespace(run_dir=Path(sys.argv[1])), Path(sys.argv[2]))
assert engine.producer.wait_ready(30) and engine.save(1)
print("saved", flush=True)
sys.stdin.read()
"""


def test_an_engine_that_is_killed(directory: Path) -> None:
    with Node({**DRAM_ONLY, "engines": {"devices": [0]}}) as node:
        argv = [sys.executable, "-c", ENGINE, str(node.run_dir), str(directory)]
        with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as engine:
            assert engine.stdout is not None and engine.stdout.readline() == "saved\n"
            engine.send_signal(signal.SIGKILL)
        again = Engine(node, directory)
        assert again.producer.wait_ready(30)
        again.memory[:] = np.random.default_rng(1).integers(0, 255, again.memory.shape, np.uint8)
        assert again.loads_what_it_saved(1), "what it saved outlives it"
        assert again.save(2) and again.loads_what_it_saved(2)
        again.close()


def test_a_device_that_the_topology_does_not_name(directory: Path) -> None:
    with Node({**DRAM_ONLY, "engines": {"devices": [1]}}) as node:
        engine = Engine(node, directory)
        assert engine.is_refused("add it to engines.devices")
        engine.close()
    with Node(DRAM_ONLY) as node:
        engine = Engine(node, directory)
        assert engine.is_refused("the topology names no GPU")
        engine.close()
