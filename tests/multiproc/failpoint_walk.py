"""Walks through the failpoints in real processes: at each of them a process dies, stops or fails, or a message is lost,
doubled or late, while engines save, load, prefetch and invalidate more than the tiers can hold; then the promises are
checked. What is loaded is compared byte for byte by `rig.Engine`.

    python tests/multiproc/failpoint_walk.py [--seed N] [--part I/N] [NAME=ACTION …]      one line for each step
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rig import WAIT_S, Engine, EngineProcess, Memory, all_tiers, assert_nothing_leaks, counters, until, until_whole

from lmpipe.failpoints import MESSAGES, POINTS, VARIABLE, Control, actions
from lmpipe.handles import Tier
from lmpipe.keys import Prompt
from lmpipe.lifecycle import SlotState
from lmpipe.shm.descriptor import SegmentKind
from lmpipe.shm.segment import Segment
from lmpipe.shm.table import SlotTable
from lmpipe.testing import Node

LEASES = 8
CHUNKS = 6
DEADLINE_MS = 1000
SLACK_S = 5.0
"""The promise is the deadline; the rest is what a loaded machine may take to run a thread that is due."""
FIRED_S = 60.0
TRIES = 5
PROVOKED = {
    "gather.release.freed": "producer.save.copied=error:EIO",
    "slots.recover.pending": "gather.save.closed=kill*1",
}
"""What has to happen for a failpoint to be passed at all."""
ON_STARTING = ("index.publish.built", "index.publish.switched", "ssd.recover.scanned")
"""Failpoints that only a start passes."""
FAULTS = ("kill", "stop", "error:EIO")
MESSAGE_ACTIONS = ("drop", "twice", "late:0.3")


def steps() -> list[str]:
    """Every failpoint with everything that may be done there, as rules."""
    found: list[str] = []
    for name in POINTS:
        if name in MESSAGES:
            found += [f"{name}={action}" for action in MESSAGE_ACTIONS]
        else:
            found += [
                f"{name}={action}"
                for action in ("kill", "stop", "error:EIO")
                if action.partition(":")[0] in actions(name)
            ]
    return found


class Compressible(Memory):
    """Content that takes half the blocks when it is encoded."""

    def content(self, key: npt.NDArray[np.uint8], pages: int) -> npt.NDArray[np.uint8]:
        return super().content(key, pages) & 0x03


class WalkEngine(Engine):
    """One of the two that every step works with."""

    memory_kind = Compressible


@dataclass
class Walk:
    """A node, two engines of its own, and the file of rules that all its processes read."""

    node: Node
    control: Control
    engines: list[Engine]
    draw: random.Random
    turn: int = 0
    kept: list[Prompt] = field(default_factory=list[Prompt])
    """What was acknowledged as persisted most lately, so that no capacity has cost it yet."""
    longest_s: float = 0.0
    calls: int = 0

    @classmethod
    @contextlib.contextmanager
    def open(cls, directory: Path, seed: int) -> Iterator[Walk]:
        """Start the node; `directory` gets the rules and the remote tier."""
        control = Control(directory / "rules")
        changes: dict[str, Any] = all_tiers(directory, dram="1MiB")
        changes["tiers"]["dram"] |= {"slots": 64, "codec": "zstd"}
        changes["tiers"]["ssd"] |= {"capacity": "4MiB", "segment": "1MiB"}
        changes["tiers"]["remote"]["capacity"] = "1MiB"
        changes["watchdog_ms"] = 2000
        former = os.environ.get(VARIABLE)
        os.environ[VARIABLE] = str(control.path)
        try:
            with (
                Node(changes) as node,
                WalkEngine(node.run_dir, tenant="walk") as private,
                WalkEngine(node.run_dir, tenant="walk", pages_in=node.directory) as mapped,
            ):
                until_whole(node, private, mapped)
                yield cls(node, control, [private, mapped], random.Random(seed))
        finally:
            del os.environ[VARIABLE]
            if former is not None:
                os.environ[VARIABLE] = former

    def step(self, rule: str) -> str:
        """One failpoint; what happened, in a word. Raises AssertionError when a promise is broken."""
        name, _, action = rule.partition("=")
        self.control.clear()
        if name in MESSAGES:
            return self._messages(rule)
        if name.startswith("producer."):
            return self._engine(rule)
        word = action.partition(":")[0]
        self._arm_and_restart(name, rule)
        end_s = time.monotonic() + FIRED_S
        while not (pid := next((fired.pid for fired in self.control.fired() if fired.name == name), 0)):
            assert time.monotonic() < end_s, "never reached"
            self._work()
            if name in PROVOKED:
                self._churn(0.5)
        if word == "stop":
            self._work()  # engines go on while it is stopped
            with contextlib.suppress(ProcessLookupError):  # the watchdog may have been first
                os.kill(pid, signal.SIGKILL)
        self._check()
        return f"{word} of {pid}"

    def _arm_and_restart(self, name: str, rule: str) -> None:
        if name not in ON_STARTING:
            self.control.arm(f"{rule}*1", *([PROVOKED[name]] if name in PROVOKED else []))
            return
        self._work()
        self.control.arm(f"{rule}*1")
        self.node.kill("persist" if name.startswith("ssd") else "gather")

    def _churn(self, seconds: float) -> None:
        """An engine in a process of its own, whose failpoints are passed, saves and loads for a while."""
        with EngineProcess(self.node, mapped=self.draw.random() < 0.5, tenant="churn") as process:
            seed = self.draw.randrange(1 << 30)
            process.ask("churn", seed=seed, prompts=30, chunks=CHUNKS, seconds=seconds, deadline_ms=300)

    def _engine(self, rule: str) -> str:
        """A failpoint of an engine's process: private or mapped pages, whichever passes it."""
        granted = "granted" in rule
        word = rule.partition("=")[2].partition(":")[0]
        process = EngineProcess(self.node, mapped=granted, tenant="churn")
        try:
            self.control.arm(f"{rule}*1")
            process.tell("churn", seed=self.draw.randrange(1 << 30), prompts=30, chunks=CHUNKS, seconds=5)
            until(self.control.fired, f"{rule} is reached", FIRED_S)
            if word == "error":
                process.hear()
            else:
                self._work()
                process.kill()
        finally:
            process.close()
        self._check()
        return f"{word} of {process.pid}"

    def _messages(self, rule: str) -> str:
        """Some of these messages, while there are any: few are sent for want of an occasion."""
        self.control.arm(f"{rule}%0.5/{self.draw.randrange(1 << 30)}")
        for _ in range(TRIES):
            if rule.startswith("producer."):
                self._churn(1)
            else:
                self._work()
            if len(self.control.fired()) > 1:
                break
        fired = len(self.control.fired())
        self.control.arm()
        self._check()
        return f"{fired} times"

    def _work(self) -> None:
        """All verbs once, with prompts that nobody has used before and such as were."""
        self.turn += 1
        for number, engine in enumerate(self.engines):
            fresh = engine.prompt(2 * self.turn + number, CHUNKS)
            self._save(engine, fresh)
            if engine.producer.flush(fresh, tiers=("ssd", "remote"), timeout_s=0.5):
                self.kept = [*self.kept[-3:], fresh]
                with contextlib.suppress(AssertionError):  # no answer: gather is away
                    engine.drop_from(fresh, *self.draw.choice([(Tier.DRAM,), (Tier.DRAM, Tier.SSD)]))
            self._load(engine, fresh)
            old = engine.prompt(self.draw.randrange(1, 2 * self.turn + 1), CHUNKS)
            engine.producer.prefetch(old)
            self._load(engine, old)
        engine, old = self.engines[0], self.engines[0].prompt(self.draw.randrange(1, 2 * self.turn + 1), CHUNKS)
        if not any(list(old.index_keys) == list(kept.index_keys) for kept in self.kept):
            engine.producer.invalidate(old, timeout_s=0.3)

    def _save(self, engine: Engine, prompt: Prompt) -> None:
        ids = engine.prefill(prompt)
        ticket = engine.send(prompt, ids)
        if not ticket.wait(2 * DEADLINE_MS / 1000):
            engine.producer.cancel(ticket)
            until(ticket.copied.is_set, "the engine has its pages back")
        engine.memory.free(ids)

    def _load(self, engine: Engine, prompt: Prompt) -> None:
        started_s = time.monotonic()
        engine.load(prompt, deadline_ms=DEADLINE_MS)
        taken_s = time.monotonic() - started_s
        self.longest_s, self.calls = max(self.longest_s, taken_s), self.calls + 1
        assert taken_s < DEADLINE_MS / 1000 + SLACK_S

    def _is_kept(self, engine: Engine) -> bool:
        """Whether a new prompt goes through all tiers. It may be refused: by a store that was just failing, say."""
        self.turn += 1
        fresh = engine.prompt(2 * self.turn, CHUNKS)
        if not engine.save(fresh).wait(0) or not engine.producer.flush(fresh, tiers=("ssd", "remote"), timeout_s=2):
            return False
        assert engine.load(fresh).chunks == CHUNKS
        return True

    def _check(self) -> None:
        """After the fault: everybody is there, what was persisted is found, everything works, nothing is left."""
        until_whole(self.node, *self.engines)
        engine = self.engines[0]
        for prompt in self.kept:
            until(lambda p=prompt: engine.load(p).chunks == CHUNKS, "what was persisted is found")
        self.kept.clear()
        for each in self.engines:
            until(lambda e=each: self._is_kept(e), "saves are taken, persisted and found")
        until(lambda: counters(self.node)["gather_unpersisted_rows"] == 0, "nothing waits for a tier below")
        assert_nothing_leaks(self.node, LEASES)
        for stage in self.node.topology.rings_needed:
            until(lambda s=stage: ring_in_use(self.node, s) == 0, f"the ring of {stage} is empty", 2 * WAIT_S)


def ring_in_use(node: Node, stage: str) -> int:
    """Slots of a stage's ring that are not free."""
    ring = SlotTable(Segment.attach(node.paths.ring(stage), SegmentKind.SLOTS))
    try:
        return sum(ring.state(index)[1] is not SlotState.FREE for index in range(ring.slots))
    finally:
        ring.close()


def main(arguments: Sequence[str]) -> int:
    """Walk; the number of broken promises, at most 1."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(4), "little"))
    parser.add_argument("--part", default="1/1", help="I/N: every Nth step, from the Ith on")
    parser.add_argument("rules", nargs="*")
    options = parser.parse_args(arguments)
    first, every = map(int, options.part.split("/"))
    chosen = options.rules or steps()[first - 1 :: every]
    broken = 0
    while chosen:
        with tempfile.TemporaryDirectory() as directory, Walk.open(Path(directory), options.seed) as walk:
            while chosen:
                rule, chosen = chosen[0], chosen[1:]
                started_s = time.monotonic()
                try:
                    result = walk.step(rule)
                except AssertionError as error:
                    result = f"BROKEN: {error}"
                    broken += 1
                    traceback.print_exc()
                print(f"{rule:48} {time.monotonic() - started_s:5.1f} s  {result}", flush=True)
                if result.startswith("BROKEN"):
                    break  # on with a fresh node
    print(f"seed {options.seed}: {broken} broken")
    return min(broken, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
