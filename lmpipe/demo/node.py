"""The demo's node: real processes, killed and started again on purpose. Knows no engine."""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lmpipe.demo.scale import RING_BYTES, SCALES, Scale
from lmpipe.testing import Node, merged

TOPOLOGIES = next(
    path
    for parent in Path(__file__).parents[1:3]  # installed, the topologies lie in the package; in a checkout beside it
    if (path := parent / "topologies").exists()
)
TOPOLOGY, GPU_TOPOLOGY = TOPOLOGIES / "local.yaml", TOPOLOGIES / "single-gpu.yaml"
SIZES: dict[str, Any] = {
    "tiers": {
        "dram": {"capacity": "512MiB"},
        "ssd": {"capacity": "1GiB", "segment": "64MiB"},
        "remote": {"capacity": "1GiB"},
    },
    "engines": {"load_deadline_ms": 20_000},
}
"""A temporary node on a small machine: tiers that hold the workload, and a deadline that outlasts two busy cores."""
STAGES = ("gather", "compress", "persist", "replicate")


def sizes_of(scale: Scale) -> dict[str, Any]:
    """What a scale changes in its topology. A GPU's has every stage and tier too."""
    if scale.device == "cpu":
        return SIZES
    tier = {"capacity": scale.tier_bytes}
    return {
        "processes": [{"name": stage, "stages": [stage]} for stage in STAGES],
        "tiers": {"dram": tier, "ssd": {**tier, "segment": "256MiB"}, "remote": {**tier, "codec": "split"}},
        "rings": dict.fromkeys(STAGES[1:], RING_BYTES),
        "engines": SIZES["engines"],
    }


class DemoNode(Node):
    """A node whose tiers lie below `work`. A context manager: nothing of it runs afterwards."""

    def __init__(self, work: Path, scale: Scale = SCALES["full"]) -> None:
        self._ssd, remote = work / "ssd", work / "remote"
        places = {"tiers": {"ssd": {"directory": str(self._ssd)}, "remote": {"url": f"file://{remote}"}}}
        on_gpu = scale.device != "cpu" and find_spec("cupy") is not None
        super().__init__(merged(sizes_of(scale), places), base=GPU_TOPOLOGY if on_gpu else TOPOLOGY)

    def kill_all(self) -> int:
        """SIGKILL to the supervisor and every worker; returns how many that were."""
        processes = 1 + sum(process.pid > 0 for process in self.status().processes)
        self.kill("all")
        return processes

    def remove_arena(self) -> None:
        """The DRAM tier of a killed node is gone."""
        self.paths.arena.unlink()

    def remove_ssd(self) -> None:
        """The SSD tier of a killed node is gone."""
        shutil.rmtree(self._ssd)
