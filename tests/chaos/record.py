"""What happened, as JSON lines; and the sums of it: faults, kills, calls, acknowledgements, violations."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import IO, Any

import numpy as np


@dataclass(slots=True)
class Kept:
    """A prompt of the vault: which of its chunks were acknowledged, by tier."""

    chunks: int
    acked: defaultdict[str, set[int]] = field(default_factory=lambda: defaultdict(set[int]))

    def is_in(self, tier: str) -> bool:
        """Whether all of it is acknowledged by a tier; "": each chunk by any."""
        parts = [self.acked[tier]] if tier else list(self.acked.values())
        return len(set[int]().union(*parts)) == self.chunks


class Sums:
    """Sums over any number of worlds."""

    def __init__(self) -> None:
        self.faults: Counter[str] = Counter()
        self.kills: Counter[str] = Counter()
        self.counts: Counter[str] = Counter()
        self.times: defaultdict[str, list[int]] = defaultdict(list)
        """Microseconds of each engine-side call."""
        self.violations: list[str] = []
        self.began_s = time.monotonic()

    def lines(self) -> list[str]:
        """The closing summary."""
        minutes = (time.monotonic() - self.began_s) / 60
        kills = self.kills.total()
        found = [
            f"{minutes:.1f} min, {self.counts['worlds']} worlds, {self.counts['rounds']} rounds,"
            f" {self.faults.total()} faults, {kills} kills ({kills / minutes:.0f} a minute)",
            "faults: " + ", ".join(f"{name} {count}" for name, count in self.faults.most_common()),
            "killed: " + ", ".join(f"{name} {count}" for name, count in self.kills.most_common()),
            "looked at: " + ", ".join(f"{name} {count}" for name, count in sorted(self.counts.items())),
        ]
        for kind, times in sorted(self.times.items()):
            p50, p99, most = (f"{value / 1000:.2f}" for value in np.percentile(times, (50, 99, 100)))
            found.append(f"{kind}: {len(times)} calls, p50 {p50} ms, p99 {p99} ms, max {most} ms")
        return [*found, f"violations: {len(self.violations)}", *self.violations]


class Record:
    """One world's account. Any thread may write into it."""

    def __init__(self, seed: int, sums: Sums, file: IO[str] | None = None) -> None:
        self.seed, self.sums = seed, sums
        self.vault: dict[int, Kept] = {}
        self.long: list[tuple[int, dict[str, Any]]] = []
        """Calls of a process that took long, as it seems to it; not judged yet."""
        self.violated = 0
        self._file = file
        self._lock = threading.RLock()

    def write(self, what: str, **details: Any) -> None:
        """One line."""
        with self._lock:
            if self._file is not None:
                line = {"at": round(time.time(), 3), "seed": self.seed, "what": what, **details}
                self._file.write(json.dumps(line, default=str) + "\n")
                self._file.flush()

    def count(self, name: str, amount: int = 1) -> None:
        """Add to a sum."""
        with self._lock:
            self.sums.counts[name] += amount

    def killed(self, name: str, amount: int = 1) -> None:
        """Count a kill."""
        with self._lock:
            self.sums.kills[name] += amount

    def fault(self, name: str, **details: Any) -> None:
        """A fault was done."""
        with self._lock:
            self.sums.faults[name] += 1
        self.write("fault", name=name, **details)

    def violation(self, text: str, **details: Any) -> None:
        """An invariant does not hold."""
        with self._lock:
            self.violated += 1
            shown = "; ".join(f"{name}: {value}" for name, value in details.items())
            self.sums.violations.append(f"seed {self.seed}: {text}" + (f" ({shown})" if shown else ""))
        self.write("violation", text=text, **details)

    def hear(self, pid: int, said: dict[str, Any]) -> None:
        """What an engine says on its own."""
        with self._lock:
            if "times" in said:
                for kind, times in said["times"].items():
                    self.sums.times[kind] += times
            elif "persisted" in said:
                for seed, chunks, at in said["chunks"]:
                    self.vault.setdefault(seed, Kept(chunks)).acked[said["persisted"]].add(at)
            elif "long" in said:
                self.long.append((pid, said))
            elif "violation" in said:
                self.violation(said.pop("violation"), pid=pid, **said)
