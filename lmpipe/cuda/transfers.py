"""What the transfers of a device have in common, whatever pages they are of: lanes, staging buffers and their sizes."""

from __future__ import annotations

from collections.abc import Callable

import torch

from lmpipe.cuda.lanes import LOADS, SAVES, Lane, lane_of, timeline_of
from lmpipe.cuda.staging import Staging
from lmpipe.spans import Spans

STAGING_BYTES = 64 << 20
"""Of device memory in each of four staging buffers, at most; what raw transfers need is `PIECE_BYTES`."""
PIECE_BYTES = 16 << 20
"""Of a raw transfer at a time: the first one's kernel overlaps with nothing."""
PROGRAMS = 16
"""Of each kernel, at most: the other multiprocessors are the engine's."""


class Transfers:
    """One for all pools of a device in a process. Transfers of one direction take turns, whatever pool they are of."""

    def __init__(
        self,
        device: torch.device,
        *,
        staging_bytes: int = STAGING_BYTES,
        piece_bytes: int = PIECE_BYTES,
        programs: int = PROGRAMS,
        lanes: Callable[[torch.device, int], Lane] = lane_of,
        spans: Spans | None = None,
    ) -> None:
        """Device memory is taken when a transfer needs it.

        Args:
            device: of the pages.
            staging_bytes: of each staging buffer at most; an encoded chunk must fit.
            piece_bytes: of a raw transfer at a time.
            programs: of each kernel.
            lanes: makes a lane of a device and a priority.
            spans: takes the time in which transfers are launched, with their raw bytes, and into a trace when the
                device did them (then not flushed while a CUDA graph is captured); nvtx ranges alone by default.

        Raises:
            ValueError: a piece does not fit the buffer.
        """
        if not piece_bytes <= staging_bytes:
            raise ValueError(f"a piece of {piece_bytes} bytes must fit the staging buffer of {staging_bytes}")
        self.device = torch.empty(0, device=device).device  # with its number
        self.staging_bytes, self.piece_bytes, self.programs = staging_bytes, piece_bytes, programs
        self.spans = spans or Spans("engine")
        self._timeline = timeline_of(self.spans, self.device, lanes)
        self.saves = Staging([lanes(device, SAVES) for _ in range(3)], "saves", self._timeline)
        self.loads = Staging([lanes(device, LOADS) for _ in range(3)], "loads", self._timeline)

    def close(self) -> None:
        """Wait for what runs, then give the staging memory back."""
        for direction in (self.saves, self.loads):
            direction.close()
        if self._timeline is not None:
            self._timeline.close()
