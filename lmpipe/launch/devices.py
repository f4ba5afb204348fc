"""Whether this machine has what a topology with GPUs needs. Loads no driver, so anybody may ask."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from lmpipe.topology import Topology

DRIVERS = (Path("/dev/nvidiactl"), Path("/dev/kfd"), Path("/dev/dxg"))
"""What a driver makes: NVIDIA's, AMD's, and that of Windows' Linux."""

INSTALL = "pip install 'lmpipe[gpu]', or for AMD's GPUs CuPy's build for ROCm"


class Lack(NamedTuple):
    """What is in the way of a topology's GPUs, and the mend."""

    seen: str
    todo: str

    def __str__(self) -> str:
        return f"{self.seen}; {self.todo}"


def lacking(topology: Topology, drivers: tuple[Path, ...] = DRIVERS) -> Lack | None:
    """What this machine lacks; None: nothing, or no GPU is named."""
    devices = topology.engines.devices
    named = f"engines.devices names GPU {', '.join(devices)}"
    if not devices:
        return None
    if not any(path.exists() for path in drivers):
        todo = "install one, give the container its GPUs, or leave the devices out"
        return Lack(f"{named}, and there is no GPU driver here", todo)
    if find_spec("cupy") is None:
        return Lack(f"{named}, and CuPy is not installed", INSTALL)
    return None
