"""A segment file while it is written: made, appended to, sealed.

O_DIRECT where the file system has it: offsets, lengths and addresses are then multiples of 4 KiB. Knows the layout of
segment files (format.py). Does not know which chunks are wanted, nor how many files there are.
"""

from __future__ import annotations

import errno
import os
import secrets
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from lmpipe import failpoints
from lmpipe.handles import BLOCK_BYTES, CHUNK, ChunkRecords, Extent
from lmpipe.tiers.format import ID_BYTES, Digests, Footer, RecordHeader, SegmentHeader, chunk_header, record_blocks

MAX_VECTOR = 1000
"""Buffers in one system call, below Linux' 1024."""

GROUP_BYTES = 8 << 20
"""Records up to so many bytes are written in one call; checksums of the next group are computed meanwhile."""


def aligned(nbytes: int) -> memoryview:
    """Memory for O_DIRECT, page-aligned, freed with the last reference."""
    buffer = np.empty(nbytes + BLOCK_BYTES, np.uint8)
    skip = -buffer.ctypes.data % BLOCK_BYTES
    return buffer.data[skip : skip + nbytes]


def segment_path(directory: Path, segment: int) -> Path:
    """The file of a segment number."""
    return directory / f"{segment:08x}.seg"


def open_direct(path: Path, flags: int) -> tuple[int, bool]:
    """A descriptor, and whether it is O_DIRECT: some file systems refuse that."""
    flags |= os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        return os.open(path, flags | os.O_DIRECT, 0o600), True
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    return os.open(path, flags, 0o600), False


def read_at(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
    """Fill `buffers` from `offset`; the number of bytes read, less only at the end of the file."""
    left, done = list(buffers), 0
    while left:
        count = os.preadv(descriptor, left, offset + done)
        if not count:
            break
        done += count
        left = _after(left, count)
    return done


def write_at(descriptor: int, buffers: Sequence[memoryview], offset: int) -> None:
    """Write all of `buffers` at `offset`."""
    left, done = list(buffers), 0
    while left:
        count = os.pwritev(descriptor, left[:MAX_VECTOR], offset + done)
        done += count
        left = _after(left, count)


def is_aligned(buffer: memoryview) -> bool:
    """Whether O_DIRECT accepts the buffer's address."""
    return not np.frombuffer(buffer, np.uint8).ctypes.data % BLOCK_BYTES


def _whole_blocks(payload: memoryview, nbytes: int, tail: memoryview) -> list[memoryview]:
    """`payload` as buffers of whole blocks; the last, partial one is copied to `tail` and ends in zeros."""
    if not is_aligned(payload) or len(payload) < nbytes:
        raise ValueError(f"{nbytes} bytes need a page-aligned buffer, got one of {len(payload)}")
    floor = nbytes // BLOCK_BYTES * BLOCK_BYTES
    tail[: nbytes - floor] = payload[floor:nbytes]
    tail[nbytes - floor :] = bytes(BLOCK_BYTES - (nbytes - floor))
    return [buffer for buffer in (payload[:floor], tail if nbytes > floor else tail[:0]) if len(buffer)]


def _after(buffers: list[memoryview], count: int) -> list[memoryview]:
    """What is left of `buffers` after their first `count` bytes."""
    for place, buffer in enumerate(buffers):
        if count < len(buffer):
            return [buffer[count:], *buffers[place + 1 :]]
        count -= len(buffer)
    return []


@dataclass(slots=True)
class OpenSegment:
    """The segment file that is being written. One thread at a time."""

    path: Path
    number: int
    id: bytes
    descriptor: int
    direct: bool
    bytes: int
    block: int = 1
    """Where the next record goes."""
    chunks: list[ChunkRecords] = field(default_factory=list[ChunkRecords])
    forgets: list[int] = field(default_factory=list[int])

    @classmethod
    def create(cls, directory: Path, number: int, nbytes: int) -> OpenSegment:
        """A new file with all its space taken.

        Raises:
            OSError: no space, a read-only file system, a failing disk; no file is left.
        """
        path = segment_path(directory, number)
        identity = secrets.token_bytes(ID_BYTES)
        descriptor, direct = open_direct(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        try:
            os.posix_fallocate(descriptor, 0, nbytes)
            failpoints.hit("ssd.create.made")
            header = aligned(BLOCK_BYTES)
            header[:] = SegmentHeader(number, identity, int(time.time())).pack()
            try:
                write_at(descriptor, [header], 0)
            except OSError as error:
                if not direct or error.errno != errno.EINVAL:
                    raise
                # Opened, but not written: a file system that only pretends.
                os.close(descriptor)
                descriptor, direct = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW), False
                write_at(descriptor, [header], 0)
        except OSError:
            os.close(descriptor)
            path.unlink(missing_ok=True)
            raise
        made = cls(path, number, identity, descriptor, direct, nbytes)
        made.flush_directory()
        return made

    @classmethod
    def reopen(
        cls, path: Path, header: SegmentHeader, block: int, chunks: ChunkRecords, forgets: Sequence[int]
    ) -> OpenSegment:
        """A file that was left unsealed and holds these records before `block`, to be sealed.

        Raises:
            OSError: it cannot be written.
        """
        descriptor, direct = open_direct(path, os.O_RDWR)
        size = os.fstat(descriptor).st_size
        return cls(path, header.segment, header.id, descriptor, direct, size, block, [chunks], list(forgets))

    def fits(self, blocks: int) -> bool:
        """Whether so many blocks more, and the footer after them, stay within the file's length."""
        entries = sum(map(len, self.chunks)) + len(self.forgets) + blocks
        footer = -(-entries * CHUNK.itemsize // BLOCK_BYTES) + 1
        return (self.block + blocks + footer) * BLOCK_BYTES <= self.bytes

    def group(self, sizes: Sequence[int]) -> int:
        """How many of the next records go into one call: at least one, else what fits the file and `GROUP_BYTES`."""
        total, blocks, count = 0, 0, 0
        for nbytes in sizes:
            total += nbytes
            blocks += record_blocks(nbytes)
            if count and (total > GROUP_BYTES or not self.fits(blocks)):
                break
            count += 1
        return count

    def append(self, records: ChunkRecords, payloads: Sequence[memoryview], pieces: Sequence[Future[Digests]]) -> None:
        """Write records with their payloads and set their `place`.

        All in one call, except that a large payload does not wait for its checksum: it goes ahead of its record.

        Raises:
            OSError: nothing counts as written.
        """
        scratch = aligned(BLOCK_BYTES * 2 * len(records))
        buffers: list[memoryview] = []
        block = self.block
        for place, (payload, digests) in enumerate(zip(payloads, pieces, strict=True)):
            nbytes = int(records["nbytes"][place])
            records["place"][place] = Extent(self.number, block).place
            at = place * 2 * BLOCK_BYTES
            header, tail = scratch[at : at + BLOCK_BYTES], scratch[at + BLOCK_BYTES : at + 2 * BLOCK_BYTES]
            body = _whole_blocks(payload, nbytes, tail)
            if nbytes >= GROUP_BYTES and not digests.done():
                write_at(self.descriptor, body, (block + 1) * BLOCK_BYTES)
                body = []
            header[:] = chunk_header(records[place], self.id, digests.result()).pack()
            buffers += [header, *body]
            block += record_blocks(nbytes)
        write_at(self.descriptor, buffers, self.block * BLOCK_BYTES)
        self.chunks.append(records)
        self.block = block

    def append_forget(self, header: RecordHeader) -> None:
        """Write a record that forgets, made for `extent`, and make it survive.

        Raises:
            OSError: it may not.
        """
        scratch = aligned(BLOCK_BYTES)
        scratch[:] = header.pack()
        write_at(self.descriptor, [scratch], self.block * BLOCK_BYTES)
        self.flush()
        self.forgets.append(self.block)
        self.block += 1

    @property
    def extent(self) -> Extent:
        """Where the next record goes."""
        return Extent(self.number, self.block)

    def flush(self) -> None:
        """What was written survives a power failure.

        Raises:
            OSError: it may not.
        """
        os.fdatasync(self.descriptor)

    def flush_directory(self) -> None:
        """The file's name survives a power failure."""
        directory = os.open(self.path.parent, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    def seal(self, flush: bool) -> int:
        """Write the footer, cut the file to length and close it; the file's bytes.

        Raises:
            OSError: the file is closed, and stays as it is, to be read by its records.
        """
        forgets = np.array(self.forgets, np.uint32)
        chunks = np.concatenate(self.chunks) if self.chunks else np.empty(0, CHUNK)
        footer = Footer(self.number, self.id, chunks, forgets).pack(self.block)
        end = self.block * BLOCK_BYTES + len(footer)
        try:
            scratch = aligned(len(footer))
            scratch[:] = footer
            failpoints.hit("ssd.seal.begun")
            write_at(self.descriptor, [scratch], self.block * BLOCK_BYTES)
            failpoints.hit("ssd.seal.written")
            os.ftruncate(self.descriptor, end)
            if flush:
                os.fsync(self.descriptor)
        finally:
            self.close()
        return end

    def close(self) -> None:
        """Close the file as it is. Idempotent."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1
