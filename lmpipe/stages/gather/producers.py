"""The engines that gather serves: their leases, their pages, and whose save is copied next.

Whatever a dead engine held comes back here, because its session lock is gone, never because time has passed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from lmpipe import messages as m
from lmpipe.books import LayoutBook
from lmpipe.codecs.checks import misfits
from lmpipe.errors import LayoutError, SegmentError
from lmpipe.handles import SessionId, Slot
from lmpipe.lifecycle import SlotState
from lmpipe.shm.pages import sweep
from lmpipe.stages.base import Peer
from lmpipe.stages.gather.pages import PageReader, PageReaders
from lmpipe.tiers.dram import DramTier
from lmpipe.topology import Tiers

LENT_PART = 4
"""At most one in this many bytes of the arena is lent to engines as leases."""


@dataclass(slots=True)
class MappedSave:
    """Pages that an engine wants saved; `at` counts the chunks that have been dealt with."""

    message: m.Save
    peer: Peer
    at: int = 0


@dataclass(slots=True)
class Engine:
    """One registered producer."""

    session: SessionId
    peer: Peer
    hello: m.Register
    chunk_pages: int
    chunk_bytes: int
    reader: PageReader | None = None
    """Of its pages, where gather copies them itself."""
    leases: set[int] = field(default_factory=set[int])
    saves: deque[MappedSave] = field(default_factory=deque[MappedSave])
    deficit: int = 0

    def close(self) -> None:
        """Let go of its pages."""
        if self.reader is not None:
            self.reader.close()
            self.reader = None


class Producers:
    """The registry. `alive` says whether a session's lock is still held, `pages` where engines put their KV cache,
    `readers` how these are read, `tiers` by which codecs their chunks will go, `layouts` where it is written down what
    they are.
    """

    def __init__(
        self,
        dram: DramTier,
        alive: Callable[[SessionId], bool],
        most: int,
        leases: int,
        pages: Path,
        readers: PageReaders,
        tiers: Tiers,
        layouts: LayoutBook,
    ) -> None:
        self._dram, self._alive, self._most, self._leases = dram, alive, most, leases
        self._pages, self._readers, self._tiers, self._layouts = pages, readers, tiers, layouts
        self._engines: dict[SessionId, Engine] = {}
        self._orphans: dict[SessionId, set[int]] = {}
        """Leases found in the arena after a restart, whose holders have not registered again."""

    def __len__(self) -> int:
        return len(self._engines)

    def __iter__(self) -> Iterator[Engine]:
        return iter(self._engines.values())

    def get(self, session: int) -> Engine | None:
        """The engine of a session."""
        return self._engines.get(SessionId(session))

    def adopt(self, leased: dict[SessionId, list[int]]) -> None:
        """Take over the leases that a former gather granted."""
        self._orphans = {session: set(slots) for session, slots in leased.items()}

    def leases_of(self, stage: SessionId) -> set[int]:
        """Leases that a former gather granted to a stage, for loads; asked for once."""
        return self._orphans.pop(stage, set[int]())

    def register(self, hello: m.Register, peer: Peer) -> Engine:
        """Enter an engine, or enter it again.

        Raises:
            LayoutError, SegmentError, DeviceError: what it brings does not fit; the text says what and why.
        """
        if hello.layout is None:
            raise LayoutError("a producer has to state its layout")
        layout = m.kv_layout(hello.layout)
        chunk_pages, chunk_bytes = layout.chunk_pages(hello.chunk_tokens), layout.chunk_bytes(hello.chunk_tokens)
        if not chunk_bytes:
            raise LayoutError("a chunk of no tokens")
        if chunk_bytes > self._dram.arena.capacity_bytes:
            raise LayoutError(
                f"a chunk of {hello.chunk_tokens} tokens takes {chunk_bytes} bytes, the arena has"
                f" {self._dram.arena.capacity_bytes}: raise tiers.dram.capacity or lower chunk_tokens"
            )
        if wrong := misfits(self._tiers, opaque=bool(layout.opaque_page_bytes)):
            raise LayoutError("; ".join(f"{path}: {problem}" for path, problem in wrong))
        session = SessionId(hello.session)
        if not self._alive(session):
            raise SegmentError(f"session {session:016x} holds no lock in this node's run directory")
        if len(self._engines) >= self._most:
            self.bury()  # an engine that died and came back must not find its own place taken
        old = self._engines.get(session)
        if old is None and len(self._engines) >= self._most:
            raise LayoutError(f"{self._most} engines are registered already: raise engines.max_producers")
        engine = Engine(session, peer, hello, chunk_pages, chunk_bytes)
        if hello.pages is not None:
            alive = partial(self._alive, session)
            engine.reader = self._readers.open(hello.pages, layout.plane_count, layout.page_bytes, alive)
        if old is None:
            engine.leases = self._orphans.pop(session, set[int]())
        else:
            engine.leases = old.leases
            if engine.reader is not None:
                engine.saves = old.saves  # the engine waits for their answers
            del self._engines[session]
            old.close()
        self._engines[session] = engine
        self._layouts.enter(layout)
        return engine

    def unused(self, engine: Engine) -> list[Slot]:
        """Its leases that it has not begun to write."""
        states = ((slot, self._dram.arena.state(slot)) for slot in sorted(engine.leases))
        return [Slot(slot, generation) for slot, (generation, state) in states if state is SlotState.LEASED]

    def written(self, engine: Engine) -> list[int]:
        """Its leases that are fully written but were never announced: gather restarted, or the message was lost."""
        return [slot for slot in sorted(engine.leases) if self._dram.arena.state(slot)[1] is SlotState.READY]

    def top_up(self, engine: Engine) -> list[Slot]:
        """Lend it slots up to its share. Returns the new ones."""
        if engine.reader is not None or not engine.hello.leases:
            return []
        share = self._dram.arena.capacity_bytes // LENT_PART // max(len(self._engines), 1) // engine.chunk_bytes
        wanted = max(1, min(self._leases, engine.hello.leases, share))
        fresh: list[Slot] = []
        while len(engine.leases) < wanted:
            slot = self._dram.reserve(engine.chunk_bytes, engine.session, wanted - len(engine.leases) - 1)
            if slot is None:
                break
            engine.leases.add(slot.index)
            fresh.append(slot)
        return fresh

    def next_save(self, busy: Container[str]) -> tuple[Engine, PageReader, MappedSave, int] | None:
        """Deficit round-robin over engines with saves of pages: the save to go on with, and how many chunks of it.
        Lanes that are `busy` are passed over.
        """
        for session in list(self._engines):
            engine = self._engines[session]
            if not engine.saves or engine.reader is None:
                engine.deficit = 0
                continue
            if engine.reader.lane in busy:
                continue
            self._engines[session] = self._engines.pop(session)  # to the back: the others come first next time
            engine.deficit += max(engine.reader.quantum_bytes, engine.chunk_bytes)
            save = engine.saves[0]
            count = min(engine.deficit // engine.chunk_bytes, len(save.message.chunks) - save.at)
            engine.deficit -= count * engine.chunk_bytes
            return engine, engine.reader, save, count
        return None

    def bury(self) -> list[Engine]:
        """Remove engines whose session has ended and free what they held, half-written slots and mapped pages too, also
        the pages of those that died unknown to this gather. Returns them.
        """
        dead = [engine for engine in self._engines.values() if not self._alive(engine.session)]
        for engine in dead:
            del self._engines[engine.session]
            engine.close()
            self._free(engine.leases)
        for session in [session for session in self._orphans if not self._alive(session)]:
            self._free(self._orphans.pop(session))
        sweep(self._pages)
        return dead

    def _free(self, slots: set[int]) -> None:
        arena = self._dram.arena
        for index in slots:
            generation, state = arena.state(index)
            if state in (SlotState.LEASED, SlotState.WRITING, SlotState.READY):
                arena.free(Slot(index, generation))
