"""`LMPipeConnector`: vLLM's connector interface, each call handed to the side it belongs to."""

from __future__ import annotations

import atexit
import logging
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.distributed.kv_events import KVCacheEvent
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
    PromMetric,
    PromMetricT,
)
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.metrics.cache_hit_source import CacheHitSource
from vllm.v1.outputs import KVConnectorOutput
from vllm.v1.request import Request

from lmpipe.engines.vllm.orders import Handshake, Orders
from lmpipe.engines.vllm.scheduler import Scheduler
from lmpipe.engines.vllm.settings import check, settings_of
from lmpipe.engines.vllm.stats import LmpipeMetrics, LmpipeStats
from lmpipe.engines.vllm.worker import Worker

log = logging.getLogger("lmpipe.vllm")


class LMPipeConnector(KVConnectorBase_V1, SupportsHMA):
    """One side of the connector in one process; see `Scheduler` and `Worker` for what each call means.

    Raises:
        UnsupportedError: a version, a configuration or a model that lmpipe cannot serve rightly.
    """

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        settings = settings_of(vllm_config)
        check(vllm_config, settings)
        super().__init__(vllm_config, role, kv_cache_config)
        self._scheduler = Scheduler(settings, vllm_config) if role is KVConnectorRole.SCHEDULER else None
        self._worker = Worker(settings, vllm_config, kv_cache_config) if role is KVConnectorRole.WORKER else None
        atexit.register(self.shutdown)  # vLLM does not call it on every way out

    @property
    def _on_scheduler(self) -> Scheduler:
        assert self._scheduler is not None
        return self._scheduler

    @property
    def _on_worker(self) -> Worker:
        assert self._worker is not None
        return self._worker

    @property
    def _orders(self) -> Orders:
        orders = self._get_connector_metadata()
        assert isinstance(orders, Orders)
        return orders

    @property
    def requires_kv_delivery(self) -> bool:
        """A cache: what is not saved is computed again."""
        return False

    # Worker.

    def get_mem_pool_context(self) -> AbstractContextManager[object] | None:
        return self._on_worker.memory()

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        self._on_worker.register(kv_caches)

    def get_handshake_metadata(self) -> KVConnectorHandshakeMetadata | None:
        return self._on_worker.handshake()

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        assert isinstance(kv_connector_metadata, Orders)
        self._on_worker.begin(kv_connector_metadata)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """The loads that this step computes on; all others began with the step (`handle_preemptions`).

        A step that replays a CUDA graph of the whole model (vLLM's FULL mode, usual for decoding) does not come back
        for its layers, since a graph holds no Python: it waits for all of them here. The connector does not ask for
        PIECEWISE graphs: a load is made in steps of a prompt, which are hardly ever replayed whole.
        """
        by_layer = forward_context.attn_metadata is not None and forward_context.cudagraph_runtime_mode.name != "FULL"
        self._on_worker.load(self._orders, by_layer=by_layer)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """The GPU waits for the layer's KV, the host does not. On CPUs loads are through before the forward."""
        self._on_worker.wait_layer(layer_name)

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing: chunks are saved whole, after the forward."""

    def wait_for_save(self) -> None:
        self._on_worker.end(self._orders)

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        return self._on_worker.results(self._orders)

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self._on_worker.invalid_blocks()

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        return self._on_worker.reports()

    # Scheduler.

    def set_xfer_handshake_metadata(self, metadata: dict[int, KVConnectorHandshakeMetadata]) -> None:
        hellos = [hello for _, hello in sorted(metadata.items()) if isinstance(hello, Handshake)]
        if len({repr(hello) for hello in hellos}) > 1:
            raise RuntimeError(f"the ranks do not agree on what they serve: {hellos}")
        if hellos:
            self._on_scheduler.attach(hellos[0])

    def bind_gpu_block_pool(self, gpu_block_pool: BlockPool) -> None:
        self._on_scheduler.bind(gpu_block_pool)

    def on_new_request(self, request: Request) -> None:
        self._on_scheduler.arrived(request)

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        return self._on_scheduler.matched(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        self._on_scheduler.allocated(request, blocks.get_block_ids(), num_external_tokens)

    def get_external_cache_hit_sources(self, request: Request, num_external_tokens: int) -> dict[CacheHitSource, int]:
        return self._on_scheduler.sources(request, num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        return self._on_scheduler.orders(scheduler_output)

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        self._on_scheduler.report(connector_output)

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        return self._on_scheduler.finished(request, (block_ids,)), None

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        return self._on_scheduler.finished(request, block_ids), None

    def take_events(self) -> Iterable[KVCacheEvent]:
        return self._on_scheduler.events.take()

    def has_pending_block_frees(self) -> bool:
        return self._on_scheduler.pending_frees()

    def reset_cache(self) -> bool | None:
        return self._on_scheduler.reset()

    # Both.

    def get_kv_connector_stats(self) -> KVConnectorStats | None:
        side = self._scheduler or self._on_worker
        return side.tally.take()

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KVConnectorStats | None:
        return LmpipeStats(data=data or {})

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: VllmConfig,
        metric_types: dict[type[PromMetric], type[PromMetricT]],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> KVConnectorPromMetrics | None:
        return LmpipeMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    def shutdown(self) -> None:
        """End the sessions; harmless when done twice."""
        scheduler, worker = self._scheduler, self._worker
        self._scheduler = self._worker = None
        atexit.unregister(self.shutdown)
        if scheduler is not None:
            scheduler.close()
        if worker is not None:
            worker.close()
