"""`Producer.load_layers` on a real node: layers in order, in any order that streams allow; holds until the end."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from deferred_lanes import DeferredDevice
from numbers_engine import LAYOUT, dram
from rig import CHUNK_TOKENS, counters, until, until_whole
from test_cuda_producer import CHUNKS, DeviceEngine

from lmpipe.cli import main
from lmpipe.cuda.engine import EnginePages, LayersComing
from lmpipe.cuda.pages import DevicePages
from lmpipe.cuda.pool import DevicePool
from lmpipe.cuda.transfers import Transfers
from lmpipe.handles import Tier
from lmpipe.keys import Prompt
from lmpipe.producer import Found, LayerLoad
from lmpipe.testing import Node

LAYERS = LAYOUT.layers


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    with Node(dram("raw")) as node:
        yield node


@pytest.fixture
def engine(node: Node, device: torch.device, request: pytest.FixtureRequest) -> Iterator[DeviceEngine]:
    with DeviceEngine(node.run_dir, device, "raw", request.node.name) as engine:
        until_whole(node, engine)
        yield engine
        assert not engine.producer._loader._under_way
        attachment = engine.producer._link.attachment
        assert attachment is not None
        until(lambda: attachment._users == 0, "nobody uses the maps any more")  # a saver may linger
        engine.transfers.close()


class Load:
    """A load by layers of a prompt that is saved, into pages that hold nothing of it."""

    def __init__(self, engine: DeviceEngine, prompt: Prompt) -> None:
        self.engine, self.prompt = engine, prompt
        self.ids = engine.memory.allocate(CHUNKS, CHUNK_TOKENS)
        engine.memory.there[:, self.ids.ravel().tolist()] = 7
        self.found: Found = engine.producer.lookup(prompt)
        assert self.found.chunks == CHUNKS
        self.load: LayerLoad = engine.producer.load_layers(self.found, engine.pages, self.ids)

    def layer_is_there(self, layer: int) -> bool:
        """What somebody reads who has waited for it."""
        planes = slice(2 * layer, 2 * layer + 2)
        memory = self.engine.memory
        for key, ids in zip(self.prompt.keys, self.ids, strict=True):
            there = memory.there[planes][:, ids.tolist()].cpu().numpy()
            if not np.array_equal(there, memory.content(key, len(ids))[planes]):
                return False
        return True

    def close(self) -> None:
        self.engine.memory.free(self.ids)


def prompt_of(engine: DeviceEngine, seed: int) -> Prompt:
    prompt = engine.prompt(seed, CHUNKS)
    assert engine.save(prompt).wait(0)
    return prompt


@pytest.mark.parametrize("seed", range(3))
def test_layers_come_in_order(engine: DeviceEngine, seed: int) -> None:
    device = engine.memory.there.device
    if device.type != "cpu":
        pytest.skip("deferred lanes are of the host")
    prompt = prompt_of(engine, seed)
    lanes = DeferredDevice(seed)
    transfers = Transfers(device, programs=4, lanes=lanes.lane, piece_bytes=LAYOUT.page_bytes * 4)
    engine.pages = EnginePages(DevicePool(DevicePages.of(LAYOUT, list(engine.memory.there)), transfers))
    loaded = Load(engine, prompt)
    assert not any(map(loaded.layer_is_there, range(LAYERS))), "it returns at once"
    for layer in range(LAYERS):
        loaded.load.wait_layer(layer)
        assert all(map(loaded.layer_is_there, range(layer + 1)))
        assert loaded.found.holds is not None
    assert not engine.producer.stats().get("loads")
    result = loaded.load.result()
    assert (result.chunks, result.tokens, result.by_tier) == (CHUNKS, CHUNKS * CHUNK_TOKENS, {Tier.DRAM: CHUNKS})
    assert loaded.found.holds is None and loaded.load.result() is result
    assert engine.producer.stats()["loads"] == 1
    loaded.close()
    transfers.close()


def test_work_that_follows_a_wait_reads_the_layer(engine: DeviceEngine) -> None:
    """On a GPU the host waits for nothing before the end."""
    prompt = prompt_of(engine, 9)
    loaded = Load(engine, prompt)
    read: list[torch.Tensor] = []
    for layer in range(LAYERS):
        loaded.load.wait_layer(layer)
        read.append(engine.memory.there[2 * layer : 2 * layer + 2].clone())
    engine.memory.there.fill_(7)  # nothing of the load comes later than its last layer
    assert loaded.load.result().chunks == CHUNKS
    assert bool((engine.memory.there == 7).all())
    engine.memory.there.copy_(torch.cat(read))
    assert all(map(loaded.layer_is_there, range(LAYERS)))
    loaded.close()


def test_nobody_has_to_wait_for_a_layer(engine: DeviceEngine) -> None:
    loaded = Load(engine, prompt_of(engine, 10))
    assert loaded.load.result().chunks == CHUNKS
    assert all(map(loaded.layer_is_there, range(LAYERS)))
    loaded.load.wait_layer(0)  # and late is harmless
    loaded.close()


def test_gather_is_killed_before_the_result(engine: DeviceEngine, node: Node) -> None:
    prompt, pid = prompt_of(engine, 11), node.pid("gather")
    loaded = Load(engine, prompt)
    loaded.load.wait_layer(0)
    node.kill("gather", signal.SIGKILL)
    loaded.load.wait_layer(LAYERS - 1)
    assert all(map(loaded.layer_is_there, range(LAYERS)))
    node.wait_restarted("gather", pid)
    assert loaded.load.result().chunks == CHUNKS
    loaded.close()
    until_whole(node, engine)


def test_a_producer_that_is_closed_ends_its_loads(node: Node, device: torch.device) -> None:
    with DeviceEngine(node.run_dir, device, "raw", "closed") as engine:
        until_whole(node, engine)
        loaded = Load(engine, prompt_of(engine, 12))
        engine.producer.close()
        assert loaded.found.holds is None and loaded.load.result().chunks == CHUNKS
        engine.transfers.close()


def test_copies_that_cannot_begin(engine: DeviceEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = prompt_of(engine, 13)
    found = engine.producer.lookup(prompt)
    ids = engine.memory.allocate(CHUNKS, CHUNK_TOKENS)

    def refuse(*_: object) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(engine.device_pool, "load_layers", refuse)
        with pytest.raises(RuntimeError, match="out of memory"):
            engine.producer.load_layers(found, engine.pages, ids)
    assert found.holds is None
    found = engine.producer.lookup(prompt)
    with pytest.raises(ValueError, match="page ids"):
        engine.producer.load_layers(found, engine.pages, np.full_like(ids, 1 << 20))
    assert found.holds is None


def test_copies_that_fail(engine: DeviceEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = Load(engine, prompt_of(engine, 14))

    def lost(_: object) -> None:
        raise RuntimeError("the device is lost")

    with monkeypatch.context() as patch:
        patch.setattr(LayersComing, "finish", lost)
        with pytest.raises(RuntimeError, match="the device is lost"):
            loaded.load.result()
    assert loaded.found.holds is None and loaded.load.result().chunks == 0
    loaded.close()


@pytest.mark.parametrize("codec", ["zstd", "split"])
def test_encoded_chunks_come_with_all_their_layers(engine: DeviceEngine, node: Node, codec: str) -> None:
    """One of them damaged: those before it have come."""
    prompt = prompt_of(engine, 15)
    encoded = counters(node)["gather_dram_encoded_chunks"]
    assert (
        main(["compress", str(node.run_dir), "--codec", codec, f"--namespace={engine.producer.namespace.hex()}"]) == 0
    )
    until(lambda: counters(node)["gather_dram_encoded_chunks"] >= encoded + CHUNKS, "they are encoded")
    loaded = Load(engine, prompt)
    loaded.load.wait_layer(0)
    assert all(map(loaded.layer_is_there, range(LAYERS)))
    assert loaded.load.result().chunks == CHUNKS
    loaded.close()
    with engine.producer.lookup(prompt) as found:
        assert found.attachment is not None
        record = found.records[1]
        found.attachment.arena.payload(int(record["place"]) >> 32, int(record["nbytes"]))[:64] = bytes(64)
    loaded = Load(engine, prompt)
    result = loaded.load.result()
    assert result.chunks == 1 and "damaged in DRAM" in result.reason
    loaded.close()


def test_what_lies_below_dram_is_loaded_as_a_whole(device: torch.device, tmp_path: Path) -> None:
    dram_and_ssd = {"tiers": {"dram": {"capacity": "8MiB", "slots": 512}}, "heartbeat_ms": 300}
    with Node(dram_and_ssd) as node, DeviceEngine(node.run_dir, device, "raw", "below") as engine:
        until_whole(node, engine)
        prompt = engine.prompt(16, CHUNKS)
        assert engine.save(prompt).wait(0)
        assert engine.producer.flush(prompt, tiers=[Tier.SSD])
        engine.drop_from(prompt, Tier.DRAM, first=1)
        loaded = Load(engine, prompt)
        assert all(map(loaded.layer_is_there, range(LAYERS))), "it is over when the call returns"
        assert loaded.found.holds is None
        loaded.load.wait_layer(0)
        assert loaded.load.result().by_tier == {Tier.DRAM: 1, Tier.SSD: CHUNKS - 1}
        loaded.close()
        engine.transfers.close()
