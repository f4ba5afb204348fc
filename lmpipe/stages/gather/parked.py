"""Loads that came while the node was starting: kept for a moment, for failing them is a recompute for nothing.

Gather answers engines before it has heard of every stage below. The moment is short, and there is only one: when a
stage dies later, loads that need it fail at once. An engine that waits is not kept for all of it: a stage that is not
there when the others are may be long in coming, and a recompute is no worse for a tenth of a second.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

from lmpipe.handles import ChunkRecords, SessionId
from lmpipe.stages.gather.loads import Waiter

GRACE_S = 2.0
"""How long after gather's start loads are kept at all."""
PARK_S = 0.1
"""How long one is that somebody waits for."""
LIMIT = 256


class Parked:
    """`needed` are the stages that loads from below go through."""

    def __init__(self, needed: frozenset[str], now_s: float) -> None:
        self._needed = needed
        self._complete = not needed
        self._until_s = now_s + GRACE_S
        self._waiting: deque[tuple[float, Waiter, ChunkRecords]] = deque()

    def heard(self, chain: Mapping[str, SessionId]) -> None:
        """The chain is another one now."""
        self._complete = self._complete or self._needed <= chain.keys()

    def park(self, waiter: Waiter, chunks: ChunkRecords, now_s: float) -> bool:
        """Keep a load for later. False: handle it now."""
        if self._complete or now_s >= self._until_s or len(self._waiting) >= LIMIT:
            return False
        until_s = self._until_s if waiter.peer is None else min(self._until_s, now_s + PARK_S)
        self._waiting.append((until_s, waiter, chunks))
        return True

    def due(self, now_s: float) -> list[tuple[Waiter, ChunkRecords]]:
        """Loads whose time has come: the chain is complete, the moment is over, or they can wait no longer."""
        now_ns = int(now_s * 1e9)

        def is_due(until_s: float, waiter: Waiter) -> bool:
            late = now_s >= until_s or (waiter.deadline_ns and waiter.deadline_ns <= now_ns)
            return bool(self._complete or late)

        ready = [(waiter, chunks) for until_s, waiter, chunks in self._waiting if is_due(until_s, waiter)]
        if ready:
            self._waiting = deque(item for item in self._waiting if not is_due(*item[:2]))
        return ready

    def wait_s(self, now_s: float) -> float | None:
        """Seconds until something may be due though no message has come."""
        ends = [until_s for until_s, _, _ in self._waiting]
        ends += [waiter.deadline_ns / 1e9 for _, waiter, _ in self._waiting if waiter.deadline_ns]
        return max(min(ends) - now_s, 0.0) if ends else None
