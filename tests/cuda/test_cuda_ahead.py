"""The kernels as a GPU would get them: compiled in a process of its own, which needs no GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "profiling" / "gpu_codecs.py"
KERNELS = {
    "paging": ("_gather", "_scatter"),
    "split": ("_measure", "_write", "_read"),
    "fp8": ("_encode", "_decode"),
    "rotated": ("_encode", "_decode"),
}


@pytest.mark.timeout(400)
@pytest.mark.parametrize("architecture", ["90", "gfx942"])
def test_all_kernels_compile(architecture: str, tmp_path: Path) -> None:
    """For Hopper and for AMD's MI300, to machine code; pages are read and written 16 bytes at a time, and no operation
    is one that rounds otherwise.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, SCRIPT, "--compile", architecture, "--dtypes", "bfloat16"],
        env={**environment, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = [line.split(" ", 2) for line in done.stdout.splitlines()]
    names = {name for name, _, _ in lines}
    assert names == {f"lmpipe.cuda.{module}.{name}" for module in KERNELS for name in KERNELS[module]}
    assert len({(name, kind) for name, kind, _ in lines}) > 2 * len(names), "raw pages make kernels of many kinds"
    for name, kind, line in lines:
        assert "inexact 0" in line, name
        if ".paging." in name:
            assert ("load v4, store v4" in line) == kind.startswith("4x"), (name, kind)
        else:
            reads_pages = name.endswith(("_measure", "_write", "_encode"))
            assert ("load v4" if reads_pages else "store v4") in line, name
