"""What a running node holds: the arena's slots, the indexes, the tiers' own complaints. Changes nothing."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable

from lmpipe.cli.doctor.finding import Finding, fail, ok, warn
from lmpipe.errors import SegmentError
from lmpipe.handles import SessionId, Tier
from lmpipe.index import IndexReader, may_map
from lmpipe.launch.overview import Overview
from lmpipe.lifecycle import LEASED_STATES, SlotState
from lmpipe.shm.descriptor import SegmentKind
from lmpipe.shm.node import NodeWords
from lmpipe.shm.segment import Segment
from lmpipe.shm.session import SessionDir
from lmpipe.shm.table import SlotTable
from lmpipe.topology import NodeInfo

SWEEP_S = 2.0
"""gather takes back within a second what the dead had."""
FULL_PART = 0.85


def examine(info: NodeInfo, seen: Overview) -> list[Finding]:
    """Arena, indexes and tiers."""
    try:
        table = SlotTable(Segment.attach(info.paths.arena, SegmentKind.SLOTS, id=bytes.fromhex(info.arena_id)))
        words = NodeWords.attach(info.paths.node_shm)
    except SegmentError as error:
        return [fail("arena", str(error), "lmpipe down, lmpipe up: engines can map nothing")]
    try:
        found = [arena(table, SessionDir(info.paths.path).alive)]
        if may_map(info.index_identity):
            found += [index(info, tier, words) for tier in info.topology.tier_names]
    finally:
        table.close()
        words.close()
    return [*found, *tiers(seen)]


def arena(table: SlotTable, alive: Callable[[SessionId], bool]) -> Finding:
    """How many slots are in which state, and whether any belongs to the dead."""
    dead = _of_the_dead(table, alive)
    if dead:
        time.sleep(SWEEP_S)
        dead &= _of_the_dead(table, alive)
    counts = Counter(table.state(index)[1] for index in range(table.slots))
    said = ", ".join(f"{count} {state.name.lower()}" for state, count in sorted(counts.items()))
    if dead:
        return fail("arena", f"{said}; {len(dead)} belong to the dead", "gather does not take them back: is it well?")
    if not counts[SlotState.FREE]:
        return warn("arena", said, "every slot is taken, though there may be room: raise tiers.dram.slots")
    return ok("arena", said)


def _of_the_dead(table: SlotTable, alive: Callable[[SessionId], bool]) -> set[tuple[int, int]]:
    """Slots, with their generations, that are lent to sessions that have ended."""
    lent: dict[SessionId, list[tuple[int, int]]] = {}
    for index in range(table.slots):
        generation, state = table.state(index)
        if state in LEASED_STATES:
            lent.setdefault(table.owner(index), []).append((index, generation))
    return {slot for session, slots in lent.items() if session and not alive(session) for slot in slots}


def index(info: NodeInfo, tier: Tier, words: NodeWords) -> Finding:
    """Whether the index of a tier can be read, and how full its map is."""
    check = f"index {tier}"
    if not words.index_generation(tier):
        return warn(check, "not published yet", "its stage is starting, or down")
    reader = IndexReader(info.paths.path, tier, info.topology.index.map_bytes(tier), words)
    try:
        usage = reader.usage()
    finally:
        trouble = reader.trouble()
        reader.close()
    if usage is None:
        return fail(check, trouble or "cannot be read", "restart the stage that owns it: it is built anew")
    rows, part = usage
    seen = f"{rows:,} rows, {100 * part:.0f} % of the map"
    if part > FULL_PART:
        return warn(check, seen, f"raise index.{tier}: when it is full nothing more is saved")
    return ok(check, seen)


def tiers(seen: Overview) -> list[Finding]:
    """What the tiers say of themselves."""
    todo = "see the log of its stage; what is above goes on without it"
    return [fail(f"tier {tier.tier}", tier.trouble, todo) for tier in seen.tiers if tier.trouble]
