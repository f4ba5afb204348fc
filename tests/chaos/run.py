"""Worlds one after another: storms and calm, until the time or the rounds are over."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import IO

from . import files as files  # enters its faults into the table
from .faults import FAULTS
from .invariants import Broken, Looker
from .record import Record, Sums
from .world import World

STEP_S = 0.004


@dataclass(frozen=True, slots=True)
class Plan:
    """`rate`: faults per second of a storm; `only`: these faults alone; `mounts`: small file systems where possible."""

    rounds: int = 6
    storm_s: float = 10.0
    rate: float = 6.0
    only: Sequence[str] = ()
    mounts: bool = True


@dataclass(frozen=True, slots=True)
class Event:
    """A fault of a schedule. `draw`: the seed of what it draws."""

    at_s: float
    fault: str
    draw: str


def schedule(seed: int, number: int, names: Sequence[str], plan: Plan) -> list[Event]:
    """The faults of one storm."""
    draw = random.Random(f"storm {seed} {number}")
    count = round(plan.rate * plan.storm_s)
    weights = [FAULTS[name].weight for name in names]
    moments = sorted(draw.uniform(0, plan.storm_s) for _ in range(count))
    chosen = draw.choices(list(names), weights, k=count)
    return [
        Event(at, name, f"{seed} {number} {place}")
        for place, (at, name) in enumerate(zip(moments, chosen, strict=True))
    ]


def storm(world: World, events: Sequence[Event], seconds: float) -> None:
    """Do the faults of a schedule at their moments, then end them all."""
    world.storm()
    begin_s, waiting = time.monotonic(), list(events)
    while time.monotonic() - begin_s < seconds:
        while waiting and waiting[0].at_s <= time.monotonic() - begin_s:
            event = waiting.pop(0)
            try:
                done = FAULTS[event.fault].act(world, random.Random(event.draw))
            except OSError as error:  # another fault was quicker: no room, no such file
                world.record.write("not done", name=event.fault, why=str(error))
                continue
            if done is not None:
                world.record.fault(event.fault, at_s=round(event.at_s, 3), **done)
        world.tick()
        time.sleep(STEP_S)
    world.heal()


def run_world(
    seed: int, plan: Plan, sums: Sums, file: IO[str] | None = None, say: Callable[[str], None] = lambda _: None
) -> int:
    """One world from start to end; how often an invariant was violated."""
    record = Record(seed, sums, file)
    with World(seed, record, mounts=plan.mounts) as world:
        names = [name for name in plan.only or FAULTS if not FAULTS[name].unfit(world)]
        skipped = {name: why for name in FAULTS if (why := FAULTS[name].unfit(world))}
        record.write("world", shape=asdict(world.shape), skipped=skipped, plan=asdict(plan))
        look = Looker(world)
        try:
            look.look()
            for number in range(plan.rounds):
                events = schedule(seed, number, names, plan)
                record.write("storm", number=number, events=[asdict(event) for event in events])
                storm(world, events, plan.storm_s)
                look.look()
                sums.counts["rounds"] += 1
                say(f"seed {seed}, round {number + 1}: {sums.kills.total()} kills, {len(sums.violations)} violations")
                if look.is_full():
                    break
            look.last_look()
        except Broken:
            record.write("broken", logs={name: world.tail(name) for name in ("up", "engine0", "engine1")})
        sums.counts["worlds"] += 1
    record.write("end", violations=record.violated)
    return record.violated
