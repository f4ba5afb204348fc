"""One supervisor at a time, one worker for each process, and what stays behind. Real processes, real locks."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lmpipe.errors import NodeError
from lmpipe.launch.claim import Claim, lock_holder, session_lock, take_role
from lmpipe.rundir import RunDir
from lmpipe.shm.session import SessionDir

HOLD = "import sys, time\nfrom pathlib import Path\n"
CLAIMER = HOLD + (
    "from lmpipe.launch.claim import Claim\nfrom lmpipe.rundir import RunDir\n"
    "Claim(RunDir(Path(sys.argv[1])), 'n')\nprint('ok', flush=True)\ntime.sleep(100)\n"
)
WORKER = HOLD + (
    "from lmpipe.launch.claim import take_role\nfrom lmpipe.rundir import RunDir\n"
    "from lmpipe.shm.session import Session\nsession = Session.create(sys.argv[1])\n"
    "if sys.argv[2]: take_role(RunDir(Path(sys.argv[1])), sys.argv[2])\n"
    "print('ok', flush=True)\ntime.sleep(100)\n"
)


class Helpers:
    """Processes that hold something, killed at the end."""

    def __init__(self) -> None:
        self.started: list[subprocess.Popen[str]] = []

    def start(self, program: str, *arguments: str) -> subprocess.Popen[str]:
        process = subprocess.Popen([sys.executable, "-c", program, *arguments], stdout=subprocess.PIPE, text=True)
        self.started.append(process)
        assert process.stdout is not None and process.stdout.readline() == "ok\n"
        return process


@pytest.fixture
def helpers() -> Iterator[Helpers]:
    helpers = Helpers()
    yield helpers
    for process in helpers.started:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


@pytest.fixture
def paths(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path / "node")


def test_takes_and_gives_back(paths: RunDir) -> None:
    claim = Claim(paths, "n")
    assert all(directory.stat().st_mode & 0o777 == 0o700 for directory in paths.directories)
    claim.clear(keep_dram=False)
    claim.release()
    assert not paths.path.exists()


def test_the_second_is_told_who_the_first_is(paths: RunDir, helpers: Helpers) -> None:
    first = helpers.start(CLAIMER, str(paths.path))
    assert lock_holder(paths.supervisor_lock) == first.pid
    with pytest.raises(NodeError, match=f"n is running already: its supervisor has pid {first.pid}; stop it with"):
        Claim(paths, "n")
    first.kill()
    first.wait()
    assert lock_holder(paths.supervisor_lock) == 0
    Claim(paths, "n").release()


def test_refuses_a_directory_that_others_may_enter(paths: RunDir) -> None:
    paths.path.mkdir(mode=0o755)
    with pytest.raises(NodeError, match=r"mode 0700\); remove it, or chmod it"):
        Claim(paths, "n")


def test_refuses_a_link(paths: RunDir, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    paths.path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(NodeError, match="must be a directory"):
        Claim(paths, "n")


def test_one_worker_for_each_process(paths: RunDir, helpers: Helpers) -> None:
    claim = Claim(paths, "n")
    worker = helpers.start(WORKER, str(paths.path), "gather")
    with pytest.raises(NodeError, match=f"gather runs already, pid {worker.pid}"):
        take_role(paths, "gather")
    worker.kill()
    worker.wait()
    os.close(take_role(paths, "gather"))
    claim.clear(keep_dram=False)
    claim.release()


def test_keeps_what_it_is_asked_to_keep(paths: RunDir, helpers: Helpers) -> None:
    claim = Claim(paths, "n")
    producer = helpers.start(WORKER, str(paths.path), "")
    session = SessionDir(paths.path).ids()[0]
    dead = paths.sessions / f"{7:016x}.lock"
    everything = [
        paths.arena,
        paths.node_shm,
        paths.node_json,
        paths.ring("persist"),
        paths.counters_of("gather", 2**22 + 1),
        paths.counters_of("engine", producer.pid),
        paths.log("gather"),
        dead,
    ]
    for path in everything:
        path.touch()
    (paths.index / "dram-1").mkdir()
    claim.clear(keep_dram=True)
    claim.release()
    left = {path.relative_to(paths.path) for path in paths.path.rglob("*") if path.is_file()}
    wanted = [paths.arena, paths.node_shm, paths.counters_of("engine", producer.pid), session_lock(paths, session)]
    wanted.append(SessionDir(paths.path).holds_path(session))
    assert left == {path.relative_to(paths.path) for path in wanted}
    claim = Claim(paths, "n")
    claim.clear(keep_dram=False)
    claim.release()
    assert not paths.path.exists()


def test_lock_holder_of_nothing(tmp_path: Path) -> None:
    assert lock_holder(tmp_path / "none") == 0


def test_two_at_once_get_it_one_after_the_other(paths: RunDir, helpers: Helpers) -> None:
    program = CLAIMER.replace("Claim(RunDir", "claim = Claim(RunDir").replace(
        "time.sleep(100)", "time.sleep(0.05); claim.clear(keep_dram=False); claim.release()"
    )
    for _ in range(5):  # each removes the directory that the next one is about to lock
        first = helpers.start(program, str(paths.path))
        while True:
            try:
                claim = Claim(paths, "n")
                break
            except NodeError:
                time.sleep(0.001)
        assert paths.supervisor_lock.stat().st_nlink == 1
        claim.clear(keep_dram=False)
        claim.release()
        assert first.wait() == 0
