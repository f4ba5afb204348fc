"""A short seeded run of the harness, and that it would notice: each thing that it looks for is planted once."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from rig import until

from lmpipe.shm.descriptor import SegmentKind
from lmpipe.shm.segment import Segment
from lmpipe.shm.table import SlotTable

from . import census
from .faults import FAULTS
from .files import flip, objects
from .invariants import Looker
from .record import Record, Sums
from .run import Event, Plan, run_world, schedule, storm
from .world import World

SEED, RARE_SEED = 16, 7
PLAN = Plan(rounds=1, storm_s=5.0, rate=4.0)


def test_nothing_of_what_must_hold_is_violated_in_a_short_storm(tmp_path: Path) -> None:
    """Longer ones: `make chaos`."""
    sums = Sums()
    with (tmp_path / "account.jsonl").open("w") as file:
        run_world(SEED, PLAN, sums, file)
    assert sums.violations == [], "\n".join([*sums.lines(), (tmp_path / "account.jsonl").read_text()])
    lines = [json.loads(line) for line in (tmp_path / "account.jsonl").read_text().splitlines()]
    assert [line["what"] for line in lines if line["what"] in ("world", "end")] == ["world", "end"]
    assert sums.counts["rounds"] == PLAN.rounds
    assert sums.kills.total() and sums.times["load"] and sums.counts["chunks audited in DRAM"]


def test_a_seed_is_a_schedule_and_every_fault_has_its_turn() -> None:
    names = list(FAULTS)
    assert schedule(1, 2, names, PLAN) == schedule(1, 2, names, PLAN) != schedule(2, 2, names, PLAN)
    drawn = {event.fault for seed in range(200) for event in schedule(seed, 0, names, PLAN)}
    assert drawn == set(names)


RARE = (("tear", "leftovers"), ("flip_index", "lose_memory"))


def test_faults_that_are_rarely_drawn() -> None:
    """Torn files, litter, damaged indexes, lost memory: some at a time, with a look after them."""
    sums = Sums()
    with World(RARE_SEED, Record(RARE_SEED, sums)) as world:
        look = Looker(world)
        look.look()
        for names in RARE:
            assert not [why for name in names if (why := FAULTS[name].unfit(world))]
            storm(world, [Event(0.4, name, f"{RARE_SEED} {name}") for name in names], 0.8)
            look.look()
            assert sums.violations == [], names
    assert set(sums.faults) == {name for names in RARE for name in names}


@pytest.fixture
def calm() -> Iterator[tuple[World, Looker, Sums]]:
    """A world without faults in which something was saved, acknowledged and found."""
    sums = Sums()
    seed = 54  # no tier evicts, none may be damaged, DRAM is raw
    with World(seed, Record(seed, sums), mounts=False) as world:
        assert world.shape.roomy and not world.shape.damaged and world.shape.dram_codec == "raw"
        look = Looker(world)
        look.look()
        world.storm()
        until(lambda: world.tick() or any(kept.is_in("") for kept in list(world.record.vault.values())))
        world.heal()
        look.look()
        assert sums.violations == []
        yield world, look, sums


def test_what_is_planted_is_noticed(calm: tuple[World, Looker, Sums]) -> None:
    world, look, sums = calm

    names = sorted(process.name for process in world.living())
    assert names == sorted([*world.workers, "supervisor", *("engine" for _ in world.engines)])
    assert census.living("another world") == []
    assert not census.send("another world", world.living()[0], signal.SIGKILL)

    stray = world.node.run_dir / "stray"
    stray.touch()
    assert "stray" in look._leaks()
    stray.unlink()

    (engine, *_) = [engine for engine in world.engines if engine is not None]
    os.kill(engine.pid, signal.SIGKILL)  # not by the harness: nobody may do that
    until(lambda: world.tick() or world.engines[engine.number] not in (None, engine))
    assert "an engine process ended" in sums.violations.pop()
    until(lambda: not look._leaks(), "it is swept")

    arena = SlotTable(Segment.attach(world.node.paths.arena, SegmentKind.SLOTS))
    committed = [index for index in range(arena.slots) if arena.state(index)[1].name == "COMMITTED"]
    for index in committed:
        flip(world.node.paths.arena, arena.offset(index), 0)
    arena.close()
    look._audit_dram()
    assert len(sums.violations) == len(committed)
    assert "is not what its key says" in sums.violations[0]
    sums.violations.clear()

    for path in (*world.ssd.glob("*.seg"), *objects(world)):
        with path.open("r+b") as file:
            file.write(bytes(path.stat().st_size))
    kept = [seed for seed, kept in world.record.vault.items() if kept.is_in("")][:1]
    world.record.vault = {seed: world.record.vault[seed] for seed in kept}
    world.node.stop()
    world.node.start()
    look.until(look._registered, "registered")
    look.patience_s = 1.0
    look._vault(everything=True)
    assert "acknowledged as persisted is not found" in sums.violations[0]
