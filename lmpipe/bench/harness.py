"""What every benchmark runs in: two cores, progress on stderr, figures on stdout; and figure and limit taking turns.

The machine is not ours alone, so nothing is compared across time: what disturbs a figure most likely disturbs its
limit, measured just before or after, too. Medians, because a disturbance has no upper bound. Knows no benchmark.
"""

from __future__ import annotations

import argparse
import gc
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import orjson

from lmpipe.bench.report import Figure

RUNS, WARM_UPS = 9, 2
QUICK_RUNS, QUICK_WARM_UPS = 2, 1
MANY_RUNS, WARM_S = 100, 1.0
"""A processor that was idle is slow for the first second, which matters where many rounds fit into one."""

Measured = Callable[[], float]
"""Does its own preparations and returns the seconds of the part that counts."""


@dataclass(frozen=True, slots=True)
class Setting:
    """How large a run is to be. `quick` proves that the benchmark works; its figures mean nothing."""

    quick: bool
    disk: Path = Path("out")
    """Where a benchmark that needs a disk makes a directory of its own."""

    def size(self, full: int, quick: int) -> int:
        """`full`, or `quick` in a quick run."""
        return quick if self.quick else full

    @property
    def runs(self) -> int:
        """Measurements for each median."""
        return self.size(RUNS, QUICK_RUNS)

    @property
    def warm_ups(self) -> int:
        """Measurements before these, which are thrown away."""
        return self.size(WARM_UPS, QUICK_WARM_UPS)

    @staticmethod
    def say(text: str) -> None:
        """A line of progress."""
        print(text, file=sys.stderr, flush=True)

    def alternate(self, name: str, figure: Measured, limit: Measured, runs: int = 0) -> tuple[list[float], list[float]]:
        """Seconds of `figure` and of `limit`, in turns, after warm-ups: a second where rounds are short."""
        runs = self.runs if self.quick or not runs else runs
        values: list[float] = []
        limits: list[float] = []
        said_s = 0.0
        gc.collect()
        began_s = time.monotonic()
        while runs >= MANY_RUNS and time.monotonic() < began_s + WARM_S:
            figure()
            limit()
        for turn in range(-self.warm_ups, runs):
            if time.monotonic() > said_s + 0.2:
                said_s = time.monotonic()
                self.say(f"{name}: {'warming up' if turn < 0 else f'{turn + 1} of {runs}'}")
            # Each goes first every other time: what the first leaves in the caches is not always the second's.
            pair = (figure(), limit()) if turn % 2 else (limit(), figure())[::-1]
            if turn >= 0:
                values.append(pair[0])
                limits.append(pair[1])
        return values, limits


def rates(nbytes: int, seconds: Sequence[float]) -> list[float]:
    """GB/s of each run."""
    return [nbytes / s / 1e9 for s in seconds]


def scaled(seconds: Sequence[float], factor: float) -> list[float]:
    """The same in another unit: 1e3 for ms, 1e6 for µs."""
    return [s * factor for s in seconds]


@contextmanager
def shared_directory() -> Generator[Path]:
    """A private directory on tmpfs, removed at the end with all that is in it."""
    path = Path(tempfile.mkdtemp(prefix="lmpipe-bench-", dir="/dev/shm"))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def keep_to_two_cores() -> None:
    """Everything that this process starts runs on the same two cores."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])


def _stop(number: int, _: object) -> None:
    raise SystemExit(128 + number)


def main(run: Callable[[Setting], list[Figure]]) -> int:
    """A benchmark as a process; returns its exit status."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="a tiny run that proves that it works")
    parser.add_argument("--disk", type=Path, default=Path("out"), help="for the files of benchmarks that need a disk")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, _stop)
    keep_to_two_cores()
    figures = run(Setting(args.quick, args.disk))
    sys.stdout.buffer.write(orjson.dumps([asdict(figure) for figure in figures], option=orjson.OPT_APPEND_NEWLINE))
    return 0
