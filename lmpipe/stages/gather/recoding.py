"""Re-encoding of what lies in DRAM: raw chunks are made smaller in the background, and an order turns chunks of
any codec into those of another.

    chunk ─▶ encode into scratch memory (job) ─▶ lease a slot of that size, copy (job) ─▶ close ─▶ exchange it for the
    old slot, which goes when nobody holds it

A chunk that a tier below has still to take stays as it is: so what the tiers below are given is always raw, and an
encoded chunk in DRAM is never pending. One chunk is worked on at a time, on a thread that yields the processor. A row
that was evicted or invalidated meanwhile wins: the new slot is thrown away.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from lmpipe import failpoints, native
from lmpipe import messages as m
from lmpipe.books import LayoutBook
from lmpipe.codecs import CODECS, ChunkCodec, Source
from lmpipe.errors import CannotEncode, LmpipeError
from lmpipe.handles import CHUNK, Codec, Fidelity, Slot
from lmpipe.lifecycle import SlotEvent
from lmpipe.shm.allocator import size_class
from lmpipe.stages.base import Context, Peer
from lmpipe.stages.gather.outflow import Name
from lmpipe.tiers.dram import DramTier

LOOKS = 1024
"""How many chunks one step looks at, of which it begins with one at most."""
ORDERS = 16
REASONS, REASON_LETTERS = 16, 200
"""Of an order's answer: codecs may say what is wrong with each chunk."""
SPARE_NAMES = 4096
"""So many more names than rows may wait before those of rows that are gone are thrown out."""


@dataclass(frozen=True, slots=True)
class Coding:
    """What gather has to know of codecs."""

    encodes: bool
    """Whether the topology wants any chunk encoded in DRAM."""
    wanted: Callable[[int], ChunkCodec]
    """The codec that the topology wants in DRAM for the chunks of a namespace id."""
    named: Callable[[str], ChunkCodec]
    """A codec by its name; KeyError: there is none."""
    is_exact: Callable[[int], bool]
    """Whether the chunks of a namespace id must lose nothing."""
    layouts: LayoutBook


@dataclass(slots=True)
class _Order:
    """A `Recode` that is being carried out."""

    peer: Peer
    ref: int
    codec: ChunkCodec
    names: deque[Name]
    recoded: int = 0
    before_bytes: int = 0
    after_bytes: int = 0
    left: dict[str, int] = field(default_factory=dict[str, int])

    def leave(self, reason: str) -> None:
        """One chunk stays as it is."""
        reason = reason[:REASON_LETTERS]
        if reason not in self.left and len(self.left) >= REASONS:
            reason = "for other reasons"
        self.left[reason] = self.left.get(reason, 0) + 1


@dataclass(frozen=True, slots=True)
class _Work:
    """One chunk that is worked on. `slot` has it as `record` says, and is kept meanwhile."""

    name: Name
    record: np.void
    slot: Slot
    codec: ChunkCodec
    order: _Order | None


class Recoder:
    """The chunks that wait to be re-encoded, oldest first, and the one that is."""

    def __init__(self, context: Context, dram: DramTier, coding: Coding) -> None:
        self._context, self._dram, self._coding = context, dram, coding
        self._copier = native.Copier(1)
        self._due: dict[Name, None] = {}
        self._held: list[Name] = []
        """Somebody holds them, or there is no room: looked at again after a while."""
        self._fresh: list[Name] = []
        self._aged: list[Name] = []
        self._unlaid: dict[int, list[Name]] = {}
        """By layout id: their codec has to know a layout that nobody has told."""
        self._orders: deque[_Order] = deque()
        self._decoded, self._encoded = _Scratch(), _Scratch()
        self._working = False

    def add(self, names: Iterable[Name]) -> None:
        """Chunks that no tier below waits for any more, to be made smaller if the topology says so.

        Those that were brought up from below wait for a second or two: who asked for them is about to hold them.
        """
        if not self._coding.encodes:
            return
        saved: list[Name] = []
        for name in names:
            row = self._dram.row(name[0])
            (saved if row is not None and row.savers.get(name[1]) else self._fresh).append(name)
        self._add_due(saved)

    def _add_due(self, names: Iterable[Name]) -> None:
        """By address, if they come together: what one leaves of its room then grows together with the next one's."""
        self._due.update(dict.fromkeys(sorted(names, key=self._offset)))
        if len(self._due) > len(self._dram) + SPARE_NAMES:
            self._due = {name: None for name in self._due if self._dram.row(name[0]) is not None}

    def _offset(self, name: Name) -> int:
        row = self._dram.row(name[0])
        slot = row.slots.get(name[1]) if row is not None else None
        return 0 if slot is None else self._dram.arena.offset(slot)

    def order(self, peer: Peer, message: m.Recode) -> None:
        """Turn chunks of a namespace id (0: of all) into those of another codec, and answer when that is done."""
        try:
            codec = self._coding.named(message.codec)
        except KeyError:
            reason = f"this node knows no codec {message.codec!r}"
        else:
            if len(self._orders) < ORDERS:
                names = deque(sorted(self._dram.names(message.namespace), key=self._offset))
                self._orders.append(_Order(peer, message.ref, codec, names))
                return
            reason = f"{ORDERS} such orders are being carried out; ask again later"
        self._context.reply(peer, m.Refused(self._context.session.id, "Recode", message.ref, reason))

    def retry(self) -> None:
        """To be called every second: look again at those that could not be worked on."""
        again = self._held + self._aged
        self._held, self._aged, self._fresh = [], self._fresh, []
        self._add_due(again)
        for layout in [layout for layout in self._unlaid if self._coding.layouts.find(layout)]:
            self._add_due(self._unlaid.pop(layout))

    def step(self) -> bool:
        """Begin with a chunk, if none is worked on. Returns whether there is more to look at, at once."""
        held: frozenset[int] | None = None  # read once for all of them
        for _ in range(LOOKS):
            if self._working:
                return False
            if self._orders:
                self._continue(self._orders[0])
            elif self._due:
                name = next(iter(self._due))
                del self._due[name]
                held = self._dram.held() if held is None else held
                self._consider(name, held)
            else:
                return False
        return not self._working

    def _consider(self, name: Name, held: frozenset[int]) -> None:
        """Make a raw chunk smaller, if it is still there, nobody holds it, and it can be."""
        row = self._dram.row(name[0])
        if row is None or name[1] not in row.records or name[1] in row.stays_raw:
            return
        record = np.frombuffer(row.records[name[1]], CHUNK)[0]
        codec = self._coding.wanted(int(record["namespace"]))
        if codec.number == Codec.RAW or int(record["codec"]) != Codec.RAW:
            return
        if self._dram.arena.pending(row.slots[name[1]]):
            return
        if codec.numeric and self._coding.layouts.find(int(record["layout"])) is None:
            self._unlaid.setdefault(int(record["layout"]), []).append(name)
        elif row.is_held(held):
            self._held.append(name)
        else:
            self._begin(name, record, codec, None)

    def _continue(self, order: _Order) -> None:
        """The next chunk of an order, or its end."""
        if not order.names:
            self._orders.popleft()
            self._decoded.drop()
            session = self._context.session.id
            answer = m.Recoded(
                session, order.ref, order.recoded, order.before_bytes, order.after_bytes, dict(order.left)
            )
            self._context.reply(order.peer, answer)
            return
        name = order.names.popleft()
        row = self._dram.row(name[0])
        if row is None or name[1] not in row.records:
            return
        record = np.frombuffer(row.records[name[1]], CHUNK)[0]
        codec, former = order.codec, CODECS[Codec(int(record["codec"]))]
        if former.number == codec.number:
            return
        if codec.fidelity != Fidelity.EXACT and self._coding.is_exact(int(record["namespace"])):
            order.leave("they are wanted exact")
        elif codec.fidelity != Fidelity.EXACT and former.fidelity != Fidelity.EXACT:
            order.leave("the errors of two codecs would add up")
        elif self._dram.arena.pending(row.slots[name[1]]):
            order.leave("a tier below has still to take them")
        elif codec.numeric and self._coding.layouts.find(int(record["layout"])) is None:
            order.leave("their layout is not known: no engine of it has registered yet")
        else:
            self._begin(name, record, codec, order)

    def _begin(self, name: Name, record: np.void, codec: ChunkCodec, order: _Order | None) -> None:
        slot = Slot.from_place(int(record["place"]))
        work = _Work(name, record, slot, codec, order)
        stored = self._dram.arena.payload(slot.index, int(record["nbytes"]))
        raw_bytes, former = int(record["raw_bytes"]), CODECS[Codec(int(record["codec"]))]
        source = self._source(record)

        def recode() -> memoryview:
            raw = stored
            if former.number != Codec.RAW:
                raw = self._decoded.of(raw_bytes)
                former.decode(stored, raw)
            if codec.number == Codec.RAW:
                return raw
            into = self._encoded.of(codec.bound(raw_bytes))
            return into[: codec.encode(raw, into, source)]

        self._working = True
        self._dram.keep(slot)
        self._context.submit(
            recode,
            lambda result: self._recoded(work, result),
            lambda error: self._failed(work, error),
            "gather.recode",
            nbytes=raw_bytes,
            chunks=1,
        )

    def _source(self, record: np.void) -> Source:
        layout = self._coding.layouts.find(int(record["layout"]))
        if layout is None:
            return Source(position=int(record["position"]))
        pages = int(record["raw_bytes"]) // (layout.page_bytes * layout.plane_count)
        return Source(layout, pages * layout.page_tokens, int(record["position"]))

    def _failed(self, work: _Work, error: Exception) -> None:
        if not isinstance(error, LmpipeError):
            raise error
        self._leave(work, str(error) if isinstance(error, CannotEncode) else f"damaged: {error}")

    def _leave(self, work: _Work, reason: str) -> None:
        """The chunk stays as it is for good."""
        self._context.count("left_chunks")
        row = self._dram.row(work.name[0])
        if work.order is not None:
            work.order.leave(reason)
        elif row is not None:
            row.stays_raw.add(work.name[1])
        self._end(work)

    def _end(self, work: _Work) -> None:
        self._working = False
        self._dram.let_go(work.slot)

    def _recoded(self, work: _Work, result: memoryview) -> None:
        failpoints.hit("gather.recode.encoded")
        arena, nbytes = self._dram.arena, len(result)
        if work.codec.number != Codec.RAW and size_class(nbytes) >= arena.capacity(work.slot.index):
            self._leave(work, f"{work.codec.name} makes them no smaller")
            return
        # Nothing that a tier below has still to take is given up for this.
        slot = self._dram.reserve(nbytes, self._context.session.id, clean_only=True)
        if slot is None:
            if work.order is None:
                self._held.append(work.name)
            else:
                work.order.leave("no room in DRAM")
            self._end(work)
            return
        arena.advance(slot, SlotEvent.OPEN)
        offset, region = arena.offset(slot.index), native.Region(result)
        self._context.submit(
            lambda: self._copier.memcpy(arena.region, offset, region, 0, nbytes),
            lambda _: self._copied(work, slot, nbytes),
            _bug,
            "gather.copy",
            nbytes=nbytes,
            chunks=1,
        )

    def _copied(self, work: _Work, slot: Slot, nbytes: int) -> None:
        failpoints.hit("gather.recode.copied")
        record, codec = work.record.copy(), work.codec
        record["place"], record["codec"], record["nbytes"] = slot.place, codec.number, nbytes
        record["fidelity"] = max(int(record["fidelity"]), int(codec.fidelity))
        self._dram.arena.set_record(slot.index, record)
        self._dram.arena.advance(slot, SlotEvent.CLOSE)
        self._end(work)
        row = self._dram.exchange(work.name, work.slot, slot)
        if row is None:
            return
        if codec.number == Codec.RAW:
            row.stays_raw.add(work.name[1])
            self._context.count("decoded_chunks")
        else:
            self._context.count("encoded_chunks")
            self._context.count("encode_raw_bytes", int(record["raw_bytes"]))
            self._context.count("encoded_bytes", nbytes)
        if work.order is not None:
            work.order.recoded += 1
            work.order.before_bytes += int(work.record["nbytes"])
            work.order.after_bytes += nbytes


class _Scratch:
    """Memory that grows with what is asked for and is used again: first touch costs more than encoding."""

    def __init__(self) -> None:
        self._memory: npt.NDArray[np.uint8] = np.empty(0, np.uint8)

    def of(self, nbytes: int) -> memoryview:
        """`nbytes` of it; what was in it is gone."""
        if nbytes > len(self._memory):
            self._memory = np.empty(nbytes, np.uint8)
        return self._memory[:nbytes].data

    def drop(self) -> None:
        """Give the memory back."""
        self._memory = np.empty(0, np.uint8)


def _bug(error: Exception) -> None:
    raise error
