"""Holds random committed slots of the arena at argv[1] and checks every byte of what it reads, argv[3] times."""

import random
import sys
from pathlib import Path

import numpy as np
from slot_content import intact

from lmpipe.lifecycle import SlotState
from lmpipe.shm.descriptor import SegmentKind
from lmpipe.shm.hold import Holds
from lmpipe.shm.segment import Segment
from lmpipe.shm.session import Session
from lmpipe.shm.slots import SlotTable

run_dir, rng, wanted = Path(sys.argv[1]), random.Random(int(sys.argv[2])), int(sys.argv[3])
session = Session.create(run_dir, entries=64, grants=1)
holds = Holds(session)
table = SlotTable(Segment.attach(run_dir / "arena.shm", SegmentKind.SLOTS))
torn = read = 0
print("ready", flush=True)
sys.stdin.readline()
while read < wanted:
    index = rng.randrange(table.slots)
    generation, state = table.state(index)
    if state is not SlotState.COMMITTED:
        continue
    with holds.take(table, np.array([index], np.uint32), np.array([generation], np.uint32), read) as held:
        if len(held):
            good = [intact(table, index) for _ in range(3)]
            torn += not all(good) or table.state(index)[0] != generation
            read += 1
holds.close()
table.close()
session.close()
print(torn, read, flush=True)
