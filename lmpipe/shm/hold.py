"""Holds and grants: a session's promises to read, and what evictors and gather see of them. Knows no tiers and no
messages.

A reader publishes (slot, generation) in its own table, fences, and reads the slot's state again
(`native.HoldTable.take`). An evictor dooms the slot, fences, and reads the tables of all living sessions
(`HoldScanner.held`). Of the two one always sees the other. There is no lock and no round trip, and when a reader dies
its holds die with its session.

A grant is the reverse: the engine's word that its pages still hold what a save names. gather reads it after its copy
and before it closes the slot.
"""

from __future__ import annotations

import threading
from collections import deque
from types import TracebackType

import numpy as np
import numpy.typing as npt

from lmpipe.errors import OUT_OF_MEANS, ProtocolViolation, SegmentError
from lmpipe.handles import SessionId
from lmpipe.lifecycle import SlotState
from lmpipe.native import HoldTable, Words, fence
from lmpipe.shm.descriptor import HEADER_BYTES, HOLD_BYTES, WORD_BYTES, SegmentKind, grants_offset
from lmpipe.shm.segment import Segment, words_of
from lmpipe.shm.session import Session, SessionDir
from lmpipe.shm.table import SlotTable


class HoldSet:
    """Holds taken together: of what was asked for, the unbroken run from the start that was still there."""

    def __init__(self, holds: Holds, entries: npt.NDArray[np.uint32], request: int) -> None:
        self._holds = holds
        self.entries = entries
        self.request = request
        self.lost = False
        """The table was full and younger holds took the room. True after a copy: its bytes may be another chunk's."""

    def __len__(self) -> int:
        return len(self.entries)

    def release(self) -> None:
        """Give the holds back; harmless when done twice."""
        self._holds.release(self)

    def __enter__(self) -> HoldSet:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


class Grant:
    """The right of one save to read the engine's pages, until it is revoked."""

    def __init__(self, words: Words, spare: deque[int], index: int, save_id: int) -> None:
        self._words = words
        self._spare: deque[int] | None = spare
        self.index = index
        self.save_id = save_id

    def revoke(self) -> None:
        """From here on the pages may change. What gather has copied but not yet kept is thrown away."""
        # Nothing to take back from the save that has the word now, if this one was released before.
        self._words.cas(self.index, self.save_id, 0)
        # The word goes out before any store that the engine makes to the pages next.
        fence()

    def release(self) -> None:
        """Revoke, and let another save have the word; harmless when done twice."""
        self.revoke()
        spare, self._spare = self._spare, None
        if spare is not None:
            spare.append(self.index)


class Holds:
    """A session's own holds and grants. May be called from any thread."""

    def __init__(self, session: Session) -> None:
        segment = session.segment
        entries, grants = segment.count, segment.grants
        if segment.nbytes < grants_offset(entries) + grants * WORD_BYTES:
            raise SegmentError(
                f"{segment.path}: {entries} entries and {grants} grants do not fit in {segment.nbytes} bytes"
            )
        self._session = session
        self.entries = entries
        self._table = HoldTable(segment.buf, HEADER_BYTES, entries)
        self._grants = Words(segment.buf, grants_offset(entries), grants)
        # First in, first out: the longer a word rests, the less a late reader can mistake whose it is.
        self._spare = deque(range(grants))
        self._sets: dict[HoldSet, None] = {}  # a dict for its order: oldest first
        self._lock = threading.Lock()
        self.lost = 0
        """How many hold sets have been lost for want of room."""

    def take(
        self, table: SlotTable, slots: npt.NDArray[np.uint32], generations: npt.NDArray[np.uint32], request: int
    ) -> HoldSet:
        """Hold as many of the slots, in order, as are committed under these generations. Holds for a whole request or
        a part.

        When the table has not that many entries free, the oldest holds are lost until it has.
        """
        self._session.check()
        if (beyond := slots >= table.slots).any():  # a damaged row leads anywhere
            first = int(np.argmax(beyond))
            slots, generations = slots[:first], generations[:first]
        with self._lock:
            self._make_room(min(len(slots), self.entries))
            entries = self._table.take(table.headers, slots, generations, SlotState.COMMITTED, request)
            held = HoldSet(self, entries, request)
            if len(entries):
                self._sets[held] = None
            return held

    def _make_room(self, wanted: int) -> None:
        while self._table.free < wanted and self._sets:
            oldest = next(iter(self._sets))
            del self._sets[oldest]
            # Said before it is done: a copy that ends after the slot was reused finds it True.
            oldest.lost = True
            self._table.release(oldest.entries)
            self.lost += 1

    def release(self, held: HoldSet) -> None:
        """Give holds back; harmless when done twice, or when they were lost."""
        self._session.check()
        with self._lock:
            if held in self._sets:
                del self._sets[held]
                self._table.release(held.entries)

    def release_request(self, request: int) -> int:
        """Give back all holds of one request; returns how many sets there were."""
        mine = [held for held in tuple(self._sets) if held.request == request]
        for held in mine:
            self.release(held)
        return len(mine)

    def grant(self, save_id: int) -> Grant | None:
        """Let a save read the engine's pages. None: as many saves as there are words are under way.

        Raises:
            ProtocolViolation: `save_id` is 0, which says revoked.
        """
        self._session.check()
        if save_id <= 0:
            raise ProtocolViolation(f"a grant for save {save_id}")
        try:
            index = self._spare.popleft()
        except IndexError:
            return None
        self._grants.store(index, save_id)
        return Grant(self._grants, self._spare, index, save_id)

    def close(self) -> None:
        """Give everything back and let go of the segment; the session stays."""
        with self._lock:
            for held in self._sets:
                held.lost = True
                self._table.release(held.entries)
            self._sets.clear()
            del self._table, self._grants


class _AnySlot(frozenset[int]):
    """What may be held when it cannot be seen: everything."""

    def __contains__(self, place: object) -> bool:
        return True

    def __bool__(self) -> bool:
        return True

    def __or__(self, other: object) -> _AnySlot:
        return self


ANY_SLOT = _AnySlot()


class _Table:
    """A session's hold segment, read by another process."""

    def __init__(self, segment: Segment) -> None:
        self._segment = segment
        words_per_entry = HOLD_BYTES // WORD_BYTES
        if HEADER_BYTES + segment.count * HOLD_BYTES > segment.nbytes:
            raise SegmentError(f"{segment.path}: {segment.count} entries do not fit in {segment.nbytes} bytes")
        words = np.frombuffer(segment.buf, "<u8", segment.count * words_per_entry, HEADER_BYTES)
        self._words = words[::words_per_entry]
        self._scratch = np.empty(segment.count, np.uint64)
        self._grants = words_of(segment, grants_offset(segment.count), segment.grants) if segment.grants else None

    def held(self) -> npt.NDArray[np.uint64]:
        # Aligned 8-byte loads, each whole, in no order: what counts is the fence before them.
        # Into the same memory each time, because this is done at every eviction and fresh pages would cost the most.
        np.copyto(self._scratch, self._words)
        return self._scratch[self._scratch != 0]

    def grant(self, index: int) -> int:
        return self._grants.load(index) if self._grants is not None and 0 <= index < len(self._grants) else 0

    def close(self) -> None:
        del self._words, self._grants
        self._segment.close()


class HoldScanner:
    """The holds and grants of every living session, for the process that evicts and for gather. Not thread-safe."""

    def __init__(self, sessions: SessionDir) -> None:
        self._sessions = sessions
        self._tables: dict[SessionId, _Table] = {}
        # Found dead, not swept yet. Ids are not used twice, so none of them comes back.
        self._dead: set[SessionId] = set()

    def refresh(self) -> None:
        """Map the tables of new sessions, forget those of the dead. The holds of a dead session count until then."""
        if not self._map_new():
            return
        dead = {session for session in self._tables if not self._sessions.alive(session)}
        for session in dead:
            self._tables.pop(session).close()
        self._dead = (self._dead | dead) & self._sessions.with_holds()

    def _map_new(self) -> bool:
        """False: there is no descriptor or no memory to look at somebody's holds."""
        try:
            for session in self._sessions.with_holds() - self._tables.keys() - self._dead:
                self._map(session)
        except OSError as error:
            if error.errno not in OUT_OF_MEANS:
                raise
            return False
        return True

    def _map(self, session: SessionId) -> None:
        try:
            segment = Segment.attach(self._sessions.holds_path(session), SegmentKind.HOLDS, readonly=True)
        except SegmentError as error:
            if isinstance(error.__cause__, OSError) and error.__cause__.errno in OUT_OF_MEANS:
                raise error.__cause__ from None
            return  # gone since, or not ready: then it has no holds yet, and the next look finds it
        self._tables[session] = _Table(segment)

    def held(self) -> frozenset[int]:
        """Hold words (`Slot.place`) of all sessions, as of now: to be asked after the slots in question were doomed.

        The directory is listed each time. A session that comes after the listing reads the doom when it takes its
        first hold. As long as somebody's holds cannot be looked at, any slot may be held.
        """
        fence()
        if not self._map_new():
            return ANY_SLOT
        found = [table.held() for table in self._tables.values()]
        return frozenset(np.concatenate(found).tolist()) if found else frozenset()

    def granted(self, session: SessionId, index: int) -> int:
        """The id of the save that may read the session's pages under grant `index`; 0: revoked, or the session is gone.

        To be asked after the copy: the copy's reads are done before the word is read.
        """
        fence()
        if session not in self._tables:
            self._map_new()
        table = self._tables.get(session)
        return table.grant(index) if table is not None else 0

    def close(self) -> None:
        """Unmap everything."""
        for table in self._tables.values():
            table.close()
        self._tables.clear()
