"""What reads bytes that it cannot trust: for each reader good samples, how they are damaged, and what it may answer.

A reader may take an input or refuse it with its own kind of error, whose text names what is wrong; anything else it
does is a defect. Damage under a checksum would never get past it, so most of it is sealed again.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from mutate import damaged_bytes, damaged_text

from lmpipe import messages as m
from lmpipe import native
from lmpipe.codecs import ANY, CODECS, Source
from lmpipe.codecs.adaptive import AdaptiveCodec
from lmpipe.codecs.calibration import Calibration
from lmpipe.codecs.calibration import read as read_calibration
from lmpipe.codecs.checks import conflicts
from lmpipe.errors import FormatError, LmpipeError, MessageError, NodeError, SegmentError, TopologyError
from lmpipe.handles import BLOCK_BYTES, CHUNK, ChunkRecords, Codec, Extent, SessionId, Slot, Tier, round_up
from lmpipe.index import IndexReader, IndexWriter
from lmpipe.index_row import index_keys, is_complete, merge_shard, row_records
from lmpipe.launch.claim import WorkerNote
from lmpipe.layout import KVLayout
from lmpipe.lifecycle import SlotEvent
from lmpipe.producer.decoding import Decoder
from lmpipe.producer.loading import _are_in
from lmpipe.producer.shards import run_of_shards
from lmpipe.producer.wanted import Wanted
from lmpipe.rundir import RunDir
from lmpipe.shm.counters import Counters
from lmpipe.shm.descriptor import HEADER_BYTES, SLOT_HEADER_BYTES, SegmentKind
from lmpipe.shm.hold import Holds, HoldScanner
from lmpipe.shm.node import NodeWords
from lmpipe.shm.segment import Segment
from lmpipe.shm.session import Session, SessionDir
from lmpipe.shm.slots import SlotOwner
from lmpipe.supervisor import NodeState
from lmpipe.tiers.format import (
    SEALED_AT,
    Footer,
    RecordHeader,
    SegmentHeader,
    chunk_header,
    digests,
    forget_header,
    piece_lengths,
    record_blocks,
)
from lmpipe.tiers.object_name import object_name, parse_name
from lmpipe.tiers.recovery import forget, newest
from lmpipe.tiers.segment_reader import cut_torn, read_chunk, scan
from lmpipe.topology import NODE_VERSION, NodeInfo, parse

ROOT = Path(__file__).parents[2]
LAYOUT = KVLayout.paged(2, 2, 16, "float16", 4)
TOKENS = 8
CHUNK_BYTES = LAYOUT.chunk_bytes(TOKENS)


class Target(ABC):
    """One reader. `directory` is private and empty; made once in a process, used for many inputs."""

    name: str
    refusals: type[LmpipeError]
    share = 1.0
    """Of the inputs, beside the others; dear ones get fewer."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    @abstractmethod
    def damaged(self, draw: random.Random) -> Any:
        """A damaged input."""

    @abstractmethod
    def read(self, data: Any) -> None:
        """Have it read; raises `refusals` when it is refused."""

    def names(self, error: LmpipeError) -> bool:
        """Whether a refusal names what is wrong."""
        return bool(str(error))

    def close(self) -> None:  # noqa: B027 - most have nothing to do
        """Let go of what was made."""


def records(count: int = 3, shards: int = 1) -> ChunkRecords:
    """Chunk records as saves make them."""
    chunks = np.zeros(count, CHUNK)
    chunks["key"] = [(i + 1).to_bytes(16, "little") for i in range(count)]
    chunks["anchor"], chunks["position"] = b"anch", np.arange(count)
    chunks["shards"], chunks["shard"] = shards, np.arange(count) % shards
    chunks["layout"] = LAYOUT.layout_id()
    chunks["raw_bytes"] = chunks["nbytes"] = CHUNK_BYTES
    chunks["place"] = [Slot(i, 1).place for i in range(count)]
    chunks["saved_at"], chunks["namespace"] = 1_700_000_000, 77
    return chunks


class Frames(Target):
    """Messages, as every socket takes them, and the answer to those that are refused."""

    name, refusals, share = "frames", MessageError, 6.0

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        golden = sorted((ROOT / "tests" / "golden" / "messages").glob("*.hex"))
        self._samples = [[bytes.fromhex(line) for line in path.read_text().splitlines()] for path in golden]
        self._frames = [frame for sample in self._samples for frame in sample]
        self._headers = [sample[0].decode() for sample in self._samples]

    def damaged(self, draw: random.Random) -> list[bytes]:
        frames = list(draw.choice(self._samples))
        kind = draw.randrange(10)
        if kind == 0:
            frames.insert(draw.randrange(len(frames) + 1), draw.choice(self._frames))
        elif kind == 1:
            del frames[draw.randrange(len(frames))]
        elif kind <= 5:
            frames[0] = damaged_text(frames[0].decode(), draw, self._headers).encode("utf-8", "surrogatepass")
        else:
            at = draw.randrange(len(frames))
            frames[at] = damaged_bytes(frames[at], draw, self._frames)
        return frames

    def read(self, data: list[bytes]) -> None:
        try:
            message = m.decode(data)
        except MessageError as error:
            answer = m.refusal(data, SessionId(1), error)
            assert m.decode(m.encode(answer)).reason, "a refusal says why"
            raise
        assert m.decode(m.encode(message)) == message

    def names(self, error: LmpipeError) -> bool:
        return isinstance(error, MessageError) and bool(error.field) and error.field in str(error)


class TopologyText(Target):
    """Topology files."""

    name, refusals, share = "topologies", TopologyError, 0.4

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        files = sorted((ROOT / "topologies").glob("*.yaml"))
        self._samples = [path.read_text() for path in files]

    def damaged(self, draw: random.Random) -> str:
        return damaged_text(draw.choice(self._samples), draw, self._samples)

    def read(self, data: str) -> None:
        parse(data, "file.yaml", Path("/base"), conflicts)

    def names(self, error: LmpipeError) -> bool:
        return all(line.startswith("file.yaml:") for line in str(error).splitlines())


class _File(Target):
    """A small file that is read whole."""

    path: Path
    samples: list[bytes]

    def damaged(self, draw: random.Random) -> bytes:
        sample = draw.choice(self.samples)
        if draw.random() < 0.3:
            return damaged_bytes(sample, draw, self.samples)
        texts = [sample.decode() for sample in self.samples]
        return damaged_text(sample.decode(), draw, texts).encode("utf-8", "surrogatepass")

    def put(self, data: bytes) -> None:
        """Make it the file."""
        self.path.write_bytes(data)

    def names(self, error: LmpipeError) -> bool:
        return str(self.path) in str(error)


def _calibration() -> Calibration:
    shape = LAYOUT.layers, LAYOUT.kv, LAYOUT.kv_heads
    bits = np.random.default_rng(1).choice([3, 4, 8], size=shape).tolist()
    return Calibration(1, "any", *shape, LAYOUT.head_dim, 4.0, bits, np.zeros([*shape, 3]).tolist())


class CalibrationFile(_File):
    """What the adaptive codec is told of a model."""

    name, refusals = "calibrations", FormatError

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.path, self.samples = directory / "model.json", [msgspec.json.encode(_calibration())]

    def read(self, data: bytes) -> None:
        self.put(data)
        read_calibration(self.path)


class NodeNote(_File):
    """`node.json`, by which engines and workers attach."""

    name, refusals = "node.json", NodeError

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.path = directory / "node.json"
        text = (ROOT / "topologies" / "local.yaml").read_text()
        topology = parse(text, "local.yaml", directory)
        given: dict[str, Any] = {
            "version": NODE_VERSION,
            "topology": topology,
            "run_dir": str(directory),
            "arena_id": "00" * 16,
            "endpoints": {"gather": {"load": "ipc:///a", "save": "ipc:///b"}},
            "supervisor_pid": 1,
            "created": 1.5,
        }
        others = [field.name for field in msgspec.structs.fields(NodeInfo) if field.name not in given]
        self.samples = [msgspec.json.encode(NodeInfo(**given, **dict.fromkeys(others, "1")))]

    def read(self, data: bytes) -> None:
        self.put(data)
        NodeInfo.read(self.directory)


class Notes(_File):
    """What supervisor and workers write down of themselves: nonsense is no note."""

    name, refusals, share = "notes", NodeError, 0.5

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.path = directory / "worker.json"
        process = b'{"name":"gather","pid":7,"state":"ready","restarts":1,"reason":""}'
        self.samples = [
            msgspec.json.encode(WorkerNote(7, 8, "ready")),
            b'{"pid":7,"state":"ready","started":1.5,"processes":[' + process + b"]}",
        ]

    def read(self, data: bytes) -> None:
        self.put(data)
        WorkerNote.read(self.path)
        NodeState.read(self.path)


def _sealed(block: bytes) -> bytes:
    body = block[:SEALED_AT].ljust(SEALED_AT, b"\0")
    return body + native.xxh3_128(body)


def _segment_file(number: int, *, sealed: bool, identity: bytes = b"i" * 16) -> bytes:
    """A segment file of three chunks and two records that forget."""
    out = bytearray(SegmentHeader(number, identity, 1_700_000_000).pack())
    chunks, forgets = records(3), []
    chunks["nbytes"] = chunks["raw_bytes"] = [5000, 4096, 300]
    for at in range(len(chunks)):
        chunks["place"][at] = Extent(number, len(out) // BLOCK_BYTES).place
        payload = bytes([at]) * int(chunks["nbytes"][at])
        found = digests(memoryview(payload), piece_lengths(len(payload)))
        out += chunk_header(chunks[at], identity, found).pack() + payload.ljust(round_up(len(payload)), b"\0")
        if at:
            keys = None if at == 2 else np.frombuffer(chunks["key"][0].tobytes(), np.uint8).reshape(1, 16)
            forgets.append(len(out) // BLOCK_BYTES)
            out += forget_header(identity, Extent(number, forgets[-1]), 78, keys).pack()
    if sealed:
        out += Footer(number, identity, chunks, np.array(forgets, np.uint32)).pack(len(out) // BLOCK_BYTES)
    return bytes(out)


def _damaged_blocks(data: bytes, draw: random.Random, others: list[bytes]) -> bytes:
    """One block is damaged and, three times in four, sealed again."""
    if draw.random() < 0.2:
        return damaged_bytes(data, draw, others)
    at = draw.randrange(max(len(data) // BLOCK_BYTES, 1)) * BLOCK_BYTES
    block = data[at : at + BLOCK_BYTES]
    head = damaged_bytes(block[:200], draw, [other[:200] for other in others])
    block = head + block[len(head) :]
    return data[:at] + (_sealed(block) if draw.random() < 0.75 else block) + data[at + BLOCK_BYTES :]


class SegmentFile(Target):
    """Segment files of the SSD tier, as a start after an unclean stop reads them."""

    name, refusals, share = "segment files", FormatError, 0.5
    NUMBER = 7

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.path = directory / "00000007.seg"
        self._samples = [_segment_file(self.NUMBER, sealed=sealed) for sealed in (True, False)]
        self._hashers = ThreadPoolExecutor(1)

    def damaged(self, draw: random.Random) -> bytes:
        return _damaged_blocks(draw.choice(self._samples), draw, self._samples)

    def read(self, data: bytes) -> None:
        self.path.write_bytes(data)
        found = scan(self.path, self.NUMBER)
        if not found.sealed:
            cut_torn(self.path, found, self._hashers)
        kept = found.chunks
        for block, record in found.forgets:
            keys = record.table if len(record.table) else None
            kept = forget(kept, Extent(self.NUMBER, block).place, int(record.record["namespace"]), keys)
        into = np.empty(1 << 20, np.uint8)
        aligned = memoryview(into)[-into.ctypes.data % BLOCK_BYTES :]
        for record in newest(kept):
            if int(record["nbytes"]) <= len(aligned) and int(record["nbytes"]):
                try:
                    read_chunk(self.path, record, aligned, self._hashers)
                except FormatError as error:
                    assert str(self.path) in str(error)
        if found.damage:
            raise FormatError(found.damage)

    def names(self, error: LmpipeError) -> bool:
        return str(self.path) in str(error)

    def close(self) -> None:
        self._hashers.shutdown()


class Records(Target):
    """The same blocks by themselves, as objects of the remote tier have them too."""

    name, refusals, share = "records and footers", FormatError, 4.0

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        golden = ROOT / "tests" / "golden"
        whole = [(golden / f"{name}.bin").read_bytes() for name in ("segment_header", "record_chunk", "segment_footer")]
        self._samples = [*whole, (golden / "record_forget_keys.bin").read_bytes()]

    def damaged(self, draw: random.Random) -> tuple[int, bytes]:
        at = draw.randrange(len(self._samples))
        return at, _damaged_blocks(self._samples[at], draw, self._samples)

    def read(self, data: tuple[int, bytes]) -> None:
        kind, block = data
        if kind == 0:
            SegmentHeader.parse(block, "a place")
        elif kind == 2:
            Footer.parse(block, Footer.first_block(block[-BLOCK_BYTES:], 1 << 20, "a place"), "a place")
        else:
            header = RecordHeader.parse(block, "a place")
            assert header.blocks <= record_blocks(2**32)
            assert bytes(header.pack()) == block

    def names(self, error: LmpipeError) -> bool:
        return str(error).startswith("a place")


class ObjectNames(Target):
    """Names of remote objects, from which the remote index is made."""

    name, refusals, share = "object names", FormatError, 3.0

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self._samples = [object_name(record) for record in records(4, shards=2)]

    def damaged(self, draw: random.Random) -> tuple[str, int]:
        return damaged_text(draw.choice(self._samples), draw, self._samples), CHUNK_BYTES + draw.choice(
            (0, BLOCK_BYTES)
        )

    def read(self, data: tuple[str, int]) -> None:
        name, nbytes = data
        assert object_name(parse_name(name, nbytes)) == name

    def names(self, error: LmpipeError) -> bool:
        return str(error).startswith("object ")


class IndexRows(Target):
    """Rows of the index as an engine's lookup and load read them, over an arena that is what it should be."""

    name, refusals, share = "index rows", FormatError, 2.0

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        paths = RunDir(directory)
        for path in (paths.sessions, paths.index):
            path.mkdir(mode=0o700)
        self._node = NodeWords.create(paths.node_shm)
        self._writer = IndexWriter(directory, Tier.DRAM, 1 << 20, self._node)
        self._writer.publish()
        self._reader = IndexReader(directory, Tier.DRAM, 1 << 20, self._node)
        self._keys = [bytes([at]) * 20 for at in range(4)]
        self._arena = SlotOwner.create(directory / "arena.shm", 64 * round_up(CHUNK_BYTES), 64)
        self._session = Session.create(directory, entries=64, grants=1)

        self._holds = Holds(self._session)
        self._decoder = Decoder(1)
        self._memory = np.zeros(CHUNK_BYTES * 4, np.uint8)
        self._pool = _pool(self._memory)
        self._ids = np.zeros((1, LAYOUT.chunk_pages(TOKENS)), np.int32)
        self._one = [row.tobytes() for row in self._committed(records(3))]
        two = records(2, shards=2)
        two["key"] = two["key"][0]
        self._two = [b"".join(row.tobytes() for row in self._committed(two))]

    def _committed(self, chunks: ChunkRecords) -> ChunkRecords:
        for at in range(len(chunks)):
            slot = self._arena.lease(CHUNK_BYTES, self._session.id)
            assert slot is not None
            chunks["place"][at] = slot.place
            self._arena.advance(slot, SlotEvent.OPEN)
            self._arena.set_record(slot.index, chunks[at])
            self._arena.advance(slot, SlotEvent.CLOSE)
            self._arena.advance(slot, SlotEvent.COMMIT)
        return chunks

    def damaged(self, draw: random.Random) -> tuple[int, list[bytes]]:
        shards = draw.choice((1, 1, 2))
        rows = list(self._one if shards == 1 else self._two)
        at = draw.randrange(len(rows))
        rows[at] = damaged_bytes(rows[at], draw, self._one + self._two)
        return shards, rows

    def read(self, data: tuple[int, list[bytes]]) -> None:
        shards, rows = data
        assert self._writer.put([(key, row) for key, row in zip(self._keys, rows, strict=False) if row])
        read = self._reader.run(self._keys)
        assert not self._reader.errors
        for row in (*read, *(row for row in self._reader.rows(self._keys) if row)):
            index_keys(row_records(row))
            is_complete(merge_shard(row, self._one[0]))
        wanted = Wanted(LAYOUT.layout_id(), CHUNK_BYTES, 0, shards, 300)
        found, _ = run_of_shards([self._reader], self._keys, 0, wanted, 1.0, own=False)
        usable = wanted.usable(found, 1.0)
        assert usable is None or usable.all()
        halves = np.ascontiguousarray(found["place"]).view(np.uint32)
        slots, lives = np.ascontiguousarray(halves[1::2]), np.ascontiguousarray(halves[::2])
        held = self._holds.take(self._arena, slots, lives, 1)
        there = found[: len(held)]
        there = there[_are_in(self._arena, there)]
        self._decoder.scatter(self._arena, there, self._pool, self._ids.repeat(len(there), 0))
        held.release()
        self._writer.delete(self._keys)

    def close(self) -> None:
        self._holds.close()
        self._session.close()
        self._arena.close()
        self._reader.close()
        self._writer.close()
        self._node.close()


def _pool(memory: np.ndarray[Any, Any]) -> native.PagePool:
    planes, page = LAYOUT.plane_count, LAYOUT.page_bytes
    pages = LAYOUT.chunk_pages(TOKENS)
    offsets = np.arange(planes, dtype=np.uint64) * np.uint64(page * pages)
    sizes = np.full(planes, page, np.uint64)
    return native.PagePool([native.Region(memory.data)], np.zeros(planes, np.uint32), offsets, sizes, sizes, pages)


class Payloads(Target):
    """Encoded chunks, every codec."""

    name, refusals, share = "codec payloads", FormatError, 3.0

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        numbers = np.random.default_rng(3).normal(size=CHUNK_BYTES // 2).astype(np.float16).tobytes()
        encoders = {**CODECS, Codec.ADAPTIVE: AdaptiveCodec(_calibration())}
        self._samples: list[tuple[Codec, bytes]] = []
        for number, codec in encoders.items():
            into = bytearray(codec.bound(len(numbers)))
            source = Source(LAYOUT, TOKENS, 0) if codec.numeric else ANY
            self._samples.append((number, bytes(into[: codec.encode(memoryview(numbers), memoryview(into), source)])))
        self._others = [data for _, data in self._samples]
        self._into = bytearray(CHUNK_BYTES)

    def damaged(self, draw: random.Random) -> tuple[Codec, bytes]:
        number, data = draw.choice(self._samples)
        if draw.random() < 0.6:  # the header, and what stands next to it
            cut = draw.choice((64, 80, 200))
            return number, damaged_bytes(data[:cut], draw, self._others) + data[cut:]
        return number, damaged_bytes(data, draw, self._others)

    def read(self, data: tuple[Codec, bytes]) -> None:
        number, stored = data
        CODECS[number].decode(memoryview(stored), memoryview(self._into))


class SlotHeaders(Target):
    """An arena's headers, as a gather that starts again finds them."""

    name, refusals, share = "slot headers", SegmentError, 0.5
    SLOTS = 12

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self._arena = SlotOwner.create(directory / "arena.shm", self.SLOTS * 2 * BLOCK_BYTES, self.SLOTS)
        for at in range(self.SLOTS - 2):
            slot = self._arena.lease(4096, SessionId(9))
            assert slot is not None
            for event in list(SlotEvent)[1 : at % 5 + 1]:
                self._arena.set_record(slot.index, records(1)[0])
                self._arena.advance(slot, event)
        self._bytes = slice(HEADER_BYTES, HEADER_BYTES + self.SLOTS * SLOT_HEADER_BYTES)
        self._sample = bytes(self._arena.segment.buf[self._bytes])

    def damaged(self, draw: random.Random) -> bytes:
        return damaged_bytes(self._sample, draw, [self._sample])[: len(self._sample)].ljust(len(self._sample), b"\0")

    def read(self, data: bytes) -> None:
        self._arena.segment.buf[self._bytes] = data
        arena = SlotOwner(self._arena.segment)
        found = arena.recover(lambda session: session == 9)
        spans = sorted((arena.offset(at), arena.capacity(at)) for at in found.committed)
        assert all(a + size <= b for (a, size), (b, _) in pairwise(spans)), "slots overlap"
        for at in found.committed:
            arena.payload(at, int(arena.record(at)["nbytes"]))
        while slot := arena.lease(BLOCK_BYTES, SessionId(9)):
            assert arena.advance(slot, SlotEvent.OPEN)

    def close(self) -> None:
        self._arena.close()


class SharedSegments(Target):
    """First pages of shared-memory segments of every kind, by those who attach."""

    name, refusals, share = "shared segments", SegmentError, 0.7

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        (directory / "sessions").mkdir(mode=0o700)
        self.path = directory / "sessions" / f"{7:016x}.holds"
        Session.create(directory, entries=4, grants=2).close()
        self._samples: list[tuple[SegmentKind, bytes]] = []
        json = b'["a","b"]'
        for kind in SegmentKind:
            count, nbytes = (2, 3 * BLOCK_BYTES) if kind is SegmentKind.COUNTERS else (4, 4 * BLOCK_BYTES)
            text = json if kind is SegmentKind.COUNTERS else b""
            with Segment.create(self.path, kind, nbytes, count=count, grants=2, json=text) as segment:
                self._samples.append((kind, bytes(segment.buf)))
                segment.unlink()
        self._others = [data[:HEADER_BYTES] for _, data in self._samples]
        self._scanner = HoldScanner(SessionDir(directory))

    def damaged(self, draw: random.Random) -> tuple[SegmentKind, bytes]:
        kind, data = draw.choice(self._samples)
        if draw.random() < 0.1:
            return kind, damaged_bytes(data, draw, self._others)
        head = damaged_bytes(data[:96], draw, self._others)[:96]
        return kind, head + data[len(head) :]

    def read(self, data: tuple[SegmentKind, bytes]) -> None:
        kind, content = data
        self.path.write_bytes(content)
        self.path.chmod(0o600)
        try:
            if kind is SegmentKind.COUNTERS:
                Counters.read(self.path)
            elif kind is SegmentKind.HOLDS:
                try:
                    self._scanner.held()
                    self._scanner.granted(SessionId(7), 1)
                finally:
                    self._scanner.close()
            elif kind is SegmentKind.SLOTS:
                with Segment.attach(self.path, kind) as segment:
                    SlotOwner(segment).recover(lambda _: False)
            else:
                Segment.attach(self.path, kind, readonly=True).close()
        finally:
            self.path.unlink()

    def names(self, error: LmpipeError) -> bool:
        return str(self.path) in str(error)


TARGETS: dict[str, Callable[[Path], Target]] = {
    kind.name: kind
    for kind in (
        Frames,
        TopologyText,
        CalibrationFile,
        NodeNote,
        Notes,
        SegmentFile,
        Records,
        ObjectNames,
        IndexRows,
        Payloads,
        SlotHeaders,
        SharedSegments,
    )
}


def inputs(target: Target, seed: int, first: int, count: int) -> Iterator[tuple[int, Any]]:
    """Damaged inputs by number: the same seed and number, the same input."""
    for number in range(first, first + count):
        yield number, target.damaged(random.Random(f"{target.name} {seed} {number}"))
