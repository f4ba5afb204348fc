"""KV events in vLLM's own stream: what this engine has saved, and what was evicted of it, for routers.

Blocks are named by vLLM's hashes, whose size is vLLM's; `medium` is "CPU", and `ownership` says that it is lmpipe's.
Correctness never depends on them.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Iterable

from vllm.config import VllmConfig
from vllm.distributed.kv_events import MEDIUM_CPU, AllBlocksCleared, BlockRemoved, BlockStored, KVCacheEvent
from vllm.v1.core.kv_cache_utils import maybe_convert_block_hash

from lmpipe.engines.vllm.requests import RequestState
from lmpipe.handles import ChunkRecords
from lmpipe.producer import Producer

OWNER = "lmpipe"
REMEMBERED = 65_536
"""Chunks whose hashes are remembered, so that their eviction can be told."""
WAITING = 4096
"""Events that wait to be taken; the oldest are lost first."""


class EventLog:
    """Events of one engine, taken by vLLM after each step."""

    def __init__(self, config: VllmConfig) -> None:
        wanted = config.kv_events_config
        self._wanted = wanted is not None and wanted.enable_kv_cache_events
        self._hash_tokens = 0
        self._cache = config.cache_config
        self._events: deque[KVCacheEvent] = deque(maxlen=WAITING)
        self._hashes: OrderedDict[bytes, list[bytes]] = OrderedDict()
        self._lock = threading.Lock()

    def attach(self, producer: Producer) -> None:
        """Listen for evictions."""
        if self._wanted:
            producer.on("evicted", lambda _, records: self._evicted(records))

    def stored(self, state: RequestState, first: int, last: int) -> None:
        """Chunks [first, last) of a request can be found now."""
        prompt, request = state.prompt, state.request
        size = self._cache.hash_block_size or self._cache.block_size
        if not self._wanted or prompt is None or prompt.chunk_tokens % size:
            return
        per_chunk = prompt.chunk_tokens // size
        hashes = request.block_hashes[first * per_chunk : last * per_chunk]
        if len(hashes) < (last - first) * per_chunk:
            return
        parent = request.block_hashes[first * per_chunk - 1] if first else None
        tokens = list(request.all_token_ids[first * prompt.chunk_tokens : last * prompt.chunk_tokens])
        lora = request.lora_request
        with self._lock:
            self._events.append(
                BlockStored(
                    block_hashes=[maybe_convert_block_hash(one) for one in hashes],
                    parent_block_hash=maybe_convert_block_hash(parent) if parent is not None else None,
                    token_ids=tokens,
                    block_size=size,
                    lora_id=lora.adapter_id if lora is not None else None,
                    medium=MEDIUM_CPU,
                    lora_name=lora.lora_name if lora is not None else None,
                    ownership=OWNER,
                )
            )
            for at in range(last - first):
                key = prompt.keys[first + at].tobytes()
                self._hashes[key] = list(hashes[at * per_chunk : (at + 1) * per_chunk])
                self._hashes.move_to_end(key)
            while len(self._hashes) > REMEMBERED:
                self._hashes.popitem(last=False)

    def _evicted(self, records: ChunkRecords) -> None:
        with self._lock:
            for key in records["key"].tolist():
                hashes = self._hashes.pop(bytes(key), None)
                if hashes is not None:
                    names = [maybe_convert_block_hash(one) for one in hashes]
                    self._events.append(BlockRemoved(block_hashes=names, medium=MEDIUM_CPU, ownership=OWNER))

    def cleared(self) -> None:
        """Nothing of it can be found any more."""
        with self._lock:
            self._hashes.clear()
            if self._wanted:
                self._events.append(AllBlocksCleared())

    def take(self) -> Iterable[KVCacheEvent]:
        """Events since the last call."""
        if not self._events:
            return ()
        with self._lock:
            events = list(self._events)
            self._events.clear()
        return events
