"""The stages below gather, joined by hand in one thread: real segments, sessions, holds, indexes and tiers; no sockets.

The test plays gather: it leases, fills and commits arena slots, and hears what the first stage answers.
"""

from __future__ import annotations

import contextlib
import math
import os
import secrets
import shutil
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from lmpipe.bus import Channel, Peer
from lmpipe.codecs import CODECS, ChunkCodec, codec_named
from lmpipe.handles import CHUNK, ChunkRecords, Codec, SessionId, Slot, Tier
from lmpipe.index import IndexWriter
from lmpipe.layout import KVLayout
from lmpipe.lifecycle import SlotEvent
from lmpipe.messages import Load, Message, Save
from lmpipe.shm.hold import Holds, HoldScanner
from lmpipe.shm.node import NodeWords
from lmpipe.shm.session import Session, SessionDir
from lmpipe.shm.slots import SlotOwner
from lmpipe.stages.base import Stage
from lmpipe.stages.compress import Compress
from lmpipe.stages.landing import Landings
from lmpipe.stages.persist import Persist
from lmpipe.stages.replicate import Replicate
from lmpipe.stages.transit import Ring, Sources
from lmpipe.tiers.remote_object import RemoteTier, open_store
from lmpipe.tiers.ssd import FlushPolicy, SsdTier

GATHER = SessionId(1)
MIB = 1 << 20


class Seat:
    """A Context whose jobs run when the chain is turned, and whose messages are handed over at once."""

    def __init__(self, chain: Chain, name: str, session: Session) -> None:
        self._chain, self.name, self.session = chain, name, session
        self.stage: Stage | None = None
        self.jobs: deque[tuple[Callable[[], Any], Callable[[Any], None], Callable[[Exception], None], str]] = deque()
        self.counts: dict[str, int] = defaultdict(int)
        self.draining = False
        self.reads_answers = True
        self.identity = secrets.token_bytes(4)

    @property
    def chain(self) -> Mapping[str, SessionId]:
        return {seat.name: seat.session.id for seat in self._chain.below(self)}

    @property
    def has_down(self) -> bool:
        return self.name != self._chain.names[-1]

    @property
    def backlog(self) -> int:
        return len(self.jobs)

    def now_s(self) -> float:
        return self._chain.now_s

    def reply(self, peer: Peer, message: Message) -> bool:
        above = self._chain.above(self)
        if above is None:
            self._chain.heard.append(message)
        elif above.stage is not None:
            above.stage.handle(None, message)
        return True

    def down(self, channel: Channel, message: Message) -> bool:
        below = self._chain.below(self)
        if not below or below[0].stage is None:
            return False
        below[0].stage.handle(Peer(channel, self.identity), message)
        return True

    def submit(
        self,
        fn: Callable[[], Any],
        done: Callable[[Any], None],
        failed: Callable[[Exception], None],
        name: str,
        *,
        urgent: bool = False,
        nbytes: int = 0,
        chunks: int = 0,
    ) -> None:
        self.jobs.append((fn, done, failed, name))

    def count(self, name: str, n: int = 1) -> None:
        self.counts[name] += n

    def gauge(self, name: str, value: int) -> None:
        self.counts[name] = value

    def span(self, name: str, nbytes: int = 0, chunks: int = 0) -> AbstractContextManager[object]:
        return contextlib.nullcontext()

    def turn(self) -> bool:
        """One finished job and a step; whether a job ran."""
        assert self.stage is not None
        ran = bool(self.jobs)
        if ran:
            fn, done, failed, _ = self.jobs.popleft()
            try:
                result = fn()
            except Exception as error:  # noqa: BLE001 - as the pool does
                failed(error)
            else:
                done(result)
        self.stage.step(self._chain.now_s)
        return ran or bool(self.jobs)


class Chain:
    """The stages of `names`, first to last, over one arena. `own`: codecs of namespaces; `layout`: of all chunks."""

    def __init__(
        self,
        root: Path,
        run_dir: Path,
        names: list[str],
        *,
        codec: str = "raw",
        own: Mapping[int, ChunkCodec] | None = None,
        layout: KVLayout | None = None,
        flush: FlushPolicy = "each",
        ring_bytes: int = 2 * MIB,
        ssd_bytes: int = 64 * MIB,
    ) -> None:
        self.root, self.run_dir, self.names = root, run_dir, names
        self._codec, self._flush, self._ssd_bytes = codec, flush, ssd_bytes
        self._own, self._layout = own or {}, layout
        self.now_s = 1000.0
        self.heard: list[Message] = []
        self.node = NodeWords.create(run_dir / "node.shm")
        self.arena = SlotOwner.create(run_dir / "arena.shm", 16 * MIB, 256)
        rings = names if codec != "raw" else []
        self.rings = {name: SlotOwner.create(run_dir / f"ring.{name}.shm", ring_bytes, 64) for name in rings}
        self.sessions = SessionDir(run_dir)
        self.seats: dict[str, Seat] = {}
        self._undo: dict[str, contextlib.ExitStack] = {}
        self.tiers: dict[str, Any] = {}
        for name in reversed(names):
            self.start(name)
        self.identity = b"gath"
        self._next = 0

    # Lives and deaths.

    def start(self, name: str) -> None:
        """A new life of a stage: a session, a hold table, an index, its tier recovered."""
        undo = self._undo[name] = contextlib.ExitStack()
        session = undo.enter_context(Session.create(self.run_dir))
        holds = Holds(session)
        undo.callback(holds.close)
        scanner = HoldScanner(self.sessions)
        undo.callback(scanner.close)
        seat = self.seats[name] = Seat(self, name, session)
        tables = {"arena": self.arena, **{f"ring.{key}": ring for key, ring in self.rings.items()}}
        sources = Sources(tables, holds)
        ring = Ring(self.rings[name], session.id, scanner, self.sessions) if name in self.rings else None
        landings = Landings(self.arena, ring, f"ring.{name}", session.id, self.sessions.alive, math.inf)
        if name == "compress":
            assert ring is not None
            tiers = [tier for tier, stage in ((Tier.SSD, "persist"), (Tier.REMOTE, "replicate")) if stage in self.names]
            seat.stage = Compress(
                seat, self._codec_of, lambda _: self._layout, CODECS, self.arena, ring, sources, tiers, math.inf
            )
        elif name == "persist":
            index = IndexWriter(self.run_dir, Tier.SSD, MIB, self.node)
            undo.callback(index.close)
            tier = SsdTier(self.root / "ssd", self._ssd_bytes, self._flush, 4 * MIB, index, lambda: self.now_s)
            tier.recover()
            self.tiers[name] = tier
            seat.stage = Persist(seat, tier, sources, landings, 0.2 if self._flush == "interval" else None)
        else:
            index = IndexWriter(self.run_dir, Tier.REMOTE, MIB, self.node)
            undo.callback(index.close)
            remote = RemoteTier(open_store(f"file://{self.root}/objects", 1.0), 64 * MIB, index, lambda: self.now_s)
            self.tiers[name] = remote
            seat.stage = Replicate(seat, remote, sources, landings)
        self._tell_above(name)

    def _codec_of(self, namespace: int) -> ChunkCodec:
        return self._own.get(namespace, codec_named(self._codec))

    def stop(self, name: str) -> None:
        """The stage's life ends, orderly for its files, abruptly for its neighbours."""
        seat = self.seats.pop(name)
        assert seat.stage is not None
        seat.stage.close()
        self._undo.pop(name).close()
        self._tell_above(name)

    def _tell_above(self, name: str) -> None:
        for other in reversed(self.names[: self.names.index(name)]):
            seat = self.seats.get(other)
            if seat is not None and seat.stage is not None:
                seat.stage.below_changed(dict(seat.chain))

    def below(self, seat: Seat) -> list[Seat]:
        found: list[Seat] = []
        for name in self.names[self.names.index(seat.name) + 1 :]:
            if name not in self.seats or self.seats[name].stage is None:
                break
            found.append(self.seats[name])
        return found

    def above(self, seat: Seat) -> Seat | None:
        at = self.names.index(seat.name)
        return self.seats.get(self.names[at - 1]) if at else None

    def close(self) -> None:
        for name in list(self.seats):
            self.stop(name)
        for ring in self.rings.values():
            ring.close()
        self.arena.close()
        self.node.close()

    # What gather does.

    def send(self, channel: Channel, message: Message) -> None:
        stage = self.seats[self.names[0]].stage
        assert stage is not None
        stage.handle(Peer(channel, self.identity), message)

    def run(self) -> list[Message]:
        """Turn all stages until nothing moves; what the first stage has said since the last call."""
        self.now_s += 1.0
        for _ in range(10_000):
            if not sum(seat.turn() for seat in list(self.seats.values())):
                break
        heard, self.heard = self.heard, []
        return heard

    def committed(
        self, count: int, nbytes: int, *, seed: int = 0, namespace: int = 7, fidelity: int = 0, position: int = 0
    ) -> ChunkRecords:
        """Chunks in the arena, as gather has them after a save."""
        records = np.zeros(count, CHUNK)
        noise = np.random.default_rng(seed).integers(0, 256, (count, 16), np.uint8)
        records["key"], records["shards"] = noise.view("V16").reshape(-1), 1
        records["raw_bytes"] = records["nbytes"] = nbytes
        records["namespace"], records["layout"], records["saved_at"] = namespace, 11, 1_700_000_000
        records["fidelity"], records["position"] = fidelity, np.arange(position, position + count)
        for at in range(count):
            slot = self.arena.lease(nbytes, GATHER)
            assert slot is not None
            self.arena.advance(slot, SlotEvent.OPEN)
            self.arena.payload(slot.index, nbytes)[:] = content(records[at])
            records["place"][at] = slot.place
            self.arena.set_record(slot.index, records[at])
            self.arena.advance(slot, SlotEvent.CLOSE)
            self.arena.advance(slot, SlotEvent.COMMIT)
        return records

    def evict(self, records: ChunkRecords) -> None:
        for place in records["place"].tolist():
            self.arena.advance(Slot.from_place(place), SlotEvent.DOOM)
            assert self.arena.free(Slot.from_place(place))

    def save(self, records: ChunkRecords) -> None:
        self._next += 1
        self.send("save", Save(GATHER, self._next, "arena", records))

    def load(self, records: ChunkRecords, writer: str | None = None, deadline_ns: int = 0) -> ChunkRecords:
        """Ask for chunks as stored rows say them, into new slots; the records as asked. `writer`: default by codec."""
        asked = records.copy()
        for at in range(len(asked)):
            name = writer or ("persist" if asked["codec"][at] == Codec.RAW else "compress")
            slot = self.arena.lease(int(asked["raw_bytes"][at]), self.seats[name].session.id)
            assert slot is not None
            asked["place"][at] = slot.place
        self._next += 1
        self.send("load", Load(GATHER, self._next, asked, "arena", deadline_ns))
        return asked

    def landed(self, records: ChunkRecords) -> bool:
        """Whether all these slots are READY with the right bytes and record."""
        for record in records:
            slot = Slot.from_place(int(record["place"]))
            there = self.arena.record(slot.index)
            assert there["key"] == record["key"] and int(there["codec"]) == Codec.RAW
            assert int(there["nbytes"]) == int(there["raw_bytes"]) == int(record["raw_bytes"])
            assert bytes(self.arena.payload(slot.index, int(there["nbytes"]))) == content(record)
            if not self.arena.advance(slot, SlotEvent.COMMIT):
                return False
        return True

    def stored(self, name: str, records: ChunkRecords) -> ChunkRecords:
        """The rows that a tier has of these chunks (and any codec)."""
        found: list[bytes] = []
        for record in records:
            for codec in Codec:
                index = self.tiers[name]._index
                from_row = index.get(record["anchor"].tobytes() + record["key"].tobytes())
                if from_row and int(np.frombuffer(from_row, CHUNK)[0]["codec"]) == codec:
                    found.append(from_row)
        return np.frombuffer(b"".join(found), CHUNK)


def content(record: np.void) -> bytes:
    """Bytes that follow from the key, and shrink by half: every second one is zero."""
    made = np.zeros(int(record["raw_bytes"]), np.uint8)
    rng = np.random.default_rng(int.from_bytes(record["key"].tobytes(), "little"))
    made[::2] = rng.integers(0, 256, len(made[::2]), np.uint8)
    return made.tobytes()


@contextmanager
def a_chain(root: Path, names: list[str], **options: Any) -> Iterator[Chain]:
    run_dir = Path(f"/dev/shm/lmpipe-test-{os.getpid()}-{secrets.token_hex(4)}")
    for part in ("index", "sessions"):
        (run_dir / part).mkdir(parents=True, mode=0o700)
    run_dir.chmod(0o700)
    chain = Chain(root, run_dir, names, **options)
    try:
        yield chain
    finally:
        chain.close()
        shutil.rmtree(run_dir)


def of(heard: list[Message], kind: type[Message]) -> list[Any]:
    return [message for message in heard if isinstance(message, kind)]


def keys(messages: list[Any]) -> set[bytes]:
    """Keys of all chunks that messages name."""
    return {record["key"].tobytes() for message in messages for record in message.chunks}
