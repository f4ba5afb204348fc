"""What this machine's kernel says of its memory."""

from __future__ import annotations

from pathlib import Path


def memory_bytes(field: str) -> int:
    """`MemTotal`, `MemAvailable` (what the kernel could give without swapping) or another line of /proc/meminfo; 0: it
    does not say.
    """
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) << 10
    return 0
