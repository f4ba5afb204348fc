"""A worker that is started without a right to be."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lmpipe import topology as tp
from lmpipe.launch.claim import Claim
from lmpipe.launch.segments import Segments
from lmpipe.rundir import RunDir
from lmpipe.shm.session import SessionDir
from lmpipe.topology import NODE_VERSION, NodeInfo

TEXT = """
name: n
run_dir: {run_dir}
tiers: {{dram: {{capacity: 1MiB, slots: 16}}}}
index: {{dram: 1MiB}}
"""


@pytest.fixture
def paths(tmp_path: Path) -> Iterator[RunDir]:
    """A node's run directory without a node, held by this process."""
    paths = RunDir(tmp_path / "n")
    topology = tp.parse(TEXT.format(run_dir=paths.path), "f.yaml", tmp_path)
    claim = Claim(paths, "n")
    arena_id = Segments(paths, topology, print, lambda *_: None).build()
    ends = {"gather": {channel: paths.endpoint("gather", channel) for channel in ("load", "save")}}
    NodeInfo(NODE_VERSION, topology, str(paths.path), arena_id.hex(), ends, 1, 0.0).write()
    yield paths
    claim.release()


def worker(run_dir: Path, process: str, *, orphan: bool = False) -> tuple[int, str]:
    argv = [sys.executable, "-P", "-m", "lmpipe.launch", str(run_dir), process]
    if orphan:  # its parent is a shell, not the process that holds the lock
        argv = ["sh", "-c", '"$@"; exit $?', "sh", *argv]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60)
    return done.returncode, done.stderr


def test_without_a_node(tmp_path: Path) -> None:
    status, said = worker(tmp_path, "gather")
    assert status == 1
    assert f"no lmpipe node at {tmp_path}" in said


def test_of_a_process_that_is_not_in_the_topology(paths: RunDir) -> None:
    assert worker(paths.path, "persist") == (1, "lmpipe: n has no process persist\n")


def test_of_a_supervisor_that_is_gone(paths: RunDir) -> None:
    assert worker(paths.path, "gather", orphan=True) == (1, "lmpipe: gather: the supervisor is gone\n")
    assert SessionDir(paths.path).ids() == []
    assert not list(paths.sockets.iterdir())
