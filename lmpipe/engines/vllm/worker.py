"""The connector in a worker: one producer for each cache group, loads on threads of its own, saves by message.

With pages in shared memory, or exported from a GPU, a save is one message: gather copies the pages, under a grant that
is revoked before they can change. Loads start before the step's forward and run beside it; nothing of the engine waits
for them but an engine that has nothing else to do: what such an engine finds in DRAM it copies within the step that
computes on it. On a GPU each layer of that step waits for its own KV only (in_step.py).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial

import torch
import vllm
from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorTransferResults
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank
from vllm.v1.kv_cache_interface import KVCacheConfig

from lmpipe.engines.vllm.device import DeviceMemory, device_memory
from lmpipe.engines.vllm.geometry import GroupPages, align_tokens, groups_of
from lmpipe.engines.vllm.identity import namespace_of
from lmpipe.engines.vllm.in_step import InStepLoads
from lmpipe.engines.vllm.loads import LoadThreads
from lmpipe.engines.vllm.memory import HostMemory, SharedPages
from lmpipe.engines.vllm.orders import Handshake, LoadOrder, LoadReport, Orders, Reports, SaveOrder
from lmpipe.engines.vllm.settings import Settings
from lmpipe.engines.vllm.stats import Tally
from lmpipe.handles import Tier
from lmpipe.keys import Prompt
from lmpipe.producer import LayerLoad, LoadResult, Producer, SaveTicket
from lmpipe.producer.pools import Pool, mark
from lmpipe.rundir import RunDir

log = logging.getLogger("lmpipe.vllm")

LOADS_AT_ONCE = 4
IDLE_WAIT_S = 0.01
"""How long a step without tokens waits for a load to end: an idle engine would only ask again."""
LEAST_PREFILL_TOKENS = 64
"""Steps with fewer prompt tokens say nothing about the speed of prefill."""


@dataclass(slots=True)
class _Group:
    """One cache group's pages, as this process copies them, and its producer."""

    pages: GroupPages
    pool: Pool
    make: Callable[..., Producer]
    """With `pages`: what gather can read."""
    producer: Producer
    shared: bool
    """Whether gather reads the pages and copies them for saves."""


@dataclass(slots=True)
class _Save:
    """One save order, by cache group."""

    request: str
    tickets: list[tuple[Producer, SaveTicket]]
    lost: bool = False
    """Some of it was not even tried."""

    @property
    def done(self) -> bool:
        return all(ticket.done for _, ticket in self.tickets)

    @property
    def whole(self) -> bool:
        return not self.lost and not any(ticket.dropped for _, ticket in self.tickets)


class Worker:
    """The worker's side of one rank."""

    def __init__(self, settings: Settings, config: VllmConfig, cache: KVCacheConfig) -> None:
        self._settings, self._config, self._cache = settings, config, cache
        self._shared_pages: SharedPages | None = None
        self._device: DeviceMemory | None = None
        """Where the pages are, unless in memory of the host."""
        self._groups: list[_Group] = []
        self._hello: Handshake | None = None
        self._saves_here = True
        self._loads = LoadThreads(LOADS_AT_ONCE)
        self._in_step: list[tuple[LoadOrder, LoadReport]] = []
        self._layers = InStepLoads({})
        self._saves: dict[int, _Save] = {}
        self._delayed: dict[str, float] = {}
        """Finished requests whose blocks wait for their saves, and until when."""
        self._invalid: set[int] = set()
        self._reports = Reports()
        self._step_started_s = 0.0
        self.tally = Tally()

    # Start.

    def memory(self) -> AbstractContextManager[object] | None:
        """What vLLM is to allocate its KV cache in; None: as it would without lmpipe."""
        if self._settings.pages == "private" or self._config.device_config.device_type != "cpu":
            return None
        self._shared_pages = SharedPages(RunDir(self._settings.run_dir).pages)
        return self._shared_pages

    def register(self, caches: Mapping[str, torch.Tensor]) -> None:
        """The KV cache is there: describe it, and begin a session for each cache group.

        Raises:
            UnsupportedError: a model whose KV lmpipe cannot keep rightly.
        """
        self._device = device_memory(caches, self._settings.run_dir)
        memory = self._device or HostMemory(caches, self._shared_pages)
        backends = self._backends() if self._device is not None else set[str]()
        groups = groups_of(self._cache, caches, memory.base, self._isa(backends), backends)
        replicas = self._cache.kv_tp_replicas
        rank = get_tensor_model_parallel_rank()
        self._saves_here = rank % replicas == 0
        shards = self._config.parallel_config.tensor_parallel_size // replicas * len(groups)
        root = namespace_of(self._config, groups, shards, self._settings)
        align = align_tokens(groups)
        for number, group in enumerate(groups):
            make = partial(
                Producer,
                self._settings.run_dir,
                group.layout,
                root=root,
                name=f"{self._settings.name}.rank{rank}" + (f".group{number}" if len(groups) > 1 else ""),
                align_tokens=align,
                shard=rank // replicas * len(groups) + number,
                shards=shards,
                copy_threads=self._settings.copy_threads,
                exact=self._settings.exact,
            )
            pool, source = memory.pool(group), None
            if self._settings.pages == "shared":
                source = memory.source(group)
            self._groups.append(_Group(group, pool, make, make(pages=source), source is not None))
        self._layers = InStepLoads({name: at for at, name in enumerate(self._groups[0].pages.layers)})
        layouts, windowed = tuple(group.layout for group in groups), tuple(group.windowed for group in groups)
        self._hello = Handshake(root, layouts, windowed, align, shards)

    def _backends(self) -> set[str]:
        """Names of the layers' attention backends."""
        layers = self._config.compilation_config.static_forward_context.values()
        return {layer.attn_backend.get_name() for layer in layers if hasattr(layer, "attn_backend")}

    def _isa(self, backends: Collection[str]) -> str:
        """What the order of bytes inside a page depends on: on CPUs the instruction set, on a GPU the kernels."""
        vllm_version, layout = ".".join(vllm.__version__.split(".")[:2]), self._cache.kv_cache_layout
        if backends:
            return f"vllm-{vllm_version}/gpu/{layout}/{'+'.join(sorted(backends))}"
        layers = self._config.compilation_config.static_forward_context
        isas = {str(getattr(layer, "isa", "")) for layer in layers.values()}
        return f"vllm-{vllm_version}/{layout}/{'+'.join(sorted(isas))}"

    def handshake(self) -> Handshake | None:
        """For the scheduler's side."""
        return self._hello

    # A step, in the order in which vLLM calls.

    def begin(self, orders: Orders) -> None:
        """Before the step changes any page: take back what was granted, then start the loads."""
        self._step_started_s = time.monotonic()
        self._take_back_refused()
        for request in orders.revoked:
            self._revoke([save for save in self._saves.values() if save.request == request])
        self._revoke([self._saves[number] for number in orders.late if number in self._saves])
        if orders.weights_epoch is not None:
            for group in self._groups:
                group.producer.renew(orders.weights_epoch)
        if not self._is_cleared_late:
            self._start_beside(orders)

    @property
    def _is_cleared_late(self) -> bool:
        """Whether vLLM may have a GPU clear new pages between `begin` and `load`."""
        return self._device is not None and self._cache.needs_kv_cache_zeroing

    def _start_beside(self, orders: Orders) -> None:
        """Start the loads that no step computes on yet, each after what the engine has ordered of its GPU until now."""
        loads = [load for load in orders.loads if not load.in_step]
        marks = [mark(group.pool) for group in self._groups] if loads else []
        for load in loads:
            self._loads.submit(load, partial(self._load, orders.root, orders.chunk_tokens, load, marks))

    def load(self, orders: Orders, *, by_layer: bool) -> None:
        """Before the forward, after vLLM has cleared its pages: what the forward computes on, from held slots.

        `by_layer`: whether the forward's layers will call `wait_layer`.
        """
        if self._is_cleared_late:
            self._start_beside(orders)
        for load in orders.loads:
            if load.in_step:
                if self._device is not None:
                    self._start_layers(orders, load)
                else:
                    marks = [None for _ in self._groups]
                    self._in_step.append((load, self._load(orders.root, orders.chunk_tokens, load, marks)))
                self._step_started_s = time.monotonic()
        self._layers.begun(by_layer=by_layer)

    def wait_layer(self, name: str) -> None:
        """Before a layer's attention: its KV is there for what the engine's stream is given from now on."""
        self._layers.wait_layer(name)

    def end(self, orders: Orders) -> None:
        """After the forward: its pages hold what the orders say."""
        if orders.prefill_tokens >= LEAST_PREFILL_TOKENS:
            self._reports.prefill = orders.prefill_tokens, time.monotonic() - self._step_started_s
        if orders.saves and self._device is not None:
            self._device.mark()
        for order in orders.saves:
            self._saves[order.order] = self._save(orders, order)
        deadline_s = time.monotonic() + self._settings.free_deadline_ms / 1000
        self._delayed.update((request, deadline_s) for request in orders.delayed)

    def results(self, orders: Orders) -> KVConnectorTransferResults:
        """Which loads and which saves of finished requests are through: each is named once."""
        results = KVConnectorTransferResults()
        through, self._in_step = self._in_step, []
        through += [(order, _report(order, result)) for order, result in self._layers.results()]
        for order, report in through + self._loads.take(0.0 if orders.tokens else IDLE_WAIT_S):
            self._landed(order, report, results)
        self._settle()
        waiting = {save.request for save in self._saves.values()}
        now_s = time.monotonic()
        for request, deadline_s in list(self._delayed.items()):
            if request in waiting and now_s >= deadline_s:
                self._revoke([save for save in self._saves.values() if save.request == request])
                self.tally.add(saves_out_of_time=1)
            elif request in waiting:
                continue
            del self._delayed[request]
            results.finished_sending.add(request)
        return results

    def invalid_blocks(self) -> set[int]:
        """Blocks that a load could not fill; named once."""
        invalid, self._invalid = self._invalid, set()
        return invalid

    def reports(self) -> Reports | None:
        """For the scheduler's side; None: nothing to say."""
        reports, self._reports = self._reports, Reports()
        return reports or None

    # Loads.

    def _load(self, root: bytes, chunk_tokens: int, order: LoadOrder, marks: Sequence[object]) -> LoadReport:
        """On a thread of the pool, or in the step. Whatever goes wrong, the blocks are reported as not loaded."""
        started_s = time.monotonic()
        result = LoadResult(0, 0, 0, {}, "", 0.0)
        try:
            prompt = Prompt.of_keys(root, chunk_tokens, order.keys)
            done: list[LoadResult] = []
            deadline_ms = self._settings.load_deadline_ms
            for group, blocks, after in zip(self._groups, order.blocks, marks, strict=True):
                found = group.producer.lookup(prompt, first_chunk=order.first, again=True, exact=order.exact)
                done.append(group.producer.load(found, group.pool, blocks, deadline_ms=deadline_ms, after=after))
            result = _together(done, time.monotonic() - started_s)
        except Exception:
            log.critical("a bug: this load is given up, its tokens are computed", exc_info=True)
        return _report(order, result)

    def _start_layers(self, orders: Orders, order: LoadOrder) -> None:
        """Begin a load that this step computes on. There is one cache group (`Scheduler.attach`)."""
        (group,), (blocks,) = self._groups, order.blocks
        try:
            prompt = Prompt.of_keys(orders.root, orders.chunk_tokens, order.keys)
            found = group.producer.lookup(prompt, first_chunk=order.first, again=True, exact=order.exact)
            deadline_ms = self._settings.load_deadline_ms
            load = group.producer.load_layers(found, group.pool, blocks, deadline_ms=deadline_ms)
        except Exception:
            log.critical("a bug: this load is given up, its tokens are computed", exc_info=True)
            load = LayerLoad.over(LoadResult(0, 0, 0, {}, "", 0.0))
        self._layers.add(order, load)

    def _landed(self, order: LoadOrder, report: LoadReport, results: KVConnectorTransferResults) -> None:
        self._reports.loads.append(report)
        if not order.in_step:
            results.finished_recving.add(order.request)
        self.tally.loaded(report.result, report.wanted_chunks)
        if not report.failed:
            return
        # Block numbers alone do not say which group's they are, and what lies before a window was not to be loaded.
        windowed = any(group.pages.windowed for group in self._groups)
        if len(order.blocks) != 1 or windowed:
            results.failed_recving.add(order.request)
            return
        (blocks,) = order.blocks
        missing = blocks[report.result.chunks :]
        self._invalid.update(missing[missing >= 0].tolist())

    # Saves.

    def _save(self, orders: Orders, order: SaveOrder) -> _Save:
        save = _Save(order.request, [])
        if not self._saves_here:
            return save
        prompt = Prompt.of_keys(orders.root, orders.chunk_tokens, order.keys)
        for group, blocks in zip(self._groups, order.blocks, strict=True):
            producer, pool = group.producer, None if group.shared else group.pool
            try:
                ticket = producer.save(
                    prompt, pool, blocks, first_chunk=order.first, fidelity=order.fidelity, exact=order.exact
                )
                save.tickets.append((producer, ticket))
            except ValueError:  # made before a node with another chunk size was found
                log.warning("a save is dropped", exc_info=True)
                save.lost = True
        return save

    def _take_back_refused(self) -> None:
        """A node that does not read this device refuses the engine: go on without gather's copies."""
        for group in self._groups:
            if group.shared and self._device is not None and group.producer.state == "refused":
                self._device.say(group.producer.reason)
                group.producer.close()
                group.producer, group.shared = group.make(pages=None), False

    def _settle(self) -> None:
        for number in [number for number, save in self._saves.items() if save.done]:
            save = self._saves.pop(number)
            self._reports.settled[number] = (1, save.whole)
            for _, ticket in save.tickets:
                self.tally.saved(ticket)

    def _revoke(self, saves: Sequence[_Save]) -> None:
        """Their pages are about to be somebody else's."""
        for save in saves:
            for producer, ticket in save.tickets:
                producer.cancel(ticket)
        for save in saves:
            for _, ticket in save.tickets:
                ticket.copied.wait()  # private pages: until the group of chunks in hand is copied

    # End.

    def close(self) -> None:
        """Give saves under way a few seconds, end the sessions, give the pages back."""
        self._layers.results()
        for group in self._groups:
            group.producer.close()  # loads that still wait end with it
        self._loads.close()
        self._groups.clear()
        if self._device is not None:
            self._device.close()
        if self._shared_pages is not None:
            self._shared_pages.close()


def _report(order: LoadOrder, result: LoadResult) -> LoadReport:
    wanted = len(order.keys) - order.first
    if result.chunks < wanted and not result.reason:
        result = replace(result, reason="evicted before it was copied", seconds=0.0)
    return LoadReport(order.request, wanted, result, order.in_step)


def _together(results: Iterable[LoadResult], seconds: float) -> LoadResult:
    """Several cache groups' loads as one: as far as all of them came."""
    parts = list(results)
    least = min(parts, key=lambda part: part.chunks)
    by_tier: dict[Tier, int] = {}
    for part in parts:
        for tier, chunks in part.by_tier.items():
            by_tier[tier] = max(by_tier.get(tier, 0), chunks)
    nbytes = sum(part.nbytes for part in parts)
    fidelity = max(part.fidelity for part in parts)
    return LoadResult(least.tokens, least.chunks, nbytes, by_tier, least.reason, seconds, fidelity)
