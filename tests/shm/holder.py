"""Holds the slot of argv[2] and argv[3] in the arena at argv[1], until it is killed."""

import sys
from pathlib import Path

import numpy as np

from lmpipe.shm.descriptor import SegmentKind
from lmpipe.shm.hold import Holds
from lmpipe.shm.segment import Segment
from lmpipe.shm.session import Session
from lmpipe.shm.slots import SlotTable

run_dir = Path(sys.argv[1])
holds = Holds(Session.create(run_dir))
table = SlotTable(Segment.attach(run_dir / "arena.shm", SegmentKind.SLOTS))
held = holds.take(table, np.array([sys.argv[2]], np.uint32), np.array([sys.argv[3]], np.uint32), 1)
print(len(held), flush=True)
sys.stdin.read()
