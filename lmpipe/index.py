"""The index: which chunks a tier holds, in LMDB environments that every engine process maps.

One environment per tier and generation, `index/<tier>-<generation>/` in the run directory (tmpfs), written by the
tier's owner alone:

      data.mdb   anchor ‖ key (20 B)  ->  chunk records (72 B each) of the shards that are there, sorted by shard
      lock.mdb   reader table

A writer always begins a new generation: it builds the rows aside, then switches the tier's generation word in the node
segment; readers see the word at their next lookup. Nothing is truncated or resized, because a reader has it mapped, and
all space is taken when the files are made: a sparse file on a full tmpfs would be SIGBUS in the engine. A lookup takes
no lock that a writer holds.

LMDB's reader table names readers by pid, so who lives in another pid namespace, or has another LMDB, must not map the
index (`reader_identity`); it asks gather instead.

Owns everything LMDB; a row's bytes are index_row.py's. Does not know what a place in a record means, nor when a row
should go.
"""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import lmdb
import numpy as np

from lmpipe import failpoints
from lmpipe.errors import SegmentError
from lmpipe.handles import ChunkRecords, Tier, round_up
from lmpipe.index_row import RECORD_BYTES, index_keys, merge_shard, rows_only
from lmpipe.rundir import RunDir
from lmpipe.shm.node import NodeWords

BATCH_KEYS = 64
MAX_READERS = 1024
_FEW_KEYS = 4
_LOOKS = 8
_RESERVE_PART = 16
"""One page in this many is kept back from `put`: LMDB copies pages before changing them, so deletes need some too."""


def reader_identity() -> str:
    """What all who map an index must have in common; for people to read, and to compare."""
    version = ".".join(map(str, lmdb.version()))
    return f"LMDB {version}, pid namespace {Path('/proc/self/ns/pid').stat().st_ino}"


def may_map(identity: str) -> bool:
    """Whether this process may map the index of those who have that `reader_identity`; empty: not known."""
    return identity in ("", reader_identity())


def _directory(run_dir: Path, tier: Tier, generation: int) -> Path:
    return RunDir(run_dir).index / f"{tier.value}-{generation}"


class _Opened:
    """This process's one environment for a directory: LMDB's locks are the process's, a second one would drop them."""

    __slots__ = ("_environment", "_name", "_users")
    _kept: ClassVar[list[lmdb.Environment]] = []
    _all: ClassVar[dict[tuple[Path, int], _Opened]] = {}
    """By path and inode: after `down` and `up` another directory may have the name of one that is still mapped."""
    _lock: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, name: tuple[Path, int], environment: lmdb.Environment) -> None:
        self._name = name
        self._environment: lmdb.Environment | None = environment
        self._users = 0

    @classmethod
    def acquire(cls, directory: Path, make: Callable[[], lmdb.Environment]) -> _Opened:
        """The environment of a directory that exists, shared by all writers and readers of this process."""
        name = directory, directory.stat().st_ino
        with cls._lock:
            opened = cls._all.get(name)
            if opened is None:
                opened = cls._all[name] = cls(name, make())
            opened._users += 1
            return opened

    def release(self) -> None:
        """One user less; the last one closes it."""
        with self._lock:
            self._users -= 1
            if not self._users and self._environment is not None:
                del self._all[self._name]
                self._environment.close()
                self._environment = None

    @property
    def usable(self) -> bool:
        """Whether `environment` would give one: not after a fork."""
        return self._environment is not None

    @property
    def environment(self) -> lmdb.Environment:
        """The LMDB environment.

        Raises:
            SegmentError: opened before a fork, by the parent.
        """
        if self._environment is None:
            raise SegmentError(f"{self._name[0]} was opened by another process, before a fork")
        return self._environment

    @classmethod
    def forget_all(cls) -> None:
        """After a fork, in the child, which opens its own.

        What is closed or freed here clears the parent's slots in the shared reader table. A reader of the parent then
        misses once and opens again. For a writer that would be fatal, so its environment is kept, and the child, which
        LMDB does not let open it a second time, misses: workers do not fork.
        """
        cls._lock = threading.Lock()
        for opened in cls._all.values():
            if opened._environment is not None and not opened._environment.flags()["readonly"]:
                cls._kept.append(opened._environment)
            opened._environment = None
        cls._all.clear()


os.register_at_fork(after_in_child=_Opened.forget_all)


class IndexWriter:
    """The rows of one tier, as its owner changes them. Threads of one process may share it.

    The generation under construction is invisible until `publish`.

    Raises:
        SegmentError: the file system of the run directory has no room for the map.
    """

    def __init__(
        self, run_dir: Path, tier: Tier, map_bytes: int, node: NodeWords, *, max_readers: int = MAX_READERS
    ) -> None:
        self.tier = tier
        self.generation = node.index_generation(tier) + 1
        self._run_dir = run_dir
        self._node = node
        self._lock = threading.RLock()
        self._map_bytes = round_up(map_bytes)
        self._owed: set[bytes] = set()
        self._directory = _directory(run_dir, tier, self.generation)
        if self._directory.exists():  # left by a writer that died before it published
            shutil.rmtree(self._directory)
        self._directory.mkdir(parents=True, mode=0o700)
        self._opened: _Opened | None = _Opened.acquire(self._directory, lambda: self._create(max_readers))

    def _create(self, max_readers: int) -> lmdb.Environment:
        lock_bytes = round_up(256 + 64 * max_readers)
        files = os.statvfs(self._directory)
        free = files.f_bavail * files.f_frsize
        try:
            if free < self._map_bytes + lock_bytes:
                raise OSError(f"only {free} bytes free")
            # The reader table is written through a mapping, by engines too, so its space is taken before LMDB opens it.
            # Not after: closing any descriptor of a file drops this process's POSIX locks on it.
            _allocate(self._directory / "lock.mdb", lock_bytes, os.O_CREAT | os.O_EXCL)
            environment = lmdb.open(
                str(self._directory),
                map_size=self._map_bytes,
                sync=False,
                metasync=False,
                writemap=False,
                readahead=False,
                mode=0o600,
                max_readers=max_readers,
                max_spare_txns=4,
            )
            _allocate(self._directory / "data.mdb", self._map_bytes, 0)
        except (OSError, lmdb.Error) as error:
            shutil.rmtree(self._directory, ignore_errors=True)
            raise SegmentError(
                f"no room for the {self.tier.value} index: {self._map_bytes + lock_bytes} bytes wanted in"
                f" {self._run_dir} ({error}); give the file system more room or lower index.map_bytes"
            ) from error
        return environment

    @property
    def environment(self) -> lmdb.Environment:
        """The LMDB environment.

        Raises:
            SegmentError: the writer is closed, or belongs to the parent of a forked process.
        """
        if self._opened is None:
            raise SegmentError(f"the {self.tier.value} index is closed")
        return self._opened.environment

    def put(self, rows: Sequence[tuple[bytes, bytes]]) -> bool:
        """Store rows (index key, value) in one transaction. False: the map is full and nothing was stored."""
        with self._lock:
            if not self._has_room():
                return False
            try:
                with self.environment.begin(write=True) as transaction, transaction.cursor() as cursor:
                    cursor.putmulti(rows)
                    failpoints.hit("index.put.written")
            except lmdb.MapFullError:
                return False
            self._owed.difference_update(key for key, _ in rows)
            return True

    def delete(self, keys: Sequence[bytes]) -> int:
        """Delete rows; the number that were there.

        One transaction, unless the map is so full that there is no room for the pages it would change: then several.
        When not even those succeed (a stopped reader pins all old pages), `tick` tries again. Till then readers may
        find the rows, whose places no longer hold the chunk: the reader's own check makes that a miss.
        """
        with self._lock:
            try:
                with self.environment.begin(write=True) as transaction:
                    removed = sum(map(transaction.delete, keys))
                    failpoints.hit("index.delete.written")
                    return removed
            except lmdb.MapFullError:
                if len(keys) > _FEW_KEYS:
                    half = len(keys) // 2
                    return self.delete(keys[:half]) + self.delete(keys[half:])
                self._owed.update(keys)
                return sum(self.get(key) is not None for key in keys)

    def get(self, key: bytes) -> bytes | None:
        """A row's value."""
        with self.environment.begin() as transaction:
            return transaction.get(key)

    def put_records(self, records: ChunkRecords) -> bool:
        """Merge records into their rows, in one transaction. False: the map is full and nothing was stored."""
        with self._lock:
            fresh: dict[bytes, bytes] = {}
            raw = np.ascontiguousarray(records).tobytes()
            for place, key in enumerate(index_keys(records)):
                old = fresh.get(key) or (None if key in self._owed else self.get(key))
                fresh[key] = merge_shard(old, raw[place * RECORD_BYTES : (place + 1) * RECORD_BYTES])
            return self.put(sorted(fresh.items()))

    def scan(self, batch: int = 8192) -> Iterator[list[tuple[bytes, bytes]]]:
        """All rows in key order, in batches; each is a snapshot of its own, so that no old pages stay pinned."""
        last = b""
        while True:
            with self.environment.begin() as transaction, transaction.cursor() as cursor:
                found: list[tuple[bytes, bytes]] = []
                if cursor.set_range(last + b"\0") if last else cursor.first():
                    for item in cursor.iternext():
                        found.append(item)
                        if len(found) == batch:
                            break
            if not found:
                return
            last = found[-1][0]
            yield found

    def count(self) -> int:
        """Number of rows."""
        return self.environment.stat()["entries"]

    def publish(self) -> None:
        """Make this generation the one that readers use, and unlink the others. Idempotent."""
        with self._lock:
            failpoints.hit("index.publish.built")
            self._node.set_index_generation(self.tier, self.generation)
            failpoints.hit("index.publish.switched")
            for other in RunDir(self._run_dir).index.glob(f"{self.tier.value}-*"):
                if other != self._directory:
                    shutil.rmtree(other, ignore_errors=True)

    def tick(self) -> int:
        """To be called every second: frees reader slots of dead processes, pays owed deletes; the slots freed."""
        with self._lock:
            stale = self.environment.reader_check()
            if self._owed:
                owed, self._owed = list(self._owed), set()
                self.delete(owed)
            return stale

    def close(self) -> None:
        """Release the environment; its files stay for the readers. Idempotent."""
        with self._lock:
            if self._opened is not None:
                self._opened.release()
                self._opened = None

    def _has_room(self) -> bool:
        page_bytes = self.environment.stat()["psize"]
        reserve = max(self._map_bytes // _RESERVE_PART, 32 * page_bytes)
        return _live_bytes(self.environment) + reserve < self._map_bytes


class IndexReader:
    """Lookups in one tier's index, from any process. Never raises for a broken or absent index: that is a miss."""

    def __init__(self, run_dir: Path, tier: Tier, map_bytes: int, node: NodeWords) -> None:
        self.tier = tier
        self.errors = 0
        """Lookups that ended as a miss because of an error."""
        self._run_dir = run_dir
        self._map_bytes = round_up(map_bytes)
        self._node = node
        self._opened: _Opened | None = None
        self._generation = 0

    def run(self, keys: Sequence[bytes], start: int = 0) -> list[bytes]:
        """Values of `keys[start:]` up to the first miss: chunk records of the shards that are there (`is_complete`).

        A row that is none, because memory was damaged, is a miss too.
        """
        found: list[bytes] = []
        try:
            environment = self._current()
            if environment is None:
                return found
            with environment.begin() as transaction:
                get = transaction.get
                for at in range(start, len(keys), BATCH_KEYS):
                    for value in map(get, keys[at : at + BATCH_KEYS]):
                        if value is None:
                            return rows_only(found)
                        found.append(value)
        except (lmdb.Error, OSError):
            self.errors += 1
            self.close()
            return []
        return rows_only(found)

    def rows(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """The value of each key; None: there is none, or it could not be read."""
        try:
            environment = self._current()
            if environment is not None:
                with environment.begin() as transaction:
                    found = list(map(transaction.get, keys))
                return [value if value and len(value) % RECORD_BYTES == 0 else None for value in found]
        except (lmdb.Error, OSError):
            self.errors += 1
            self.close()
        return [None] * len(keys)

    def usage(self) -> tuple[int, float] | None:
        """Rows, and the part of the map that they take; None: it cannot be read, or there is none yet."""
        try:
            environment = self._current()
            if environment is None:
                return None
            return environment.stat()["entries"], _live_bytes(environment) / self._map_bytes
        except (lmdb.Error, OSError):
            self.errors += 1
            self.close()
            return None

    def trouble(self) -> str:
        """Why the index cannot be mapped here, though it is there; empty: it can, or there is none yet."""
        for _ in range(_LOOKS):
            generation = self._node.index_generation(self.tier)
            try:
                self._current()
            except FileNotFoundError:
                return ""  # of a former life: its writer is about to begin another
            except (lmdb.Error, OSError) as error:
                if generation == self._node.index_generation(self.tier):  # else it was replaced in this moment
                    return str(error)
            else:
                break
        return ""

    def close(self) -> None:
        """Release the environment; the next lookup opens it again. Idempotent."""
        if self._opened is not None:
            self._opened.release()
            self._opened = None

    def _current(self) -> lmdb.Environment | None:
        """The environment of the published generation, None before there is one."""
        generation = self._node.index_generation(self.tier)
        if generation != self._generation or self._opened is None or not self._opened.usable:
            self.close()
            if not generation:
                return None
            directory = _directory(self._run_dir, self.tier, generation)
            self._opened = _Opened.acquire(directory, lambda: self._open(directory))
            self._generation = generation
        return self._opened.environment

    def _open(self, directory: Path) -> lmdb.Environment:
        if os.statvfs(directory).f_flag & os.ST_RDONLY:
            # LMDB would go without its reader table there, and pages be used again while they are read.
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(directory))
        return lmdb.open(
            str(directory),
            map_size=self._map_bytes,
            readonly=True,
            create=False,
            lock=True,
            readahead=False,
            max_spare_txns=4,
        )


def _live_bytes(environment: lmdb.Environment) -> int:
    """What the rows take, without the pages that wait to be used again."""
    stat = environment.stat()
    return stat["psize"] * (stat["branch_pages"] + stat["leaf_pages"] + stat["overflow_pages"])


def _allocate(path: Path, nbytes: int, flags: int) -> None:
    """Make a file `nbytes` long with every block of it taken."""
    descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | flags, 0o600)
    try:
        os.posix_fallocate(descriptor, 0, nbytes)
    finally:
        os.close(descriptor)
