"""The DRAM tier: which chunks lie in the arena, how recently each was wanted, and what goes when room is needed.

A row is one chunk of one prompt with all its shards; it is indexed, pinned and evicted whole. Rows stand in order of
use, and a prompt is
touched from its tail to its head, so that the head is always the more recent: eviction takes a prompt's tail first, and
no row outlives the prefix it needs. Rows that still have to be persisted wait in a queue of their own and go last.

A chunk may lie there encoded, in a slot of its own size; then no tier below waits for it. `exchange` puts one form of a
chunk in the place of the other, and a chunk that is more exact than the one that is there takes its place.

Eviction passes over rows of which any slot is held: they would free nothing at once, and others, who are to read the
same chunks, must go on finding them. It removes a row from the index, dooms its slots (no new hold succeeds), and frees
them at once or, when a reader was quicker than the doom, as soon as the hold is gone. Recency lives in this process
only; after a restart it is rebuilt from the slot headers.

Owns the `dram` index and the arena's slots. Knows no messages and no engine. Not thread-safe: gather's loop is the only
caller.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import numpy as np

from lmpipe import failpoints
from lmpipe.handles import CHUNK, ChunkRecords, Codec, SessionId, Slot
from lmpipe.index import IndexWriter
from lmpipe.index_row import index_key
from lmpipe.lifecycle import SlotEvent, SlotState
from lmpipe.shm.slots import SlotOwner
from lmpipe.tiers import has_expired
from lmpipe.tiers.row import Row, encoded_away, expires_at, fidelity_of, place_of


class HeldSlots(Protocol):
    """Tells which slots are held: `shm.hold.HoldScanner`, or a set in a test."""

    def held(self) -> frozenset[int]:
        """Hold words (`Slot.place`) of every living session, read after a fence."""
        ...


class DramTier:
    """Rows over an arena. `now_s` is a monotonic clock, for pins."""

    def __init__(self, arena: SlotOwner, index: IndexWriter, held: HeldSlots, now_s: Callable[[], float]) -> None:
        self.arena = arena
        self._index = index
        self._held = held
        self._now_s = now_s
        self._clean: OrderedDict[bytes, Row] = OrderedDict()
        self._dirty: OrderedDict[bytes, Row] = OrderedDict()
        self._doomed: list[Slot] = []
        self._kept: set[int] = set()
        self._replaced: list[int] = []
        self._tick = 0
        self.encoded_chunks = 0
        """Chunks that do not lie there raw."""
        self.saved_bytes = 0
        """Bytes that these would have more, were they raw."""
        self.cleaned: list[tuple[bytes, int]] = []
        """Index key and shard of what no tier below waits for any more, since the caller last took them."""
        self.evicted: list[bytes] = []
        """Records of rows evicted since the caller last took them."""

    def __len__(self) -> int:
        return len(self._clean) + len(self._dirty)

    @property
    def unpersisted(self) -> int:
        """Rows that some tier has still to take."""
        return len(self._dirty)

    def row(self, key: bytes) -> Row | None:
        """The row of an index key."""
        return self._clean.get(key) or self._dirty.get(key)

    def has(self, key: bytes, shard: int, fidelity: int, saved_at: int = 0) -> bool:
        """Whether this shard of the chunk is in DRAM, still valid (when one like it was saved, if that is later by the
        saver's clock), and at least as exact as that.
        """
        row = self.row(key)
        if row is None or shard not in row.records or has_expired(expires_at(row.records[shard]), saved_at):
            return False
        return fidelity_of(row.records[shard]) <= fidelity

    def load_rows(self, slots: Iterable[int], doomed: Iterable[int] = ()) -> list[int]:
        """Rebuild rows from committed slots after a restart, oldest first, tails before heads. Returns the slots with
        pending bits.

        `doomed` are slots that were on their way out and are still held. Of two slots with the same chunk, one of which
        was to take the other's place, the more exact is kept, or else the smaller.
        """
        self._doomed = [Slot(slot, self.arena.state(slot)[0]) for slot in doomed]
        order: list[tuple[int, int, int, int, int]] = []
        for slot in slots:
            r = self.arena.record(slot)
            order.append((int(r["saved_at"]), -int(r["position"]), int(r["fidelity"]), int(r["nbytes"]), slot))
            if int(r["codec"]) != Codec.RAW:
                self.arena.set_pending(slot, 0)  # READY when gather died: the chunk was clean, or else it would be raw
        pending: list[int] = []
        rows: dict[bytes, bytes] = {}
        for *_, slot in sorted(order):
            row = self._admit(slot, SessionId(0))
            if row is None:
                self._doom([slot])  # a second copy of a chunk: two writers were at it when the node died
                continue
            rows[row.key] = row.value
            if self.arena.pending(slot):
                pending.append(slot)
        self._index.put(list(rows.items()))
        self._end_replaced()
        return pending

    def commit(self, slots: Sequence[int], pending_bits: int, saver: SessionId) -> list[int]:
        """Make READY slots visible to lookups: one index transaction. Returns the slots committed; the rest were known
        and are freed.

        Slots are given in prompt order, so that recency is set from the tail.
        """
        rows: dict[bytes, Row] = {}
        done: list[int] = []
        for slot in reversed(slots):
            self.arena.set_pending(slot, pending_bits)
            failpoints.hit("dram.commit.pending")
            generation, _ = self.arena.state(slot)
            if not self.arena.advance(Slot(slot, generation), SlotEvent.COMMIT):
                continue
            row = self._admit(slot, saver)
            if row is None:
                self._doom([slot])
                continue
            rows[row.key] = row
            done.append(slot)
        failpoints.hit("dram.commit.committed")
        if not self._index.put([(key, row.value) for key, row in rows.items()]):
            # The index is full: what no lookup can find must not take room. Other shards of these rows may be in it.
            for key in rows:
                self._remove(key)
            self._index.delete(list(rows))
            done = []
        self._end_replaced()
        return done[::-1]

    def _admit(self, slot: int, saver: SessionId) -> Row | None:
        """Enter a committed slot into its row; None when that shard is there already, and as exact."""
        record = self.arena.record(slot)
        generation, _ = self.arena.state(slot)
        record["place"] = Slot(slot, generation).place
        key, shard = index_key(record.tobytes()), int(record["shard"])
        row = self.row(key)
        if row is not None and shard in row.records:
            if has_expired(expires_at(row.records[shard]), int(record["saved_at"])):
                self._remove(key)
                row = None
            elif int(record["fidelity"]) < fidelity_of(row.records[shard]):
                self._replaced.append(row.slots[shard])
                self._count(row.records[shard], -1)
                if not saver:
                    row.stays_raw.add(shard)  # brought up from below: somebody wants it that exact
            else:
                return None
        self._tick += 1
        if row is None:
            row = Row(key, int(record["shards"]), self._tick)
        row.tick = self._tick
        row.slots[shard], row.savers[shard] = slot, saver
        row.records[shard] = record.tobytes()
        self._count(row.records[shard], 1)
        self._file(row)
        return row

    def _end_replaced(self) -> None:
        """End the slots of chunks that were replaced, after the index names the others: who found the old ones and is
        too late to hold them looks again and finds the new ones.
        """
        replaced, self._replaced = self._replaced, []
        self._doom(replaced)
        self.sweep()

    def exchange(self, name: tuple[bytes, int], old: Slot, new: Slot) -> Row | None:
        """Give a chunk that lies in `old`, and which no tier waits for, the READY slot `new`, which has it in another
        form. The row, or None when the chunk is gone or the index is full; then `new` is freed.
        """
        key, shard = name
        row = self.row(key)
        if (
            row is None
            or shard not in row.slots
            or place_of(row.records[shard]) != old.place
            or self.arena.pending(old.index)
        ):
            self.arena.free(new)
            return None
        self.arena.advance(new, SlotEvent.COMMIT)
        former, row.records[shard] = row.records[shard], self.arena.record(new.index).tobytes()
        row.slots[shard] = new.index
        failpoints.hit("dram.exchange.committed")
        stored = self._index.put([(key, row.value)])
        failpoints.hit("dram.exchange.indexed")
        if stored:
            self._count(former, -1)
            self._count(row.records[shard], 1)
        else:
            row.records[shard], row.slots[shard] = former, old.index
        self._doom([old.index if stored else new.index])
        self.sweep()
        return row if stored else None

    def _count(self, record: bytes, sign: int) -> None:
        saved_bytes = encoded_away(record)
        if saved_bytes is not None:
            self.encoded_chunks += sign
            self.saved_bytes += sign * saved_bytes

    def _file(self, row: Row) -> None:
        """Put a row at the recent end of the queue it belongs to."""
        dirty = any(self.arena.pending(slot) for slot in row.slots.values())
        into, other = (self._dirty, self._clean) if dirty else (self._clean, self._dirty)
        other.pop(row.key, None)
        into[row.key] = row
        into.move_to_end(row.key)
        if not dirty:
            self.cleaned.extend((row.key, shard) for shard in row.slots)

    def touch(self, keys: Sequence[bytes]) -> None:
        """Mark a prompt's chunks, given head first, as just used."""
        for key in reversed(keys):
            row = self.row(key)
            if row is not None:
                self._tick += 1
                row.tick = self._tick
                (self._clean if key in self._clean else self._dirty).move_to_end(key)

    def pin(self, keys: Iterable[bytes], until_s: float) -> int:
        """Keep rows until a time (0: unpin). Returns how many there were."""
        rows = [row for key in keys if (row := self.row(key)) is not None]
        for row in rows:
            row.pinned_until_s = until_s
        return len(rows)

    def answered(self, key: bytes, shard: int, place: int, bits: int) -> Row | None:
        """A tier below has taken or refused the chunk that lies, or lay, at a place. Returns the row, or None when that
        chunk is gone.
        """
        row = self.row(key)
        if row is None or shard not in row.slots or place_of(row.records[shard]) != place:
            return None
        if not self.arena.clear_pending(row.slots[shard], bits) and key in self._dirty:
            self._file(row)
        return row

    def reserve(self, nbytes: int, owner: SessionId, more: int = 0, *, clean_only: bool = False) -> Slot | None:
        """Lease a slot, evicting what was wanted least. None: everything left is pinned, held or being written.

        `more` slots of this size are wanted right after: what has to go for them goes in the same index transaction.
        What is held is not evicted, and stays to be found. `clean_only`: nor is what a tier below has still to take.
        """
        slot = self.arena.lease(nbytes, owner)
        if slot is None and self._doomed:
            self.sweep()
            slot = self.arena.lease(nbytes, owner)
        if slot is not None or nbytes > self.arena.capacity_bytes:
            return slot
        for victims in self._victims(nbytes, more, (self._clean,) if clean_only else (self._clean, self._dirty)):
            self._evict(victims)
            slot = self.arena.lease(nbytes, owner)
            if slot is not None:
                return slot
        return None

    def _victims(self, nbytes: int, more: int, queues: Sequence[OrderedDict[bytes, Row]]) -> Iterable[list[Row]]:
        """What of these queues to evict, step by step: least recent rows worth `nbytes`, more of them while those that
        went were taken hold of in that moment; then, or at once where enough is free in pieces (encoded chunks leave
        holes of all sizes), the cheapest neighbours.
        """
        now_s = self._now_s()
        wanted = nbytes * (1 + more)
        while not (self.arena.slots_free and self.arena.free_bytes >= nbytes):
            batch = self._least_recent(wanted, now_s, queues)
            if not batch:
                break
            yield batch
            wanted = nbytes
        if not self.arena.slots_free or self.arena.free_bytes < nbytes:
            return
        held = self.held()
        by_slot = {slot: row for queue in queues for row in queue.values() for slot in row.slots.values()}
        found = [window for window in self.arena.window(nbytes) if by_slot.keys() >= set(window)]
        windows = [[by_slot[slot] for slot in window] for window in found]
        windows = [rows for rows in windows if all(row.may_go(now_s, held) for row in rows)]
        yield from sorted(windows, key=lambda rows: max(row.tick for row in rows))

    def _least_recent(self, nbytes: int, now_s: float, queues: Sequence[OrderedDict[bytes, Row]]) -> list[Row]:
        """Rows worth `nbytes`, or all there are, that are neither pinned nor held."""
        held = self.held()  # once for all of them; who takes hold of one after this is seen by `sweep`
        batch: list[Row] = []
        freed = 0
        for queue in queues:
            for row in queue.values():
                if not row.may_go(now_s, held):
                    continue
                batch.append(row)
                freed += sum(self.arena.capacity(slot) for slot in row.slots.values())
                if freed >= nbytes:
                    return batch
        return batch

    def _evict(self, rows: Iterable[Row]) -> None:
        gone = [row for row in rows if self._remove(row.key)]
        for row in gone:
            self.evicted.extend(row.records.values())
        failpoints.hit("dram.evict.doomed")
        self._index.delete([row.key for row in gone])
        failpoints.hit("dram.evict.unindexed")
        self.sweep()

    def drop(self, keys: Iterable[bytes]) -> int:
        """Remove rows for good, pinned or not. Returns how many there were."""
        gone = [key for key in keys if self._remove(key)]
        self._index.delete(gone)
        self.sweep()
        return len(gone)

    def keys(self, namespace: int = 0) -> list[bytes]:
        """Index keys of all rows, or of those of one namespace id."""
        rows = (row for queue in (self._clean, self._dirty) for row in queue.values())
        if not namespace:
            return [row.key for row in rows]
        return [row.key for row in rows if row.namespace == namespace]

    def names(self, namespace: int = 0) -> list[tuple[bytes, int]]:
        """The same with every shard that is there, least recent first."""
        return [(key, shard) for key in self.keys(namespace) if (row := self.row(key)) for shard in row.slots]

    def _remove(self, key: bytes) -> bool:
        row = self._clean.pop(key, None) or self._dirty.pop(key, None)
        if row is None:
            return False
        for record in row.records.values():
            self._count(record, -1)
        self._doom(row.slots.values())
        return True

    def keep(self, slot: Slot) -> None:
        """Hold a slot for this process itself, until `let_go`."""
        self._kept.add(slot.place)

    def let_go(self, slot: Slot) -> None:
        """End `keep`."""
        self._kept.discard(slot.place)

    def held(self) -> frozenset[int]:
        """Hold words of every living session, read after a fence, and what this process holds itself."""
        held = self._held.held()
        return held | self._kept if self._kept else held

    def _doom(self, slots: Iterable[int]) -> None:
        for index in slots:
            generation, _ = self.arena.state(index)
            slot = Slot(index, generation)
            if self.arena.advance(slot, SlotEvent.DOOM):
                self._doomed.append(slot)

    def sweep(self) -> None:
        """Free doomed slots that nobody holds any more."""
        if not self._doomed:
            return
        held = self.held()  # fenced: a hold published before the doom is seen here, a later one sees the doom
        still: list[Slot] = []
        for slot in self._doomed:
            if slot.place in held:
                still.append(slot)
            else:
                self.arena.free(slot)
        self._doomed = still

    def tick(self) -> None:
        """To be called every second: free what readers have let go, let the index clear dead readers."""
        self.sweep()
        self._index.tick()

    def take_cleaned(self) -> list[tuple[bytes, int]]:
        """What no tier below waits for any more, since the last call."""
        cleaned, self.cleaned = self.cleaned, []
        return cleaned

    def take_evicted(self) -> ChunkRecords:
        """Records of the rows evicted since the last call."""
        records = np.frombuffer(b"".join(self.evicted), CHUNK)
        self.evicted = []
        return records

    def audit(self) -> list[str]:
        """Broken invariants, in words; empty when all is well. For tests and `lmpipe status --check`."""
        wrong: list[str] = []
        for queue in (self._clean, self._dirty):
            for row in queue.values():
                for shard, index in row.slots.items():
                    state = self.arena.state(index)[1]
                    if state is not SlotState.COMMITTED or index_key(self.arena.record(index).tobytes()) != row.key:
                        wrong.append(f"row {row.key.hex()} shard {shard}: slot {index} is {state.name}")
        return wrong
