"""Every file in topologies/ runs, but for sizes and places: a chunk goes down to the last tier and comes back."""

from __future__ import annotations

import urllib.request
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lmpipe import KVLayout, native
from lmpipe import topology as tp
from lmpipe.cli import check, main
from lmpipe.launch import node as launch_node
from lmpipe.launch.devices import lacking
from lmpipe.rundir import RunDir
from lmpipe.testing import Node

SHIPPED = sorted((Path(__file__).parent.parent / "topologies").glob("*.yaml"))
LAYOUT = KVLayout.paged(2, 1, 32, "bfloat16", 16)
CHUNKS, CHUNK_PAGES = 3, 16


def small(path: Path, tmp_path: Path) -> dict[str, Any]:
    """Changes that make a file's node small and put it below `tmp_path`."""
    topology = tp.load(path)
    tiers: dict[str, Any] = {"dram": {"capacity": "16MiB", "slots": 256}}
    if topology.tiers.ssd:
        tiers["ssd"] = {"directory": str(tmp_path / "ssd"), "capacity": "32MiB", "segment": "4MiB"}
    if topology.tiers.remote:
        tiers["remote"] = {"url": f"file://{tmp_path}/remote", "capacity": "32MiB"}
    sizes = dict.fromkeys(("compress", "persist", "replicate"), "4MiB")
    index = dict.fromkeys(("dram", "ssd", "remote"), "4MiB")
    changes: dict[str, Any] = {"tiers": tiers, "rings": sizes, "index": index, "heartbeat_ms": 100, "metrics": None}
    return changes | ({"engines": {"devices": []}} if topology.engines.devices else {})  # all the rest of it


WITH_GPUS = [path for path in SHIPPED if tp.load(path).engines.devices]


@pytest.mark.parametrize("path", WITH_GPUS, ids=lambda path: path.stem)
def test_without_a_gpu(path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is right, the machine is not: said at once, and nothing is begun."""
    for module in (check, launch_node):
        monkeypatch.setattr(module, "lacking", partial(lacking, drivers=()))
    assert main(["check", str(path)]) == 0
    assert "warning: engines.devices names GPU 0" in capsys.readouterr().out
    assert main(["up", str(path)]) == 1
    said = capsys.readouterr().err
    assert "engines.devices names GPU 0" in said and "there is no GPU driver here" in said
    assert not RunDir(Path(tp.load(path).run_dir)).path.exists()


def test_there_are_some() -> None:
    assert [path.stem for path in WITH_GPUS] == ["single-gpu", "two-gpus"]


def pool_of(pages: np.ndarray) -> native.PagePool:
    planes, nbytes = pages.shape
    each = np.full(planes, LAYOUT.page_bytes, np.uint64)
    starts = np.arange(planes, dtype=np.uint64) * np.uint64(nbytes)
    region = native.Region(memoryview(pages).cast("B"))
    return native.PagePool([region], np.zeros(planes, np.uint32), starts, each, each, CHUNKS * CHUNK_PAGES)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_down_to_every_tier_and_back(path: Path, tmp_path: Path) -> None:
    shape = (LAYOUT.plane_count, CHUNKS * CHUNK_PAGES * LAYOUT.page_bytes)
    saved = np.random.default_rng(1).integers(0, 9, shape, np.uint8)
    page_ids = np.arange(CHUNKS * CHUNK_PAGES, dtype=np.int32).reshape(CHUNKS, CHUNK_PAGES)
    with Node(small(path, tmp_path), base=path) as node:
        producer = node.producer(LAYOUT)
        prompt = producer.prompt(np.arange(CHUNKS * 256))
        producer.save(prompt, pool_of(saved), page_ids)
        assert producer.flush(prompt, timeout_s=20, tiers=node.topology.tier_names)
        tiers = node.topology.tier_names
        for at, tier in enumerate(tiers, 1):
            found = producer.lookup(prompt)
            assert found.by_tier == {tier: CHUNKS}
            loaded = np.zeros_like(saved)
            assert producer.load(found, pool_of(loaded), page_ids, deadline_ms=20_000).tokens == CHUNKS * 256
            assert (loaded == saved).all()
            assert main(["clear", str(node.run_dir), *(f"--tier={above}" for above in tiers[:at])]) == 0
        assert not producer.lookup(prompt).tokens


def test_metrics_endpoint() -> None:
    with Node({"tiers": {"ssd": None}, "metrics": {"port": 19_464}}) as node:
        producer = node.producer(LAYOUT)
        producer.lookup(producer.prompt([1, 2, 3]))
        old = node.kill("gather")
        node.wait_restarted("gather", old)
        with urllib.request.urlopen("http://127.0.0.1:19464/metrics") as answer:
            text = answer.read().decode()
        assert 'lmpipe_gather_dram_capacity_bytes{process="gather"}' in text
        assert text.count("lmpipe_turns_total{") == 1, "both lives of gather are one"
