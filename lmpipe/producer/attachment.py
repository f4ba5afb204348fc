"""What one registration maps of a node: session, holds, arena, index readers; and the lookup, which needs nothing else.

Everything here works while every lmpipe process is stopped or dead: the maps stay, evictors that are dead evict
nothing, and generation and hold guard each slot. Only where the index cannot be mapped (rows.py) gather is asked for
rows, within a deadline; holds are taken and copies made all the same. Knows no sockets. `lookup` and `known` may be
called from any thread.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from lmpipe import failpoints
from lmpipe.clock import wall_s
from lmpipe.codecs import CODECS
from lmpipe.errors import SegmentError
from lmpipe.handles import CHUNK, ChunkRecords, Tier
from lmpipe.index import IndexReader, may_map, reader_identity
from lmpipe.index_row import index_key, is_complete, row_records
from lmpipe.keys import Prompt
from lmpipe.producer.rows import AskedIndex, Asking, Index, MappedIndex, Rows
from lmpipe.producer.shards import run_of_shards
from lmpipe.producer.wanted import Wanted as Wanted
from lmpipe.shm.descriptor import SegmentKind
from lmpipe.shm.hold import Holds, HoldSet
from lmpipe.shm.node import NodeWords
from lmpipe.shm.segment import Segment
from lmpipe.shm.session import Session, SessionDir
from lmpipe.shm.table import SlotTable
from lmpipe.topology import NodeInfo

log = logging.getLogger("lmpipe.producer")

GRANTS = 1024
"""Saves of mapped pages that one producer may have in flight."""

LOOKS = 8
"""How often a lookup reads the rows at most, while chunks of the prompt are being put into other slots."""

TIERS = (Tier.DRAM, Tier.SSD, Tier.REMOTE)


_DECODABLE = np.zeros(1 << 16, np.bool_)
_DECODABLE[list(CODECS)] = True


@dataclass(slots=True)
class Found:
    """An unbroken run of chunks from the start of a prompt, and the holds that keep its DRAM part in place. Release it,
    or load it.
    """

    chunk_tokens: int
    records: ChunkRecords
    tiers: npt.NDArray[np.uint8]
    """(n,) index into `TIERS`."""
    holds: HoldSet | None = None
    attachment: Attachment | None = None
    dram: npt.NDArray[np.intp] = field(default_factory=lambda: np.empty(0, np.intp))
    """Positions of the chunks that are held in DRAM."""

    @property
    def chunks(self) -> int:
        """Number of chunks found."""
        return len(self.records)

    @property
    def tokens(self) -> int:
        """Number of tokens found."""
        return self.chunks * self.chunk_tokens

    @property
    def fidelity(self) -> int:
        """Of the least exact chunk found (`handles.Fidelity`)."""
        return int(self.records["fidelity"].max(initial=0))

    @property
    def by_tier(self) -> dict[Tier, int]:
        """Chunks by tier."""
        counts = np.bincount(self.tiers, minlength=len(TIERS))
        return {tier: int(counts[i]) for i, tier in enumerate(TIERS) if counts[i]}

    def release(self) -> None:
        """Give the holds back; harmless when done twice."""
        holds, self.holds = self.holds, None
        if holds is not None and self.attachment is not None:
            self.attachment.let_go(holds)

    def __enter__(self) -> Found:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class Attachment:
    """The maps of one node, closed when retired and no call uses them any more.

    Raises:
        SegmentError, OSError: the node's segments are gone or are not this version's.
    """

    def __init__(self, info: NodeInfo, link: Asking) -> None:
        self.info = info
        run_dir = info.paths
        engines = info.topology.engines
        self.sessions = SessionDir(run_dir.path)
        if info.sessions_identity not in ("", self.sessions.identity()):
            raise SegmentError(
                f"{self.sessions.path}: is not the node's, which could not see what is held here;"
                f" share the whole of {run_dir.path} with this container"
            )
        self.session = Session.create(run_dir.path, entries=engines.hold_entries, grants=GRANTS)
        opened: list[Segment] = []
        try:
            arena = Segment.attach(run_dir.arena, SegmentKind.SLOTS, id=bytes.fromhex(info.arena_id))
            opened.append(arena)
            self.arena = SlotTable(arena)
            self.node = NodeWords.attach(run_dir.node_shm)
        except BaseException:
            for segment in opened:
                segment.close()
            self.session.close()
            raise
        self.holds = Holds(self.session)
        self._index = self._open_index(link)
        self._lookup_s = engines.lookup_deadline_ms / 1000
        self._lock = threading.Lock()
        self._users = 0
        self._kept = 0
        self._retired = False
        self._abandoned = False
        self._closed = False

    def _open_index(self, link: Asking) -> Index:
        """The maps of the index, where they are safe and can be made."""
        info = self.info
        if may_map(info.index_identity):
            sizes = info.topology.index
            mapped = MappedIndex([IndexReader(info.paths.path, t, sizes.map_bytes(t), self.node) for t in TIERS])
            trouble = next((text for reader in mapped.readers if (text := reader.trouble())), "")
            if not trouble:
                return mapped
            mapped.close()
        else:
            trouble = f"the node has {info.index_identity}, this process {reader_identity()}"
        log.warning("lookups go by message, and end with gather: the index is not mapped (%s)", trouble)
        return AskedIndex(self.session.id, TIERS, link)

    @property
    def by_message(self) -> bool:
        """Whether gather is asked for rows, because the index is not mapped."""
        return isinstance(self._index, AskedIndex)

    def _end_s(self) -> float:
        return time.monotonic() + self._lookup_s

    def all_in(self, tier: Tier, keys: list[bytes]) -> bool:
        """Whether one tier has all of these chunks, each with all its shards, and none whose time is over."""
        with self._index.guard:
            rows = self._index.tiers(keys, self._end_s())[TIERS.index(tier)].run(keys)
        if len(rows) < len(keys) or not all(map(is_complete, rows)):
            return False
        expires = row_records(b"".join(rows))["expires_at"]
        return not np.any((expires != 0) & (expires <= wall_s()))

    def enter(self) -> bool:
        """Use the maps: every successful call is paired with `leave`. False: closed."""
        with self._lock:
            if self._closed:
                return False
            self._users += 1
            return True

    def leave(self) -> None:
        """End one use."""
        with self._lock:
            self._users -= 1
        self._close_if_idle()

    def keep(self) -> bool:
        """Use the maps for as long as a find is held; ended by `let_go`. False: closed."""
        with self._lock:
            self._kept += not self._closed
            return not self._closed

    def let_go(self, holds: HoldSet) -> None:
        """Give the holds of a find back; harmless when the maps are gone, and with them the holds."""
        with self._lock:
            if self._closed:
                return
            self.holds.release(holds)
            self._kept -= 1
        self._close_if_idle()

    def retire(self, *, abandon: bool = False) -> None:
        """Close as soon as nobody uses the maps. `abandon`: finds that are not given back do not count."""
        with self._lock:
            self._retired = True
            self._abandoned = self._abandoned or abandon
        self._close_if_idle()

    @property
    def closed(self) -> bool:
        """Whether the maps are gone."""
        return self._closed

    def _close_if_idle(self) -> None:
        with self._lock:
            kept = self._kept and not self._abandoned
            if not self._retired or self._users or kept or self._closed:
                return
            self._closed = True
        self._index.close()
        self.holds.close()
        self.session.close()
        self.arena.close()
        self.node.close()

    def known(self, prompt: Prompt, first: int, wanted: Wanted) -> int:
        """How many chunks from `first` on are in some tier already, without a gap; takes no holds. Of rows of several
        shards the own one counts: what other ranks have still to save is theirs.
        """
        return len(self._run(prompt.index_keys, first, wanted, self._end_s(), own=True)[0])

    def moved(self, record: np.void) -> np.void | None:
        """What DRAM's row says by now of a chunk that could not be held where it was; None: nothing else."""
        keys = [index_key(record.tobytes())]
        with self._index.guard:
            rows = self._index.tiers(keys, self._end_s())[0].run(keys)
        for there in row_records(rows[0]) if rows else ():
            if there["shard"] == record["shard"] and there["place"] != record["place"] and _DECODABLE[there["codec"]]:
                return there
        return None

    def lookup(self, prompt: Prompt, chunks: int, wanted: Wanted, request: int) -> Found:
        """The longest unbroken run of usable chunks from the start of the prompt, its DRAM part held."""
        found: Found | None = None
        looks, most = 0, LOOKS if chunks <= self.holds.entries else 2
        end_s = self._end_s()
        while found is None:  # a slot was doomed between row and hold: by now the row names another place, or is gone
            looks += 1
            found = self._hold(prompt, chunks, wanted, request, end_s, cut=looks == most)
        return found

    def _hold(
        self, prompt: Prompt, chunks: int, wanted: Wanted, request: int, end_s: float, *, cut: bool = False
    ) -> Found | None:
        records, tiers = self._run(prompt.index_keys[:chunks], 0, wanted, end_s)
        dram = np.arange(len(tiers)) if not tiers.any() else np.flatnonzero(tiers == 0)
        if not len(dram) or not self.keep():
            below = 0 if len(dram) else len(records)
            return Found(prompt.chunk_tokens, records[:below], tiers[:below])
        holds = self.holds.take(self.arena, *slots_of(records if len(dram) == len(records) else records[dram]), request)
        held = len(holds)
        if held < len(dram):
            if not cut:
                self.let_go(holds)
                return None
            end = int(dram[held])
            records, tiers, dram = records[:end], tiers[:end], dram[:held]
        failpoints.hit("producer.lookup.held")
        return Found(prompt.chunk_tokens, records, tiers, holds, self, dram)

    def _run(
        self, keys: list[bytes], first: int, wanted: Wanted, end_s: float, *, own: bool = False
    ) -> tuple[ChunkRecords, npt.NDArray[np.uint8]]:
        """Records and tiers of the unbroken run from `first`; DRAM is asked first, the others only where it misses.

        It ends before a chunk in DRAM that this process cannot decode.
        """
        with self._index.guard:
            columns = self._index.tiers(keys, end_s)
            records, tiers = _usable_run(columns, keys, first, wanted, own=own)
        codecs = records["codec"]
        if codecs.any():
            decodable = _DECODABLE[codecs] | (tiers != 0)
            if not decodable.all():
                end = int(np.argmin(decodable))
                records, tiers = records[:end], tiers[:end]
        return records, tiers


def _usable_run(
    columns: Sequence[Rows], keys: list[bytes], first: int, wanted: Wanted, *, own: bool
) -> tuple[ChunkRecords, npt.NDArray[np.uint8]]:
    now_s = wall_s()
    if wanted.shards > 1:
        return run_of_shards(columns, keys, first, wanted, now_s, own=own)
    values: list[bytes] = []
    counts: list[tuple[int, int]] = []
    at = first
    while at < len(keys):
        for tier, rows in enumerate(columns):
            run = rows.run(keys, at)
            if run:
                values += run
                counts.append((tier, len(run)))
                at += len(run)
                break
        else:
            break
        if len(values[-1]) != CHUNK.itemsize:
            break
    tiers = np.frombuffer(b"".join(bytes((tier,)) * count for tier, count in counts), np.uint8)
    flat = b"".join(values)
    if len(flat) != len(values) * CHUNK.itemsize:  # some row has more shards: stop before it
        whole = next(i for i, value in enumerate(values) if len(value) != CHUNK.itemsize)
        flat, tiers = b"".join(values[:whole]), tiers[:whole]
    records = np.frombuffer(flat, CHUNK)
    usable = wanted.usable(records, now_s)
    if usable is None or usable.all():
        return records, tiers
    # A slower tier may have what the fastest has not exact enough, or not for long enough.
    return run_of_shards(columns, keys, first, wanted, now_s, own=own)


def slots_of(records: ChunkRecords) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint32]]:
    """Slot numbers and generations that the records' places name."""
    halves = np.ascontiguousarray(records["place"]).view(np.uint32)
    return np.ascontiguousarray(halves[1::2]), np.ascontiguousarray(halves[::2])
