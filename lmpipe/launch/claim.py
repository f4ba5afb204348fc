"""The exclusive right to a run directory, one supervisor at a time, and to a role in it, one worker for each process;
and a tidy start after a supervisor that was killed.

Both are POSIX record locks, dropped by the kernel with their owner: they need no time-out and no pid to be believed.
Who owns one must not open its file a second time: closing that would drop the lock.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
import struct
import time
from pathlib import Path

import msgspec

from lmpipe.errors import NodeError
from lmpipe.rundir import RunDir, default_parent, session_mark, write_atomically
from lmpipe.shm.pages import sweep as sweep_pages
from lmpipe.shm.session import SessionDir

MAKE_ATTEMPTS = 100
ROLE_STEP_S = 0.01
_FLOCK = struct.Struct("hhqqi4x")  # Linux, 64 bits: type, whence, start, length, pid


class WorkerNote(msgspec.Struct, frozen=True):
    """`up/<process>.json`, written by a worker: who it is. `state`: starting or ready."""

    pid: int
    session: int
    state: str

    @classmethod
    def read(cls, path: Path) -> WorkerNote | None:
        """The note, or None when there is none or it makes no sense."""
        try:
            return msgspec.json.decode(path.read_bytes(), type=cls)
        except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return None

    def write(self, path: Path) -> None:
        """Puts the note in place atomically."""
        write_atomically(path, msgspec.json.encode(self))


def lock_holder(path: Path) -> int:
    """Pid of the process that holds the record lock on `path`; 0 when nobody does, -1 for one in another pid namespace.

    Must not be called by a process on a lock of its own: closing the file would drop it.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return 0
    try:
        asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        kind, _, _, _, pid = _FLOCK.unpack(fcntl.fcntl(descriptor, fcntl.F_GETLK, asked))
    finally:
        os.close(descriptor)
    return 0 if kind == fcntl.F_UNLCK else pid or -1


def take_role(paths: RunDir, process: str, wait_s: float = 0.0) -> int:
    """The lock that makes the caller this process of the node, until the descriptor is closed or it ends.

    Raises:
        NodeError: another one is that process, and still is after `wait_s`.
    """
    path, deadline_s = paths.role(process), time.monotonic() + wait_s
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    while True:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            if time.monotonic() >= deadline_s:
                os.close(descriptor)
                raise NodeError(f"{process} runs already, pid {lock_holder(path)}") from None
            time.sleep(ROLE_STEP_S)
        else:
            return descriptor


def session_lock(paths: RunDir, session: int) -> Path:
    """The lock file of a session."""
    return paths.sessions / f"{session:016x}.lock"


def dead_counters(paths: RunDir) -> list[Path]:
    """Counter files whose process has no living session any more. Not for a process that has one.

    A worker's file is known by its pid; a producer's by its session, because the pid may be of another namespace.
    """
    holders = {session: lock_holder(session_lock(paths, session)) for session in SessionDir(paths.path).ids()}
    pids = {str(pid) for pid in holders.values() if pid}
    marks = {session_mark(session) for session, pid in holders.items() if pid}
    dead: list[Path] = []
    for path in paths.counters.glob("*.shm"):
        name, _, pid = path.stem.rpartition("-")
        if pid not in pids and name.rpartition(".")[2] not in marks:
            dead.append(path)
    return dead


class Claim:
    """A held run directory. Raises NodeError when somebody else has it, or when it is not safe to use."""

    def __init__(self, paths: RunDir, name: str) -> None:
        self.paths = paths
        _make_private(paths.path)
        self._lock_fd = _lock(paths, name)
        try:
            for directory in paths.directories:
                directory.mkdir(mode=0o700, exist_ok=True)
        except BaseException:
            os.close(self._lock_fd)
            raise

    def remove_leftovers(self) -> None:
        """Removes what the dead left; living producers and the arena stay. No worker may live."""
        paths = self.paths
        for path in (paths.node_json, paths.keep_dram, *paths.ups.glob("*.json"), *paths.sockets.iterdir()):
            path.unlink(missing_ok=True)
        for path in (*paths.path.glob("ring.*.shm"), *paths.logs.iterdir()):
            path.unlink()
        for directory in paths.index.iterdir():
            shutil.rmtree(directory, ignore_errors=True)
        SessionDir(paths.path).sweep()
        sweep_pages(paths.pages)
        for path in dead_counters(paths):
            path.unlink(missing_ok=True)

    def clear(self, *, keep_dram: bool) -> None:
        """Removes the content; `keep_dram` spares the arena, the node words and the sessions of living producers. The
        pages of living engines stay in any case.
        """
        paths = self.paths
        if keep_dram:
            self.remove_leftovers()
            return
        sweep_pages(paths.pages)
        for directory in paths.directories[:0:-1]:
            shutil.rmtree(directory, ignore_errors=True)
        for path in (paths.node_json, paths.keep_dram, paths.node_shm, paths.arena, *paths.path.glob("ring.*.shm")):
            path.unlink(missing_ok=True)

    def release(self) -> None:
        """Gives the directory up, and removes it when nothing is left in it."""
        # Name first, lock last: who waits at the old file finds it unlinked and looks again (`_lock`).
        self.paths.supervisor_lock.unlink(missing_ok=True)
        empty = [self.paths.path, default_parent()] if self.paths.path.parent == default_parent() else [self.paths.path]
        with contextlib.suppress(OSError):
            for path in empty:
                path.rmdir()
        os.close(self._lock_fd)


def _make_private(path: Path) -> None:
    for _ in range(MAKE_ATTEMPTS):
        with contextlib.suppress(FileNotFoundError):  # gone between two steps: a former owner removes it
            status = _make(path)
            break
    else:
        raise NodeError(f"{path}: is removed each time it is made; choose another run_dir")
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
        raise NodeError(f"{path}: must be a directory of user {os.geteuid()} alone (mode 0700); remove it, or chmod it")


def _make(path: Path) -> os.stat_result:
    missing = [directory for directory in (path, *path.parents) if not directory.exists()]
    try:
        for directory in reversed(missing):
            directory.mkdir(mode=0o700, exist_ok=True)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise NodeError(f"{path}: {error.strerror}; choose another run_dir") from None
    return path.lstat()


def _lock(paths: RunDir, name: str) -> int:
    while True:
        path = paths.supervisor_lock
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:  # the directory went with the former owner
            _make_private(paths.path)
            continue
        except OSError as error:
            raise NodeError(f"{path}: {error.strerror}") from None
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
            pid = lock_holder(path)
            if pid:
                who = f"its supervisor has pid {pid}" if pid > 0 else "in another container"
                raise NodeError(f"{name} is running already: {who}; stop it with: lmpipe down {paths.path}") from None
            continue
        if os.fstat(descriptor).st_nlink:
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"{os.getpid()}\n".encode())
            return descriptor
        os.close(descriptor)
