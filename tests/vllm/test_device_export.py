"""Saves out of a KV cache on a GPU: exported by the worker, read by gather. The device is fake (tests/cuda), the engine
and the node are real.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

CUDA = Path(__file__).parent.parent / "cuda"
sys.path.append(str(CUDA))

from cached import CHUNK, ask, connector, idle, producers, ready, settled, tiers, tokens, until  # noqa: E402
from device_memory import Deferred  # noqa: E402
from fake_runtime import FakeRuntime  # noqa: E402
from harness import Engine  # noqa: E402
from processes import EngineProcess  # noqa: E402

from lmpipe.cuda.runtime import Stream  # noqa: E402
from lmpipe.engines.vllm import worker as worker_module  # noqa: E402
from lmpipe.engines.vllm.device import DeviceMemory  # noqa: E402
from lmpipe.engines.vllm.memory import SharedPages  # noqa: E402
from lmpipe.testing import Node  # noqa: E402


class OnDevice(SharedPages):
    """While entered, the KV cache is made in the fake device's memory."""

    def __init__(self, runtime: FakeRuntime, *, exportable: bool) -> None:
        super().__init__(Path())
        self._runtime, self._exportable = runtime, exportable

    def _map(self, nbytes: int) -> torch.Tensor:
        address = self._runtime.malloc(nbytes, exportable=self._exportable)
        return torch.from_numpy(self._runtime.view(address, nbytes)).view(torch.int8)


class FakeMemory(Deferred):
    """Exports through the fake runtime; the engine's stream is one of its."""

    def __init__(self, caches: Mapping[str, torch.Tensor], runtime: FakeRuntime) -> None:
        super().__init__(caches, [], runtime)
        self.fake, self._stream = runtime, runtime.new_stream(urgent=False)

    def stream(self) -> Stream:
        return self._stream

    def mark(self) -> None:
        super().mark()
        self.fake.finish(self._stream)  # the kernels before it, which here are done


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Of the devices' memory."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(CUDA / "fake_site"), str(CUDA)]))
    monkeypatch.setenv("LMPIPE_FAKE_DEVICES", str(tmp_path))
    yield tmp_path


def engine_on(directory: Path, node: Node, llama: Path, monkeypatch: pytest.MonkeyPatch, **kind: Any) -> Engine:
    runtime = FakeRuntime(directory)
    monkeypatch.setattr(
        worker_module, "SharedPages", lambda _: OnDevice(runtime, exportable=kind.get("exportable", True))
    )
    monkeypatch.setattr(worker_module, "device_memory", lambda caches, _: FakeMemory(caches, runtime))
    settings = connector(node, free_deadline_ms=300)
    return Engine(llama, settings, num_gpu_blocks_override=31, max_model_len=512)


def served(directory: Path, *devices: int) -> dict[str, Any]:
    return {**tiers(directory), **({"engines": {"devices": list(devices)}} if devices else {})}


def test_gather_copies_saves_from_the_device(
    directory: Path, tmp_path: Path, llama: Path, plain: EngineProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [tokens(2 * CHUNK + 5 + 10 * n) for n in range(5)]  # more than there are blocks for: some are preempted
    wanted = plain.generate(prompts, 70)
    with Node(served(tmp_path, 0)) as node, engine_on(directory, node, llama, monkeypatch) as engine:
        ready(engine)
        worker = engine.worker_connector._worker
        monkeypatch.setattr(type(worker._groups[0].pool), "save", None)  # nobody else does
        preempt, times = engine.scheduler._preempt_request, []
        monkeypatch.setattr(
            engine.scheduler, "_preempt_request", lambda *args, **how: (times.append(1), preempt(*args, **how))[1]
        )
        assert ask(engine, prompts, 70)[0] == wanted
        assert times, "nothing was preempted: this test shows nothing"
        settled(engine)
        engine.reset_prefix_cache()
        for prompt, want in zip(prompts, wanted, strict=True):
            assert ask(engine, [prompt], 4) == ([want[:4]], [len(prompt) // CHUNK * CHUNK])
        idle(engine)
        assert engine.free_blocks == 30
        assert worker._groups[0].shared and producers(engine)[1].stats()["saved_chunks"]
        memory = worker._device
    assert not memory._exported, "handles and events are given back with the engine"


@pytest.mark.parametrize(
    ("devices", "exportable", "said"),
    [((), True, "add it to engines.devices"), ((0,), False, "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:False")],
    ids=["not served", "no handle"],
)
def test_what_gather_cannot_read_this_process_saves(
    directory: Path,
    tmp_path: Path,
    llama: Path,
    plain: EngineProcess,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    devices: tuple[int, ...],
    exportable: bool,
    said: str,
) -> None:
    caplog.set_level(logging.WARNING, "lmpipe.vllm")
    with (
        Node(served(tmp_path, *devices)) as node,
        engine_on(directory, node, llama, monkeypatch, exportable=exportable) as engine,
    ):
        until(lambda: producers(engine)[1].state != "absent", "the node has answered")
        prompt = tokens(4 * CHUNK + 3)
        ask(engine, [tokens(CHUNK)], 1)
        assert not engine.worker_connector._worker._groups[0].shared
        ready(engine)
        ask(engine, [prompt], 1)
        settled(engine, "dram", prompt=prompt)
        engine.reset_prefix_cache()
        assert ask(engine, [prompt]) == (plain.generate([prompt], 8), [4 * CHUNK])
    warnings = [record.getMessage() for record in caplog.records if "this process copies saves" in record.message]
    assert len(warnings) == 1 and said in warnings[0]


def test_without_cupy_it_is_said_what_to_install(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    memory = DeviceMemory.of({"layer": torch.empty(1)}, Path())
    assert memory.source(None) is None and memory.source(None) is None  # pyright: ignore[reportArgumentType]
    assert len(caplog.messages) == 1 and "pip install 'lmpipe[gpu]'" in caplog.messages[0]
    memory.close()
