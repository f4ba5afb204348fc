"""The bytes of segment files and remote objects. Offsets in bytes, integers little-endian, every part a multiple of 4
KiB.

A segment file is written from front to back and never changed; the footer comes when it is full ("sealed"):

      +--------+--------+-------------+--------+-------------+--- - - ---+--------+---------+
      | header | record | payload     | record | payload     |           | footer | trailer |
      | 4 KiB  | 4 KiB  | to 4 KiB    |        |             |           |        | 4 KiB   |
      +--------+--------+-------------+--------+-------------+--- - - ---+--------+---------+

A remote object is one record and its payload, without padding. Every 4 KiB block of this file's making ends in its
checksum:

   4080 xxh3-128 of bytes 0..4079                                                                              4096

Segment header
      0 magic "LMPSEGF\\0" | 8 version u32 | 12 segment u32 | 16 id 16 B, random | 32 created u64, seconds since 1970

Record
      0 magic "LMPRECD\\0" | 8 version u32 | 12 kind u32 | 16 id of the segment file, 16 B (zero in an object)
     32 pieces u32 | 36 piece bytes u32 | 40 zero
     48 chunk record 72 B (handles.py), with `place` set to this place (zero in an object)
    128 kind CHUNK: xxh3-128 of each piece of the payload as stored, at most 128 of them, the last piece may be shorter
        kind FORGET_KEYS: keys of 16 B, at most 247. Chunks of these keys that stand before this record are gone
        kind FORGET_NAMESPACE: nothing; all chunks before this record whose namespace is the record's are gone (0: all)

Footer
      0 chunk records of the file, 72 B each, in file order | block numbers u32 of the records that forget | zeros to 4
      KiB

Trailer
      0 magic "LMPTRAI\\0" | 8 version u32 | 12 segment u32 | 16 id 16 B | 32 chunks u32 | 36 forgets u32
     40 footer's first block u32 | 44 zero u32 | 48 xxh3-128 of the footer

Parsing is strict: what is not exactly as above is a `FormatError` that names the place and the field.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from lmpipe import native
from lmpipe.errors import ForeignVersion, FormatError
from lmpipe.handles import BLOCK_BYTES, CHUNK, ChunkRecords, Codec, Extent, round_up
from lmpipe.keys import KEY_BYTES

VERSION = 1
MAGIC_SEGMENT, MAGIC_RECORD, MAGIC_TRAILER = b"LMPSEGF\0", b"LMPRECD\0", b"LMPTRAI\0"
SEALED_AT = BLOCK_BYTES - 16
ID_BYTES = 16
MAX_PIECES = 128
MIN_PIECE_BYTES = 256 << 10
R_RECORD, R_TABLE = 48, 128
MAX_KEYS = (SEALED_AT - R_TABLE) // KEY_BYTES
NO_ID = bytes(ID_BYTES)

_SEGMENT = struct.Struct("<8sII16sQ")
_RECORD = struct.Struct("<8sII16sII")
_TRAILER = struct.Struct("<8sII16sIIII16s")

Block = memoryview | bytes | bytearray
Digests = npt.NDArray[np.uint8]


class RecordKind(IntEnum):
    """What a record in a segment file says."""

    CHUNK = 1
    FORGET_NAMESPACE = 2
    FORGET_KEYS = 3


@dataclass(frozen=True, slots=True)
class SegmentHeader:
    """The first block of a segment file."""

    segment: int
    id: bytes
    created: int

    def pack(self) -> bytes:
        """The block."""
        return _sealed(_SEGMENT.pack(MAGIC_SEGMENT, VERSION, self.segment, self.id, self.created))

    @classmethod
    def parse(cls, block: Block, where: str) -> SegmentHeader:
        """Inverse of `pack`.

        Raises:
            FormatError: not the first block of a segment file of this version, or damaged.
        """
        _check(block, MAGIC_SEGMENT, where)
        _, _, segment, identity, created = _SEGMENT.unpack_from(block)
        _zeros(block, _SEGMENT.size, SEALED_AT, where)
        return cls(segment, identity, created)


@dataclass(frozen=True, slots=True)
class RecordHeader:
    """One record's block. `table`: digests of the pieces, or keys to forget, shape (n, 16)."""

    kind: RecordKind
    id: bytes
    record: np.void
    piece_bytes: int
    table: Digests

    def pack(self) -> bytes:
        """The block."""
        head = _RECORD.pack(MAGIC_RECORD, VERSION, self.kind, self.id, len(self.table), self.piece_bytes)
        return _sealed(head.ljust(R_RECORD, b"\0") + self.record.tobytes().ljust(R_TABLE - R_RECORD, b"\0"), self.table)

    @property
    def blocks(self) -> int:
        """4 KiB blocks of the record and its payload in a segment file."""
        return record_blocks(int(self.record["nbytes"])) if self.kind is RecordKind.CHUNK else 1

    @classmethod
    def parse(cls, block: Block, where: str) -> RecordHeader:
        """Inverse of `pack`.

        Raises:
            FormatError: not a record of this version, damaged, or one that cannot exist.
        """
        _check(block, MAGIC_RECORD, where)
        _, _, number, identity, pieces, piece_bytes = _RECORD.unpack_from(block)
        if number not in (kind.value for kind in RecordKind):
            raise FormatError(f"{where}: record kind {number} is unknown")
        kind = RecordKind(number)
        record = np.frombuffer(block, CHUNK, 1, R_RECORD).copy()[0]
        _check_pieces(kind, record, pieces, piece_bytes, where)
        end = R_TABLE + pieces * 16
        _zeros(block, _RECORD.size, R_RECORD, where)
        _zeros(block, R_RECORD + CHUNK.itemsize, R_TABLE, where)
        _zeros(block, end, SEALED_AT, where)
        table = np.frombuffer(block, np.uint8, pieces * 16, R_TABLE).reshape(pieces, 16).copy()
        return cls(kind, identity, record, piece_bytes, table)


@dataclass(frozen=True, slots=True)
class Footer:
    """What a sealed segment file holds: its chunks in file order, and the blocks of the records that forget."""

    segment: int
    id: bytes
    chunks: ChunkRecords
    forgets: npt.NDArray[np.uint32]

    def pack(self, block: int) -> bytes:
        """Footer and trailer, to be written at `block`."""
        body = self.chunks.tobytes() + self.forgets.astype("<u4").tobytes()
        body = body.ljust(round_up(len(body)), b"\0")
        counts = len(self.chunks), len(self.forgets), block, 0
        digest = native.xxh3_128(body)
        return body + _sealed(_TRAILER.pack(MAGIC_TRAILER, VERSION, self.segment, self.id, *counts, digest))

    @staticmethod
    def first_block(trailer: Block, file_bytes: int, where: str) -> int:
        """Where the footer of a sealed file begins, by the file's last block.

        Raises:
            FormatError: the block is no trailer, or not of a file of this length.
        """
        _check(trailer, MAGIC_TRAILER, where)
        _, _, _, _, chunks, forgets, block, spare, _ = _TRAILER.unpack_from(trailer)
        body = round_up(chunks * CHUNK.itemsize + forgets * 4)
        if spare or block < 1 or block * BLOCK_BYTES + body + BLOCK_BYTES != file_bytes:
            raise FormatError(f"{where}: a footer at block {block} does not fit a file of {file_bytes} bytes")
        _zeros(trailer, _TRAILER.size, SEALED_AT, where)
        return block

    @classmethod
    def parse(cls, data: Block, block: int, where: str) -> Footer:
        """Inverse of `pack`; `data` is the file from `block` to its end.

        Raises:
            FormatError: damaged, or with entries that cannot exist.
        """
        body, trailer = memoryview(data)[:-BLOCK_BYTES], memoryview(data)[-BLOCK_BYTES:]
        if len(data) < BLOCK_BYTES or cls.first_block(trailer, block * BLOCK_BYTES + len(data), where) != block:
            raise FormatError(f"{where}: footer at another block than {block}")
        _, _, segment, identity, n_chunks, n_forgets, _, _, digest = _TRAILER.unpack_from(trailer)
        if native.xxh3_128(body) != digest:
            raise FormatError(f"{where}: footer checksum differs")
        chunks = np.frombuffer(body, CHUNK, n_chunks).copy()
        forgets = np.frombuffer(body, "<u4", n_forgets, n_chunks * CHUNK.itemsize).astype(np.uint32)
        _zeros(body, n_chunks * CHUNK.itemsize + n_forgets * 4, len(body), where)
        places = chunks["place"]
        outside = ((places & 0xFFFFFFFF) < 1) | ((places & 0xFFFFFFFF) >= block) | (places >> 32 != segment)
        if outside.any() or (forgets < 1).any() or (forgets >= block).any():
            raise FormatError(f"{where}: footer names a place outside its file")
        return cls(segment, identity, chunks, forgets)


def record_blocks(nbytes: int) -> int:
    """4 KiB blocks that a chunk of `nbytes` takes in a segment file, with its record."""
    return 1 + round_up(nbytes) // BLOCK_BYTES


def piece_lengths(nbytes: int) -> npt.NDArray[np.uint64]:
    """Length of each piece of a payload."""
    piece_bytes = piece_size(nbytes)
    lengths = np.full(-(-nbytes // piece_bytes), piece_bytes, np.uint64)
    lengths[-1] -= len(lengths) * piece_bytes - nbytes
    return lengths


def piece_size(nbytes: int) -> int:
    """Bytes of one piece: at least 256 KiB, and so many that 128 pieces are enough."""
    return max(round_up(-(-nbytes // MAX_PIECES)), MIN_PIECE_BYTES)


def digests(data: memoryview, lengths: npt.NDArray[np.uint64]) -> Digests:
    """xxh3-128 of the pieces of `data`, shape (n, 16); runs without the interpreter lock."""
    return native.xxh3_128_pieces(data, lengths)


def chunk_header(record: np.void, segment_id: bytes, digests: Digests) -> RecordHeader:
    """The record before a payload whose pieces have these digests."""
    return RecordHeader(RecordKind.CHUNK, segment_id, record, piece_size(int(record["nbytes"])), digests)


def forget_header(
    segment_id: bytes, extent: Extent, namespace: int, keys: npt.NDArray[np.uint8] | None
) -> RecordHeader:
    """A record at `extent` that forgets keys, shape (n, 16), at most `MAX_KEYS`, or (None) a namespace."""
    record = np.zeros(1, CHUNK)[0]
    record["namespace"] = namespace
    record["place"] = extent.place
    kind = RecordKind.FORGET_NAMESPACE if keys is None else RecordKind.FORGET_KEYS
    return RecordHeader(kind, segment_id, record, 0, _NO_TABLE if keys is None else keys)


_NO_TABLE = np.empty((0, 16), np.uint8)


def _sealed(head: bytes, table: Digests = _NO_TABLE) -> bytes:
    body = (head + table.tobytes()).ljust(SEALED_AT, b"\0")
    return body + native.xxh3_128(body)


def _check(block: Block, magic: bytes, where: str) -> None:
    if len(block) != BLOCK_BYTES:
        raise FormatError(f"{where}: a block of {len(block)} bytes, wanted {BLOCK_BYTES}")
    if bytes(block[:8]) != magic:
        raise FormatError(f"{where}: magic is {bytes(block[:8])!r}, wanted {magic!r}")
    if native.xxh3_128(memoryview(block)[:SEALED_AT]) != bytes(block[SEALED_AT:]):
        raise FormatError(f"{where}: header checksum differs")
    if (version := int.from_bytes(block[8:12], "little")) != VERSION:
        raise ForeignVersion(f"{where}: version {version}, this lmpipe reads {VERSION}")


def _check_pieces(kind: RecordKind, record: np.void, pieces: int, piece_bytes: int, where: str) -> None:
    nbytes = int(record["nbytes"])
    if kind is RecordKind.CHUNK:
        if not nbytes or not int(record["raw_bytes"]):
            raise FormatError(f"{where}: chunk of {nbytes} bytes, {int(record['raw_bytes'])} before encoding")
        if int(record["shard"]) >= int(record["shards"]) or int(record["codec"]) not in (
            codec.value for codec in Codec
        ):
            raise FormatError(f"{where}: shard or codec out of range")
        if piece_bytes != piece_size(nbytes) or pieces != -(-nbytes // piece_bytes):
            raise FormatError(f"{where}: {pieces} pieces of {piece_bytes} bytes do not make {nbytes} bytes")
        return
    if piece_bytes or nbytes:
        raise FormatError(f"{where}: a record that forgets has no payload")
    if pieces > MAX_KEYS or (kind is RecordKind.FORGET_KEYS) != (pieces > 0):
        raise FormatError(f"{where}: {pieces} keys to forget")


def _zeros(block: Block, first: int, last: int, where: str) -> None:
    if bytes(block[first:last]).count(0) != last - first:
        raise FormatError(f"{where}: bytes {first} to {last} are not zero")
