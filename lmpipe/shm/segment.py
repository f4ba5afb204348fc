"""Shared-memory segments: files on tmpfs that are made once, checked on every attach, and mapped. Only importer of
`mmap`.

What can go wrong with shared memory goes wrong here, as a `SegmentError` that says what to mend, and never later, as
a signal:

* A sparse file on a tmpfs that is full kills whoever touches the next page with SIGBUS, and that may be the engine.
  So every byte is taken with `fallocate` before it is mapped by anyone, and no segment is ever resized.
* A file shorter than its header says would be SIGBUS as well: attach compares the two before it maps.
* A file of another user, a symbolic link or a pipe put where a segment is expected is refused before a byte of it is
  read.

Knows nothing of what a segment holds beyond its first page.
"""

from __future__ import annotations

import errno
import mmap
import os
import secrets
import stat
from collections.abc import Callable
from pathlib import Path

from lmpipe.errors import SegmentError
from lmpipe.handles import round_up
from lmpipe.native import Region, Words, populate
from lmpipe.shm.descriptor import (
    H_READY,
    HEADER,
    HEADER_BYTES,
    MAGIC,
    SEGMENT_VERSION,
    WORD_BYTES,
    SegmentKind,
)

STEP_BYTES = 64 << 20
"""Space is taken and faulted in step by step, so that progress and signals come through in between."""

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""

_MEND = (
    "Give the mount more room (`mount -o remount,size=... /dev/shm`, `docker run --shm-size=...`),"
    " or ask for less in the topology."
)


class Segment:
    """A mapped segment. Closing one that has views in use leaves the mapping to the last of them; it never raises."""

    def __init__(
        self, path: Path, kind: SegmentKind, mapping: mmap.mmap, *, readonly: bool, inode: tuple[int, int]
    ) -> None:
        """Use `create` or `attach`; the header in `mapping` has been written or checked."""
        self.path = path
        self.kind = kind
        self.readonly = readonly
        self.nbytes = len(mapping)
        self.buf = memoryview(mapping)
        """The whole segment, header included."""
        fields = HEADER.unpack_from(self.buf)
        self.id: bytes = fields[3]
        self.count: int = fields[6]
        """Slots, hold entries or counters."""
        self.grants: int = fields[7]
        self.json = bytes(self.buf[HEADER_BYTES : HEADER_BYTES + fields[8]])
        self._mapping: mmap.mmap | None = mapping
        self._region: Region | None = None
        self._inode = inode

    @classmethod
    def create(
        cls,
        path: Path,
        kind: SegmentKind,
        nbytes: int,
        *,
        count: int = 0,
        grants: int = 0,
        json: bytes = b"",
        progress: Progress | None = None,
        prefault: bool = True,
    ) -> Segment:
        """Make a segment of `nbytes`, header included, rounded up to pages and zeroed behind the header.

        Nobody can attach before it is complete: the ready word is written last.

        Raises:
            SegmentError: the file exists, the directory is not private, or there is no room.
        """
        nbytes = round_up(max(nbytes, HEADER_BYTES + len(json)))
        directory = _open_private(path.parent)
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            try:
                descriptor = os.open(path.name, flags, 0o600, dir_fd=directory)
            except FileExistsError:
                raise SegmentError(f"{path}: exists already; attach to it, or remove it if nothing uses it") from None
            except OSError as error:
                raise SegmentError(f"{path}: {os.strerror(error.errno or 0)}") from error
            try:
                segment = _format(path, kind, descriptor, nbytes, (count, grants, json), progress, prefault=prefault)
            except BaseException:
                os.unlink(path.name, dir_fd=directory)
                raise
            finally:
                os.close(descriptor)
        finally:
            os.close(directory)
        return segment

    @classmethod
    def attach(cls, path: Path, kind: SegmentKind, *, id: bytes | None = None, readonly: bool = False) -> Segment:
        """Map a segment that somebody made. `id`: which one it has to be.

        Raises:
            SegmentError: it is absent or not what was asked for; the text names which.
        """
        flags = (os.O_RDONLY if readonly else os.O_RDWR) | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        try:
            descriptor = os.open(path, flags)
        except FileNotFoundError:
            raise SegmentError(f"{path}: there is no such segment; is the node up?") from None
        except OSError as error:
            problem = "is a symbolic link" if error.errno == errno.ELOOP else os.strerror(error.errno or 0)
            raise SegmentError(f"{path}: {problem}") from error
        try:
            status = os.fstat(descriptor)
            _check(path, descriptor, status, kind, id)
            protection = mmap.PROT_READ if readonly else mmap.PROT_READ | mmap.PROT_WRITE
            mapping = _map(path, descriptor, status.st_size, protection)
            return cls(path, kind, mapping, readonly=readonly, inode=(status.st_dev, status.st_ino))
        finally:
            os.close(descriptor)

    @property
    def region(self) -> Region:
        """The whole segment, for the native module."""
        if self._region is None:
            self._region = Region(self.buf)
        return self._region

    def prefault(self) -> None:
        """Fault all pages in, which takes a second for some gigabytes; on any thread, until the segment is closed."""
        region = self.region  # it stays mapped as long as this is
        for start in range(0, self.nbytes, STEP_BYTES):
            if self.closed:
                return
            _populate(region, start, min(STEP_BYTES, self.nbytes - start), self.path, write=not self.readonly)

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._mapping is None

    def close(self) -> None:
        """Unmap. Where views of `buf` are still about, they stay valid and the last one to go unmaps."""
        mapping, self._mapping, self._region = self._mapping, None, None
        if mapping is None:
            return
        try:
            self.buf.release()
            mapping.close()
        except BufferError:
            # Somebody still reads or writes through a view. Unmapping under them would be a segmentation fault;
            # the mapping's own reference count does it when they are done.
            self.buf = memoryview(b"")

    def unlink(self) -> None:
        """Remove the file, if it is still this segment's: a successor under the same name stays."""
        try:
            status = self.path.lstat()
        except FileNotFoundError:
            return
        if (status.st_dev, status.st_ino) == self._inode:
            self.path.unlink(missing_ok=True)

    def __enter__(self) -> Segment:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _open_private(directory: Path) -> int:
    """A descriptor of a directory that only this user can enter: through it, nobody can swap the path's last step."""
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise SegmentError(f"{directory}: {os.strerror(error.errno or 0)}; a real directory is needed") from error
    status = os.fstat(descriptor)
    problem = ""
    if status.st_uid != os.geteuid():
        problem = f"belongs to user {status.st_uid}, not to {os.geteuid()}"
    elif status.st_mode & 0o077:
        problem = f"is open to others (mode {stat.S_IMODE(status.st_mode):04o}); `chmod 700` it"
    if problem:
        os.close(descriptor)
        raise SegmentError(f"{directory}: {problem}")
    return descriptor


def _format(
    path: Path,
    kind: SegmentKind,
    descriptor: int,
    nbytes: int,
    contents: tuple[int, int, bytes],
    progress: Progress | None,
    *,
    prefault: bool,
) -> Segment:
    """Take the space step by step, then write the header, ready word last."""
    _refuse_if_hopeless(path, descriptor, nbytes)
    try:
        os.ftruncate(descriptor, nbytes)
    except OSError as error:
        raise _no_room(path, descriptor, nbytes, error) from error
    mapping = _map(path, descriptor, nbytes, mmap.PROT_READ | mmap.PROT_WRITE)
    region = Region(mapping)
    for start in range(0, nbytes, STEP_BYTES):
        step = min(STEP_BYTES, nbytes - start)
        try:
            os.posix_fallocate(descriptor, start, step)
        except OSError as error:
            raise _no_room(path, descriptor, nbytes, error) from error
        if prefault:
            _populate(region, start, step, path, write=True)
        if progress is not None:
            progress(start + step, nbytes)
    count, grants, json = contents
    identity = secrets.token_bytes(16)
    HEADER.pack_into(mapping, 0, MAGIC, SEGMENT_VERSION, kind, identity, nbytes, 0, count, grants, len(json))
    mapping[HEADER_BYTES : HEADER_BYTES + len(json)] = json
    Words(mapping, H_READY, 1).store(0, 1)
    status = os.fstat(descriptor)
    return Segment(path, kind, mapping, readonly=False, inode=(status.st_dev, status.st_ino))


def _refuse_if_hopeless(path: Path, descriptor: int, nbytes: int) -> None:
    """Say so at once rather than after zeroing all the memory there is."""
    room = os.fstatvfs(descriptor)
    if room.f_blocks and room.f_bavail * room.f_frsize < nbytes:  # no blocks at all: a tmpfs without a limit
        raise _no_room(path, descriptor, nbytes, OSError(errno.ENOSPC, ""))


def _no_room(path: Path, descriptor: int, nbytes: int, error: OSError) -> SegmentError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.ENOMEM):
        room = os.fstatvfs(descriptor)
        free = room.f_bavail * room.f_frsize
        return SegmentError(f"{path}: {nbytes} bytes are wanted and {free} bytes are free in {path.parent}. {_MEND}")
    if error.errno == errno.EFBIG:
        return SegmentError(f"{path}: {nbytes} bytes are wanted, more than one file may have here (`ulimit -f`)")
    return SegmentError(f"{path}: {nbytes} bytes are wanted: {os.strerror(error.errno or 0)}")


def _check(path: Path, descriptor: int, status: os.stat_result, kind: SegmentKind, id: bytes | None) -> None:
    """Everything that has to hold before the file may be mapped."""
    if not stat.S_ISREG(status.st_mode):
        raise SegmentError(f"{path}: is no regular file")
    if status.st_uid != os.geteuid():
        raise SegmentError(f"{path}: belongs to user {status.st_uid}, not to {os.geteuid()}")
    header = os.pread(descriptor, HEADER_BYTES, 0)
    if len(header) < HEADER_BYTES:
        raise SegmentError(f"{path}: {len(header)} bytes are no segment")
    magic, version, found_kind, found_id, nbytes, ready, _, _, json_bytes = HEADER.unpack_from(header)
    # A segment that is being made has a zero header until the end.
    if magic == bytes(len(MAGIC)) or (magic == MAGIC and ready != 1):
        raise SegmentError(f"{path}: is not ready; it is being made, or whoever made it died doing so")
    if magic != MAGIC:
        raise SegmentError(f"{path}: is no lmpipe segment")
    if version != SEGMENT_VERSION:
        raise SegmentError(
            f"{path}: has segment version {version}, this lmpipe reads {SEGMENT_VERSION}; run one version"
        )
    if found_kind != kind:
        names = {int(k): k.name for k in SegmentKind}
        raise SegmentError(f"{path}: is a segment of kind {names.get(found_kind, found_kind)}, wanted is {kind.name}")
    if id is not None and found_id != id:
        raise SegmentError(f"{path}: is segment {found_id.hex()}, wanted is {id.hex()}; the node was started anew")
    if status.st_size != nbytes:
        raise SegmentError(
            f"{path}: has {status.st_size} bytes, its header says {nbytes}; the file was cut or extended"
        )
    if HEADER_BYTES + json_bytes > nbytes:
        raise SegmentError(f"{path}: its header names {json_bytes} bytes of JSON, more than it has")


def _map(path: Path, descriptor: int, nbytes: int, protection: int) -> mmap.mmap:
    try:
        mapping = mmap.mmap(descriptor, nbytes, flags=mmap.MAP_SHARED, prot=protection)
    except OSError as error:
        raise SegmentError(
            f"{path}: cannot map {nbytes} bytes: {os.strerror(error.errno or 0)} (`ulimit -v`?)"
        ) from error
    # An engine's core dump need not hold gigabytes of its users' prompts.
    mapping.madvise(mmap.MADV_DONTDUMP)
    return mapping


def _populate(region: Region, offset: int, nbytes: int, path: Path, *, write: bool) -> None:
    """Fault pages in now; a first touch costs several times a copy."""
    try:
        populate(region, offset, nbytes, write)
    except OSError as error:
        raise SegmentError(f"{path}: cannot fault in its pages: {os.strerror(error.errno or 0)}") from error


def words_of(segment: Segment, offset: int, count: int) -> Words:
    """Words of a segment, if it is long enough to have them.

    Raises:
        SegmentError: the header's counts do not fit the segment.
    """
    if count < 1 or offset + count * WORD_BYTES > segment.nbytes:
        raise SegmentError(f"{segment.path}: {count} words at {offset} do not fit in {segment.nbytes} bytes")
    return Words(segment.buf, offset, count)
