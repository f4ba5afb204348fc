"""Slots, holds and streaming copies under several processes at once, as fast as they go, with deaths in between.

    python tests/native/torture.py --seconds 600

One owner leases, commits, dooms, scans and frees; writers fill what they are lent with the native copier; readers hold
and compare every byte; now and then a writer or a reader is killed and another takes its place. A payload is its slot's
generation and number, everywhere. `--without-holds` reads without holding, which has to go wrong.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from lmpipe import native
from lmpipe.handles import CHUNK, SessionId, Slot
from lmpipe.lifecycle import SlotEvent, SlotState
from lmpipe.shm.descriptor import SegmentKind
from lmpipe.shm.hold import Holds, HoldScanner
from lmpipe.shm.segment import Segment
from lmpipe.shm.session import Session, SessionDir
from lmpipe.shm.slots import SlotOwner, SlotTable

SLOTS, PAYLOAD_BYTES, PAGES = 6, 64 * 1024, 8
LOST_S = 80.0
IDLE_S = 20e-6
"""What has nothing to do leaves the processor to the others: there may be more of them than processors."""
MAIL_WORDS = 4
"""For each writer: its session, the place it is lent, chunks filled; for each reader: chunks read, wrong ones."""
MOST = 8


@dataclass
class Tally:
    """What happened."""

    committed: int = 0
    evicted: int = 0
    spared: int = 0
    reclaimed: int = 0
    killed: int = 0
    read: int = 0
    wrong: int = 0


def content(slot: Slot) -> int:
    """The 64-bit word that fills a slot's payload."""
    return slot.generation << 32 | slot.index | 1 << 31


class Mail:
    """Words between the processes: no sockets, so that nothing slows them down."""

    def __init__(self, directory: Path) -> None:
        with (directory / "mail").open("a+b") as file:
            file.truncate(mmap.PAGESIZE)
            self.words = native.Words(mmap.mmap(file.fileno(), mmap.PAGESIZE), 0, MOST * MAIL_WORDS)

    def get(self, who: int, at: int) -> int:
        return self.words.load(who * MAIL_WORDS + at)

    def put(self, who: int, at: int, value: int) -> None:
        self.words.store(who * MAIL_WORDS + at, value)

    def add(self, who: int, at: int) -> None:
        self.words.fetch_add(who * MAIL_WORDS + at, 1)


def arena_at(directory: Path) -> SlotTable:
    return SlotTable(Segment.attach(directory / "arena.shm", SegmentKind.SLOTS))


def write(directory: Path, me: int) -> None:
    """Fill what is lent until killed: open, streaming copy of pages in odd order, close."""
    mail, arena, session = Mail(directory), arena_at(directory), Session.create(directory, entries=4, grants=1)
    source = np.zeros(PAYLOAD_BYTES // 8, np.uint64)
    page = PAYLOAD_BYTES // PAGES
    one = np.full(1, page, np.uint64)
    pool = native.PagePool([native.Region(source)], np.zeros(1, np.uint32), np.zeros(1, np.uint64), one, one, PAGES)
    copier = native.Copier(2)
    pages = np.roll(np.arange(PAGES, dtype=np.int32), me)[None, :].copy()
    mail.put(me, 0, session.id)
    while True:
        place = mail.get(me, 1)
        slot = Slot.from_place(place)
        if not place or arena.owner(slot.index) != session.id or not arena.advance(slot, SlotEvent.OPEN):
            time.sleep(IDLE_S)
            continue
        source[:] = content(slot)
        copier.gather(pool, pages, arena.region, np.array([arena.offset(slot.index)], np.uint64))
        record = np.zeros(1, CHUNK)[0]
        record["nbytes"] = record["raw_bytes"] = PAYLOAD_BYTES
        arena.set_record(slot.index, record)
        arena.advance(slot, SlotEvent.CLOSE)


def read(directory: Path, me: int, *, holding: bool) -> None:
    """Hold what is committed and compare it, until killed; or compare without holding."""
    mail, arena, session = Mail(directory), arena_at(directory), Session.create(directory, entries=16, grants=1)
    holds, draw = Holds(session), random.Random(me)
    payload = np.empty(PAYLOAD_BYTES // 8, np.uint64)
    mail.put(me, 0, session.id)
    while True:
        index = draw.randrange(arena.slots)
        generation, state = arena.state(index)
        if state is not SlotState.COMMITTED:
            continue
        held = (
            holds.take(arena, np.array([index], np.uint32), np.array([generation], np.uint32), 1) if holding else None
        )
        if held is None or len(held):
            payload[:] = np.frombuffer(arena.payload(index, PAYLOAD_BYTES), np.uint64)
            if not (payload == content(Slot(index, generation))).all():
                mail.add(me, 2)
            mail.add(me, 1)
        if held is not None:
            held.release()


class Owner:
    """The one that gives slots out, and starts and kills the others."""

    def __init__(self, directory: Path, writers: int, readers: int, seed: int, *, holding: bool) -> None:
        (directory / "sessions").mkdir(mode=0o700)
        self._directory, self._draw, self._holding = directory, random.Random(seed), holding
        self.arena = SlotOwner.create(directory / "arena.shm", SLOTS * PAYLOAD_BYTES, SLOTS)
        self._mail, self._sessions = Mail(directory), SessionDir(directory)
        self._scanner = HoldScanner(self._sessions)
        self._writers, self._readers = range(writers), range(writers, writers + readers)
        self._children: dict[int, subprocess.Popen[bytes]] = {}
        self._committed: list[Slot] = []
        self._doomed: list[Slot] = []
        self._lent: dict[int, Slot] = {}
        self._owner_of: dict[int, SessionId] = {}
        self.tally = Tally()
        for who in (*self._writers, *self._readers):
            self._start(who)

    def _start(self, who: int) -> None:
        self._mail.put(who, 0, 0)
        self._mail.put(who, 1, 0) if who in self._writers else None
        role = "write" if who in self._writers else "read" if self._holding else "peek"
        argv = [sys.executable, "-W", "error", __file__, "--role", role, str(self._directory), str(who)]
        self._children[who] = subprocess.Popen(argv)

    def run(self, seconds: float, kill_every_s: float) -> Tally:
        """Until the time is over and all that must happen has happened."""
        begin_s = time.monotonic()
        next_kill_s = begin_s + kill_every_s
        while (now_s := time.monotonic()) < begin_s + seconds or not self._enough():
            assert now_s < begin_s + seconds + LOST_S, f"nothing goes on: {self.tally}"
            before = self.tally.committed, self.tally.evicted
            self._turn()
            if before == (self.tally.committed, self.tally.evicted):
                time.sleep(IDLE_S)
            if now_s >= next_kill_s:
                next_kill_s = now_s + kill_every_s
                self._kill(self._draw.choice([*self._writers, *self._readers]))
        self._end()
        return self.tally

    def _enough(self) -> bool:
        """Whether everything that is to be tried has happened; without holds, whether it has gone wrong."""
        found = self._count()
        if not self._holding:
            return found.wrong > 0
        much = min(found.committed, found.evicted, found.read) > 100
        return much and min(found.spared, found.reclaimed, found.killed) > 0

    def _count(self) -> Tally:
        self.tally.read = sum(self._mail.get(who, 1) for who in self._readers)
        self.tally.wrong = sum(self._mail.get(who, 2) for who in self._readers)
        return self.tally

    def _turn(self) -> None:
        for who in self._writers:
            self._serve(who)
        if len(self._committed) > SLOTS // 2 or (self._committed and not self.arena.slots_free):
            victim = self._committed.pop(self._draw.randrange(len(self._committed)))
            assert self.arena.advance(victim, SlotEvent.DOOM)
            self._doomed.append(victim)
        if self._doomed:
            held = self._scanner.held()
            kept = [slot for slot in self._doomed if slot.place in held]
            for slot in self._doomed:
                if slot not in kept:
                    assert self.arena.free(slot)
                    self.tally.evicted += 1
            self.tally.spared += len(kept)
            self._doomed = kept

    def _serve(self, who: int) -> None:
        slot = self._lent.get(who)
        if slot is not None:
            state = self.arena.state(slot.index)
            assert state[0] == slot.generation
            if state[1] is SlotState.READY:
                assert self.arena.advance(slot, SlotEvent.COMMIT)
                self._committed.append(slot)
                self.tally.committed += 1
            elif not self._sessions.alive(self._owner_of[who]):
                assert self.arena.free(slot)
                self.tally.reclaimed += 1
            elif self._draw.random() < 0.01 and self.arena.take_back(slot):
                self.tally.reclaimed += 1
            else:
                return
            del self._lent[who]
            return
        session = SessionId(self._mail.get(who, 0))
        fresh = self.arena.lease(PAYLOAD_BYTES, session) if session and self._sessions.alive(session) else None
        if fresh is not None:
            self._lent[who], self._owner_of[who] = fresh, session
            self._mail.put(who, 1, fresh.place)

    def _kill(self, who: int) -> None:
        child = self._children[who]
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        if who in self._writers and who in self._lent:
            self._serve(who)
        self._scanner.refresh()
        self._sessions.sweep()
        self.tally.killed += 1
        self._start(who)

    def _end(self) -> None:
        """Kill all; whatever they held comes back."""
        for who, child in self._children.items():
            os.kill(child.pid, signal.SIGKILL)
            child.wait()
            while who in self._lent:
                self._serve(who)
        self._count()
        self._scanner.refresh()
        for slot in self._committed:
            assert self.arena.advance(slot, SlotEvent.DOOM)
        assert self._scanner.held() == frozenset()
        for slot in [*self._committed, *self._doomed]:
            assert self.arena.free(slot)
        assert self.arena.free_bytes == self.arena.capacity_bytes and self.arena.slots_free == SLOTS
        self._sessions.sweep()
        assert not list((self._directory / "sessions").iterdir())

    def close(self) -> None:
        """End what is left of the processes."""
        for child in self._children.values():
            child.kill()
            child.wait()
        self._scanner.close()
        self.arena.close()


def torture(
    directory: Path, seconds: float, *, writers: int = 2, readers: int = 2, seed: int = 1, holding: bool = True
) -> Tally:
    """Run it in an empty private directory."""
    owner = Owner(directory, writers, readers, seed, holding=holding)
    try:
        return owner.run(seconds, kill_every_s=2.0)
    finally:
        owner.close()


def main() -> int:
    """1 if any byte was wrong, or, without holds, none."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--without-holds", action="store_true")
    parser.add_argument("--role", choices=("write", "read", "peek"), help=argparse.SUPPRESS)
    parser.add_argument("rest", nargs="*", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.role:
        directory, me = Path(asked.rest[0]), int(asked.rest[1])
        write(directory, me) if asked.role == "write" else read(directory, me, holding=asked.role == "read")
    with tempfile.TemporaryDirectory(prefix="lmpipe-torture-", dir="/dev/shm") as directory:
        found = torture(Path(directory), asked.seconds, seed=asked.seed, holding=not asked.without_holds)
    print(json.dumps(asdict(found)))
    return bool(found.wrong) is not asked.without_holds


if __name__ == "__main__":
    sys.exit(main())
