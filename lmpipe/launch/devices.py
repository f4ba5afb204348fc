"""Whether this machine has what a topology with GPUs needs. Loads no driver, so anybody may ask."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from lmpipe.topology import Topology

DRIVERS = (Path("/dev/nvidiactl"), Path("/dev/kfd"), Path("/dev/dxg"))
"""What a driver makes: NVIDIA's, AMD's, and that of Windows' Linux."""


def lacking(topology: Topology, drivers: tuple[Path, ...] = DRIVERS) -> str:
    """What is in the way of the topology's GPUs, and the mend; nothing if it names none, or nothing is."""
    devices = topology.engines.devices
    if not devices:
        return ""
    named = f"engines.devices names GPU {', '.join(devices)}"
    if not any(path.exists() for path in drivers):
        return f"{named}, and there is no GPU driver here; install one, give the container its GPUs, or leave it out"
    if find_spec("cupy") is None:
        return f"{named}, and CuPy is not installed: pip install 'lmpipe[gpu]'"
    return ""
