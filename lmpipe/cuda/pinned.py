"""Pinning of memory that is there already: the driver is told of it piece by piece, while it is in use.

    0 ───────── pinned ─────────┤ `done_bytes`                          all
    [piece 0][piece 1] … [piece k][ not yet: copies go through a bounce buffer ]

Telling the driver of a terabyte takes minutes, so a thread does it and nobody waits. Pieces come in order; where one is
refused (the limit of locked memory), the rest stays as it is. Knows no slot and no engine.
"""

from __future__ import annotations

import logging
import threading
import time

from lmpipe import native
from lmpipe.cuda.runtime import Runtime
from lmpipe.errors import DeviceError, DeviceLost

PIECE_BYTES = 256 << 20
"""No copy may cross the border of two pieces: to the driver they are two memories."""
TOLD_PARTS = 4

log = logging.getLogger("lmpipe.cuda")


class Pinned:
    """A region on its way to being pinned. Begins at once, ends with `close`."""

    def __init__(self, runtime: Runtime, region: native.Region, name: str, piece_bytes: int = PIECE_BYTES) -> None:
        """`region`: whole pages; `name`: for the log."""
        self._runtime, self._region, self._name, self.piece_bytes = runtime, region, name, piece_bytes
        self.address = region.address
        self.done_bytes = 0
        """From the region's start: what copies may go to directly."""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lmpipe-pin", daemon=True)
        self._thread.start()

    def wait(self, timeout_s: float) -> bool:
        """Wait until all is pinned that will be. True: all of it."""
        self._thread.join(timeout_s)
        return self.done_bytes == self._region.nbytes

    def _run(self) -> None:
        total, told = self._region.nbytes, 0
        begun_s = time.monotonic()
        while self.done_bytes < total and not self._stop.is_set():
            nbytes = min(self.piece_bytes, total - self.done_bytes)
            try:
                self._runtime.pin(self.address + self.done_bytes, nbytes)
            except DeviceError as error:
                log.warning("%s: %s are pinned: %s", self._name, self._share, error)
                return
            except DeviceLost:
                log.critical("%s: not pinned", self._name, exc_info=True)
                return  # whoever copies next meets it too, and ends the process
            self.done_bytes += nbytes
            if self.done_bytes * TOLD_PARTS // total > told:
                told = self.done_bytes * TOLD_PARTS // total
                log.info("%s: %s are pinned, after %.1f s", self._name, self._share, time.monotonic() - begun_s)

    @property
    def _share(self) -> str:
        return f"{self.done_bytes / (1 << 30):.2f} of {self._region.nbytes / (1 << 30):.2f} GiB"

    def close(self) -> None:
        """Unpin all of it. No copy may be under way."""
        self._stop.set()
        self._thread.join()
        for start in range(0, self.done_bytes, self.piece_bytes):
            self._runtime.unpin(self.address + start)
        self.done_bytes = 0
