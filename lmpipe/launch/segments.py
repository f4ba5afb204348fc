"""The segments of a node: made, or taken over from a former life when they still fit. Knows no process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lmpipe.errors import SegmentError
from lmpipe.handles import round_up
from lmpipe.rundir import RunDir
from lmpipe.shm.descriptor import SegmentKind, payload_offset
from lmpipe.shm.node import NodeWords
from lmpipe.shm.segment import Segment
from lmpipe.shm.slots import SlotOwner, default_slots
from lmpipe.topology import Topology

Report = Callable[[str], None]
Progress = Callable[[str, int, int], None]
"""Called with (segment, bytes done, bytes in all)."""


class Segments:
    """What `build` made, so that a failed start takes back its own and nothing else."""

    def __init__(self, paths: RunDir, topology: Topology, report: Report, progress: Progress) -> None:
        self._paths, self._topology = paths, topology
        self._report, self._progress = report, progress
        self._made: list[Path] = []
        self.took_over = False
        """Whether the arena is that of a former life."""

    def build(self) -> bytes:
        """Makes or takes over every segment and returns the arena's id. Raises SegmentError, leaving nothing new."""
        try:
            arena_id = self._arena()
            self._node_words()
            for stage in self._topology.rings_needed:
                self._slots(self._paths.ring(stage), self._topology.rings.capacity(stage), None, prefault=True)
        except BaseException:
            self.unmake()
            raise
        return arena_id

    def unmake(self) -> None:
        """Removes what was made."""
        while self._made:
            self._made.pop().unlink(missing_ok=True)

    def _arena(self) -> bytes:
        path, dram = self._paths.arena, self._topology.tiers.dram
        slots = dram.slots or default_slots(dram.capacity)
        if path.exists():
            try:
                with Segment.attach(path, SegmentKind.SLOTS) as found:
                    wanted = round_up(payload_offset(slots) + dram.capacity)
                    if (found.count, found.nbytes) == (slots, wanted):
                        self._report(f"arena: taken over as it is, {found.nbytes / (1 << 30):.2f} GiB")
                        self.took_over = True
                        return found.id
                    problem = f"has {found.count} slots and {found.nbytes} bytes, wanted are {slots} and {wanted}"
            except SegmentError as error:
                problem = str(error)
            self._report(f"arena: cannot be taken over, what it held is lost: {problem}")
            path.unlink()
        return self._slots(path, dram.capacity, slots, prefault=dram.prefault)

    def _slots(self, path: Path, capacity: int, slots: int | None, *, prefault: bool) -> bytes:
        def progress(done: int, total: int) -> None:
            self._progress(path.stem, done, total)

        owner = SlotOwner.create(path, capacity, slots, progress=progress, prefault=prefault)
        self._made.append(path)
        arena_id = owner.segment.id
        owner.close()
        return arena_id

    def _node_words(self) -> None:
        """Kept where possible: living producers have it mapped, and generations must go on from where they were."""
        path = self._paths.node_shm
        if path.exists():
            try:
                NodeWords.attach(path).close()
                return
            except SegmentError as error:
                self._report(f"{error}; made anew")
                path.unlink()
        NodeWords.create(path).close()
        self._made.append(path)
