"""The connector in vLLM's engine core: finds what can be loaded, orders loads and saves, and keeps count of them.

Never waits for anybody: lookups are read from maps of this process, everything else goes out with the step's orders and
comes back as reports. What it holds for a request it holds until the workers have copied it, so that nothing is evicted
between the promise and the load.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from vllm.config import VllmConfig
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.metrics.cache_hit_source import CacheHitSource
from vllm.v1.outputs import KVConnectorOutput
from vllm.v1.request import Request, RequestStatus

from lmpipe.engines.vllm.events import EventLog
from lmpipe.engines.vllm.orders import BlockIds, Handshake, LoadOrder, LoadReport, Orders, Reports, SaveOrder
from lmpipe.engines.vllm.requests import RequestState, asks_exact, blocks_of, keep_apart, state_of
from lmpipe.engines.vllm.settings import Settings
from lmpipe.engines.vllm.stats import Tally
from lmpipe.errors import UnsupportedError
from lmpipe.handles import Fidelity, Tier
from lmpipe.producer import Found, Producer
from lmpipe.producer.attachment import TIERS

log = logging.getLogger("lmpipe.vllm")

RESET_S = 2.0
"""How long `reset_cache` waits for lmpipe to forget."""

SOURCES = {
    Tier.DRAM: CacheHitSource.HOST,
    Tier.SSD: CacheHitSource.DISK,
    Tier.REMOTE: CacheHitSource.EXTERNAL_UNSPECIFIED,
}


@dataclass(slots=True)
class _Open:
    """A save order that some rank has not answered."""

    state: RequestState
    first: int
    last: int
    ranks: int
    kept: list[KVCacheBlock]
    """What `_keep` has kept for it."""
    until_s: float
    whole: bool = True


class Scheduler:
    """The scheduler's side. Without a handshake (no worker could register) it does nothing.

    vLLM's own prefix cache does not know how exact the KV in its blocks is. So requests that ask for exact KV have a
    part of it to themselves, and what others compute on blocks they found there counts as no more exact than the least
    exact load that this engine has ever made.
    """

    def __init__(self, settings: Settings, config: VllmConfig) -> None:
        assert config.kv_transfer_config is not None
        self._settings = settings
        self._loads_wanted = config.kv_transfer_config.is_kv_consumer
        self._saves_wanted = config.kv_transfer_config.is_kv_producer
        self._ranks = config.parallel_config.world_size
        self._producer: Producer | None = None
        self._pool: BlockPool | None = None
        self._block_tokens: tuple[int, ...] = ()
        self._windowed: tuple[bool, ...] = ()
        self._in_step = self._ranks == 1 and not config.scheduler_config.async_scheduling
        """Whether a step may compute on a load of its own. With asynchronous scheduling vLLM would keep the token of
        the next step, which began before the failure was known.
        """
        self._states: dict[str, RequestState] = {}
        self._held: dict[str, Found] = {}
        """Loads under way."""
        self._unproven: dict[str, list[int]] = {}
        """The blocks of requests in whose step a load is made: what is computed there may stand on one that fails."""
        self._loads: list[LoadOrder] = []
        self._open: dict[int, _Open] = {}
        self._next_order = 1
        self._final: list[SaveOrder] = []
        self._revoked: list[str] = []
        self._delayed: list[str] = []
        self._weights_epoch: int | None = None
        self._adapters: dict[tuple[str, str], str] = {}
        self._refused: set[str] = set()
        self._least: int = Fidelity.EXACT
        """Fidelity of the least exact load so far: what vLLM's prefix cache may hold."""
        self.tally = Tally()
        self.events = EventLog(config)

    def attach(self, hello: Handshake) -> None:
        """Begin, with what the workers have registered."""
        self._block_tokens = tuple(layout.page_tokens for layout in hello.layouts)
        self._windowed = hello.windowed
        self._in_step = self._in_step and self._windowed == (False,)  # elsewhere failed blocks cannot be named
        self._producer = Producer(
            self._settings.run_dir,
            hello.layouts[0],
            root=hello.root,
            name=f"{self._settings.name}.scheduler",
            align_tokens=hello.align_tokens,
            shards=hello.shards,
            saves=False,
            exact=self._settings.exact,
        )
        self.events.attach(self._producer)

    def bind(self, pool: BlockPool) -> None:
        """The engine's blocks."""
        self._pool = pool

    # A request's way.

    def arrived(self, request: Request) -> None:
        """A new request: hash it, and have what lies below DRAM brought up."""
        producer = self._producer
        if producer is None:
            return
        salt, exact = request.cache_salt or "", asks_exact(request)
        apart = (exact and not self._settings.exact) or (producer.exact and bool(self._least))
        if apart:
            keep_apart(request)
        try:
            state = state_of(request, self._adapters, salt, exact, apart)
            prompt = state.keyed(producer)
        except UnsupportedError as error:
            self.tally.add(refused_requests=1)
            if str(error) not in self._refused:
                self._refused.add(str(error))
                log.warning("requests are not cached: %s", error)
            return
        self._states[request.request_id] = state
        if self._loads_wanted and not request.skip_reading_prefix_cache:
            producer.prefetch(prompt, exact=state.exact)

    def matched(self, request: Request, computed: int) -> tuple[int, bool]:
        """How many tokens after the `computed` ones can be loaded, and whether beside the engine's steps, after which
        the request is scheduled. Asked again for the same request, it looks again.

        A request that is alone, with all of it in DRAM, is loaded within its first step: one step less, and nobody
        waits for the copy who would not wait for it anyway.
        """
        state, producer = self._states.get(request.request_id), self._producer
        if state is None or producer is None:
            return 0, False
        state.release()
        state.fidelity = self._least if computed and not state.apart else Fidelity.EXACT
        if not self._loads_wanted or state.failed or request.skip_reading_prefix_cache:
            return 0, False
        prompt = state.keyed(producer)
        first = computed // prompt.chunk_tokens
        found = producer.lookup(prompt, first_chunk=first, exact=state.exact)
        tokens = first * prompt.chunk_tokens + found.tokens - computed
        if found.chunks == 0 or tokens <= 0:
            found.release()
            return 0, False
        state.found, state.computed = found, computed
        alone, in_dram = len(self._states) == 1, not found.tiers.any()
        state.in_step = self._in_step and alone and in_dram and computed + tokens < request.num_tokens
        return tokens, not state.in_step

    def allocated(self, request: Request, block_ids: tuple[Sequence[int], ...], tokens: int) -> None:
        """Blocks are there for `tokens` tokens to be loaded into."""
        state = self._states.get(request.request_id)
        if state is None or state.found is None or state.prompt is None:
            return
        if tokens <= 0:
            state.release()
            return
        chunk = state.prompt.chunk_tokens
        first, last = state.computed // chunk, -(-(state.computed + tokens) // chunk)
        blocks = tuple(
            blocks_of(ids, chunk // size, first, last, state.computed // size)
            for ids, size in zip(block_ids, self._block_tokens, strict=True)
        )
        keys = state.prompt.keys[:last].copy()
        self._loads.append(LoadOrder(request.request_id, keys, first, blocks, state.exact, state.in_step))
        self._lost(state, state.found.fidelity)
        self._held[request.request_id], state.found = state.found, None

    def _lost(self, state: RequestState | None, fidelity: int) -> None:
        """KV of this fidelity goes into blocks: a request's, and so vLLM's prefix cache."""
        self._least = max(self._least, fidelity)
        if state is not None:
            state.fidelity = max(state.fidelity, fidelity)

    def sources(self, request: Request, tokens: int) -> dict[CacheHitSource, int]:
        """Where the tokens of a load come from."""
        found, state = self._held.get(request.request_id), self._states.get(request.request_id)
        if found is None or state is None:
            return {CacheHitSource.EXTERNAL_UNSPECIFIED: tokens} if tokens else {}
        split: dict[CacheHitSource, int] = {}
        at, end = state.computed, state.computed + tokens
        first = state.computed // found.chunk_tokens
        for number, tier in enumerate(found.tiers.tolist(), first):
            upto = min((number + 1) * found.chunk_tokens, end)
            if upto > at:
                source = SOURCES[TIERS[tier]]
                split[source] = split.get(source, 0) + upto - at
                at = upto
        return split

    def finished(self, request: Request, block_ids: tuple[Sequence[int], ...]) -> bool:
        """A request has ended. True: its blocks have to stay until the workers say that they are saved."""
        state, producer = self._states.pop(request.request_id, None), self._producer
        if state is None or producer is None:
            return False
        state.release()
        if request.status not in (RequestStatus.FINISHED_STOPPED, RequestStatus.FINISHED_LENGTH_CAPPED):
            self._revoke(state)
            return False
        computed = min(request.num_computed_tokens, request.num_tokens)
        last = self._order(producer, state, computed, block_ids)
        if last is not None:
            self._final.append(last)
        if not state.open:
            return False
        self._delayed.append(request.request_id)
        return True

    # A step's way.

    def orders(self, output: SchedulerOutput) -> Orders:
        """What the workers have to do with this step."""
        orders = Orders(tokens=output.total_num_scheduled_tokens, weights_epoch=self._weights_epoch)
        self._weights_epoch = None
        producer = self._producer
        if producer is None:
            return orders
        for request_id in output.preempted_req_ids or ():
            if (state := self._states.get(request_id)) is not None:
                state.release()
                self._revoke(state)
        orders.late = self._late()
        for request_id, scheduled in output.num_scheduled_tokens.items():
            state = self._states.get(request_id)
            if state is None:
                continue
            request = state.request
            computed = request.num_computed_tokens
            if computed < request.num_prompt_tokens:
                orders.prefill_tokens += scheduled
            # Tokens beyond num_tokens are drafts, or not known yet: their KV may change.
            known = min(computed + scheduled, request.num_tokens)
            chunk = state.prompt.chunk_tokens if state.prompt is not None else producer.chunk_tokens
            in_step = state.in_step and request_id in self._held
            if (in_step or known // chunk > state.ordered) and output.kv_connector_block_state is not None:
                block_ids = output.kv_connector_block_state.get_block_ids(request_id)
                if in_step and block_ids is not None:
                    self._unproven[request_id] = list(block_ids[0])
                    continue
                order = self._order(producer, state, known, block_ids) if block_ids is not None else None
                if order is not None:
                    orders.saves.append(order)
        orders.root, orders.chunk_tokens = producer.namespace, producer.chunk_tokens
        orders.saves += self._final
        orders.loads, orders.revoked, orders.delayed = self._loads, self._revoked, self._delayed
        self._loads, self._final, self._revoked, self._delayed = [], [], [], []
        return orders

    def _order(
        self, producer: Producer, state: RequestState, computed: int, block_ids: tuple[Sequence[int], ...]
    ) -> SaveOrder | None:
        """Order the whole chunks among the first `computed` tokens that were not ordered before."""
        if not self._saves_wanted or state.unsaveable:
            return None
        prompt = state.keyed(producer)
        first, last = state.ordered, min(computed // prompt.chunk_tokens, len(prompt.keys))
        if last <= first or prompt.tokens < producer.admission.min_tokens:
            return None
        blocks = tuple(
            blocks_of(ids, prompt.chunk_tokens // size, first, last)
            for ids, size in zip(block_ids, self._block_tokens, strict=True)
        )
        there = np.logical_and.reduce([(ids >= 0).all(axis=1) for ids in blocks])
        if not there.all():
            state.unsaveable = True
            last = first + int(np.argmin(there))
            self.tally.add(chunks_out_of_window=1)
            if last == first:
                return None
            blocks = tuple(ids[: last - first] for ids in blocks)
        number, self._next_order = self._next_order, self._next_order + 1
        state.ordered = last
        state.open.add(number)
        until_s = time.monotonic() + self._settings.free_deadline_ms / 1000
        self._open[number] = _Open(state, first, last, self._ranks, self._keep(blocks), until_s)
        keys = prompt.keys[:last].copy()
        return SaveOrder(number, state.request.request_id, keys, first, blocks, state.fidelity, state.exact)

    def _keep(self, blocks: Sequence[BlockIds]) -> list[KVCacheBlock]:
        """Have vLLM keep the blocks of groups with a window: it would take them back while they are copied."""
        ids = [ids.ravel() for ids, windowed in zip(blocks, self._windowed, strict=True) if windowed]
        if not ids or self._pool is None:
            return []
        numbers: list[int] = np.concatenate(ids).tolist()
        kept = [self._pool.blocks[block] for block in numbers]
        self._pool.touch(kept)
        return kept

    def _give_back(self, order: _Open) -> None:
        kept, order.kept = order.kept, []
        if kept and self._pool is not None:
            self._pool.free_blocks(kept)

    def _late(self) -> list[int]:
        """Save orders that have kept blocks for too long: they may be others' from the next step on."""
        now_s = time.monotonic()
        late = [number for number, order in self._open.items() if order.kept and now_s >= order.until_s]
        for number in late:
            self._open[number].state.unsaveable = True
            self._give_back(self._open[number])
        self.tally.add(saves_out_of_time=len(late))
        return late

    def _revoke(self, state: RequestState) -> None:
        """Its blocks go to others: whatever is not saved by then is not saved."""
        state.ordered, state.unsaveable = 0, False
        if state.open:
            self._revoked.append(state.request.request_id)
        for number in state.open:
            self._give_back(self._open[number])

    def report(self, output: KVConnectorOutput) -> None:
        """What the workers say after a step."""
        reports = output.kv_connector_worker_meta
        for request_id in output.finished_recving or ():
            self._let_go(request_id)
        if not isinstance(reports, Reports) or self._producer is None:
            return
        for load in reports.loads:
            self._loaded(load, self._producer)
        for number, (ranks, whole) in reports.settled.items():
            order = self._open.get(number)
            if order is None:
                continue
            order.ranks -= ranks
            order.whole = order.whole and whole
            if order.ranks <= 0:
                del self._open[number]
                self._give_back(order)
                order.state.open.discard(number)
                if order.whole:
                    self.events.stored(order.state, order.first, order.last)
        if reports.prefill[0]:
            self._producer.admission.observe_prefill(*reports.prefill)

    def _let_go(self, request_id: str) -> None:
        found = self._held.pop(request_id, None)
        if found is not None:
            found.release()

    def _loaded(self, load: LoadReport, producer: Producer) -> None:
        producer.admission.observe_load(load.result)
        state = self._states.get(load.request)
        self._lost(state, load.result.fidelity)
        if load.in_step:
            self._let_go(load.request)
            blocks = self._unproven.pop(load.request, [])
            if load.failed and self._pool is not None:  # vLLM counts them as computed, and would share them
                self._pool.evict_blocks(set(blocks))
        if state is not None and load.failed:
            state.failed = True
            log.info("%d chunks of a request are computed: %s", load.wanted_chunks, load.result.reason)

    # The rest.

    def reset(self) -> bool:
        """Forget everything that this engine has saved, everywhere, and begin a namespace that is only its own.

        vLLM calls this after weights were changed under the files' name, so what is saved from here on must not be
        found by an engine that serves the files.
        """
        producer = self._producer
        if producer is None:
            return True
        for state in self._states.values():
            state.release()
            state.unsaveable = True  # what its blocks hold is of the former weights, until it is computed anew
        removed = producer.invalidate(timeout_s=RESET_S)
        if removed < 0:
            log.warning("lmpipe did not answer: what it has is out of this engine's reach now, but not removed")
        self._weights_epoch = secrets.randbits(62) | 1
        producer.renew(self._weights_epoch)
        self.events.cleared()
        return True

    def pending_frees(self) -> bool:
        """Whether blocks that only saves need are about to come free."""
        ending = (order.kept or order.state.request.is_finished() for order in self._open.values())
        return bool(self._delayed) or any(ending)

    def close(self) -> None:
        """End the session."""
        for found in self._held.values():
            found.release()
        self._held.clear()
        for state in self._states.values():
            state.release()
        if self._producer is not None:
            self._producer.close()
