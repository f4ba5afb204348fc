"""A run directory on tmpfs, slots with content that tells whose it is, and child processes that are always reaped."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent
Spawn = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def run_dir() -> Iterator[Path]:
    """A private directory with what the supervisor would have made in it."""
    path = Path(tempfile.mkdtemp(prefix="lmpipe-test-", dir="/dev/shm"))
    (path / "sessions").mkdir(mode=0o700)
    yield path
    shutil.rmtree(path)


@pytest.fixture
def spawn() -> Iterator[Spawn]:
    """Start a script of this directory with arguments; its output is a pipe. Killed and reaped at the end."""
    children: list[subprocess.Popen[str]] = []

    def start(script: str, *arguments: object) -> subprocess.Popen[str]:
        command = [sys.executable, "-W", "error", str(HERE / script), *map(str, arguments)]
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        children.append(child)
        return child

    yield start
    for child in children:
        with child:
            child.kill()
