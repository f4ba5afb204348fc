"""What the stages of one process are made of, and the making: the only file that knows every stage and every tier."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

from lmpipe import native
from lmpipe.books import LayoutBook, NamespaceBook
from lmpipe.codecs import CODECS
from lmpipe.codecs.choice import Choice, configured
from lmpipe.errors import DeviceError
from lmpipe.handles import Tier
from lmpipe.index import IndexReader, IndexWriter
from lmpipe.launch.devices import INSTALL
from lmpipe.shm.descriptor import SegmentKind
from lmpipe.shm.hold import Holds, HoldScanner
from lmpipe.shm.node import NodeWords
from lmpipe.shm.segment import Segment
from lmpipe.shm.session import Session, SessionDir
from lmpipe.shm.slots import SlotOwner
from lmpipe.shm.table import SlotTable
from lmpipe.spans import Spans
from lmpipe.stages.base import Context, Stage
from lmpipe.stages.compress import Compress
from lmpipe.stages.gather import Gather
from lmpipe.stages.gather.pages import PageReaders
from lmpipe.stages.gather.recoding import Coding
from lmpipe.stages.landing import Landings
from lmpipe.stages.persist import Persist
from lmpipe.stages.pool import yield_processor
from lmpipe.stages.replicate import Replicate
from lmpipe.stages.transit import Ring, Sources
from lmpipe.tiers.dram import DramTier
from lmpipe.tiers.remote_object import RemoteTier, open_store
from lmpipe.tiers.ssd import SsdTier
from lmpipe.topology import NodeInfo
from lmpipe.topology import SsdTier as SsdSettings

if TYPE_CHECKING:
    from lmpipe.cuda.readers import DeviceReaders

RING_ANSWERS = 4
"""A slot of a ring is lent so many times longer than an answer may take: answers are behind all that waits there."""


class _Closable(Protocol):
    def close(self) -> None: ...


C = TypeVar("C", bound=_Closable)


class Parts:
    """Segments, holds, indexes and tiers of one process, each made when a stage first asks, closed with `undo`."""

    def __init__(self, info: NodeInfo, session: Session, spans: Spans, undo: contextlib.ExitStack) -> None:
        self._info, self._session, self._spans, self._undo = info, session, spans, undo
        self._topology, self._paths = info.topology, info.paths
        self._sessions = SessionDir(info.paths.path)

    def stage(self, name: str, context: Context) -> Stage:
        """The stage of that name on its seat."""
        makers: dict[str, Callable[[Context], Stage]] = {
            "gather": self._gather,
            "compress": self._compress,
            "persist": self._persist,
            "replicate": self._replicate,
        }
        return makers[name](context)

    # Stages.

    def _gather(self, context: Context) -> Stage:
        topology, engines = self._topology, self._topology.engines
        index = self._index(Tier.DRAM)
        arena = self._owned(self._paths.arena, bytes.fromhex(self._info.arena_id))
        threading.Thread(target=_prefault, args=(arena.segment,), name="lmpipe-prefault", daemon=True).start()
        copier = native.Copier(topology.copy_threads)
        devices = self._devices(arena.region, copier) if engines.devices else None
        gather = Gather(
            context,
            DramTier(arena, index, self._scanner, time.monotonic),
            {tier: self._reader(tier) for tier in topology.tier_names if tier is not Tier.DRAM},
            self._scanner,
            self._sessions,
            pages=self._paths.pages,
            readers=PageReaders(arena.region, copier, devices.open if devices else None),
            pinned_bytes=lambda: devices.pinned.done_bytes if devices else 0,
            tiers=topology.tiers,
            coding=self._coding,
            chunk_tokens=topology.chunk_tokens,
            leases=engines.leases,
            max_producers=engines.max_producers,
            answer_s=topology.answer_s,
        )
        index.publish()
        return gather

    def _devices(self, arena: native.Region, copier: native.Copier) -> DeviceReaders:
        try:
            # CuPy is optional and slow to import; without a GPU nothing of cuda/ is loaded.
            from lmpipe.cuda.cupy_runtime import open_device  # noqa: PLC0415
            from lmpipe.cuda.readers import DeviceReaders  # noqa: PLC0415
        except ImportError as error:
            raise DeviceError(f"engines.devices: CuPy cannot be loaded ({error}): {INSTALL}") from None
        runtimes = [open_device(name) for name in self._topology.engines.devices]
        return self._closing(DeviceReaders(runtimes, arena, copier, spans=self._spans))

    def _compress(self, context: Context) -> Stage:
        below = [tier for tier in self._topology.tier_names if tier is not Tier.DRAM]
        ring = self._ring("compress")
        return Compress(
            context,
            self._choice.below,
            self._layouts.find,
            CODECS,
            self._arena,
            ring,
            self._sources,
            below,
            RING_ANSWERS * self._topology.answer_s,
        )

    def _persist(self, context: Context) -> Stage:
        settings = self._topology.tiers.ssd
        assert settings is not None, "the topology places persist where there is an SSD tier"
        tier = SsdTier(
            Path(settings.directory), settings.capacity, settings.flush, settings.segment, self._index(Tier.SSD)
        )
        tier.recover()
        return Persist(context, tier, self._sources, self._landings("persist"), _flush_interval_s(settings))

    def _replicate(self, context: Context) -> Stage:
        settings = self._topology.tiers.remote
        assert settings is not None, "the topology places replicate where there is a remote tier"
        store = open_store(settings.url, settings.timeout_ms / 1000)
        tier = RemoteTier(store, settings.capacity, self._index(Tier.REMOTE))
        return Replicate(context, tier, self._sources, self._landings("replicate"))

    # What chunks are named and encoded by.

    @cached_property
    def _layouts(self) -> LayoutBook:
        return LayoutBook(self._paths)

    @cached_property
    def _choice(self) -> Choice:
        return Choice(self._topology, self._namespaces.tenant_of)

    @cached_property
    def _namespaces(self) -> NamespaceBook:
        return NamespaceBook(self._paths)

    @cached_property
    def _coding(self) -> Coding:
        return Coding(
            encodes=self._topology.tiers.dram.codec != "raw",
            wanted=self._choice.dram,
            named=partial(configured, self._topology),
            is_exact=lambda namespace: self._topology.is_exact(self._namespaces.tenant_of(namespace)),
            layouts=self._layouts,
        )

    # Shared memory.

    @cached_property
    def _node(self) -> NodeWords:
        return self._closing(NodeWords.attach(self._paths.node_shm))

    @cached_property
    def _scanner(self) -> HoldScanner:
        return self._closing(HoldScanner(self._sessions))

    @cached_property
    def _arena(self) -> SlotTable:
        """As one sees it that does not own it."""
        return self._table(self._paths.arena)

    @cached_property
    def _sources(self) -> Sources:
        tables = {"arena": self._arena}
        for stage in self._topology.rings_needed:
            tables[f"ring.{stage}"] = self._table(self._paths.ring(stage))
        # One for all stages of the process: a table of holds has one owner.
        return Sources(tables, self._closing(Holds(self._session)))

    def _landings(self, stage: str) -> Landings:
        ring = self._ring(stage) if stage in self._topology.rings_needed else None
        lend_s = RING_ANSWERS * self._topology.answer_s
        return Landings(self._arena, ring, f"ring.{stage}", self._session.id, self._sessions.alive, lend_s)

    def _ring(self, stage: str) -> Ring:
        return Ring(self._owned(self._paths.ring(stage)), self._session.id, self._scanner, self._sessions)

    def _owned(self, path: Path, segment_id: bytes | None = None) -> SlotOwner:
        return self._closing(SlotOwner(Segment.attach(path, SegmentKind.SLOTS, id=segment_id)))

    def _table(self, path: Path) -> SlotTable:
        return self._closing(SlotTable(Segment.attach(path, SegmentKind.SLOTS)))

    # Indexes.

    def _index(self, tier: Tier) -> IndexWriter:
        return self._closing(IndexWriter(self._paths.path, tier, self._topology.index.map_bytes(tier), self._node))

    def _reader(self, tier: Tier) -> IndexReader:
        return self._closing(IndexReader(self._paths.path, tier, self._topology.index.map_bytes(tier), self._node))

    def _closing(self, part: C) -> C:
        self._undo.callback(part.close)
        return part


def _flush_interval_s(settings: SsdSettings) -> float | None:
    return settings.flush_interval_ms / 1000 if settings.flush == "interval" else None


def _prefault(arena: Segment) -> None:
    """Beside the work: mapping a large arena takes a second a GiB, and gather need not wait for it to serve again."""
    yield_processor()
    arena.prefault()
