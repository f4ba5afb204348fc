"""Who lives: locks under SIGKILL, SIGSTOP, zombies, fork, and two sweeps at once."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from lmpipe.errors import SegmentError
from lmpipe.handles import SessionId
from lmpipe.shm import life as module
from lmpipe.shm.session import Session, SessionDir


def tell(child: subprocess.Popen[str], word: str) -> str:
    assert child.stdin and child.stdout
    child.stdin.write(f"{word}\n")
    child.stdin.flush()
    return child.stdout.readline().strip()


def begin(spawn: Callable, run_dir: Path) -> tuple[subprocess.Popen[str], SessionId]:
    child = spawn("session_life.py", run_dir)
    return child, SessionId(int(child.stdout.readline()))


def files(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "sessions").iterdir())


def test_a_session_of_this_process(run_dir: Path) -> None:
    sessions = SessionDir(run_dir)
    with Session.create(run_dir, entries=4, grants=2) as session:
        assert 0 < session.id < 1 << 63 and sessions.alive(session.id) and sessions.ids() == [session.id]
        assert files(run_dir) == [f"{session.id:016x}.holds", f"{session.id:016x}.lock"]
        assert sessions.with_holds() == {session.id} and sessions.holds_path(session.id) == session.segment.path
        assert sessions.sweep() == [] and (session.segment.count, session.segment.grants) == (4, 2)
        number = session.id
    session.close()
    assert not sessions.alive(number) and files(run_dir) == [] and not sessions.alive(SessionId(5))


def test_others_see_it_live_and_end(run_dir: Path, spawn: Callable) -> None:
    sessions = SessionDir(run_dir)
    child, number = begin(spawn, run_dir)
    assert sessions.alive(number) and sessions.ids() == [number]
    # The owner looks at its own session; opening and closing the file there would drop the lock.
    assert tell(child, "look") == "done" and sessions.alive(number)
    child.send_signal(signal.SIGSTOP)
    assert sessions.alive(number) and sessions.sweep() == []
    child.send_signal(signal.SIGCONT)
    assert tell(child, "close") == "done"
    assert not sessions.alive(number) and files(run_dir) == []


def test_a_killed_process_is_dead_before_it_is_reaped(run_dir: Path, spawn: Callable) -> None:
    sessions = SessionDir(run_dir)
    child, number = begin(spawn, run_dir)
    child.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert "Z (zombie)" in Path(f"/proc/{child.pid}/status").read_text()
    assert not sessions.alive(number)
    assert len(files(run_dir)) == 2 and sessions.ids() == [number]
    assert sessions.sweep() == [number] and files(run_dir) == [] and sessions.sweep() == []


def test_a_forked_child_is_not_the_session(run_dir: Path, spawn: Callable) -> None:
    child, number = begin(spawn, run_dir)
    assert tell(child, "fork") == "4 True"
    assert SessionDir(run_dir).alive(number) and tell(child, "look") == "done"


def test_an_orphaned_hold_file_is_swept(run_dir: Path) -> None:
    (run_dir / "sessions" / f"{9:016x}.holds").touch()
    (run_dir / "sessions" / "notes.txt").touch()
    sessions = SessionDir(run_dir)
    assert sessions.ids() == [] and sessions.sweep() == [SessionId(9)] and files(run_dir) == ["notes.txt"]


def test_a_sweep_between_open_and_lock_is_noticed(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is nobody's for a moment. Whoever made it must not take a lock on a file that is gone."""
    swept: list[str] = []
    lock = fcntl.lockf

    def lock_late(descriptor: int, operation: int) -> None:
        if len(swept) < 2:
            path = Path(f"/proc/self/fd/{descriptor}").readlink()
            path.unlink()
            swept.append(path.name)
        lock(descriptor, operation)

    monkeypatch.setattr(module.fcntl, "lockf", lock_late)
    with Session.create(run_dir) as session:
        assert len(swept) == 2 and f"{session.id:016x}" not in "".join(swept)
        assert len(files(run_dir)) == 2 and len(module._own) == 1
    assert not module._own


def test_a_lock_that_a_sweep_holds_is_noticed(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lock_late(descriptor: int, operation: int) -> None:
        raise BlockingIOError

    monkeypatch.setattr(module.fcntl, "lockf", lock_late)
    with pytest.raises(SegmentError, match="in 16 attempts"):
        Session.create(run_dir)
    assert files(run_dir) == [] and not module._own


def test_without_a_node_there_is_no_session(run_dir: Path) -> None:
    absent = run_dir / "absent"
    with pytest.raises(SegmentError, match="is the node up"):
        Session.create(absent)
    sessions = SessionDir(absent)
    assert sessions.ids() == [] and sessions.sweep() == [] and not sessions.alive(SessionId(1))


def test_without_room_nothing_is_left(run_dir: Path) -> None:
    with pytest.raises(SegmentError, match="bytes are wanted"):
        Session.create(run_dir, entries=1 << 45)
    assert files(run_dir) == [] and not module._own
    (run_dir / "sessions").chmod(0o755)
    with pytest.raises(SegmentError, match="open to others"):
        Session.create(run_dir)
    assert files(run_dir) == [] and not module._own
