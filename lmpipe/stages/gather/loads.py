"""Loads from below DRAM: destination slots, who writes them, who waits for them.

The slot of a load is leased to the stage that will write it, so it comes back when that stage says it failed or when
its session is dead. A deadline ends the waiting, not the lease, and so does the death of a stage on the way: what
arrives late is committed all the same, for the next request. With a stage that dies in between, question or answer may
be lost; then the slot itself tells: one that was not opened is taken back, one that is complete has landed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import takewhile

import numpy as np

from lmpipe.handles import CHUNK, ChunkRecords, Codec, SessionId, Slot, Tier
from lmpipe.index import IndexReader
from lmpipe.index_row import index_keys, row_records
from lmpipe.lifecycle import LEASED_STATES, SlotState
from lmpipe.stages.base import Peer
from lmpipe.stages.gather.outflow import Name
from lmpipe.tiers.dram import DramTier

WRITERS = {Tier.SSD: "persist", Tier.REMOTE: "replicate"}
"""The stage that writes a chunk that is stored raw; encoded ones are written by the decoder."""
DECODER = "compress"

Route = tuple[tuple[str, SessionId], ...]
"""The stages that a load passes through, nearest first, each in the life in which it was asked."""


@dataclass(slots=True, eq=False)
class Waiter:
    """One producer's load."""

    peer: Peer | None
    session: SessionId
    load_id: int
    deadline_ns: int
    names: dict[Name, bytes] = field(default_factory=dict[Name, bytes])
    """The records still awaited, as they were asked for."""
    routes: set[Route] = field(default_factory=set[Route])
    """Of the flights it has waited for."""


@dataclass(slots=True)
class Flight:
    """One chunk on its way up."""

    slot: Slot
    owner: SessionId
    tier: Tier
    route: Route
    fidelity: int
    record: bytes
    """As it was asked for from below."""
    seen_s: float = 0.0
    """When `overdue` saw it first."""
    waiters: list[Waiter] = field(default_factory=list[Waiter])
    unwanted: bool = False
    """Invalidated on the way: it is freed when it lands."""


@dataclass(slots=True)
class Asked:
    """What became of a load request at once."""

    ready: list[bytes] = field(default_factory=list[bytes])
    failed: dict[str, list[bytes]] = field(default_factory=dict[str, list[bytes]])
    down: list[bytes] = field(default_factory=list[bytes])

    def fail(self, reason: str, record: bytes) -> None:
        """One chunk will not come."""
        self.failed.setdefault(reason, []).append(record)


def joined(records: list[bytes]) -> ChunkRecords:
    """72-byte records as one array."""
    return np.frombuffer(b"".join(records), CHUNK)


def names_of(records: ChunkRecords) -> list[Name]:
    """Index key and shard of each record."""
    return list(zip(index_keys(records), records["shard"].tolist(), strict=True))


class Loads:
    """The table of flights. Index rows of the tiers below are read here again: what a producer saw is only a hint."""

    def __init__(self, dram: DramTier, below: dict[Tier, IndexReader], alive: Callable[[SessionId], bool]) -> None:
        self._dram, self._below, self._alive = dram, below, alive
        self._flights: dict[Name, Flight] = {}
        self._waiters: list[Waiter] = []
        self._recalls: dict[int, tuple[set[bytes] | None, int]] = {}
        self._former: set[Slot] = set()
        """Leased by a former gather to stages that live; nobody here waits for them."""

    def __len__(self) -> int:
        return len(self._flights)

    def ask(self, waiter: Waiter, records: ChunkRecords, chain: Mapping[str, SessionId]) -> Asked:
        """Sort a request: what is in DRAM by now, what is on its way, what has to be asked for, what cannot come."""
        asked = Asked()
        chain = self._living(chain)
        for name, record in zip(names_of(records), records, strict=True):
            raw = record.tobytes()
            fidelity = int(record["fidelity"])
            row = self._dram.row(name[0])
            if row is not None and self._dram.has(*name, fidelity):
                asked.ready.append(row.records[name[1]])
                continue
            flight = self._flights.get(name)
            if flight is None:
                flight = self._start(name, raw, fidelity, chain, asked)
            elif flight.fidelity > fidelity:
                asked.fail("a less exact copy is on its way", raw)
                continue
            if flight is not None and waiter.peer is not None and name not in waiter.names:
                flight.waiters.append(waiter)
                waiter.names[name] = raw
                waiter.routes.add(flight.route)
        if waiter.names:
            self._waiters.append(waiter)
        self._dram.touch([name[0] for name in names_of(records)])
        return asked

    def _start(
        self, name: Name, raw: bytes, fidelity: int, chain: Mapping[str, SessionId], asked: Asked
    ) -> Flight | None:
        if self._is_recalled(name[0], raw):
            asked.fail("being invalidated", raw)
            return None
        stored = self._stored(name, fidelity)
        if stored is None:
            asked.fail("not stored below", raw)
            return None
        tier, record = stored
        writer = WRITERS[tier] if int(record["codec"]) == Codec.RAW else DECODER
        owner = chain.get(writer)
        if owner is None or WRITERS[tier] not in chain:
            asked.fail(f"{WRITERS[tier] if owner else writer} is down", raw)
            return None
        slot = self._dram.reserve(int(record["raw_bytes"]), owner)
        if slot is None:
            asked.fail("no room in DRAM", raw)
            return None
        record = record.copy()
        record["place"] = slot.place
        asked.down.append(record.tobytes())
        route = tuple(chain.items())[: list(chain).index(WRITERS[tier]) + 1]
        flight = self._flights[name] = Flight(slot, owner, tier, route, int(record["fidelity"]), record.tobytes())
        return flight

    def _living(self, chain: Mapping[str, SessionId]) -> dict[str, SessionId]:
        """The chain down to the first stage that is dead: no load gets past it."""
        return dict(takewhile(lambda link: self._alive(link[1]), chain.items()))

    def _stored(self, name: Name, fidelity: int) -> tuple[Tier, np.void] | None:
        for tier, reader in self._below.items():
            for row in reader.run([name[0]]):
                for record in row_records(row):
                    if int(record["shard"]) == name[1] and int(record["fidelity"]) <= fidelity:
                        return tier, record
        return None

    def landed(self, records: ChunkRecords) -> list[tuple[Name, Flight]]:
        """Flights whose slots are fully written; the caller commits them and then tells `settle`."""
        done: list[tuple[Name, Flight]] = []
        for name, place in zip(names_of(records), records["place"].tolist(), strict=True):
            flight = self._flights.get(name)
            if flight is None or flight.slot.place != place:
                continue  # an answer to a flight that was given up when its writer died
            if self._dram.arena.state(flight.slot.index) == (flight.slot.generation, SlotState.READY):
                done.append((name, flight))
        return done

    def settle(self, name: Name) -> list[tuple[Waiter, bytes]]:
        """End a flight. Returns who waited for it, each with the record as it asked for it."""
        flight = self._flights.pop(name, None)
        if flight is None:
            return []
        waited = [(waiter, waiter.names.pop(name)) for waiter in flight.waiters]
        self._waiters = [waiter for waiter in self._waiters if waiter.names]
        return waited

    def give_up(self, name: Name, place: int | None = None) -> list[tuple[Waiter, bytes]]:
        """The writer failed (and so returned the lease) or is dead: free the slot. Returns who waited, as `settle`."""
        flight = self._flights.get(name)
        if flight is None or (place is not None and flight.slot.place != place):
            if place is not None and (slot := Slot.from_place(place)) in self._former:
                self._former.discard(slot)
                self._dram.arena.free(slot)
            return []
        if self._dram.arena.state(flight.slot.index)[1] in LEASED_STATES:
            self._dram.arena.free(flight.slot)
        return self.settle(name)

    @property
    def waited_for(self) -> bool:
        """Whether somebody waits."""
        return bool(self._waiters)

    def stranded(self) -> list[tuple[Waiter, str, list[bytes]]]:
        """Chunks that somebody waits for in vain, for a stage on their way is dead: who, which stage, the records.
        They are waited for no longer; their flights go on, until the owner of the slot fails or dies.
        """
        dead = {route: stage for route in self._routes() if (stage := self._dead_stage(route))}
        found: list[tuple[Waiter, str, list[bytes]]] = []
        for waiter in self._waiters if dead else ():
            by_stage: dict[str, list[bytes]] = defaultdict(list)
            for name in list(waiter.names):
                flight = self._flights[name]
                if flight.route in dead:
                    flight.waiters.remove(waiter)
                    by_stage[dead[flight.route]].append(waiter.names.pop(name))
            waiter.routes.difference_update(dead)
            found += [(waiter, stage, records) for stage, records in by_stage.items()]
        self._waiters = [waiter for waiter in self._waiters if waiter.names]
        return found

    def _routes(self) -> set[Route]:
        return {route for waiter in self._waiters for route in waiter.routes}

    def _dead_stage(self, route: Route) -> str:
        return next((stage for stage, session in route if not self._alive(session)), "")

    def cut_off(self) -> tuple[list[Name], ChunkRecords]:
        """Of the flights that have lost a stage on their way, but not their writer: those whose slots were not opened,
        which are taken back now, and the records of those that are complete. What is being written is found the next
        time.
        """
        taken: list[Name] = []
        complete: list[bytes] = []
        arena = self._dram.arena
        dead = {route for route in {flight.route for flight in self._flights.values()} if self._dead_stage(route)}
        for name, flight in self._flights.items() if dead else ():
            if flight.route not in dead:
                continue
            if arena.take_back(flight.slot):
                taken.append(name)
            elif arena.state(flight.slot.index) == (flight.slot.generation, SlotState.READY):
                complete.append(arena.record(flight.slot.index).tobytes())
        return taken, joined(complete)

    def overdue(self, now_s: float, limit_s: float) -> tuple[ChunkRecords, ChunkRecords]:
        """Flights of which nothing was heard for so long that question or answer must be lost: the records to ask for
        again, and those of slots that are complete. Who writes a slot at this moment lets a second question pass.
        """
        again: list[bytes] = []
        complete: list[bytes] = []
        for flight in self._flights.values():
            flight.seen_s = flight.seen_s or now_s
            if now_s - flight.seen_s <= limit_s:
                continue
            flight.seen_s = now_s
            if self._dram.arena.state(flight.slot.index) == (flight.slot.generation, SlotState.READY):
                complete.append(self._dram.arena.record(flight.slot.index).tobytes())
            else:
                again.append(flight.record)
        return joined(again), joined(complete)

    def adopt(self, leases: set[int]) -> None:
        """Take over what a former gather had leased for loads."""
        self._former.update(Slot(index, self._dram.arena.state(index)[0]) for index in leases)

    def end_former(self) -> None:
        """Take back what was not opened, what is complete (nobody here knows who wanted it), and what the dead had."""
        arena = self._dram.arena
        for slot in list(self._former):
            generation, state = arena.state(slot.index)
            over = generation != slot.generation or arena.take_back(slot)
            if not over and (state is SlotState.READY or not self._alive(arena.owner(slot.index))):
                arena.free(slot)
                over = True
            if over:
                self._former.discard(slot)

    def orphans(self) -> list[Name]:
        """Flights whose writer is dead."""
        dead = {owner for owner in {flight.owner for flight in self._flights.values()} if not self._alive(owner)}
        return [name for name, flight in self._flights.items() if flight.owner in dead]

    def expired(self, now_ns: int) -> list[Waiter]:
        """Waiters whose deadline has passed; they are forgotten, their flights go on."""
        late = [waiter for waiter in self._waiters if waiter.deadline_ns and waiter.deadline_ns <= now_ns]
        for waiter in late:
            self._forget(waiter)
        return late

    def cancel(self, session: int, load_id: int) -> None:
        """Nobody waits for this load any more."""
        for waiter in [w for w in self._waiters if w.session == session and w.load_id == load_id]:
            self._forget(waiter)

    def _forget(self, waiter: Waiter) -> None:
        for name in waiter.names:
            flight = self._flights.get(name)
            if flight is not None and waiter in flight.waiters:
                flight.waiters.remove(waiter)
        self._waiters.remove(waiter)

    def next_deadline_ns(self) -> int:
        """The earliest deadline, 0 for none."""
        return min((waiter.deadline_ns for waiter in self._waiters if waiter.deadline_ns), default=0)

    def begin_recall(self, number: int, keys: set[bytes] | None, namespace: int) -> None:
        """Until `end_recall` the tiers below may still have chunks of these keys, or of a namespace (0: of all), that
        must not come up any more.
        """
        self._recalls[number] = keys, namespace

    def end_recall(self, number: int) -> None:
        """They have forgotten, or it was given up."""
        self._recalls.pop(number, None)

    def _is_recalled(self, key: bytes, raw: bytes) -> bool:
        return any(
            key in keys if keys is not None else namespace in (0, int(joined([raw])["namespace"][0]))
            for keys, namespace in self._recalls.values()
        )

    def invalidate(self, keys: set[bytes] | None) -> None:
        """Chunks on their way that must not land: those of these keys, or all."""
        for name, flight in self._flights.items():
            if keys is None or name[0] in keys:
                flight.unwanted = True
