"""Loading: the engine's own threads copy held slots into its pages; what lies below DRAM is asked for first and copied
as it arrives.

Encoded slots are decoded on the way (decoding.py). No worker ever writes engine memory, so a late or stopped one cannot
hurt. The deadline ends the wait, and so does the death of gather; what has not come is recomputed. What lies in DRAM
altogether can be loaded into pages on a device layer by layer, while the engine computes (layers.py).
"""

from __future__ import annotations

import queue
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from lmpipe import failpoints, native
from lmpipe import messages as m
from lmpipe.handles import CHUNK, ChunkRecords, Codec
from lmpipe.producer.attachment import LOOKS, TIERS, Attachment, Found, slots_of
from lmpipe.producer.layers import LayerLoad, LoadResult
from lmpipe.producer.link import Answer, Link
from lmpipe.producer.pools import Copies, Pool, mark
from lmpipe.producer.saving import PageIds
from lmpipe.shm.table import SlotTable

LOOK_S = 0.02
"""How often a load that waits looks whether gather lives."""


@dataclass(slots=True)
class _Arrivals:
    """Chunks expected from below, by key."""

    waiting: dict[bytes, int]
    done: npt.NDArray[np.bool_]
    fidelity: npt.NDArray[np.uint16]
    """As asked for; in the end, as loaded."""
    after: object
    """When nothing reads the pages any more that are loaded into."""
    failed: set[str] = field(default_factory=set[str])


class Loader:
    """The load side of one producer."""

    def __init__(self, link: Link, copy_threads: int) -> None:
        self._link = link
        self._copies = Copies(copy_threads)
        self._under_way: set[LayerLoad] = set()

    def load_layers(
        self, found: Found, pool: Pool, page_ids: PageIds, after: object, told: Callable[[LoadResult], None]
    ) -> LayerLoad | None:
        """Begin to copy what was found into pages on a device; see `Producer.load_layers`. `told`: of the result.

        None: not all of it lies in DRAM, or the pages are on no device; nothing was done.
        """
        attachment, holds, count = found.attachment, found.holds, min(found.chunks, len(page_ids))
        below = found.tiers[:count].any()
        if isinstance(pool, native.PagePool) or not count or below or holds is None or attachment is None:
            return None
        if not attachment.enter():
            return None
        with ExitStack() as needed:
            needed.callback(attachment.leave)
            needed.callback(found.release)
            records = found.records[:count]
            there = np.flatnonzero(_are_in(attachment.arena, records))
            after = mark(pool) if after is None else after
            copies = self._copies.load_layers(pool, page_ids[there], attachment.arena, records[there], after)
            until_then = needed.pop_all()

        def end() -> LoadResult:
            try:
                with until_then:
                    damaged = copies.finish()
                    failed = set(damaged.values())
                    done = np.zeros(count, np.bool_)
                    done[np.delete(there, list(damaged))] = True
                    if len(there) < count:
                        failed.add("another chunk is there")
                    if holds.lost:
                        done[:] = False
                        failed.add("hold lost")
                    result = _result(found, done, found.records["fidelity"][:count], failed, 0.0)
            finally:
                self._under_way.discard(load)
            told(result)
            return result

        load = LayerLoad(copies, end)
        self._under_way.add(load)
        return load

    def close(self) -> None:
        """Wait for loads whose result nobody has taken."""
        for load in list(self._under_way):
            load.result()

    def load(
        self, load_id: int, found: Found, pool: Pool, page_ids: PageIds, deadline_ns: int, after: object
    ) -> LoadResult:
        """Copy what was found into the engine's pages; see `Producer.load`."""
        started = time.monotonic()
        attachment = found.attachment or self._link.attachment
        count = min(found.chunks, len(page_ids))
        if not count or attachment is None or not attachment.enter():
            found.release()
            return LoadResult(0, 0, 0, {}, "" if not count else "lmpipe absent", 0.0)
        try:
            after = mark(pool) if after is None else after
            return self._load(attachment, load_id, found, count, pool, page_ids, deadline_ns, after, started)
        finally:
            found.release()
            failpoints.hit("producer.load.released")
            self._link.forget(load_id)
            attachment.leave()

    def _load(
        self,
        attachment: Attachment,
        load_id: int,
        found: Found,
        count: int,
        pool: Pool,
        page_ids: PageIds,
        deadline_ns: int,
        after: object,
        started: float,
    ) -> LoadResult:
        done = np.zeros(count, np.bool_)
        below = np.flatnonzero(found.tiers[:count] != 0)
        records = found.records[below]
        arrivals = _Arrivals(
            {key: int(at) for key, at in zip(records["key"].tolist(), below.tolist(), strict=True)},
            done,
            found.records["fidelity"][:count].copy(),
            after,
        )
        answers: queue.SimpleQueue[Answer | None] | None = None
        if len(below):
            ask = m.Load(attachment.session.id, load_id, records, "arena", deadline_ns)
            answers = self._link.request(load_id, "load", ask)
            failpoints.hit("producer.load.asked")
            # Asked after the request is entered: a node that is lost from here on says so in the queue, and slots of
            # another node's arena are never taken for this one's.
            if self._link.attachment is not attachment:
                arrivals.failed.add("lmpipe was started anew")
                answers = None
        if found.holds is not None:
            held = found.dram[found.dram < count]
            there = self._scatter(attachment, found.records[held], pool, page_ids[held], arrivals)
            failpoints.hit("producer.load.copied")
            if found.holds.lost:
                arrivals.failed.add("hold lost")
            else:
                done[held] = there
        if answers is not None:
            self._await(attachment, load_id, arrivals, answers, pool, page_ids, deadline_ns)
        return _result(found, done, arrivals.fidelity, arrivals.failed, time.monotonic() - started)

    def _await(
        self,
        attachment: Attachment,
        load_id: int,
        arrivals: _Arrivals,
        answers: queue.SimpleQueue[Answer | None],
        pool: Pool,
        page_ids: PageIds,
        deadline_ns: int,
    ) -> None:
        died = False
        while arrivals.waiting:
            left_s = (deadline_ns - time.monotonic_ns()) / 1e9
            try:
                answer = answers.get(timeout=min(left_s, LOOK_S)) if left_s > 0 else answers.get_nowait()
            except queue.Empty:
                if left_s > LOOK_S and not died:
                    died = self._link.gather_died()  # the link brings what it had said, and then the end
                    continue
                arrivals.failed.add("gather died" if died else "deadline")
                self._link.post("load", m.Cancel(attachment.session.id, load_id))
                return
            match answer:
                case m.Loaded():
                    self._arrived(attachment, load_id, arrivals, answer.chunks, pool, page_ids)
                case m.LoadFailed():
                    arrivals.failed.add(answer.reason)
                    for key in answer.chunks["key"].tolist():
                        arrivals.waiting.pop(key, None)
                case _:
                    arrivals.failed.add(self._link.loss if self._link.state == "absent" else "lmpipe lost")
                    return

    def _arrived(
        self,
        attachment: Attachment,
        load_id: int,
        arrivals: _Arrivals,
        chunks: ChunkRecords,
        pool: Pool,
        page_ids: PageIds,
    ) -> None:
        at = np.array([arrivals.waiting.pop(key, -1) for key in chunks["key"].tolist()], np.intp)
        chunks, at = chunks[at >= 0].copy(), at[at >= 0]
        failpoints.hit("producer.load.arrived")
        for _ in range(LOOKS * len(at)):
            held = self._take(attachment, load_id, arrivals, chunks, at, pool, page_ids)
            chunks, at = chunks[held:], at[held:]
            if not len(at):
                return
            moved = attachment.moved(chunks[0])  # put into another slot, encoded, or gone
            if moved is None:
                break
            chunks[0] = moved
        arrivals.failed.add("evicted before it was copied")

    def _take(
        self,
        attachment: Attachment,
        load_id: int,
        arrivals: _Arrivals,
        chunks: ChunkRecords,
        at: npt.NDArray[np.intp],
        pool: Pool,
        page_ids: PageIds,
    ) -> int:
        """Hold what has arrived and copy it; how many of the chunks, from the first, could be held."""
        holds = attachment.holds.take(attachment.arena, *slots_of(chunks), load_id)
        held = len(holds)
        exact_enough = chunks["fidelity"][:held] <= arrivals.fidelity[at[:held]]
        if not exact_enough.all():
            arrivals.failed.add("less exact than what was found")
        there = self._scatter(attachment, chunks[:held], pool, page_ids[at[:held]], arrivals)
        if holds.lost:
            arrivals.failed.add("hold lost")
        else:
            there &= exact_enough
            arrivals.done[at[:held]] = there
            arrivals.fidelity[at[:held]] = chunks["fidelity"][:held]
        attachment.holds.release(holds)
        return held

    def _scatter(
        self,
        attachment: Attachment,
        records: ChunkRecords,
        pool: Pool,
        page_ids: PageIds,
        arrivals: _Arrivals,
    ) -> npt.NDArray[np.bool_]:
        """Copy held slots into pages; (n,) which of them have arrived. Why others have not is noted."""
        arena = attachment.arena
        there = _are_in(arena, records)
        if not there.all():
            arrivals.failed.add("another chunk is there")
        raw = there & (records["codec"] == Codec.RAW)
        if raw.any():
            self._copies.load(pool, page_ids[raw], arena, records[raw], arrivals.after)
        if not raw[there].all():
            encoded = np.flatnonzero(there & ~raw)
            damaged = self._copies.decode(pool, page_ids[encoded], arena, records[encoded], arrivals.after)
            there[encoded[list(damaged)]] = False
            arrivals.failed.update(damaged.values())
        return there


def _result(
    found: Found,
    done: npt.NDArray[np.bool_],
    fidelity: npt.NDArray[np.uint16],
    failed: set[str],
    seconds: float,
) -> LoadResult:
    """Of a load of the first len(done) chunks found."""
    chunks = len(done) if done.all() else int(np.argmin(done))
    tiers = np.bincount(found.tiers[:chunks], minlength=len(TIERS))
    by_tier = {tier: int(tiers[i]) for i, tier in enumerate(TIERS) if tiers[i]}
    reason = "" if chunks == len(done) else ", ".join(sorted(failed)) or "not found below"
    nbytes = int(found.records["raw_bytes"][:chunks].sum())
    least = int(fidelity[:chunks].max(initial=0))
    return LoadResult(chunks * found.chunk_tokens, chunks, nbytes, by_tier, reason, seconds, least)


def _are_in(arena: SlotTable, records: ChunkRecords) -> npt.NDArray[np.bool_]:
    """(n,) which held slots say themselves that they have what a row promised: a damaged row leads anywhere."""
    headers = arena.records(records["place"] >> np.uint64(32))
    headers["place"] = records["place"]
    shape = (len(records), CHUNK.itemsize)
    said, promised = (np.ascontiguousarray(each).view(np.uint8).reshape(shape) for each in (headers, records))
    return (said == promised).all(axis=1)
