"""What vLLM is told of the connector's work: its own log line, and its Prometheus metrics.

The node's metrics (`lmpipe status`, the exposition) have the rest; these are the ones that belong beside an engine's.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from prometheus_client import Counter as PrometheusCounter
from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
    PromMetric,
    PromMetricT,
)

from lmpipe.handles import Tier
from lmpipe.producer import LoadResult, SaveTicket

COUNTERS = {
    "loads": "Loads that were made.",
    "loaded_bytes": "Bytes copied into the KV cache.",
    "load_seconds": "Seconds that loads took.",
    "load_failed_chunks": "Chunks that were found but had to be computed.",
    "saved_chunks": "Chunks saved.",
    "known_chunks": "Chunks that were saved before.",
    "dropped_chunks": "Chunks that were not saved.",
    "saves_out_of_time": "Requests whose blocks were freed before their saves were through.",
    "chunks_out_of_window": "Requests with blocks that were gone before they could be saved.",
    "refused_requests": "Requests whose KV depends on more than keys can name.",
    **{f"hit_chunks_{tier}": f"Chunks loaded from {tier}." for tier in Tier},
}

TIMED_BYTES = "timed_bytes"
"""Of loads whose seconds are known: one that goes layer by layer is waited for by nobody alone. For the rate only."""


class LmpipeStats(KVConnectorStats):
    """Sums of one interval."""

    def reset(self) -> None:
        """Begin a new interval."""
        self.data = {}

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        """Add another rank's, or another step's."""
        for name, value in other.data.items():
            self.data[name] = self.data.get(name, 0) + value
        return self

    def reduce(self) -> dict[str, int | float]:
        """For vLLM's log."""
        shown: dict[str, int | float] = {name: round(self.data[name], 3) for name in COUNTERS if self.data.get(name)}
        if self.data.get("load_seconds"):
            shown["load_GB_per_s"] = round(self.data.get(TIMED_BYTES, 0) / self.data["load_seconds"] / 1e9, 2)
        return shown

    def is_empty(self) -> bool:
        """Whether nothing happened."""
        return not self.data


class LmpipeMetrics(KVConnectorPromMetrics):
    """Each of `COUNTERS` as `vllm:lmpipe_…` on the engine's /metrics."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        metric_types: dict[type[PromMetric], type[PromMetricT]],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._counters: dict[str, dict[int, Any]] = {}
        for name, text in COUNTERS.items():
            metric: Any = metric_types[PrometheusCounter](f"vllm:lmpipe_{name}", text, labelnames=labelnames)
            self._counters[name] = {engine: metric.labels(*values) for engine, values in per_engine_labelvalues.items()}

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Add an interval's sums."""
        for name, value in transfer_stats_data.items():
            if name in self._counters:
                self._counters[name][engine_idx].inc(value)


class Tally:
    """Counts since the last `take`; one thread's."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()

    def add(self, **amounts: int | float) -> None:
        """Add to counters, each one of `COUNTERS`, or `TIMED_BYTES`."""
        for name, amount in amounts.items():
            self._counts[name] += amount  # pyright: ignore[reportArgumentType]  seconds are floats

    def loaded(self, result: LoadResult, wanted_chunks: int) -> None:
        """One load has ended."""
        self.add(loads=1, loaded_bytes=result.nbytes, load_seconds=result.seconds)
        self.add(**{TIMED_BYTES: result.nbytes if result.seconds else 0})
        self.add(load_failed_chunks=wanted_chunks - result.chunks)
        self.add(**{f"hit_chunks_{tier}": chunks for tier, chunks in result.by_tier.items()})

    def saved(self, ticket: SaveTicket) -> None:
        """One save has ended."""
        self.add(saved_chunks=ticket.saved, known_chunks=ticket.known, dropped_chunks=sum(ticket.dropped.values()))

    def take(self) -> LmpipeStats | None:
        """What came together, as vLLM wants it; None: nothing."""
        counts = {name: value for name, value in self._counts.items() if value}
        self._counts.clear()
        return LmpipeStats(data=counts) if counts else None
