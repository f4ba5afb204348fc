"""What DRAM has and the tiers below do not have yet: sent down in a bounded window, and sent again when the stage below
starts anew.

The pending bits in the slot headers are the truth and outlive gather; this is the queue over them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from lmpipe import failpoints
from lmpipe.handles import CHUNK, ChunkRecords, SessionId
from lmpipe.tiers.dram import DramTier

WINDOW_CHUNKS = 64
GROUP_CHUNKS = 8
LEAST_BACKLOG = 1024
"""From so many names on those of chunks that are gone are dropped, not only when it is their turn."""

Name = tuple[bytes, int]
"""Index key and shard of a chunk."""


@dataclass(slots=True)
class _Sent:
    bits: int
    """Of the tiers that have still to answer."""
    saver: SessionId
    seen_s: float = 0.0
    """When `resend` saw it first."""


class Outflow:
    """`send` hands records to the stage below; False: it takes no more now."""

    def __init__(self, dram: DramTier, send: Callable[[ChunkRecords], bool]) -> None:
        self._dram, self._send = dram, send
        self._backlog: deque[Name] = deque()
        self._sent: dict[Name, _Sent] = {}

    @property
    def waiting(self) -> int:
        """Chunks not answered by every tier below."""
        return len(self._backlog) + len(self._sent)

    def add(self, names: list[Name]) -> None:
        """Chunks that have become pending."""
        self._backlog.extend(names)
        used = self._dram.arena.slots - self._dram.arena.slots_free
        if len(self._backlog) > max(2 * used, LEAST_BACKLOG):  # the tiers below stand still, and DRAM does not
            self._backlog = deque(name for name in dict.fromkeys(self._backlog) if self._bits(name))

    def _bits(self, name: Name) -> int:
        """Tiers that have still to take a chunk; 0 too when it is gone."""
        row = self._dram.row(name[0])
        slot = None if row is None else row.slots.get(name[1])
        return 0 if slot is None else self._dram.arena.pending(slot)

    def pump(self) -> bool:
        """Send what the window allows. Returns whether anything was sent."""
        moved = False
        while self._backlog and len(self._sent) < WINDOW_CHUNKS:
            group: list[bytes] = []
            taken: list[tuple[Name, int, SessionId]] = []
            while self._backlog and len(group) < GROUP_CHUNKS:
                name = self._backlog.popleft()
                row, bits = self._dram.row(name[0]), self._bits(name)
                if row is not None and bits:  # else evicted before it was its turn
                    group.append(row.records[name[1]])
                    taken.append((name, bits, row.savers[name[1]]))
            if not group:
                continue
            if not self._send(np.frombuffer(b"".join(group), CHUNK)):
                self._backlog.extendleft(name for name, _, _ in reversed(taken))
                return moved
            self._sent.update({name: _Sent(bits, saver) for name, bits, saver in taken})
            moved = True
            failpoints.hit("gather.outflow.sent")
        return moved

    def answered(self, name: Name, place: int, bit: int) -> SessionId | None:
        """A tier took or refused the chunk that was sent from a place. Returns the session that saved it, once for each
        tier.
        """
        self._dram.answered(name[0], name[1], place, bit)
        sent = self._sent.get(name)
        if sent is None or not sent.bits & bit:
            return None
        sent.bits &= ~bit
        if not sent.bits:
            del self._sent[name]
        return sent.saver

    def resend(self, now_s: float, limit_s: float) -> int:
        """Send again what no tier has answered for so long that question or answer must be lost; how much that is. Who
        has a chunk already says so, and who has it in his queue finds it there twice.
        """
        late: list[Name] = []
        for name, sent in self._sent.items():
            sent.seen_s = sent.seen_s or now_s
            if now_s - sent.seen_s > limit_s:
                late.append(name)
        for name in late:
            del self._sent[name]
        self._backlog.extendleft(reversed(late))
        return len(late)

    def restart(self) -> None:
        """The stage below is another one now: everything unanswered goes again."""
        self._backlog.extendleft(reversed(self._sent))
        self._sent.clear()
