"""Where a producer reads index rows: in the maps of its own process; or, where these would not be safe (another pid
namespace, another LMDB, an index that cannot be opened), by asking gather, which is what decision 17 is about.

Either way what is read is a hint: the hold that follows is what decides. Knows no arena and no holds.
"""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import numpy as np

from lmpipe import messages as m
from lmpipe.handles import CHUNK, SessionId, Tier
from lmpipe.index import IndexReader


class Rows(Protocol):
    """The rows of one tier."""

    def run(self, keys: Sequence[bytes], start: int = 0) -> list[bytes]:
        """Values of `keys[start:]` up to the first miss."""
        ...


class Index(Protocol):
    """The rows of all tiers."""

    @property
    def guard(self) -> AbstractContextManager[object]:
        """To be held while rows are read."""
        ...

    def tiers(self, keys: Sequence[bytes], end_s: float) -> Sequence[Rows]:
        """Of each tier, fastest first, the rows of these keys. Waits until `end_s` (monotonic) at most."""
        ...

    def close(self) -> None:
        """Let go of what is mapped."""
        ...


class MappedIndex:
    """Readers of this process; one thread's at a time."""

    def __init__(self, readers: Sequence[IndexReader]) -> None:
        self.readers = readers
        self.guard = threading.Lock()

    def tiers(self, keys: Sequence[bytes], end_s: float) -> Sequence[IndexReader]:
        """See `Index`; never waits."""
        return self.readers

    def close(self) -> None:
        """See `Index`."""
        for reader in self.readers:
            reader.close()


class Asking(Protocol):
    """What the link does for it."""

    heard_s: float
    """When gather was last heard of (monotonic)."""
    asked: Callable[[bool], None]
    """Told of each question, whether it was answered."""

    def ask(self, ref: int, message: m.Message, timeout_s: float) -> m.Message | None:
        """Send, and wait for the answer. None: nobody is there, or there was none in time."""
        ...


class AskedIndex:
    """gather's answers. When one does not come, nothing is asked until gather is heard of again: a gather that hangs
    costs an engine one deadline, not one for each lookup.
    """

    guard = nullcontext()

    def __init__(self, session: SessionId, order: Sequence[Tier], link: Asking) -> None:
        self._session, self._order, self._link = session, order, link
        self._refs = itertools.count(int.from_bytes(os.urandom(4), "little") << 24 | 1)
        self._silent_since_s = -1.0

    def tiers(self, keys: Sequence[bytes], end_s: float) -> Sequence[Rows]:
        """See `Index`."""
        found = self._ask(keys, end_s)
        return [_Answered(found.get(tier, {})) for tier in self._order]

    def _ask(self, keys: Sequence[bytes], end_s: float) -> dict[Tier, dict[bytes, bytes]]:
        now_s = time.monotonic()
        if not keys or now_s >= end_s or self._link.heard_s < self._silent_since_s:
            return {}
        keys = keys[: m.MAX_LOOKUP_KEYS]
        ref = next(self._refs)
        lookup = m.Lookup(self._session, ref, np.frombuffer(b"".join(keys), m.INDEX_KEY))
        answer = self._link.ask(ref, lookup, end_s - now_s)
        self._link.asked(isinstance(answer, m.Found))
        if not isinstance(answer, m.Found):
            self._silent_since_s = time.monotonic()
            return {}
        return _by_tier(answer, keys)

    def close(self) -> None:
        """See `Index`: nothing is mapped."""


class _Answered:
    """What gather said of one tier."""

    def __init__(self, values: dict[bytes, bytes]) -> None:
        self._values = values

    def run(self, keys: Sequence[bytes], start: int = 0) -> list[bytes]:
        """See `Rows`."""
        found: list[bytes] = []
        for key in itertools.islice(keys, start, None):
            value = self._values.get(key)
            if value is None:
                break
            found.append(value)
        return found


def _by_tier(answer: m.Found, keys: Sequence[bytes]) -> dict[Tier, dict[bytes, bytes]]:
    """The rows' values by tier and key; what names no key of the lookup is passed over."""
    found: dict[Tier, dict[bytes, bytes]] = {tier: {} for tier in answer.tiers}
    raw, at = answer.chunks.tobytes(), 0
    for number, tier, records in answer.rows.tolist():
        end = at + records * CHUNK.itemsize
        if number < len(keys):
            found[answer.tiers[tier]][keys[number]] = raw[at:end]
        at = end
    return found
