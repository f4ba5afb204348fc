"""The arena of one producer, pinned for the engine's device from its first use on, and not unpinned under a copy.

Pools of any pages share it. What is not pinned yet is copied all the same, slower.
"""

from __future__ import annotations

import threading
from collections.abc import Generator
from contextlib import contextmanager

import numpy as np

from lmpipe import native
from lmpipe.cuda.pinned import PIECE_BYTES, Pinned
from lmpipe.cuda.runtime import Runtime


class PinnedArena:
    """Whatever arena the producer is attached to. Any thread may call."""

    def __init__(self, runtime: Runtime, piece_bytes: int = PIECE_BYTES) -> None:
        """`runtime`: of the device (`cupy_runtime.open_device`). `piece_bytes`: pinned at a time."""
        self._runtime, self._piece_bytes = runtime, piece_bytes
        self._changed = threading.Condition()
        self._region: native.Region | None = None
        self._pinned: Pinned | None = None
        self._users = 0

    @contextmanager
    def use(self, region: native.Region) -> Generator[None]:
        """Within it copies may go from and to this arena. It is pinned in place of the one before when nobody copies:
        memory is not unpinned under a copy, and nobody waits, for who waits may be who copies.
        """
        with self._changed:
            if region is not self._region and not self._users:
                self._pin(region)
            self._users += 1
        try:
            yield
        finally:
            with self._changed:
                self._users -= 1
                self._changed.notify_all()

    def is_one_memory(self, slot: memoryview) -> bool:
        """Whether the driver knows all of a slot as one memory, or none of it; no copy may cross the border of two."""
        if self._pinned is None or self._region is None:
            return True
        start = np.frombuffer(slot, np.uint8).ctypes.data - self._pinned.address
        if not 0 <= start < self._region.nbytes:
            return True
        return start // self._piece_bytes == (start + len(slot) - 1) // self._piece_bytes

    def close(self) -> None:
        """Unpin, when nobody copies any more. No use comes after it."""
        with self._changed:
            self._changed.wait_for(lambda: not self._users)
            self._pin(None)

    def _pin(self, region: native.Region | None) -> None:
        if self._pinned is not None:
            self._pinned.close()
        self._region, self._pinned = region, None
        if region is not None:
            self._pinned = Pinned(self._runtime, region, "arena", self._piece_bytes)
