"""The GPU that torch sees, asked of a process that ends: torch, and a context on the GPU, would stay in this one.

`python -m lmpipe.demo.gpu` answers with a line of JSON, null without a GPU.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import asdict, dataclass

import orjson

ASK_S = 120.0


@dataclass(frozen=True, slots=True)
class Gpu:
    """`free_bytes`: of its memory."""

    name: str
    free_bytes: int


def ask() -> Gpu | None:
    """The first one that torch sees; None also where torch cannot say."""
    argv = [sys.executable, "-P", "-m", "lmpipe.demo.gpu"]
    try:
        said = subprocess.run(argv, capture_output=True, timeout=ASK_S, check=True).stdout
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired):
        return None
    found = orjson.loads(said.splitlines()[-1])
    return None if found is None else Gpu(**found)


def look() -> Gpu | None:
    """The same, in this process."""
    import torch  # noqa: PLC0415  only the process that is asked loads it

    if not torch.cuda.is_available():
        return None
    return Gpu(torch.cuda.get_device_name(0), torch.cuda.mem_get_info(0)[0])


if __name__ == "__main__":
    seen = look()
    print(orjson.dumps(None if seen is None else asdict(seen)).decode())
