"""The staging buffers of one direction: two, each with a lane of its own, which take the pieces of transfers in turns.

Within a lane everything is in order, so that no buffer is written before it was read; the lanes run beside each other,
so that the kernel of one piece overlaps with the DMA of the other. A third lane only brings the two together: its
events are what callers get, and no lane waits for the other.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate

import torch

from lmpipe.cuda.lanes import Event, Lane
from lmpipe.cuda.pages import WIDEST_ACCESS
from lmpipe.cuda.pieces import Piece
from lmpipe.cuda.timeline import Timeline


@dataclass(frozen=True, slots=True)
class Staged:
    """A lane and its buffer, until the lane's next turn."""

    lane: Lane
    buffer: torch.Tensor
    timeline: Timeline | None = None
    track: int = 0

    def run(self, name: str, nbytes: int, chunks: int, work: Callable[[], None]) -> None:
        """Add work to the lane; a trace shows it under this name, with its bytes and chunks."""
        if self.timeline is None:
            self.lane.run(work)
            return
        with self.timeline.work(self.track, name, nbytes, chunks, self.lane.mark):
            self.lane.run(work)


class Staging:
    """Work is added within `transfer`. Buffers grow to what was asked of them."""

    def __init__(self, lanes: Sequence[Lane], name: str = "", timeline: Timeline | None = None) -> None:
        """`lanes`: three; `name`: of the direction, for the tracks of the timeline."""
        *self._lanes, self._join = lanes
        self._timeline = timeline
        self._tracks = [
            timeline.track(f"{name}, lane {number}") if timeline else 0 for number, _ in enumerate(self._lanes, 1)
        ]
        self._buffers: list[torch.Tensor | None] = [None for _ in self._lanes]
        self._turn = 0
        self._lock = threading.Lock()

    @contextmanager
    def transfer(self, after: Event | None) -> Generator[None]:
        """The turn of one transfer, whose work begins after an event.

        If adding work fails, what was added before is waited for: nobody is told, and takes memory away, while a copy
        may still write there.
        """
        with self._lock:
            if after is not None:
                for lane in self._lanes:
                    lane.wait(after)
            try:
                yield
            except BaseException:
                self.joined().synchronize()
                raise

    def next(self, nbytes: int) -> Staged:
        """The lane whose turn it is, with so many bytes at least."""
        self._turn = (self._turn + 1) % len(self._lanes)
        lane, buffer = self._lanes[self._turn], self._buffers[self._turn]
        if buffer is None or len(buffer) < nbytes:
            buffer = self._buffers[self._turn] = lane.empty(nbytes)
        return Staged(lane, buffer, self._timeline, self._tracks[self._turn])

    def joined(self) -> Event:
        """After all that was added."""
        for lane in self._lanes:
            self._join.wait(lane.record())
        return self._join.record()

    def close(self) -> None:
        """Wait for what was added, then give the memory back."""
        with self._lock:
            self.joined().synchronize()
            self._buffers = [None for _ in self._lanes]


def rows(buffer: torch.Tensor, piece: Piece) -> torch.Tensor:
    """Of a piece, `[chunks, bytes]`."""
    return buffer[: len(piece.chunks) * piece.nbytes].view(len(piece.chunks), piece.nbytes)


def aligned(nbytes: int) -> int:
    """With what is left free so that the next part can be moved in the widest accesses."""
    return -(-nbytes // WIDEST_ACCESS) * WIDEST_ACCESS


def parts(buffer: torch.Tensor, lengths: Sequence[int]) -> list[torch.Tensor]:
    """Of so many bytes each, at aligned places."""
    starts = accumulate((aligned(nbytes) for nbytes in lengths), initial=0)
    return [buffer[start : start + nbytes] for start, nbytes in zip(starts, lengths, strict=False)]
