"""Sessions: one life of a producer or worker, and how others know whether it still lives. Knows nothing of what a
session does.

A life is a POSIX record lock on the session's file. The kernel drops it when the process dies, however it dies, also
when nobody has reaped it yet; pids and start times are reused, hidden by pid namespaces, and make a zombie look
alive. What the lock's rules ask for:

* It belongs to the process, not to the descriptor: closing *any* descriptor of the file in the owning process drops
  it. So a process never opens the file of a session of its own; it knows those by heart (`_own`).
* F_GETLK does not show a process its own locks: the same list answers instead.
* It is not inherited by fork. A forked child is not the session, and every use in the child raises.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import struct
import threading
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path

from lmpipe.errors import ProtocolViolation, SegmentError
from lmpipe.handles import SessionId
from lmpipe.rundir import RunDir
from lmpipe.shm.descriptor import WORD_BYTES, SegmentKind, grants_offset
from lmpipe.shm.segment import Segment

ENTRIES = 16_384
"""Hold entries of a session unless it says otherwise: a 128K-token prompt of 256-token chunks takes 512."""

GRANTS = 1024
"""Grant words of a session unless it says otherwise: one for each save of mapped pages under way."""

_LOCK, _HOLDS = ".lock", ".holds"
_ATTEMPTS = 16

# struct flock of Linux on 64-bit machines: type, whence, start, length, pid.
_FLOCK = struct.Struct("hhqqi4x")
_WHOLE_FILE = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)

_own: dict[SessionId, int] = {}
"""Sessions of this process, and the pid they were made under: a forked child inherits the list but not the locks."""
_own_lock = threading.Lock()


def _is_own(session: SessionId) -> bool:
    return _own.get(session) == os.getpid()


class Session:
    """A session of this process. Lives until `close`, or as long as the process."""

    def __init__(self, session: SessionId, lock_path: Path, descriptor: int, segment: Segment) -> None:
        """Use `create`."""
        self._id = session
        self._pid = os.getpid()
        self._lock_path = lock_path
        self._descriptor = descriptor
        self._segment = segment

    @classmethod
    def create(cls, run_dir: str | PathLike[str], *, entries: int = ENTRIES, grants: int = GRANTS) -> Session:
        """Begin a session in the node of `run_dir`, whose `sessions` directory is there already.

        Raises:
            SegmentError: there is no node, or no room for the hold segment.
        """
        directory = RunDir(Path(run_dir)).sessions
        session, lock_path, descriptor = _lock_new_file(directory)
        try:
            # After the lock: a hold file without a locked session file is a dead session's.
            nbytes = grants_offset(entries) + grants * WORD_BYTES
            holds = lock_path.with_suffix(_HOLDS)
            segment = Segment.create(holds, SegmentKind.HOLDS, nbytes, count=entries, grants=grants)
        except BaseException:
            _end(session, lock_path, descriptor)
            raise
        return cls(session, lock_path, descriptor, segment)

    @property
    def id(self) -> SessionId:
        """The session's number.

        Raises:
            ProtocolViolation: this process was forked from the one whose session it is.
        """
        self.check()
        return self._id

    @property
    def segment(self) -> Segment:
        """The session's HOLDS segment; raises as `id` does."""
        self.check()
        return self._segment

    def check(self) -> None:
        """Raise `ProtocolViolation` in a forked child, whose use of the session nothing would guard."""
        if os.getpid() != self._pid:
            raise ProtocolViolation(
                f"session {self._id:016x} belongs to process {self._pid}; make one after fork, not before"
            )

    def close(self) -> None:
        """End the session and remove its files. In a forked child: let go of its copies, the session goes on."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor < 0:
            return
        self._segment.close()
        if os.getpid() != self._pid:
            os.close(descriptor)  # a child's locks are its own: this drops none of the parent's
            return
        self._segment.unlink()
        _end(self._id, self._lock_path, descriptor)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _lock_new_file(directory: Path) -> tuple[SessionId, Path, int]:
    """Make and lock a session file under a new random id."""
    for _ in range(_ATTEMPTS):
        session = SessionId(secrets.randbelow((1 << 63) - 1) + 1)
        path = directory / f"{session:016x}{_LOCK}"
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except FileExistsError:
            continue
        except OSError as error:
            raise SegmentError(f"{path}: {os.strerror(error.errno or 0)}; is the node up?") from error
        with _own_lock:
            _own[session] = os.getpid()  # before the lock: from here on nobody in this process opens the file
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Between open and lock the file looked like a dead session's. If a sweep was quicker, the name is gone and
            # the lock guards nothing.
            swept = os.fstat(descriptor).st_nlink == 0
        except BlockingIOError:
            swept = True
        except BaseException:
            _end(session, path, descriptor)
            raise
        if not swept:
            return session, path, descriptor
        _end(session, path, descriptor)
    raise SegmentError(f"{directory}: no session file could be made in {_ATTEMPTS} attempts")


def _end(session: SessionId, lock_path: Path, descriptor: int) -> None:
    """Name first, lock last: nobody sees the session dead under a name that still stands."""
    lock_path.unlink(missing_ok=True)
    os.close(descriptor)
    with _own_lock:
        _own.pop(session, None)


class SessionDir:
    """All sessions of a node, seen from any process."""

    def __init__(self, run_dir: str | PathLike[str]) -> None:
        self.path = RunDir(Path(run_dir)).sessions

    def ids(self) -> list[SessionId]:
        """Every session that has a file, alive or not, in no order."""
        return [session for session in self._files() if self._lock_path(session).exists()]

    def holds_path(self, session: SessionId) -> Path:
        """The session's HOLDS segment."""
        return self.path / f"{session:016x}{_HOLDS}"

    def with_holds(self) -> set[SessionId]:
        """Every session that has a HOLDS segment, alive or not."""
        return {session for session, suffix in self._entries() if suffix == _HOLDS}

    def alive(self, session: SessionId) -> bool:
        """Whether the session's process lives and has not ended it."""
        if _is_own(session):
            return True
        with self._open(session, os.O_RDONLY) as descriptor:
            if descriptor is None:
                return False
            kind, *_ = _FLOCK.unpack(fcntl.fcntl(descriptor, fcntl.F_GETLK, _WHOLE_FILE))
            return kind != fcntl.F_UNLCK

    def sweep(self) -> list[SessionId]:
        """Remove what dead sessions left behind and return their ids."""
        return [session for session in self._files() if not _is_own(session) and self._remove_if_dead(session)]

    def _remove_if_dead(self, session: SessionId) -> bool:
        with self._open(session, os.O_RDWR) as descriptor:
            if descriptor is not None:
                try:
                    # Held while the names go, so that a session that is being made under this name sees it
                    # (`st_nlink`).
                    fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except (BlockingIOError, PermissionError):
                    return False
            # A hold file alone: a sweep or a close was cut short. A living session's lock file is there before it.
            self.holds_path(session).unlink(missing_ok=True)
            self._lock_path(session).unlink(missing_ok=True)
        return True

    def _lock_path(self, session: SessionId) -> Path:
        return self.path / f"{session:016x}{_LOCK}"

    @contextmanager
    def _open(self, session: SessionId, flags: int) -> Generator[int | None]:
        """A descriptor of another process's session file; None when there is none."""
        try:
            descriptor = os.open(self._lock_path(session), flags | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            descriptor = None
        try:
            yield descriptor
        finally:
            if descriptor is not None:
                os.close(descriptor)

    def _files(self) -> set[SessionId]:
        return {session for session, _ in self._entries()}

    def _entries(self) -> Iterator[tuple[SessionId, str]]:
        try:
            with os.scandir(self.path) as entries:
                names = [entry.name for entry in entries]
        except FileNotFoundError:
            return
        for name in names:
            stem, dot, suffix = name.partition(".")
            if len(stem) == 16 and dot + suffix in (_LOCK, _HOLDS):
                yield SessionId(int(stem, 16)), dot + suffix
