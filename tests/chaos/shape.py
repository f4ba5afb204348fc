"""The shape of a world, drawn from its seed: topology, codecs, engines, and what may be damaged in it."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Shape:
    """`roomy`: no tier below DRAM ever evicts, so that what was acknowledged has to be found. `damaged`: the tier whose
    stored bytes faults may destroy ("" for none); the other one is then what has to have it.
    """

    codec: str
    dram_codec: str
    processes: list[list[str]]
    flush: str
    roomy: bool
    damaged: str
    mapped: tuple[bool, ...]
    """Of each engine, whether gather copies its pages."""
    on_disk: bool
    """Whether the segment files lie on the disk, not on a small tmpfs that can be filled."""
    failing_io: bool
    """Whether every process runs with the library that makes calls on files fail."""

    @classmethod
    def draw(cls, seed: int) -> Shape:
        """The shape of a seed."""
        draw = random.Random(f"shape {seed}")
        codec = draw.choice(("raw", "zstd", "split"))
        stages = ["gather", *(["compress"] if codec != "raw" else []), "persist", "replicate"]
        apart = [[stage] for stage in stages]
        processes = draw.choices((apart, [stages[:1], stages[1:]], [stages]), (6, 2, 1))[0]
        mapped = draw.choice(((False, True), (False, True), (False, True, False), (True, True)))
        return cls(
            codec=codec,
            dram_codec=draw.choice(("raw", "raw", "raw", "zstd")) if codec != "raw" else "raw",
            processes=processes,
            flush=draw.choice(("each", "interval")),
            roomy=draw.random() < 0.75,
            damaged=draw.choice(("", "ssd", "remote")),
            mapped=mapped,
            on_disk=draw.random() < 0.2,
            failing_io=draw.random() < 0.3,
        )

    def topology(self, run_dir: Path, ssd: Path, remote: Path) -> dict[str, Any]:
        """Changes to `lmpipe.testing.small_topology`: a DRAM tier much smaller than what is saved."""
        below = (
            {"ssd": 56 * MIB, "segment": 4 * MIB, "remote": 96 * MIB}
            if self.roomy
            else {"ssd": 4 * MIB, "segment": MIB, "remote": 2 * MIB}
        )
        return {
            "run_dir": str(run_dir),
            "tiers": {
                "dram": {"capacity": "1MiB", "slots": 112, "codec": self.dram_codec},
                "ssd": {
                    "directory": str(ssd),
                    "capacity": below["ssd"],
                    "segment": below["segment"],
                    "flush": self.flush,
                    "codec": self.codec,
                },
                "remote": {"url": f"file://{remote}", "capacity": below["remote"], "codec": self.codec},
            },
            "processes": [
                {"name": "-".join(dict.fromkeys((stages[0], stages[-1]))), "stages": stages}
                for stages in self.processes
            ],
            "rings": {"compress": "2MiB", "persist": "2MiB", "replicate": "2MiB"},
            "index": {"dram": "2MiB", "ssd": "2MiB", "remote": "2MiB"},
            "restarts": {"budget": 1000, "window_s": 1},
            "heartbeat_ms": 200,
            "watchdog_ms": 3000,
        }
