"""The disk that the SSD tier lies on, or would: room, O_DIRECT, and what it writes and reads in a short trial."""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from lmpipe.cli.check import existing
from lmpipe.cli.doctor.finding import Finding, fail, ok, warn
from lmpipe.cli.picture import size
from lmpipe.settings import SsdTier
from lmpipe.tiers.segment_file import aligned, open_direct, read_at, write_at

TRIAL_BYTES = 64 << 20
BLOCK_BYTES = 8 << 20
TRIAL_S = 2.0
SLOW_BYTES_PER_S = 300e6
"""Below this a long prompt is prefilled faster than it is loaded."""


@dataclass(frozen=True, slots=True)
class Trial:
    """Bytes per second; `direct`: past the page cache."""

    direct: bool
    write: float
    read: float


def examine(ssd: SsdTier, *, measure: bool) -> list[Finding]:
    """The tier's directory. `measure`: with the trial, which leaves nothing behind."""
    directory, place = Path(ssd.directory), existing(Path(ssd.directory))
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        return [fail("SSD directory", f"{place} cannot be written", f"make {directory} one of this user's")]
    free = shutil.disk_usage(place).free
    own = sum(path.stat().st_blocks * 512 for path in directory.glob("*") if path.is_file())
    seen = f"{directory}: {size(free)} free, {size(own)} the tier's, {size(ssd.capacity)} wanted"
    todo = "lower tiers.ssd.capacity, or make room: a full disk makes the tier read-only"
    found = [warn("SSD room", seen, todo) if ssd.capacity > free + own else ok("SSD room", seen)]
    if measure and free > 4 * TRIAL_BYTES:
        try:
            found += judge(trial(place))
        except OSError as error:
            found.append(fail("SSD speed", f"{place}: {error.strerror}", "the disk, or its file system, is in trouble"))
    return found


def judge(seen: Trial) -> list[Finding]:
    """What a trial says."""
    speed = f"writes {size(int(seen.write))}/s, reads {size(int(seen.read))}/s, for a moment"
    slow = min(seen.write, seen.read) < SLOW_BYTES_PER_S
    todo = "loads may take longer than prefill; admission then makes few: a faster disk, or a codec that is smaller"
    direct = ok("O_DIRECT", "works") if seen.direct else None
    return [
        direct
        or warn("O_DIRECT", "refused by the file system", "the page cache takes memory and CPU: ext4, xfs have it"),
        warn("SSD speed", speed, todo) if slow else ok("SSD speed", speed),
    ]


def trial(directory: Path) -> Trial:
    """Write at most `TRIAL_BYTES`, flush, and read them, for `TRIAL_S` each at most. The file has no name: nothing is
    left whatever happens.
    """
    buffer = aligned(BLOCK_BYTES)
    buffer[:] = os.urandom(4096) * (BLOCK_BYTES // 4096)
    descriptor, direct = open_direct(directory, os.O_TMPFILE | os.O_RDWR)
    try:
        begin_s = time.monotonic()
        written = 0
        while written < TRIAL_BYTES and time.monotonic() - begin_s < TRIAL_S:
            write_at(descriptor, [buffer], written)
            written += BLOCK_BYTES
        os.fdatasync(descriptor)
        middle_s = time.monotonic()
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        done = 0
        while done < written and time.monotonic() - middle_s < TRIAL_S:
            done += read_at(descriptor, [buffer], done)
        end_s = time.monotonic()
    finally:
        os.close(descriptor)
    return Trial(direct, written / max(middle_s - begin_s, 1e-6), done / max(end_s - middle_s, 1e-6))
