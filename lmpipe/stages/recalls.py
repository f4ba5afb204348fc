"""Invalidations under way: each stage answers for its own tier, and the counts add up on the way back.

What cannot be sent down now is kept until it can: an answer means that every tier has forgotten.
"""

from __future__ import annotations

from dataclasses import dataclass

from lmpipe.handles import Tier
from lmpipe.messages import Invalidate, Invalidated
from lmpipe.stages.base import Context
from lmpipe.stages.links import Links

LIMIT = 256


@dataclass(slots=True)
class _Recall:
    asked: Invalidate
    here: bool
    below: bool
    removed: int = 0


class Recalls:
    """Those of one stage; `tier` is its own, if it has one."""

    def __init__(self, context: Context, links: Links, tier: Tier | None) -> None:
        self._context, self._links, self._tier = context, links, tier
        self._open: dict[int, _Recall] = {}
        self._next = 0

    @property
    def busy(self) -> bool:
        """Whether the own tier has still to answer."""
        return any(recall.here for recall in self._open.values())

    def begin(self, message: Invalidate) -> int:
        """Take one in and pass it down; the number by which `answered_here` knows it."""
        self._next += 1
        below = self._context.has_down and any(tier not in (self._tier, Tier.DRAM) for tier in message.tiers)
        recall = self._open[self._next] = _Recall(message, self._tier in message.tiers, below)
        if len(self._open) > LIMIT:
            del self._open[next(iter(self._open))]
        if below:
            self._pass_down(self._next, recall)
        self._answer(self._next)
        return self._next

    def answered_here(self, number: int, removed: int) -> None:
        """The own tier has forgotten."""
        recall = self._open.get(number)
        if recall is not None:
            recall.here, recall.removed = False, recall.removed + removed
            self._answer(number)

    def answered_below(self, message: Invalidated) -> None:
        """All tiers below have."""
        recall = self._open.get(message.ref)
        if recall is not None and recall.below:
            recall.below, recall.removed = False, recall.removed + message.removed
            self._answer(message.ref)

    def below_changed(self) -> None:
        """The stage below is another one: what it has not answered it may not have heard."""
        if self._context.chain:
            for number, recall in self._open.items():
                if recall.below:
                    self._pass_down(number, recall)

    def _pass_down(self, number: int, recall: _Recall) -> None:
        asked = recall.asked
        message = Invalidate(self._context.session.id, number, asked.namespace, asked.tiers, asked.chunks)
        self._links.down("save", message)  # behind the saves that came before it

    def _answer(self, number: int) -> None:
        recall = self._open[number]
        if not recall.here and not recall.below:
            del self._open[number]
            self._links.up("save", Invalidated(self._context.session.id, recall.asked.ref, recall.removed))
