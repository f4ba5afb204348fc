"""The wall clock as TTLs need it: what has expired stays so, whatever is done to the machine's clock. Knows no TTL."""

from __future__ import annotations

import time

_offset_s = time.time() - time.monotonic()
"""How far the wall clock was ahead of the monotonic one, at most so far. The wall clock is read first: who is stopped
between the two sees it less far ahead than it is, and is not ahead of all others from then on.
"""


def wall_s() -> float:
    """Seconds since the epoch. In one process it never runs backwards, and never slower than time passes."""
    global _offset_s
    at_least_s = _offset_s + time.monotonic()
    now_s = time.time()
    _offset_s = max(_offset_s, now_s - time.monotonic())
    return max(now_s, at_least_s)
