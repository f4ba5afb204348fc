"""The wall clock as TTLs need it: what has expired stays so, whatever is done to the machine's clock. Knows no TTL."""

from __future__ import annotations

import time

_last = (time.time(), time.monotonic())
"""The wall clock and the monotonic one, as last read."""


def wall_s() -> float:
    """Seconds since the epoch. In one process it never runs backwards, and never slower than time passes."""
    global _last
    monotonic_s = time.monotonic()
    last_wall_s, last_monotonic_s = _last
    now_s = max(time.time(), last_wall_s + monotonic_s - last_monotonic_s)
    _last = now_s, monotonic_s
    return now_s
