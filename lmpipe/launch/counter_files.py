"""The counter segments of a node, as its supervisor reads them: the living from their files, the dead from memory."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from lmpipe.errors import SegmentError
from lmpipe.exposition import Sample
from lmpipe.launch.claim import dead_counters
from lmpipe.metrics import GAUGES
from lmpipe.rundir import RunDir
from lmpipe.shm.counters import Counters
from lmpipe.shm.session import SessionDir


class CounterFiles:
    """What was counted since the node started. A dead process's file goes; its sums stay, so that sums only grow."""

    def __init__(self, paths: RunDir) -> None:
        self._paths = paths
        self._sessions = SessionDir(paths.path)
        self._retired: defaultdict[str, dict[str, int]] = defaultdict(dict)
        self._lock = threading.Lock()

    def samples(self) -> Iterator[Sample]:
        """The dead first, so that a gauge is what the living say. May be called from any thread."""
        with self._lock:
            found = [Sample(process, dict(values)) for process, values in self._retired.items()]
            found += [Sample(_name_and_pid(path)[0], values) for path, values in read_counters(self._paths)]
        return iter(found)

    def retire(self, process: str, pid: int) -> None:
        """Takes over what a dead process counted, and removes its file."""
        path = self._paths.counters_of(process, pid)
        with self._lock:
            try:
                values = Counters.read(path)
            except SegmentError:
                return
            sums = self._retired[process]
            for name, value in values.items():
                if name not in GAUGES:
                    sums[name] = sums.get(name, 0) + value
            path.unlink(missing_ok=True)

    def sweep(self) -> None:
        """Removes what dead engines left: sessions, hold segments, counters."""
        self._sessions.sweep()
        for path in dead_counters(self._paths):
            self.retire(*_name_and_pid(path))


def read_counters(paths: RunDir) -> list[tuple[Path, dict[str, int]]]:
    """Counters of every process that has a file, by file; those that come or go in this moment are left out."""
    found: list[tuple[Path, dict[str, int]]] = []
    for path in sorted(paths.counters.glob("*.shm")):
        try:
            found.append((path, Counters.read(path)))
        except SegmentError:
            continue
    return found


def _name_and_pid(path: Path) -> tuple[str, int]:
    name, _, pid = path.stem.rpartition("-")
    return name, int(pid) if pid.isdigit() else 0
