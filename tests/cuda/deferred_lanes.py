"""Lanes that do nothing until somebody waits, and then in any order that CUDA's streams allow.

What CUDA promises of streams is that the work of one is done in order, and that a stream goes on after a `wait` only
when the event has come, which was recorded before. Everything else may happen at any time: that is what a seed decides.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from lmpipe.cuda.lanes import Event

Step = Callable[[], bool]
"""Does its work, or returns False while it cannot."""


class DeferredDevice:
    """All lanes of a device, and the memory that they asked for."""

    def __init__(self, seed: int, *, launches: int = 1 << 30) -> None:
        """`launches`: so many succeed, then the device is out of memory."""
        self._random = random.Random(seed)
        self.launches = launches
        self.lanes: list[DeferredLane] = []
        self.asked: list[int] = []
        self.clock = 0
        """Counts what it has done."""

    def lane(self, _: torch.device, priority: int) -> DeferredLane:
        """What a pool makes its lanes with."""
        self.lanes.append(DeferredLane(self, priority))
        return self.lanes[-1]

    def step(self) -> bool:
        """Let one lane do one thing; False: none can."""
        ready = [lane for lane in self.lanes if lane.steps]
        self._random.shuffle(ready)
        for lane in ready:
            if lane.steps[0]():
                lane.steps.popleft()
                self.clock += 1
                return True
        return False


@dataclass(eq=False)
class DeferredEvent:
    """Comes when its lane gets there."""

    device: DeferredDevice
    come: bool = False

    def query(self) -> bool:
        """Whether it has come, which time alone does not bring about here."""
        return self.come

    def synchronize(self) -> None:
        """Let the device work until it comes."""
        while not self.come:
            assert self.device.step(), "the lanes wait for each other"


@dataclass(eq=False)
class DeferredMark(DeferredEvent):
    """Knows when it has come."""

    at: int = 0

    def reach(self) -> bool:
        """Come."""
        self.come, self.at = True, self.device.clock
        return True

    def elapsed_ms(self, later: DeferredMark) -> float:
        """A thing done takes a millisecond."""
        assert self.come and later.come
        return later.at - self.at

    def free(self) -> None:
        """Nothing is kept."""


@dataclass(eq=False)
class DeferredLane:
    """A stream."""

    device: DeferredDevice
    priority: int
    steps: deque[Step] = field(default_factory=deque)

    def run(self, work: Callable[[], None]) -> None:
        if not self.device.launches:
            raise RuntimeError("out of memory")
        self.device.launches -= 1

        def step() -> bool:
            work()
            return True

        self.steps.append(step)

    def wait(self, event: Event) -> None:
        self.steps.append(event.query)

    def record(self) -> DeferredEvent:
        event = DeferredEvent(self.device)

        def step() -> bool:
            event.come = True
            return True

        self.steps.append(step)
        return event

    def mark(self) -> DeferredMark:
        mark = DeferredMark(self.device)
        if self.steps:
            self.steps.append(mark.reach)
        else:
            mark.reach()  # it has nothing else to do
        return mark

    def empty(self, nbytes: int) -> torch.Tensor:
        self.device.asked.append(nbytes)
        return torch.full((nbytes,), 0x5A, dtype=torch.uint8)
