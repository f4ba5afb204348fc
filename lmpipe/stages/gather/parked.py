"""Loads that came while the node was starting: kept for a moment, for failing them is a recompute for nothing.

Gather answers engines before it has heard of every stage below. The moment is short, and there is only one: when a
stage dies later, loads that need it fail at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

from lmpipe.handles import ChunkRecords, SessionId
from lmpipe.stages.gather.loads import Waiter

GRACE_S = 2.0
LIMIT = 256


class Parked:
    """`needed` are the stages that loads from below go through."""

    def __init__(self, needed: frozenset[str], now_s: float) -> None:
        self._needed = needed
        self._complete = not needed
        self._until_s = now_s + GRACE_S
        self._waiting: deque[tuple[Waiter, ChunkRecords]] = deque()

    def heard(self, chain: Mapping[str, SessionId]) -> None:
        """The chain is another one now."""
        self._complete = self._complete or self._needed <= chain.keys()

    def park(self, waiter: Waiter, chunks: ChunkRecords, now_s: float) -> bool:
        """Keep a load for later. False: handle it now."""
        if self._complete or now_s >= self._until_s or len(self._waiting) >= LIMIT:
            return False
        self._waiting.append((waiter, chunks))
        return True

    def due(self, now_s: float) -> list[tuple[Waiter, ChunkRecords]]:
        """Loads whose time has come: the chain is complete, the moment is over, or they can wait no longer."""
        now_ns = int(now_s * 1e9)
        over = self._complete or now_s >= self._until_s
        ready = [(w, c) for w, c in self._waiting if over or (w.deadline_ns and w.deadline_ns <= now_ns)]
        if ready:
            self._waiting = deque((w, c) for w, c in self._waiting if not any(w is r for r, _ in ready))
        return ready

    def wait_s(self, now_s: float) -> float | None:
        """Seconds until something may be due though no message has come."""
        deadlines = [waiter.deadline_ns / 1e9 for waiter, _ in self._waiting if waiter.deadline_ns]
        return max(min([self._until_s, *deadlines]) - now_s, 0.0) if self._waiting else None
