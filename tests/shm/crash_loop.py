"""Recovers the arena at argv[1], then leases, fills, commits and frees without end, until somebody kills it."""

import random
import sys
from pathlib import Path

from slot_content import fill, intact, no_overlap

from lmpipe.handles import Slot
from lmpipe.lifecycle import SlotEvent
from lmpipe.shm.descriptor import SegmentKind
from lmpipe.shm.segment import Segment
from lmpipe.shm.session import Session, SessionDir
from lmpipe.shm.slots import SlotOwner

run_dir = Path(sys.argv[1])
rng = random.Random(int(sys.argv[2]))
session = Session.create(run_dir, entries=16, grants=1)
owner = SlotOwner(Segment.attach(run_dir / "arena.shm", SegmentKind.SLOTS))
found = owner.recover(SessionDir(run_dir).alive)
assert not found.damaged and not found.leased and not found.doomed, found
assert no_overlap(owner, found.committed) and all(intact(owner, index) for index in found.committed)
committed = [Slot(index, owner.state(index)[0]) for index in found.committed]
print("ready", len(committed), found.freed, flush=True)
while True:
    slot = owner.lease(rng.randrange(1, 12) * 4096 - 4080, session.id)
    if committed and (slot is None or rng.random() < 0.3):
        victim = committed.pop(rng.randrange(len(committed)))
        assert owner.advance(victim, SlotEvent.DOOM) and owner.free(victim)
    if slot is not None:
        fill(owner, slot, rng.randbytes(16), int(owner.capacity(slot.index)))
        if rng.random() < 0.1:
            owner.free(slot)
        else:
            assert owner.advance(slot, SlotEvent.COMMIT)
            committed.append(slot)
