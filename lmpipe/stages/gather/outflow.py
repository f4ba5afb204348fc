"""What DRAM has and the tiers below do not have yet: sent down in a bounded window, and sent again when the stage below
starts anew, or when a tier that was down may take it.

The pending bits in the slot headers are the truth and outlive gather; this is the queue over them. Whoever saves most
does not hold up what others have saved: each saver has a turn.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice

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


@dataclass(slots=True)
class _Refused:
    """What a tier that is down did not take."""

    names: dict[Name, None] = field(default_factory=dict[Name, None])
    tried: int = GROUP_CHUNKS
    """So many go to it next: twice as many as the last time, unless it refused one of them."""


class Outflow:
    """`send` hands records to the stage below; False: it takes no more now."""

    def __init__(self, dram: DramTier, send: Callable[[ChunkRecords], bool]) -> None:
        self._dram, self._send = dram, send
        self._backlog: dict[SessionId, deque[Name]] = {}
        """By who saved them, none of them empty; whose turn it is stands first."""
        self._sent: dict[Name, _Sent] = {}
        self._refused: defaultdict[int, _Refused] = defaultdict(_Refused)
        """By the bit of the tier."""

    @property
    def waiting(self) -> int:
        """Chunks not answered by every tier below; without those that wait for a tier that is down."""
        return sum(map(len, self._backlog.values())) + len(self._sent)

    def add(self, names: list[Name]) -> None:
        """Chunks that have become pending."""
        for name in names:
            row = self._dram.row(name[0])
            saver = SessionId(0) if row is None else row.savers.get(name[1], SessionId(0))
            self._backlog.setdefault(saver, deque()).append(name)
        used = self._dram.arena.slots - self._dram.arena.slots_free
        if self.waiting - len(self._sent) > max(2 * used, LEAST_BACKLOG):
            self._forget_gone()  # the tiers below stand still, and DRAM does not

    def _forget_gone(self) -> None:
        for saver, names in list(self._backlog.items()):
            self._backlog[saver] = deque(name for name in dict.fromkeys(names) if self._bits(name))
            if not self._backlog[saver]:
                del self._backlog[saver]

    def _bits(self, name: Name) -> int:
        """Tiers that have still to take a chunk; 0 too when it is gone."""
        row = self._dram.row(name[0])
        slot = None if row is None else row.slots.get(name[1])
        return 0 if slot is None else self._dram.arena.pending(slot)

    def pump(self) -> bool:
        """Send what the window allows, a group of each saver's in turn. Returns whether anything was sent."""
        moved = False
        while self._backlog and len(self._sent) < WINDOW_CHUNKS:
            turn = next(iter(self._backlog))
            names = self._backlog[turn]
            group: list[bytes] = []
            taken: list[tuple[Name, int, SessionId]] = []
            while names and len(group) < GROUP_CHUNKS:
                name = names.popleft()
                row, bits = self._dram.row(name[0]), self._bits(name)
                if row is not None and bits:  # else evicted before it was its turn
                    group.append(row.records[name[1]])
                    taken.append((name, bits, row.savers[name[1]]))
            if group and not self._send(np.frombuffer(b"".join(group), CHUNK)):
                names.extendleft(name for name, _, _ in reversed(taken))
                return moved
            del self._backlog[turn]
            if names:
                self._backlog[turn] = names
            if group:
                self._sent.update({name: _Sent(bits, saver) for name, bits, saver in taken})
                moved = True
                failpoints.hit("gather.outflow.sent")
        return moved

    def answered(self, name: Name, place: int, bit: int, *, again: bool = False) -> SessionId | None:
        """A tier took or refused the chunk that was sent from a place. Returns the session that saved it, once for each
        tier. `again`: the tier is down, the chunk stays pending and `try_again` sends it.
        """
        if again:
            self._refused[bit].names[name] = None
            self._refused[bit].tried = GROUP_CHUNKS
        else:
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
        self._put_back(late)
        return len(late)

    def try_again(self) -> None:
        """To be called every second: a few of what a tier refused because it was down, more when it takes them."""
        for bit, refused in self._refused.items():
            names = list(islice(refused.names, refused.tried))
            for name in names:
                del refused.names[name]
            if len(refused.names) > LEAST_BACKLOG:
                refused.names = {name: None for name in refused.names if self._bits(name) & bit}
            refused.tried = min(2 * refused.tried, LEAST_BACKLOG)
            self.add([name for name in names if self._bits(name) & bit])

    def restart(self) -> None:
        """The stage below is another one now: everything unanswered goes again."""
        self._put_back(list(self._sent))

    def _put_back(self, names: list[Name]) -> None:
        for name in reversed(names):
            self._backlog.setdefault(self._sent.pop(name).saver, deque()).appendleft(name)
