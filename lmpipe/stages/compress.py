"""compress: raw slot → encoded slot on the way down, encoded slot → raw slot on the way up. Owns no chunk, only its
ring.

    Save in the arena ─▶ hold, encode into the own ring ─▶ Save in "ring.compress"; the slot goes back when every tier
    has answered Load ─▶ remembered, passed on ─▶ Loaded in a ring below ─▶ hold, decode into the arena slot, close ─▶
    Loaded, Release

A chunk that does not shrink, that its codec cannot write, or whose layout a codec would have to know and nobody has
said, goes on raw. What was encoded with a loss says so in its record, also when it is raw again. Encode and decode run
as jobs; decoding overtakes.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from lmpipe import failpoints
from lmpipe import messages as m
from lmpipe.codecs import ANY, ChunkCodec, Source
from lmpipe.errors import CannotEncode, LmpipeError, ProtocolViolation
from lmpipe.handles import ChunkRecords, Codec, SessionId, Slot, Tier
from lmpipe.index_row import index_key
from lmpipe.layout import KVLayout
from lmpipe.shm.table import SlotTable
from lmpipe.stages.base import Context, Peer
from lmpipe.stages.landing import close_arena, is_leased, open_arena
from lmpipe.stages.links import Links
from lmpipe.stages.recalls import Recalls
from lmpipe.stages.transit import Reading, Ring, Sources

log = logging.getLogger("lmpipe.compress")

ENCODES_AT_ONCE = 1
DECODES_AT_ONCE = 2
QUEUE_CHUNKS = 256
TICK_S = 1.0
STAGES = {Tier.SSD: "persist", Tier.REMOTE: "replicate"}
SEGMENT = "ring.compress"
REASONS_SAID = 32
"""Different reasons for not encoding that are logged; all are counted."""

Name = tuple[bytes, int, int]
"""Index key, shard and fidelity: a more exact chunk of the same key is another one."""


@dataclass(slots=True)
class _Sent:
    """An encoded chunk that tiers below may be reading."""

    slot: Slot
    record: np.void
    """As in the ring."""
    original: np.void
    """As it came: the answer names this."""
    awaited: dict[Tier, int]
    """Answers still to come."""
    sent_s: float


@dataclass(slots=True)
class _Wanted:
    """A chunk asked for from below; `record` has the arena slot."""

    record: np.void
    load_id: int
    deadline_ns: int
    asked_s: float


class Compress:
    """The stage. `codec_of` a namespace id and `layout_of` a layout id say how to encode; `sources` has the arena and
    the rings below; `tiers` are those that will answer; what is not answered within `answer_s` is not waited for.
    """

    name = "compress"

    def __init__(
        self,
        context: Context,
        codec_of: Callable[[int], ChunkCodec],
        layout_of: Callable[[int], KVLayout | None],
        codecs: Mapping[Codec, ChunkCodec],
        arena: SlotTable,
        ring: Ring,
        sources: Sources,
        tiers: Sequence[Tier],
        answer_s: float,
    ) -> None:
        self._answer_s = answer_s
        self._context, self._codecs = context, codecs
        self._codec_of, self._layout_of = codec_of, layout_of
        self._arena, self._ring, self._sources, self._tiers = arena, ring, sources, tuple(tiers)
        self._links = Links(context)
        self._recalls = Recalls(context, self._links, None)
        self._saves: deque[np.void | m.Invalidate] = deque()
        self._sent: dict[int, _Sent] = {}
        self._by_name: dict[Name, int] = {}
        self._wanted: dict[Name, _Wanted] = {}
        self._arrived: deque[tuple[str, np.void, _Wanted]] = deque()
        self._encoding = self._decoding = 0
        self._writing: set[int] = set()
        """Places in the arena that are being decoded into."""
        self._said: set[str] = set()
        self._chain = dict(context.chain)
        self._tick_at_s = 0.0

    @property
    def _session(self) -> SessionId:
        return self._context.session.id

    def handle(self, peer: Peer | None, message: m.Message) -> None:
        """A message from above (`peer`) or from below."""
        if peer is None:
            self._from_below(message)
            return
        self._links.heard(peer)
        match message:
            case m.Save() if message.segment == "arena":
                self._saves.extend(message.chunks)
            case m.Load():
                self._load(message)
            case m.Cancel():
                self._context.down("load", message)
            case m.Invalidate():
                self._saves.append(message)  # behind the saves that came before it
            case _:
                self._context.count("unexpected_messages")

    def _from_below(self, message: m.Message) -> None:
        match message:
            case m.Persisted():
                chunks = self._answered(message.tier, message.chunks)
                self._links.up("save", replace(message, session=self._session, chunks=chunks))
            case m.SaveDropped():
                chunks = self._answered(message.tier, message.chunks)
                self._links.up("save", replace(message, session=self._session, chunks=chunks))
            case m.Evicted():
                self._links.up("save", replace(message, session=self._session))
            case m.Invalidated():
                self._recalls.answered_below(message)
            case m.Loaded() if message.segment == "arena":
                self._links.up("load", replace(message, session=self._session))
            case m.Loaded():
                self._loaded(message)
            case m.LoadFailed():
                self._load_failed(message)
            case _:
                self._context.count("unexpected_messages")

    # ---- save ----

    def _encode_next(self) -> bool:
        """Begin with what is first: a save, or an invalidation, which no save may pass. False: the ring is full."""
        record = self._saves[0]
        if isinstance(record, m.Invalidate):
            if self._encoding:
                return False
            self._saves.popleft()
            self._recalls.begin(record)
            return True
        known = self._by_name.get(_name(record))
        if known is not None:  # asked again while tiers still have it
            self._saves.popleft()
            self._sent[known].original = record  # it may lie elsewhere by now
            self._send(self._sent[known])
            return True
        codec = self._codec_of(int(record["namespace"]))
        source = self._source(record)
        if codec.number is Codec.RAW or (codec.numeric and source is ANY):
            self._saves.popleft()
            self._pass_on(record, "" if codec.number is Codec.RAW else "unknown_layout_chunks")
            return True
        try:
            bound = codec.bound(int(record["nbytes"]), source)
        except CannotEncode as error:
            self._saves.popleft()
            self._cannot(codec, error, record)
            return True
        if bound > self._ring.slots.capacity_bytes:
            self._saves.popleft()
            self._drop("larger than the ring", record)
            return True
        found = self._ring.open(bound)
        if found is None:
            return False
        self._saves.popleft()
        reading = self._sources.take("arena", record.reshape(1))
        if len(reading.records):
            self._encode(record, codec, source, reading, *found)
        else:
            reading.release()
            self._ring.free(found[0])
            self._drop("evicted before it was encoded", record)
        return True

    def _source(self, record: np.void) -> Source:
        layout = self._layout_of(int(record["layout"]))
        if layout is None:
            return ANY
        return Source(layout, layout.tokens_of(int(record["raw_bytes"])), int(record["position"]))

    def _encode(
        self, record: np.void, codec: ChunkCodec, source: Source, reading: Reading, slot: Slot, into: memoryview
    ) -> None:
        nbytes = int(record["nbytes"])

        def encode() -> int:
            failpoints.hit("compress.encode.held")
            return codec.encode(reading.payloads[0], into, source)

        def ended() -> None:
            self._encoding -= 1
            if reading.lost:
                raise ProtocolViolation("a hold was lost while its chunk was encoded")
            reading.release()

        def done(stored: int) -> None:
            failpoints.hit("compress.encode.encoded")
            ended()
            if stored >= nbytes:
                self._ring.free(slot)
                self._pass_on(record, "incompressible_chunks")
                return
            self._context.count("encoded_chunks")
            self._context.count("encoded_bytes", stored)
            self._context.count("encode_raw_bytes", nbytes)
            encoded = record.copy()
            encoded["codec"], encoded["nbytes"] = codec.number, stored
            encoded["fidelity"] = max(int(record["fidelity"]), codec.fidelity)
            self._ring.publish(slot, encoded)
            failpoints.hit("compress.encode.published")
            sent = _Sent(slot, encoded, record, dict.fromkeys(self._tiers, 0), self._context.now_s())
            self._sent[slot.place] = sent
            self._by_name[_name(record)] = slot.place
            self._send(sent)

        def failed(error: Exception) -> None:
            if not isinstance(error, CannotEncode):
                raise error
            ended()
            self._ring.free(slot)
            self._cannot(codec, error, record)

        self._encoding += 1
        self._context.submit(encode, done, failed, "encode", nbytes=nbytes, chunks=1)

    def _pass_on(self, record: np.void, reason: str) -> None:
        """To the tiers below as it is."""
        self._context.count("passed_chunks")
        if reason:
            self._context.count(reason)
        self._links.down("save", m.Save(self._session, 0, "arena", record.reshape(1)))

    def _cannot(self, codec: ChunkCodec, error: CannotEncode, record: np.void) -> None:
        reason = f"{codec.name}: {error}"
        if reason not in self._said and len(self._said) < REASONS_SAID:
            self._said.add(reason)
            log.warning("a chunk is stored raw: %s", reason)
        self._pass_on(record, "unencodable_chunks")

    def _send(self, sent: _Sent) -> None:
        for tier in self._tiers:
            sent.awaited[tier] += 1
        self._links.down("save", m.Save(self._session, 0, SEGMENT, sent.record.reshape(1)))

    def _drop(self, reason: str, record: np.void) -> None:
        self._context.count("failed_chunks")
        for tier in self._tiers:
            self._links.up("save", m.SaveDropped(self._session, 0, tier, reason, record.reshape(1)))

    def _answered(self, tier: Tier, chunks: ChunkRecords) -> ChunkRecords:
        """Count answers, take back slots that nobody reads any more; the chunks as those above know them."""
        originals = chunks.copy()
        for at, record in enumerate(chunks):
            sent = self._sent.get(int(record["place"]))
            if sent is None or int(record["codec"]) == Codec.RAW:
                continue
            originals[at] = sent.original
            sent.awaited[tier] = max(sent.awaited.get(tier, 0) - 1, 0)
            if not any(sent.awaited.values()):
                self._forget(sent)
                self._ring.free(sent.slot)
                failpoints.hit("compress.encode.freed")
        return originals

    def _forget(self, sent: _Sent) -> None:
        del self._sent[sent.slot.place]
        del self._by_name[_name(sent.original)]

    # ---- load ----

    def _load(self, message: m.Load) -> None:
        for record in message.chunks:
            if int(record["codec"]) != Codec.RAW:
                now_s = self._context.now_s()
                self._wanted[_name(record)] = _Wanted(record, message.load_id, message.deadline_ns, now_s)
        relayed = replace(message, session=self._session)
        if not (self._context.chain and self._context.down("load", relayed)):
            for record in message.chunks:
                self._wanted.pop(_name(record), None)
            self._fail(message.load_id, "the tiers below are down", message.chunks)

    def _load_failed(self, message: m.LoadFailed) -> None:
        for record in message.chunks:
            self._wanted.pop(_name(record), None)
        # Asked twice, and the first answer is being decoded: gather must not take the slot back meanwhile.
        chunks = message.chunks[~np.isin(message.chunks["place"], list(self._writing))]
        if len(chunks):
            self._links.up("load", replace(message, session=self._session, chunks=chunks))

    def _loaded(self, message: m.Loaded) -> None:
        for record in message.chunks:
            wanted = self._wanted.pop(_name(record), None)
            if wanted is None or int(wanted.record["place"]) in self._writing:  # asked twice: one answer is enough
                self._release(message.segment, record)
            else:
                self._arrived.append((message.segment, record, wanted))

    def _decode_next(self, now_s: float) -> None:
        segment, record, wanted = self._arrived.popleft()
        place = int(wanted.record["place"])
        if place in self._writing:
            self._release(segment, record)
            return
        into, reason = None, ""
        if wanted.deadline_ns and now_s * 1e9 >= wanted.deadline_ns:
            reason = "deadline"
        reading = self._sources.take(segment, record.reshape(1)[: 0 if reason else 1])
        if not reason and not len(reading.records):
            reason = "stale"
        if not reason:
            into = open_arena(self._arena, wanted.record, self._session)
            reason = "stale" if into is None else ""
        if into is None:
            reading.release()
            self._release(segment, record)
            self._fail(wanted.load_id, reason, wanted.record.reshape(1))
            return
        raw_bytes, codec = int(record["raw_bytes"]), self._codecs[Codec(int(record["codec"]))]

        def decode() -> None:
            failpoints.hit("compress.decode.opened")
            codec.decode(reading.payloads[0], into[:raw_bytes])
            failpoints.hit("compress.decode.decoded")

        def ended() -> None:
            self._decoding -= 1
            self._writing.discard(place)
            reading.release()
            self._release(segment, record)

        def done(_: None) -> None:
            lost = reading.lost
            ended()
            there = None if lost else close_arena(self._arena, wanted.record)
            if there is None:
                self._fail(wanted.load_id, "stale", wanted.record.reshape(1))
                return
            failpoints.hit("compress.decode.closed")
            self._context.count("decoded_chunks")
            self._context.count("decoded_bytes", raw_bytes)
            self._links.up("load", m.Loaded(self._session, wanted.load_id, "arena", there.reshape(1)))

        def failed(error: Exception) -> None:
            ended()
            if not isinstance(error, LmpipeError):
                raise error
            self._context.count("failed_chunks")
            self._fail(wanted.load_id, str(error), wanted.record.reshape(1))

        self._decoding += 1
        self._writing.add(place)
        self._context.submit(decode, done, failed, "decode", urgent=True, nbytes=raw_bytes, chunks=1)

    def _release(self, segment: str, record: np.void) -> None:
        places = np.array([int(record["place"])], np.uint64)
        self._links.down("load", m.Release(self._session, segment, places))

    def _fail(self, load_id: int, reason: str, chunks: ChunkRecords) -> None:
        self._links.up("load", m.LoadFailed(self._session, load_id, reason, chunks))

    # ---- time, and the stages below ----

    def step(self, now_s: float) -> float | None:
        """Begin what can begin."""
        self._links.pump()
        if now_s >= self._tick_at_s:
            self._tick_at_s = now_s + TICK_S
            self._forget_unanswered(now_s)
            self._ring.tick()
            self._context.gauge("ring_used_bytes", self._ring.slots.used_bytes)
            self._context.gauge("ring_capacity_bytes", self._ring.slots.capacity_bytes)
        while self._arrived and self._decoding < DECODES_AT_ONCE:
            self._decode_next(now_s)
        while self._saves and self._encoding < ENCODES_AT_ONCE and self._encode_next():
            pass
        return max(self._tick_at_s - now_s, 0.0)

    def _forget_unanswered(self, now_s: float) -> None:
        """Question or answer was lost, though those below live: gather sends again, or asks again, what it misses."""
        before_s = now_s - self._answer_s
        for sent in [sent for sent in self._sent.values() if sent.sent_s < before_s]:
            self._forget(sent)
            self._ring.retire(sent.slot)
        for name in [name for name, wanted in self._wanted.items() if wanted.asked_s < before_s]:
            del self._wanted[name]

    def below_changed(self, chain: dict[str, SessionId]) -> None:
        """Stages below are others, or gone: their answers will not come. gather sends again what it misses."""
        gone = {tier for tier in self._tiers if chain.get(STAGES[tier]) != self._chain.get(STAGES[tier])}
        self._chain = dict(chain)
        for sent in list(self._sent.values()):
            for tier in gone:
                sent.awaited[tier] = 0
            if not any(sent.awaited.values()):
                self._forget(sent)
                self._ring.retire(sent.slot)  # who does not answer may be stopped, not dead
        wanted, self._wanted = self._wanted, {}
        for want in wanted.values():
            if is_leased(self._arena, want.record, self._session):
                self._fail(want.load_id, "a tier below went away", want.record.reshape(1))
        self._links.forget_saves()
        self._recalls.below_changed()
        self._links.pump()

    def accepts_saves(self) -> bool:
        """False while enough waits."""
        return len(self._saves) < QUEUE_CHUNKS and not self._links.crowded

    def busy(self) -> bool:
        """Whether a chunk is on its way through."""
        working = self._saves or self._encoding or self._decoding or self._arrived
        return bool(working or (self._context.chain and self._sent))

    def close(self) -> None:
        """The ring is the segment's, not this life's."""


def _name(record: np.void) -> Name:
    return index_key(record.tobytes()), int(record["shard"]), int(record["fidelity"])
