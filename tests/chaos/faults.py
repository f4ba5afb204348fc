"""The faults, by name: each is done at once, on a world at work, with what it draws; what has to be mended after a
while it leaves to `World.later`.

A new one is a function with `@fault(weight)`. It returns what is worth recording, or None when there was nothing to be
done. `breaks` names the tier whose stored bytes it may destroy, `asks` says why a world cannot have it.
"""

from __future__ import annotations

import random
import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lmpipe import failpoints

from .census import Process
from .world import World

Act = Callable[[World, random.Random], "dict[str, Any] | None"]


@dataclass(frozen=True, slots=True)
class Fault:
    """One kind of fault. `weight`: how often it is drawn."""

    name: str
    weight: int
    act: Act
    breaks: str
    asks: Callable[[World], str]

    def unfit(self, world: World) -> str:
        """Why this world cannot have it; empty when it can."""
        if self.breaks and self.breaks != world.shape.damaged:
            return f"this world's {self.breaks} tier has to keep what it acknowledged"
        return self.asks(world)


FAULTS: dict[str, Fault] = {}


def fault(weight: int, *, breaks: str = "", asks: Callable[[World], str] = lambda _: "") -> Callable[[Act], Act]:
    """Enter a function into the table, under its own name."""

    def enter(act: Act) -> Act:
        FAULTS[act.__name__] = Fault(act.__name__, weight, act, breaks, asks)
        return act

    return enter


def kind(process: Process) -> str:
    """`supervisor`, `engine` or `worker`."""
    return process.name if process.name in ("supervisor", "engine") else "worker"


def some(world: World, draw: random.Random) -> Process | None:
    """A living process, mostly a worker. None: of the drawn kind there is none now, which shall not cost the others."""
    wanted = draw.choices(("worker", "engine", "supervisor"), (14, 5, 1))[0]
    found = sorted((p for p in world.living() if kind(p) == wanted), key=lambda process: (process.name, process.pid))
    return draw.choice(found) if found else None


def kill_everything(world: World, *, hold_back_s: float = 0.0) -> list[str]:
    """SIGKILL to the supervisor, then to all workers, also those that it was about to start; engines live on."""
    world.hold_back_supervisor(hold_back_s)
    killed: list[str] = []
    for _ in range(3):
        found = sorted(world.living(), key=lambda process: process.name != "supervisor")
        killed += [process.name for process in found if process.name != "engine" and world.kill(process)]
    return killed


@fault(40)
def kill(world: World, draw: random.Random) -> dict[str, Any] | None:
    """One process, at any moment."""
    process = some(world, draw)
    return {"of": process.name} if process is not None and world.kill(process) else None


@fault(10)
def kill_several(world: World, draw: random.Random) -> dict[str, Any] | None:
    """Two to four processes in the same moment."""
    found = sorted(world.living(), key=lambda process: (process.name, process.pid))
    if draw.random() < 0.8:  # a node without a supervisor does little for some seconds
        found = [process for process in found if process.name != "supervisor"]
    chosen = draw.sample(found, min(len(found), draw.randrange(2, 6)))
    return {"of": [process.name for process in chosen if world.kill(process)]} if chosen else None


@fault(4)
def kill_again(world: World, draw: random.Random) -> dict[str, Any] | None:
    """A worker, and its successors, each at some moment of its start."""
    name = draw.choice(world.workers)

    def next_one() -> None:
        for process in world.living():
            if process.name == name:
                world.kill(process)

    next_one()
    for _ in range(draw.randrange(2, 5)):
        world.later(draw.uniform(0.1, 2.0), next_one)
    return {"of": name}


@fault(2)
def kill_all(world: World, draw: random.Random) -> dict[str, Any] | None:
    """Supervisor and workers in one moment."""
    killed = kill_everything(world, hold_back_s=draw.choice((0.0, 0.3)))
    return {"of": killed} if killed else None


@fault(2)
def restart(world: World, draw: random.Random) -> dict[str, Any] | None:
    """An orderly stop, the arena kept or not, and a start."""
    keep = draw.random() < 0.5
    for process in world.living():
        if process.name == "supervisor":
            if keep and world.node.paths.path.exists():
                world.node.paths.keep_dram.touch(mode=0o600)
            if world.signal(process, signal.SIGTERM):
                return {"keep_dram": keep}
    return None


@fault(10)
def stop(world: World, draw: random.Random) -> dict[str, Any] | None:
    """SIGSTOP at any moment, SIGCONT a little later."""
    process, seconds = some(world, draw), draw.choice((0.02, 0.1, 0.3, 1.0))
    return {"of": process.name, "s": seconds} if process is not None and world.stop(process, seconds) else None


@fault(1)
def stop_for_long(world: World, draw: random.Random) -> dict[str, Any] | None:
    """A worker that does not wake up until its watchdog has lost patience."""
    workers = [process for process in world.living() if process.name in world.workers]
    process = draw.choice(workers) if workers else None
    return {"of": process.name} if process is not None and world.stop(process, 5.0) else None


@fault(3)
def stop_and_kill(world: World, draw: random.Random) -> dict[str, Any] | None:
    """A process that is asleep and never wakes up."""
    process = some(world, draw)
    if process is None or not world.stop(process, 3.0):
        return None
    world.later(draw.uniform(0.05, 1.0), lambda: world.kill(process))
    return {"of": process.name}


@fault(14)
def failpoint(world: World, draw: random.Random) -> dict[str, Any] | None:
    """Whoever next comes to some point between two steps dies there, falls asleep, or sees a call fail."""
    name = draw.choice([name for name in failpoints.POINTS if name not in failpoints.MESSAGES])
    action = draw.choice([action for action in failpoints.actions(name) if action != "sleep"])
    rule = f"{name}=error:{draw.choice(('EIO', 'ENOSPC', 'EMFILE'))}" if action == "error" else f"{name}={action}"
    rule += f"@{draw.choice((1, 1, 2, 5))}*1"
    world.arm(rule)
    return {"rule": rule}


@fault(8)
def dawdle(world: World, draw: random.Random) -> dict[str, Any] | None:
    """Whoever comes to some point between two steps waits there, again and again: what others do falls in between."""
    name = draw.choice([name for name in failpoints.POINTS if name not in failpoints.MESSAGES])
    seconds = draw.choice((0.002, 0.01) if name.startswith("producer.") else (0.005, 0.03, 0.2))
    rule = f"{name}=sleep:{seconds}*{draw.choice((5, 50))}"
    world.arm(rule)
    return {"rule": rule}


@fault(8)
def message(world: World, draw: random.Random) -> dict[str, Any] | None:
    """Messages of one kind are lost, doubled or late for a while."""
    name = draw.choice(failpoints.MESSAGES)
    action = draw.choice(("drop", "twice", f"late:{draw.choice((0.01, 0.2))}"))
    rule = f"{name}={action}*{draw.choice((1, 3, 10))}"
    world.arm(rule)
    return {"rule": rule}


@fault(2)
def remote_hangs(world: World, draw: random.Random) -> dict[str, Any] | None:
    """The object store takes its time."""
    rule = f"remote.ask.begun=sleep:{draw.choice((0.5, 2.0))}*{draw.choice((1, 4))}"
    world.arm(rule)
    return {"rule": rule}


@fault(2)
def remote_fails(world: World, draw: random.Random) -> dict[str, Any] | None:
    """The object store answers with errors."""
    rule = f"remote.ask.begun=error:EIO*{draw.choice((1, 4, 40))}"
    world.arm(rule)
    return {"rule": rule}
