from typing import Any, TypeAlias, TypeVar

from prometheus_client import Counter, Gauge, Histogram
from vllm.config import VllmConfig

PromMetric: TypeAlias = Gauge | Counter | Histogram
PromMetricT = TypeVar("PromMetricT", bound=PromMetric)

class KVConnectorStats:
    data: dict[str, Any]
    def __init__(self, data: dict[str, Any] = ...) -> None: ...

class KVConnectorPromMetrics:
    def __init__(
        self,
        vllm_config: VllmConfig,
        metric_types: dict[type[PromMetric], type[PromMetricT]],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None: ...
