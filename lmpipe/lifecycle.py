"""The law of a slot: its states and the events that may change them.

A slot is FREE until its owner (gather for the arena, a stage for its ring) leases it to a writer. The writer opens it
(WRITING), fills it, closes it (READY). Only the owner makes it visible (COMMITTED), and only the owner ends it: DOOM
first, so that no new hold succeeds, then, once no hold names this generation, FREE with the next generation. A writer
that dies leaves LEASED, WRITING or READY behind; the owner may FREE those only when the writer's session lock is gone
or the writer itself gave the lease back, never because time has passed: a stopped writer may wake up and go on writing.
A lease that was not opened it may take back as well: the writer's OPEN and this FREE exclude each other.

Who may fire which event is part of the table, because "whoever owns memory writes it" is what keeps a late worker
harmless.
"""

from __future__ import annotations

from enum import IntEnum, StrEnum


class SlotState(IntEnum):
    """Low 8 bits of a slot's state word."""

    FREE = 0
    LEASED = 1
    WRITING = 2
    READY = 3
    COMMITTED = 4
    DOOMED = 5


class SlotEvent(StrEnum):
    """What may happen to a slot."""

    LEASE = "lease"
    OPEN = "open"
    CLOSE = "close"
    COMMIT = "commit"
    DOOM = "doom"
    FREE = "free"


class Actor(StrEnum):
    """Who fires an event: the process that allocates the segment's slots, or the one that holds the lease."""

    OWNER = "owner"
    WRITER = "writer"


TRANSITIONS: dict[tuple[SlotState, SlotEvent], SlotState] = {
    (SlotState.FREE, SlotEvent.LEASE): SlotState.LEASED,
    (SlotState.LEASED, SlotEvent.OPEN): SlotState.WRITING,
    (SlotState.WRITING, SlotEvent.CLOSE): SlotState.READY,
    (SlotState.READY, SlotEvent.COMMIT): SlotState.COMMITTED,
    (SlotState.COMMITTED, SlotEvent.DOOM): SlotState.DOOMED,
    (SlotState.DOOMED, SlotEvent.FREE): SlotState.FREE,
    # The lease came back unused, its holder is dead, or (LEASED only) it was taken back before it was opened.
    (SlotState.LEASED, SlotEvent.FREE): SlotState.FREE,
    (SlotState.WRITING, SlotEvent.FREE): SlotState.FREE,
    (SlotState.READY, SlotEvent.FREE): SlotState.FREE,
}

ACTORS: dict[SlotEvent, Actor] = {
    SlotEvent.LEASE: Actor.OWNER,
    SlotEvent.OPEN: Actor.WRITER,
    SlotEvent.CLOSE: Actor.WRITER,
    SlotEvent.COMMIT: Actor.OWNER,
    SlotEvent.DOOM: Actor.OWNER,
    SlotEvent.FREE: Actor.OWNER,
}

LEASED_STATES = frozenset({SlotState.LEASED, SlotState.WRITING, SlotState.READY})
"""States in which somebody holds the right to write."""
