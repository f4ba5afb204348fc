"""Segment files read: one chunk, verified, or all that a file holds. Knows no index and no other files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lmpipe.errors import FormatError
from lmpipe.handles import BLOCK_BYTES, CHUNK, ChunkRecords, Extent, round_up
from lmpipe.tiers.format import Footer, RecordHeader, RecordKind, SegmentHeader, digests, piece_lengths, piece_size
from lmpipe.tiers.segment_file import aligned, is_aligned, open_direct, read_at

SPLIT_BYTES = 8 << 20
"""A payload from here on is read in two parts; the first is verified while the second comes."""


def read_chunk(path: Path, record: np.void, into: memoryview, hashers: Executor) -> None:
    """Read the payload of `record` into `into`, page-aligned and at least `nbytes` long, and verify it.

    Raises:
        FileNotFoundError: there is no such file.
        FormatError: what lies there is damaged, or another chunk.
        OSError: it cannot be read.
    """
    extent, nbytes = Extent.from_place(int(record["place"])), int(record["nbytes"])
    if not is_aligned(into) or len(into) < nbytes:
        raise ValueError(f"{nbytes} bytes need a page-aligned buffer, got one of {len(into)}")
    where = f"{path}: block {extent.block}"
    block, tail = aligned(BLOCK_BYTES), aligned(BLOCK_BYTES)
    lengths = piece_lengths(nbytes)
    half = len(lengths) * 7 // 8 if nbytes >= SPLIT_BYTES else 0  # what is checked after the last byte came is short
    cut, floor = half * piece_size(nbytes), nbytes // BLOCK_BYTES * BLOCK_BYTES
    descriptor, _ = open_direct(path, os.O_RDONLY)
    try:
        head = [block, into[:cut]] if cut else [block, into[:floor], tail]
        read_at(descriptor, head, extent.offset_bytes)
        header = RecordHeader.parse(block, where)
        if header.record.tobytes() != record.tobytes():
            raise FormatError(f"{where}: another chunk than its row says")
        first = hashers.submit(digests, into[:cut], lengths[:half])
        try:
            if cut:
                read_at(descriptor, [into[cut:floor], tail], extent.offset_bytes + BLOCK_BYTES + cut)
        finally:
            found = first.result()
    finally:
        os.close(descriptor)
    into[floor:nbytes] = tail[: nbytes - floor]
    found = np.concatenate((found, digests(into[cut:nbytes], lengths[half:])))
    wrong = np.flatnonzero((found != header.table).any(axis=1))
    if len(wrong):
        raise FormatError(f"{where}: checksum of piece {wrong[0]} of {len(lengths)} differs")


@dataclass(slots=True)
class Scan:
    """What one segment file holds."""

    header: SegmentHeader
    chunks: ChunkRecords
    forgets: list[tuple[int, RecordHeader]]
    """By block."""
    sealed: bool
    end_block: int
    """Behind the last good record."""
    damage: str = ""


def scan(path: Path, number: int) -> Scan:
    """Read a segment file's footer, or, where there is none, its records up to the first that is not whole.

    Raises:
        FormatError: the file does not begin as a segment file of this number.
        OSError: it cannot be read.
    """
    descriptor, _ = open_direct(path, os.O_RDONLY)
    try:
        size = os.fstat(descriptor).st_size
        block = aligned(BLOCK_BYTES)
        _fill(descriptor, block, 0, path)
        header = SegmentHeader.parse(block, f"{path}: header")
        if header.segment != number:
            raise FormatError(f"{path}: header says segment {header.segment}")
        damage = ""
        try:
            return _scan_footer(descriptor, size, header, path)
        except FormatError as error:
            damage = "" if "magic" in str(error) else str(error)
        found = Scan(header, np.empty(0, CHUNK), [], False, 1, damage)
        chunks: list[np.void] = []
        for at, record in _records(descriptor, size, header, path, found):
            found.end_block = at + record.blocks
            if record.kind is RecordKind.CHUNK:
                chunks.append(record.record)
            else:
                found.forgets.append((at, record))
        if chunks:
            found.chunks = np.array(chunks, CHUNK)
        return found
    finally:
        os.close(descriptor)


def _scan_footer(descriptor: int, size: int, header: SegmentHeader, path: Path) -> Scan:
    block = aligned(BLOCK_BYTES)
    where = f"{path}: trailer"
    _fill(descriptor, block, max(size - BLOCK_BYTES, 0), path)
    first = Footer.first_block(block, size, where)
    data = aligned(size - first * BLOCK_BYTES)
    _fill(descriptor, data, first * BLOCK_BYTES, path)
    footer = Footer.parse(data, first, f"{path}: footer")
    if footer.id != header.id or footer.segment != header.segment:
        raise FormatError(f"{path}: the footer belongs to another file")
    forgets: list[tuple[int, RecordHeader]] = []
    for at in footer.forgets.tolist():
        _fill(descriptor, block, at * BLOCK_BYTES, path)
        forgets.append((at, RecordHeader.parse(block, f"{path}: block {at}")))
    return Scan(header, footer.chunks, forgets, True, first)


def _records(
    descriptor: int, size: int, header: SegmentHeader, path: Path, found: Scan
) -> Iterator[tuple[int, RecordHeader]]:
    block = aligned(BLOCK_BYTES)
    at = 1
    while (at + 1) * BLOCK_BYTES <= size:
        _fill(descriptor, block, at * BLOCK_BYTES, path)
        if not any(bytes(block[:8])):
            return  # never written
        where = f"{path}: block {at}"
        try:
            record = RecordHeader.parse(block, where)
            if record.id != header.id or int(record.record["place"]) != Extent(header.segment, at).place:
                raise FormatError(f"{where}: a record of another place")
            if (at + record.blocks) * BLOCK_BYTES > size:
                raise FormatError(f"{where}: the payload runs past the end of the file")
        except FormatError as error:
            found.damage = found.damage or str(error)
            return
        yield at, record
        at += record.blocks


def _fill(descriptor: int, buffer: memoryview, offset: int, path: Path) -> None:
    if read_at(descriptor, [buffer], offset) < len(buffer):
        raise FormatError(f"{path}: ends within the {len(buffer)} bytes at {offset}")


def cut_torn(path: Path, part: Scan, hashers: Executor) -> None:
    """Remove from the end of an unsealed file's scan what was not written whole."""
    while len(part.chunks):
        last = part.chunks[-1]
        extent = Extent.from_place(int(last["place"]))
        if part.forgets and part.forgets[-1][0] > extent.block:
            return  # it was flushed with the record that forgets
        try:
            read_chunk(path, last, aligned(round_up(int(last["nbytes"]))), hashers)
            return
        except FormatError as error:
            part.chunks, part.end_block, part.damage = part.chunks[:-1], extent.block, str(error)
