"""Pages by IPC from another process on a real card: run by `make test-gpu`, skipped without one."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from lmpipe import messages as m
from lmpipe import native
from lmpipe.cuda.readers import DeviceReaders

SCRIPT = Path(__file__).with_name("card_exporter.py")
PLANES, PAGE = 4, 16384
"""As the exporter has them."""
IDS = np.array([[3, 4, 5, 6, 7, 20, 2, 63], [9, 1, 14, 0, 40, 41, 42, 43]], np.int32)
CHUNK = IDS.shape[1] * PLANES * PAGE
ARENA = 16 << 20


@pytest.fixture(autouse=True)
def cupy_runtime(device: torch.device) -> ModuleType:
    if device.type != "cuda":
        pytest.skip("needs a GPU: make test-gpu")
    pytest.importorskip("cupy")
    return importlib.import_module("lmpipe.cuda.cupy_runtime")


def exporter(kind: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, SCRIPT, kind],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )


@pytest.mark.parametrize("pinned", [True, False])
@pytest.mark.parametrize("kind", ["close", "apart"])
def test_pages_of_another_process(kind: str, pinned: bool, cupy_runtime: ModuleType) -> None:
    memory = np.zeros(ARENA + 4096, np.uint8)
    start = -memory.ctypes.data % 4096
    region = native.Region.at(memory.ctypes.data + start, ARENA, True, memory)
    readers = DeviceReaders([cupy_runtime.open_device("0")], region, native.Copier(1), bounce_bytes=100_000)
    assert readers.pinned.wait(60)
    if not pinned:
        readers.pinned.close()
    offsets = np.array([4096, 4 << 20], np.uint64)
    with exporter(kind) as engine:
        assert engine.stdin is not None and engine.stdout is not None
        hello = m.decode([bytes.fromhex(json.loads(engine.stdout.readline())["hello"])])
        assert isinstance(hello, m.Register) and isinstance(hello.pages, m.DeviceSource)
        reader = readers.open(hello.pages, lambda: True)
        reader.gather(IDS, offsets)
        digests = json.loads(engine.stdout.readline())["digests"]
        reader.close()
        engine.stdin.close()
    for chunk, offset in zip(IDS, offsets.tolist(), strict=True):
        payload = memory[start + offset :][:CHUNK].reshape(PLANES, len(chunk), PAGE)
        found = [[hashlib.sha256(page.tobytes()).hexdigest() for page in plane] for plane in payload]
        assert found == [[digests[plane][page] for page in chunk.tolist()] for plane in range(PLANES)]
    readers.close()


def test_expandable_segments_are_refused_with_the_setting() -> None:
    with exporter("close", PYTORCH_CUDA_ALLOC_CONF="expandable_segments:True") as engine:
        said, _ = engine.communicate()
    assert "expandable_segments:False" in json.loads(said.splitlines()[0])["refused"]
