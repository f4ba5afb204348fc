"""What slot headers say after a crash: which make sense, and which ranges they have. Reads copies, changes nothing.

The order of stores (slots.py) makes every header that is in use complete, and no two of them overlap, whenever the
owner died. What this file calls damaged is therefore another fault: stray writes, or a segment that somebody edited.
Such a slot is given up, not guessed at.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from lmpipe.handles import BLOCK_BYTES, SessionId
from lmpipe.lifecycle import SlotState
from lmpipe.shm.descriptor import GENERATION_MASK, GENERATION_SHIFT, STATE_MASK


@dataclass(slots=True)
class Recovered:
    """What a restart found in a segment."""

    committed: list[int] = field(default_factory=list[int])
    """COMMITTED now: those that were, and those that were READY."""
    leased: dict[SessionId, list[int]] = field(default_factory=dict[SessionId, list[int]])
    """LEASED or WRITING, by their living owners."""
    doomed: list[int] = field(default_factory=list[int])
    """DOOMED and still held: to be freed when the holds are gone, and not to be shown again."""
    freed: int = 0
    """Slots of dead writers, and doomed ones that nobody holds."""
    damaged: int = 0
    """Slots freed because their header makes no sense."""


@dataclass(frozen=True, slots=True)
class Audit:
    """The slots in use."""

    spans: dict[int, tuple[int, int]]
    """(offset, bytes) of each slot that makes sense, by index; they do not overlap."""
    damaged: dict[int, int]
    """Generation of each slot that does not."""


def audit_headers(
    words: npt.NDArray[np.uint64], headers: npt.NDArray[np.void], payload_start: int, capacity_bytes: int
) -> Audit:
    """Sort the slots in use into those that make sense and those that do not. `words`: state words, (slots,)."""
    used = np.flatnonzero(words & STATE_MASK)
    generations = (words >> GENERATION_SHIFT)[used].tolist()
    sane = _sane(words[used], headers[used], payload_start, payload_start + capacity_bytes).tolist()
    offsets, capacities = headers["offset"][used].tolist(), headers["capacity"][used].tolist()
    indices = used.tolist()
    spans = {index: (offsets[i], capacities[i]) for i, index in enumerate(indices) if sane[i]}
    for index in _overlapping(spans):
        del spans[index]
    return Audit(spans, {index: generations[i] for i, index in enumerate(indices) if index not in spans})


def _sane(words: npt.NDArray[np.uint64], headers: npt.NDArray[np.void], start: int, end: int) -> npt.NDArray[np.bool_]:
    """Which headers can be what a lease wrote and a writer filled."""
    states, generations = words & STATE_MASK, words >> GENERATION_SHIFT
    offsets, capacities = headers["offset"], headers["capacity"]
    nbytes = headers["record"]["nbytes"]
    being_written = (states == SlotState.LEASED) | (states == SlotState.WRITING)
    return (
        (states < len(SlotState))
        & (generations > 0)
        & (generations <= GENERATION_MASK)
        & (offsets % BLOCK_BYTES == 0)
        & (offsets >= start)
        & (offsets < end)
        & (capacities % BLOCK_BYTES == 0)
        & (capacities > 0)
        & (capacities <= end - np.minimum(offsets, end))
        & (being_written | ((nbytes > 0) & (nbytes <= capacities)))
    )


def _overlapping(spans: dict[int, tuple[int, int]]) -> set[int]:
    """Slots that share bytes with another. Whose the bytes are cannot be told, so none of them is believed."""
    wrong: set[int] = set()
    end, last = 0, -1
    for offset, size, index in sorted((offset, size, index) for index, (offset, size) in spans.items()):
        if offset < end:
            wrong |= {index, last}
        if offset + size > end:
            end, last = offset + size, index
    return wrong
