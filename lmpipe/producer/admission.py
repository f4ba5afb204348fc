"""Admission: a load is made only when it is expected to be faster than computing the same tokens.

Rates are running averages of what was seen; until both are known everything is admitted. DRAM hits are always taken: a
copy is never slower than prefill.
"""

from __future__ import annotations

import threading

import numpy as np

from lmpipe.handles import Tier
from lmpipe.producer.attachment import TIERS, Found
from lmpipe.producer.layers import LoadResult
from lmpipe.topology import Admission as AdmissionConfig

SMOOTHING = 0.3
EXPLORE_EVERY = 16
"""Every so many refusals one load is made all the same, so that a tier that has become fast again is noticed."""


class Admission:
    """Weighs loads from below DRAM against prefill. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._given = AdmissionConfig()
        self.prefill_tokens_per_s: float | None = None
        self.load_bytes_per_s: dict[Tier, float] = {}
        self.refused = 0

    @property
    def min_tokens(self) -> int:
        """Prompts shorter than this are not saved."""
        return self._given.min_tokens

    def configure(self, given: AdmissionConfig) -> None:
        """Take the node's settings; a rate that is given is not measured."""
        with self._lock:
            self._given = given
            self.prefill_tokens_per_s = given.prefill_tokens_per_s or self.prefill_tokens_per_s
            self.load_bytes_per_s.update({tier: rate for tier in TIERS if (rate := given.load_bytes_per_s.of(tier))})

    def observe_prefill(self, tokens: int, seconds: float) -> None:
        """Tell how long computing `tokens` took."""
        if tokens > 0 and seconds > 0 and not self._given.prefill_tokens_per_s:
            with self._lock:
                self.prefill_tokens_per_s = _mean(self.prefill_tokens_per_s, tokens / seconds)

    def observe_load(self, result: LoadResult) -> None:
        """Learn from a load that came from one tier below DRAM only."""
        below = [tier for tier in result.by_tier if tier is not Tier.DRAM]
        alone = len(below) == 1 and len(result.by_tier) == 1 and result.seconds > 0 and not result.reason
        if alone and not self._given.load_bytes_per_s.of(below[0]):
            with self._lock:
                self.load_bytes_per_s[below[0]] = _mean(
                    self.load_bytes_per_s.get(below[0]), result.nbytes / result.seconds
                )

    def admit(self, found: Found) -> Found:
        """Cut a find before the first chunk whose tier is slower than prefill. The holds of what is cut stay until
        release.
        """
        prefill = self.prefill_tokens_per_s
        if prefill is None or not self.load_bytes_per_s:
            return found
        chunk_s = found.chunk_tokens / prefill
        for at in np.flatnonzero(found.tiers != 0).tolist():
            rate = self.load_bytes_per_s.get(TIERS[int(found.tiers[at])])
            if rate is not None and int(found.records["raw_bytes"][at]) / rate > chunk_s:
                self.refused += 1
                if self.refused % EXPLORE_EVERY == 0:
                    return found
                found.records, found.tiers = found.records[:at], found.tiers[:at]
                found.dram = found.dram[found.dram < at]
                break
        return found


def _mean(old: float | None, new: float) -> float:
    return new if old is None else old + SMOOTHING * (new - old)
