"""What has to hold when the weather is calm: the node comes back, nothing leaks, the tables agree, what lies in DRAM is
what its key says, and what was acknowledged is found.

That bytes are right and calls in time the engines check themselves, all the time (engine.py).
"""

from __future__ import annotations

import os
import queue
import random
import re
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
from rig import LAYOUT, Memory, bytes_in_use, holds, slot_states, stages_below

from lmpipe.errors import LmpipeError
from lmpipe.handles import CHUNK, Codec, Slot, Tier
from lmpipe.index_row import index_keys
from lmpipe.lifecycle import SlotState
from lmpipe.shm.counters import Counters
from lmpipe.shm.descriptor import SegmentKind
from lmpipe.shm.node import NodeWords
from lmpipe.shm.segment import Segment
from lmpipe.shm.session import SessionDir
from lmpipe.shm.table import SlotTable

from . import census
from .world import PATIENCE_S, EngineProcess, World

LEASES = 8
SPARE_DESCRIPTORS = 8
MOST_PRIVATE_BYTES = 400 << 20
OLD_ONES = 10
MOST_USED = 0.75
TIERS = {"gather": Tier.DRAM, "persist": Tier.SSD, "replicate": Tier.REMOTE}
ROWS = {"gather": "gather_dram_rows", "persist": "persist_rows", "replicate": "replicate_rows"}
_FILES = re.compile(r"segment|stuffing|\.seg|\.mdb|\.shm|\.log|/objects|/remote")


class Broken(Exception):
    """The world is in no state to go on."""


class Looker:
    """Looks at one world in calm weather, again and again."""

    def __init__(self, world: World) -> None:
        self._world, self._record = world, world.record
        self.patience_s = 20.0
        """How long a prompt may need to be found and loaded, in however many attempts."""
        self._draw = random.Random(f"look {world.seed}")
        self._memory = Memory(LAYOUT, 4)
        self._seen: set[int] = set()
        self._descriptors: dict[int, int] = {}

    def until(self, why_not: Callable[[], str], what: str, timeout_s: float = PATIENCE_S) -> None:
        """Wait until there is no reason why not. Raises Broken, after it was recorded."""
        end_s = time.monotonic() + timeout_s
        while reason := _asked(why_not):
            self._world.tick()
            if time.monotonic() > end_s:
                logs = {name: self._world.tail(name) for name in ("up",)}
                self._record.violation(f"not in {timeout_s:g} s: {what}", reason=reason, **logs)
                raise Broken(what)
            time.sleep(0.02)

    def look(self) -> None:
        """All of it. Raises Broken when there is no use in going on."""
        self._calm()
        self.until(self._world.is_whole, "the node is well again")
        self._world.settled = True
        self.until(self._registered, "every engine is registered")
        self.until(self._chain, "the stages know each other")
        self._judge_long()
        self.until(self._leaks, "nothing is left behind")
        self._proof()
        self.until(self._disagreements, "tables and counters agree")
        self._audit_dram()
        self._processes()
        self._vault(everything=False)

    def _engines(self) -> list[EngineProcess]:
        return [engine for engine in self._world.engines if engine is not None]

    def _ask(self, number: int, do: str, **arguments: Any) -> Any:
        """Ask an engine, or the next one in its place when it is dead."""
        while True:
            engine = self._world.engines[number]
            if engine is not None:
                try:
                    return engine.ask(do, **arguments)
                except EOFError:
                    engine.exit  # noqa: B018  (it is reaped by the next tick)
                except queue.Empty:
                    self._record.violation("an engine does not answer", asked=do)
                    raise Broken(do) from None
            self._world.tick()
            time.sleep(0.01)

    def _calm(self) -> None:
        for number in range(len(self._world.engines)):
            holding = self._ask(number, "calm")["holding"]
            if holding:
                self._record.violation("holds stay", holding=holding)

    def _registered(self) -> str:
        session = self._world.gather_session()
        for number in range(len(self._world.engines)):
            standing = self._ask(number, "standing")
            if standing["state"] != "ready" or standing["gather"] != session or not standing["mapped"]:
                return f"engine {number}: {standing}, gather is {session}"
        return ""

    def _chain(self) -> str:
        below, wanted = stages_below(self._world.node), list(self._world.node.topology.stages[1:])
        return "" if below == wanted else f"gather sees {below}"

    def _judge_long(self) -> None:
        """How long calls took when what their process was stopped is taken off; some were late."""
        long, self._record.long = self._record.long, []
        for pid, call in long:
            begin, end = call["begin_ns"], call["end_ns"]
            asleep = sum(
                max(0, min(end, until_ns) - max(begin, since_ns))
                for stopped, since_ns, until_ns in self._world.stops
                if stopped == pid
            )
            took_s = (end - begin - asleep) / 1e9
            self._record.sums.times[call["long"]].append(int(took_s * 1e6))
            if took_s > call["allowed_s"]:
                self._record.violation(f"a {call['long']} took {took_s:.1f} s", allowed_s=call["allowed_s"])
        self._world.stops.clear()

    def _leaks(self) -> str:
        node, shape = self._world.node, self._world.shape
        states = slot_states(node)
        leased = LEASES * shape.mapped.count(False)
        passing = {state.name: states[state] for state in (SlotState.WRITING, SlotState.READY, SlotState.DOOMED)}
        if any(passing.values()) or states[SlotState.LEASED] > leased:
            return f"slots: {passing}, {states[SlotState.LEASED]} leased of {leased} that may be"
        if held := holds(node):
            return f"{len(held)} holds"
        living = Counter(process.name for process in self._world.living())
        wanted = Counter([*self._world.workers, "supervisor"])
        wanted["engine"] = len(self._engines())
        if living != wanted:
            return f"processes: {living}"
        return self._left_files() or self._left_maps() or self._left_readers() or self._left_in_rings()

    def _left_files(self) -> str:
        """Files of the run directory that belong to nobody."""
        paths, stages = self._world.node.paths, self._world.node.topology.stages
        pids = {process.pid for process in self._world.living()}
        sessions = SessionDir(paths.path).ids()
        if len(sessions) != len(self._world.workers) + len(self._engines()):
            return f"{len(sessions)} sessions"
        expected = {
            paths.index: {f"{tier.value}-*" for tier in self._world.node.topology.tier_names},
            paths.sockets: {f"{stage}.{channel}" for stage in stages for channel in ("load", "save")},
        }
        for directory, names in expected.items():
            found = sorted(re.sub(r"-\d+$", "-*", path.name) for path in directory.iterdir())
            if found != sorted(names):
                return f"{directory.name}: {found}"
        for path in paths.counters.glob("*.shm"):
            if int(path.stem.rpartition("-")[2]) not in pids:
                return f"counters of the dead: {path.name}"
        rings = {path.stem for path in paths.path.glob("ring.*.shm")}
        if rings != {f"ring.{stage}" for stage in self._world.node.topology.rings_needed}:
            return f"rings: {rings}"
        strange = {path.name for path in paths.path.iterdir()} - {
            *(path.name for path in paths.directories[1:]),
            *(f"{ring}.shm" for ring in rings),
            *(path.name for path in (paths.node_json, paths.supervisor_lock, paths.node_shm, paths.arena)),
        }
        return f"strange files: {strange}" if strange else ""

    def _left_maps(self) -> str:
        """Gather has the pages of living engines mapped, and of no others."""
        gather = self._world.node.topology.process_of("gather").name
        pid = self._world.node.pid(gather)
        mapped = set(re.findall(r"/pages-(\d+)-\d+\.shm", Path(f"/proc/{pid}/maps").read_text()))
        strangers = {int(owner) for owner in mapped} - {engine.pid for engine in self._engines()}
        return f"gather maps pages of {strangers}" if strangers else ""

    def _left_readers(self) -> str:
        """Slots of LMDB's reader tables that the dead have: they would keep old pages from being used again."""
        pids = {process.pid for process in self._world.living()} | {os.getpid()}
        for tier in self._world.node.topology.tier_names:
            with self._environment(tier) as environment:
                table = environment.readers()
            if stale := {int(line.split()[0]) for line in table.splitlines()[1:] if line.split()[0].isdigit()} - pids:
                return f"{tier.value}: readers that are dead: {stale}"
        return ""

    def _left_in_rings(self) -> str:
        """Slots of rings that are not free, by their headers, while nothing is on its way."""
        for stage in self._world.node.topology.rings_needed:
            ring = SlotTable(Segment.attach(self._world.node.paths.ring(stage), SegmentKind.SLOTS))
            states = Counter(ring.state(index)[1].name for index in range(ring.slots))
            ring.close()
            if set(states) != {SlotState.FREE.name}:
                return f"ring of {stage}: {states}"
        return ""

    def _proof(self) -> None:
        """What is saved now reaches every tier: the node really serves, whatever its status says."""
        numbers = list(range(len(self._world.engines)))
        number = self._draw.choice(numbers)
        if problem := self._ask(number, "prove"):
            self._record.violation("a save does not reach every tier", problem=problem)

    def _disagreements(self) -> str:
        topology, values = self._world.node.topology, self._values()
        for stage, name in ROWS.items():
            rows = self._entries(TIERS[stage])
            if values[name] != rows:
                return f"{name} is {values[name]}, the index has {rows}"
        if values["gather_dram_used_bytes"] != (used := bytes_in_use(self._world.node)):
            return f"gather counts {values['gather_dram_used_bytes']} bytes, slots have {used}"
        zeros = ["gather_unpersisted_rows", "persist_read_only", "replicate_store_down"]
        zeros += [f"{stage}_ring_used_bytes" for stage in topology.rings_needed]
        if bad := {name: values[name] for name in zeros if values[name]}:
            return f"not zero: {bad}"
        prefixes = ("gather_dram", "persist", "replicate")
        if over := [name for name in prefixes if values[f"{name}_used_bytes"] > values[f"{name}_capacity_bytes"]]:
            return f"over capacity: {over}"
        if values["gather_producers"] != len(self._engines()):
            return f"gather has {values['gather_producers']} producers"
        return ""

    def _values(self) -> dict[str, int]:
        node = self._world.node
        values: dict[str, int] = {}
        for name in self._world.workers:
            values |= Counters.read(node.paths.counters_of(name, node.pid(name)))
        return values

    def _environment(self, tier: Tier) -> lmdb.Environment:
        node = self._world.node
        words = NodeWords.attach(node.paths.node_shm)
        directory = node.paths.index / f"{tier.value}-{words.index_generation(tier)}"
        words.close()
        return lmdb.open(str(directory), readonly=True, create=False, max_readers=1024)

    def _rows(self, tier: Tier) -> list[bytes]:
        with self._environment(tier) as environment, environment.begin() as transaction:
            return [bytes(value) for _, value in transaction.cursor()]

    def _entries(self, tier: Tier) -> int:
        return len(self._rows(tier))

    def _audit_dram(self) -> None:
        """Every row of the DRAM index leads to a slot that holds what the row's key says."""
        rows = self._rows(Tier.DRAM)
        arena = SlotTable(Segment.attach(self._world.node.paths.arena, SegmentKind.SLOTS))
        try:
            for row in rows:
                record = np.frombuffer(row, CHUNK)[0]
                slot = Slot.from_place(int(record["place"]))
                if arena.state(slot.index) != (slot.generation, SlotState.COMMITTED):
                    self._record.violation("a row leads to no chunk", key=index_keys(record.reshape(1))[0].hex())
                elif record["codec"] == Codec.RAW:
                    key = np.frombuffer(record["key"].tobytes(), np.uint8)
                    wanted = self._memory.content(key, 4).tobytes()
                    if bytes(arena.payload(slot.index, int(record["nbytes"]))) != wanted:
                        self._record.violation("a chunk in DRAM is not what its key says", key=key.tobytes().hex())
        finally:
            arena.close()
        self._record.count("chunks audited in DRAM", len(rows))

    def _processes(self) -> None:
        """Descriptors and memory of each process are what they were when it was first seen calm."""
        for process in self._world.living():
            names = census.descriptors(process.pid)
            count = sum(not _FILES.search(name) for name in names)
            first = self._descriptors.setdefault(process.pid, count)
            if count > first + SPARE_DESCRIPTORS:
                self._record.violation(f"{process.name} has {count} descriptors, it had {first}", open=sorted(names))
            if (nbytes := census.private_bytes(process.pid)) > MOST_PRIVATE_BYTES:
                self._record.violation(f"{process.name} has {nbytes >> 20} MiB for itself")

    def _vault(self, *, everything: bool) -> None:
        """What was acknowledged as persisted is found, every byte of it."""
        shape = self._world.shape
        if not shape.roomy:
            return
        tier = {"ssd": "remote", "remote": "ssd", "": ""}[shape.damaged]
        kept = sorted(seed for seed, kept in self._record.vault.items() if kept.is_in(tier))
        fresh = [seed for seed in kept if seed not in self._seen]
        old = [seed for seed in kept if seed in self._seen]
        chosen = kept if everything else fresh + self._draw.sample(old, min(len(old), OLD_ONES))
        self._seen.update(kept)
        numbers = range(len(self._world.engines))
        prompts = [(seed, self._record.vault[seed].chunks) for seed in chosen]
        for lost in self._ask(self._draw.choice(list(numbers)), "verify", prompts=prompts, patience_s=self.patience_s):
            self._record.violation("what was acknowledged as persisted is not found", lost=lost)
        self._record.count("persisted prompts found again", len(prompts))

    def is_full(self) -> bool:
        """Whether a tier that must not evict comes near to it."""
        values = self._values()
        parts = (
            values[f"{stage}_used_bytes"] / values[f"{stage}_capacity_bytes"] for stage in ("persist", "replicate")
        )
        return self._world.shape.roomy and max(parts) > MOST_USED

    def last_look(self) -> None:
        """Start without DRAM and find everything; forget everything; stop, and leave nothing."""
        world, node = self._world, self._world.node
        node.stop()
        node.start()
        self.until(self._registered, "every engine is registered after a restart")
        self.until(self._chain, "the stages know each other after a restart")
        self._vault(everything=True)
        if self._ask(0, "forget_all") < 0:
            self._record.violation("everything is to be forgotten, and there is no answer")
        self.until(self._forgotten, "everything is forgotten")
        for number, engine in enumerate(world.engines):
            if engine is not None:
                engine.close()
                world.engines[number] = None
                if engine.exit:
                    self._record.violation("an engine ended badly", exit=engine.exit, log=world.tail(f"engine{number}"))
        node.stop()
        if node.exit:
            self._record.violation("the supervisor ended badly", exit=node.exit, log=world.tail("up"))
        left = [*world.living(), *world.pages.iterdir()]
        left += [path for path in (node.run_dir, node.paths.pages) if os.path.lexists(path)]
        left += list(world.shm.iterdir()) if world.shm is not None else []
        if left:
            self._record.violation("left behind", left=[str(thing) for thing in left])

    def _forgotten(self) -> str:
        rows = {tier.value: len(self._rows(tier)) for tier in TIERS.values()}
        states = slot_states(self._world.node)
        used = states.total() - states[SlotState.FREE] - states[SlotState.LEASED]
        return f"{rows}, {used} slots" if used or any(rows.values()) else ""


def _asked(why_not: Callable[[], str]) -> str:
    try:
        return why_not()
    except (LmpipeError, OSError, lmdb.Error, KeyError, ValueError) as error:  # what is looked at comes and goes
        return f"{type(error).__name__}: {error}"
