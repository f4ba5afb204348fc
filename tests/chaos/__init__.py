"""Chaos: a real topology with real engines under a seeded schedule of faults, and what must hold whatever happens.

    python -m tests.chaos --seconds 600          # or: make chaos SECONDS=600
    python -m tests.chaos --seed 17 --rounds 8   # one world again

A run is a row of worlds; a world is one topology, drawn from its seed, with engine processes at work. A world goes
through rounds: a storm, in which faults (faults.py, files.py) are done at drawn moments, then calm, in which everything
is healed and looked at (invariants.py). Schedules are drawn from the seed, so that they can be replayed; on which
instruction a signal arrives is up to the machine.
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent / "multiproc"))  # the rig
