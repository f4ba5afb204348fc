"""Engines' page segments: they last as long as the process that made them, and no longer than the next look."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lmpipe.errors import SegmentError
from lmpipe.rundir import RunDir
from lmpipe.shm import life as module
from lmpipe.shm import pages as pages_module
from lmpipe.shm.descriptor import SegmentKind
from lmpipe.shm.pages import PageSegment, sweep
from lmpipe.shm.segment import Segment

HERE = Path(__file__).parent


@pytest.fixture
def directory(run_dir: Path) -> Path:
    """Two levels that are not there yet."""
    return RunDir(run_dir / "nodes" / "node").pages


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir()) if directory.exists() else []


def begin(spawn: Callable, directory: Path) -> tuple[subprocess.Popen[str], Path]:
    child = spawn("pages_life.py", directory)
    return child, Path(child.stdout.readline().strip())


def tell(child: subprocess.Popen[str], word: str) -> str:
    assert child.stdin and child.stdout
    child.stdin.write(f"{word}\n")
    child.stdin.flush()
    return child.stdout.readline().strip()


def test_a_segment_of_this_process(directory: Path) -> None:
    steps: list[tuple[int, int]] = []
    with PageSegment.create(directory, 1 << 20, progress=lambda *step: steps.append(step)) as pages:
        assert directory.name == "node.pages" and directory.stat().st_mode & 0o777 == 0o700
        assert directory.parent.stat().st_mode & 0o777 == 0o700
        assert names(directory) == [f"{pages.path.stem}.lock", f"{pages.path.stem}.pages"]
        assert len(pages.path.stem) == 16 and pages.path.stat().st_mode & 0o777 == 0o600
        assert steps[-1] == (1 << 20, 1 << 20) == (pages.segment.nbytes, pages.path.stat().st_size)
        with Segment.attach(pages.path, SegmentKind.PAGES, id=pages.id, readonly=True) as mapped:
            pages.segment.buf[-1] = 7
            assert mapped.buf[-1] == 7
        assert sweep(directory) == [] and pages.path.exists(), "never its own"
    pages.close()
    assert not directory.exists() and not module._own


def test_views_outlive_it(directory: Path) -> None:
    pages = PageSegment.create(directory, 1 << 16)
    view = memoryview(pages.segment.buf)[-10:]
    pages.close()
    view[:] = bytes(10)
    assert not directory.exists()


def test_a_living_engine_s_pages_are_never_swept(directory: Path, spawn: Callable) -> None:
    child, path = begin(spawn, directory)
    another = Path(tell(child, "another"))
    for stopped in (False, True):
        if stopped:
            child.send_signal(signal.SIGSTOP)
        assert sweep(directory) == [] and path.exists() and another.exists()
        with PageSegment.create(directory, 4096):
            assert len(names(directory)) == 6
    child.send_signal(signal.SIGCONT)
    assert tell(child, "close") == "done"
    assert names(directory) == [f"{another.stem}.lock", f"{another.stem}.pages"]


def test_a_killed_engine_s_pages_go_when_the_next_are_made(directory: Path, spawn: Callable) -> None:
    child, path = begin(spawn, directory)
    child.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert path.exists()
    with PageSegment.create(directory, 4096) as pages:
        assert names(directory) == [f"{pages.path.stem}.lock", f"{pages.path.stem}.pages"]


def test_a_sweep_removes_what_the_dead_left_and_says_what(directory: Path, spawn: Callable) -> None:
    child, path = begin(spawn, directory)
    child.kill()
    child.wait()
    (directory / "notes.pages").touch()
    (directory / f"{'x' * 16}.pages").touch()
    assert sweep(directory) == [path]
    assert names(directory) == ["notes.pages", f"{'x' * 16}.pages"], "strangers stay"
    assert sweep(directory) == []


def test_an_orphaned_file_is_swept(directory: Path) -> None:
    directory.mkdir(parents=True, mode=0o700)
    orphan = directory / f"{9:016x}.pages"
    orphan.touch()
    assert sweep(directory) == [orphan] and not directory.exists()
    assert sweep(directory) == []


def test_a_forked_child_does_not_end_it(directory: Path, spawn: Callable) -> None:
    child, path = begin(spawn, directory)
    assert tell(child, "fork") == "0", "swept nothing, closed its copy, ended"
    assert path.exists() and sweep(directory) == []
    assert tell(child, "close") == "done" and not directory.exists()


def test_a_directory_that_goes_while_it_is_used_is_made_again(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others remove it when they find it empty."""
    make, left = pages_module._make_private, [3]

    def make_and_lose(path: Path) -> None:
        make(path)
        left[0] -= 1
        if left[0] > 0:
            path.rmdir()

    monkeypatch.setattr(pages_module, "_make_private", make_and_lose)
    with PageSegment.create(directory, 4096) as pages:
        assert pages.path.exists() and left == [0]
    left[0] = 99
    with pytest.raises(SegmentError, match="removed each time"):
        PageSegment.create(directory, 4096)


def test_a_directory_that_is_not_private_is_refused(directory: Path) -> None:
    directory.mkdir(parents=True)
    directory.chmod(0o755)
    (directory / "something").touch()
    with pytest.raises(SegmentError, match="open to others"):
        PageSegment.create(directory, 4096)
    assert names(directory) == ["something"] and not module._own
    shutil.rmtree(directory)
    directory.touch()
    with pytest.raises(SegmentError, match=r"node\.pages"):
        PageSegment.create(directory, 4096)
    directory.unlink()


def test_without_room_nothing_is_left(directory: Path, tmp_path: Path) -> None:
    with pytest.raises(SegmentError, match="bytes are wanted"):
        PageSegment.create(directory, 1 << 50)
    assert not directory.exists() and not module._own
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("no mount namespace to be had: `unshare -m` is not permitted")
    mount = (
        f"mount -t tmpfs -o size=2m,mode=700 none {tmp_path} && exec {sys.executable} {HERE}/full_pages.py {tmp_path}"
    )
    done = subprocess.run(["unshare", "-m", "sh", "-c", mount], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "ok\n"), done.stderr
