"""Lives: a lock file each, by which other processes know whether somebody still lives, and what the dead leave behind.
Knows nothing of what a life is for.

A life is a POSIX record lock on its file. The kernel drops it when the process dies, however it dies, also when nobody
has reaped it yet; pids and start times are reused, hidden by pid namespaces, and make a zombie look alive. What the
lock's rules ask for:

* It belongs to the process, not to the descriptor: closing *any* descriptor of the file in the owning process drops
  it. So a process never opens the file of a life of its own; it knows those by heart (`_own`).
* F_GETLK does not show a process its own locks: the same list answers instead.
* It is not inherited by fork. A forked child is not the life, and must not end it.

Beside `<id>.lock` stands what belongs to the life, `<id><suffix>`: made after the lock, removed before it.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import struct
import threading
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path

from lmpipe.errors import SegmentError

_LOCK = ".lock"
_DIGITS = 16
_ID = re.compile(f"[0-9a-f]{{{_DIGITS}}}")
_ATTEMPTS = 16

# struct flock of Linux on 64-bit machines: type, whence, start, length, pid.
_FLOCK = struct.Struct("hhqqi4x")
_WHOLE_FILE = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)

_own: dict[int, int] = {}
"""Lives of this process, and the pid they were begun under: a forked child inherits the list but not the locks."""
_own_lock = threading.Lock()


def _is_own(number: int) -> bool:
    return _own.get(number) == os.getpid()


class Life:
    """A life of this process. Lasts until `end`, or as long as the process."""

    def __init__(self, number: int, lock_path: Path, descriptor: int) -> None:
        """Use `begin`."""
        self.number = number
        """Random, in [1, 2**63)."""
        self.pid = os.getpid()
        """Whose life it is."""
        self._lock_path = lock_path
        self._descriptor = descriptor

    @classmethod
    def begin(cls, directory: Path) -> Life:
        """Make and lock a file under a new random id.

        Raises:
            OSError: the directory is not there, or cannot be written.
            SegmentError: a sweep was quicker, time and again.
        """
        for _ in range(_ATTEMPTS):
            number = secrets.randbelow((1 << 63) - 1) + 1
            path = directory / f"{number:0{_DIGITS}x}{_LOCK}"
            try:
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            except FileExistsError:
                continue
            with _own_lock:
                _own[number] = os.getpid()  # before the lock: from here on nobody in this process opens the file
            life = cls(number, path, descriptor)
            try:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Between open and lock the file looked like a dead one's. If a sweep was quicker, the name is gone and
                # the lock guards nothing.
                swept = os.fstat(descriptor).st_nlink == 0
            except BlockingIOError:
                swept = True
            except BaseException:
                life.end()
                raise
            if not swept:
                return life
            life.end()
        raise SegmentError(f"{directory}: no lock file could be made in {_ATTEMPTS} attempts")

    @property
    def owned(self) -> bool:
        """Whether it is this process's: not in a forked child."""
        return os.getpid() == self.pid

    def file(self, suffix: str) -> Path:
        """A file that belongs to this life."""
        return self._lock_path.with_suffix(suffix)

    def end(self) -> None:
        """Remove the lock file; harmless when done twice. In a forked child: let go of its copy, the life goes on."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor < 0:
            return
        if not self.owned:
            os.close(descriptor)  # a child's locks are its own: this drops none of the parent's
            return
        # Name first, lock last: nobody sees the life ended under a name that still stands.
        self._lock_path.unlink(missing_ok=True)
        os.close(descriptor)
        with _own_lock:
            _own.pop(self.number, None)


class Lives:
    """All lives of a directory, seen from any process. `suffix` is that of the file that belongs to each."""

    def __init__(self, directory: Path, suffix: str) -> None:
        self.directory, self.suffix = directory, suffix

    def ids(self) -> list[int]:
        """Every life that has a lock file, ended or not, in no order."""
        return [number for number in self._numbers() if self._lock_path(number).exists()]

    def file(self, number: int) -> Path:
        """The file that belongs to a life."""
        return self.directory / f"{number:0{_DIGITS}x}{self.suffix}"

    def with_file(self) -> set[int]:
        """Every life whose file is there, ended or not."""
        return {number for number, suffix in self._entries() if suffix == self.suffix}

    def alive(self, number: int) -> bool:
        """Whether the life's process lives and has not ended it."""
        if _is_own(number):
            return True
        with self._open(number, os.O_RDONLY) as descriptor:
            if descriptor is None:
                return False
            kind, *_ = _FLOCK.unpack(fcntl.fcntl(descriptor, fcntl.F_GETLK, _WHOLE_FILE))
            return kind != fcntl.F_UNLCK

    def sweep(self) -> list[int]:
        """Remove what ended lives left behind and return their ids."""
        return [number for number in self._numbers() if not _is_own(number) and self._remove_if_ended(number)]

    def _remove_if_ended(self, number: int) -> bool:
        with self._open(number, os.O_RDWR) as descriptor:
            if descriptor is not None:
                try:
                    # Held while the names go, so that a life that is being begun under this name sees it (`st_nlink`).
                    fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except (BlockingIOError, PermissionError):
                    return False
            # A file alone: a sweep or a close was cut short. A living one's lock file is there before it.
            self.file(number).unlink(missing_ok=True)
            self._lock_path(number).unlink(missing_ok=True)
        return True

    def _lock_path(self, number: int) -> Path:
        return self.directory / f"{number:0{_DIGITS}x}{_LOCK}"

    @contextmanager
    def _open(self, number: int, flags: int) -> Generator[int | None]:
        """A descriptor of another process's lock file; None when there is none."""
        try:
            descriptor = os.open(self._lock_path(number), flags | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            descriptor = None
        try:
            yield descriptor
        finally:
            if descriptor is not None:
                os.close(descriptor)

    def _numbers(self) -> set[int]:
        return {number for number, _ in self._entries()}

    def _entries(self) -> Iterator[tuple[int, str]]:
        try:
            with os.scandir(self.directory) as entries:
                names = [entry.name for entry in entries]
        except FileNotFoundError:
            return
        for name in names:
            stem, dot, suffix = name.partition(".")
            if _ID.fullmatch(stem) and dot + suffix in (_LOCK, self.suffix):
                yield int(stem, 16), dot + suffix
