"""What vLLM's worker does with a KV cache on a device, without vLLM: Triton interprets, or with `--gpu` on a card."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from test_cuda_node import DRAM_ONLY, TOKENS

from lmpipe import KVLayout
from lmpipe.engines.vllm.device import DeviceMemory, device_memory
from lmpipe.producer import Producer
from lmpipe.spans import read_trace
from lmpipe.testing import Node

LAYERS, BLOCKS, BLOCK, HEADS, DIM = 3, 16, 16, 2, 32
LAYOUT = KVLayout(LAYERS, HEADS, DIM, "bfloat16", BLOCK, ("layer",), ("token", "head", "kv", "dim"))
IDS = np.array([[2, 3, 4, 5], [11, 0, 9, 7]], np.int32)


class Cache:
    """As vLLM makes one in its layout LBNHC: a view `[blocks, heads, tokens, K|V]` of one buffer for each layer."""

    def __init__(self, device: torch.device) -> None:
        self.raw = torch.zeros(LAYERS * BLOCKS * LAYOUT.page_bytes, dtype=torch.int8, device=device)
        whole = self.raw.view(torch.bfloat16).view(LAYERS, BLOCKS, BLOCK, HEADS, 2 * DIM).transpose(2, 3)
        self.views = {f"layer.{number}": view for number, view in enumerate(whole)}
        offsets = [view.data_ptr() for view in self.views.values()]
        self.pages: Any = SimpleNamespace(
            layout=LAYOUT, offsets=np.array(offsets, np.uint64), stride=LAYOUT.page_bytes, pages=BLOCKS
        )

    def compute(self, seed: int) -> torch.Tensor:
        """Fill it; what it holds."""
        self.raw.copy_(torch.from_numpy(np.random.default_rng(seed).integers(-128, 128, len(self.raw), np.int8)))
        return self.raw.clone()

    def comes_back(self, producer: Producer, pool: Any, prompt: Any, computed: torch.Tensor) -> bool:
        """Load by layers into pages that were lost; each layer is compared as its wait allows."""
        self.raw.zero_()
        load = producer.load_layers(producer.lookup(prompt), pool, IDS)
        rows = self.raw.view(LAYERS, BLOCKS, -1)
        there: list[torch.Tensor] = []
        for layer in range(LAYERS):
            load.wait_layer(layer)
            there.append(rows[layer, IDS.ravel().tolist()].clone())
        wanted = computed.view(LAYERS, BLOCKS, -1)[:, IDS.ravel().tolist()]
        return load.result().tokens == 2 * TOKENS and torch.equal(torch.stack(there), wanted)


def test_this_process_copies(device: torch.device) -> None:
    cache = Cache(device)
    with Node({**DRAM_ONLY, "profile": {"trace": True}}) as node:
        memory = DeviceMemory(cache.views, node.run_dir, None)
        producer = Producer(node.run_dir, LAYOUT, model="test", wait_s=30)
        pool = memory.pool(cache.pages)
        computed, prompt = cache.compute(1), producer.prompt(np.arange(2 * TOKENS))
        assert producer.save(prompt, pool, IDS).wait(30)
        assert cache.comes_back(producer, pool, prompt, computed)
        producer.close()
        memory.close()
        (trace,) = node.paths.engine_traces()
        assert {"gpu.save", "gpu.load"} <= {event["name"] for event in read_trace(trace)}


def test_gather_copies_from_a_card(device: torch.device, tmp_path: Path) -> None:
    """By IPC, marked on the stream that computes."""
    if device.type != "cuda":
        pytest.skip("no GPU: tests/vllm has a fake one")
    cache = Cache(device)
    memory = device_memory(cache.views, tmp_path)
    assert memory is not None
    with Node({**DRAM_ONLY, "engines": {"devices": [0]}}) as node:
        source = memory.source(cache.pages)
        assert source is not None
        producer = Producer(node.run_dir, LAYOUT, model="test", pages=source, wait_s=60)
        pool, prompt = memory.pool(cache.pages), producer.prompt(np.arange(2 * TOKENS))
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(100_000_000)
            computed = cache.compute(2)
            memory.mark()
            assert producer.save(prompt, None, IDS).wait(60)
            assert cache.comes_back(producer, pool, prompt, computed)
        producer.close()
        memory.close()


def test_pages_of_the_host_need_none_of_it() -> None:
    assert device_memory({"layer": torch.empty(1)}, Path()) is None
