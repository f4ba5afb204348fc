"""A worker that is started without a right to be."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from lmpipe import topology as tp
from lmpipe.launch.claim import Claim, take_role
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


def test_waits_for_one_that_is_about_to_see_that_it_is_alone(paths: RunDir) -> None:
    program = (
        "import sys, time\nfrom pathlib import Path\nfrom lmpipe.launch.claim import take_role\n"
        "from lmpipe.rundir import RunDir\nrole = take_role(RunDir(Path(sys.argv[1])), 'gather')\n"
        "print('ok', flush=True)\nsys.stdin.read()\n"
    )
    argv = [sys.executable, "-P", "-c", program, str(paths.path)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as alone:
        assert alone.stdout is not None and alone.stdin is not None
        assert alone.stdout.readline() == "ok\n"
        waiting = threading.Timer(0.2, alone.stdin.close)
        waiting.start()
        os.close(take_role(paths, "gather", 60))
        waiting.join()
