"""A producer whose pages only kernels reach, on a real node: saved by them, loaded by them, raw and encoded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from fake_runtime import FakeRuntime
from numbers_engine import LARGEST_ERROR, LAYOUT, Numbers, NumbersEngine, dram
from rig import CHUNK_TOKENS, PageIds, counters, until, until_whole

from lmpipe import native
from lmpipe.cli import main
from lmpipe.cuda.arena import PinnedArena
from lmpipe.cuda.engine import EnginePages
from lmpipe.cuda.pages import DevicePages
from lmpipe.cuda.pool import DevicePool
from lmpipe.cuda.transfers import Transfers
from lmpipe.handles import Codec, Tier
from lmpipe.testing import Node

CHUNKS, PAGES = 3, 64


class DeviceMemory(Numbers):
    """Filled and checked on the host; in between the pages are on the device."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(LAYOUT, PAGES)
        self.there = torch.from_numpy(self.memory).to(device)  # pyright: ignore[reportUnknownMemberType]

    def fill(self, keys: npt.NDArray[np.uint8], page_ids: PageIds) -> None:
        super().fill(keys, page_ids)
        self.there.copy_(torch.from_numpy(self.memory))  # pyright: ignore[reportUnknownMemberType]

    def wrong(self, keys: npt.NDArray[np.uint8], page_ids: PageIds) -> list[int]:
        self.memory[:] = self.there.cpu().numpy()
        return super().wrong(keys, page_ids)


class DeviceEngine(NumbersEngine):
    """An engine whose pool is `EnginePages`."""

    def __init__(self, run_dir: Path, device: torch.device, codec: str, tenant: str) -> None:
        super().__init__(run_dir, codec, tenant=tenant)
        self.memory.close()
        memory = DeviceMemory(device)
        memory.error = LARGEST_ERROR.get(codec, 0.0)
        self.transfers = Transfers(device, programs=4)
        self.device_pool = DevicePool(DevicePages.of(LAYOUT, list(memory.there)), self.transfers)
        self.pages = EnginePages(self.device_pool)
        self.memory = memory
        self.memory.pool = self.pages


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    with Node(dram("raw")) as node:
        yield node


@pytest.fixture
def engine(node: Node, device: torch.device, request: pytest.FixtureRequest) -> Iterator[DeviceEngine]:
    codec = getattr(request, "param", "raw")
    with DeviceEngine(node.run_dir, device, codec, request.node.name) as engine:
        until_whole(node, engine)
        yield engine
        engine.transfers.close()


def test_what_kernels_save_kernels_load(engine: DeviceEngine) -> None:
    prompt = engine.prompt(1, CHUNKS)
    assert engine.save(prompt).wait(0)
    result = engine.load(prompt)  # every byte is compared
    assert (result.chunks, result.by_tier) == (CHUNKS, {Tier.DRAM: CHUNKS})


def test_what_kernels_save_native_threads_load(
    engine: DeviceEngine, node: Node, request: pytest.FixtureRequest
) -> None:
    prompt = engine.prompt(2, CHUNKS)
    assert engine.save(prompt).wait(0)
    with NumbersEngine(node.run_dir, "raw", tenant=request.node.name) as host:
        until_whole(node, host)
        assert host.load(prompt).chunks == CHUNKS
        other = host.prompt(3, CHUNKS)
        assert host.save(other).wait(0)
    assert engine.load(other).chunks == CHUNKS


def test_a_page_that_the_engine_has_is_left_out(engine: DeviceEngine) -> None:
    prompt = engine.prompt(4, 1)
    assert engine.save(prompt).wait(0)
    ids = engine.memory.allocate(1, CHUNK_TOKENS)
    engine.memory.there.fill_(7)
    kept = int(ids[0, 0])
    with_gap = ids.copy()
    with_gap[0, 0] = -1
    assert engine.producer.load(engine.producer.lookup(prompt), engine.pages, with_gap).chunks == 1
    there = engine.memory.there.cpu().numpy()
    assert (there[:, kept] == 7).all() and not (there[:, ids[0, 1]] == 7).all()


@pytest.mark.parametrize("engine", ["zstd", "split", "fp8", "int4h"], indirect=True)
def test_encoded_chunks_are_decoded_on_the_way(
    engine: DeviceEngine, node: Node, request: pytest.FixtureRequest
) -> None:
    codec = request.node.callspec.params["engine"]
    prompt = engine.prompt(5, CHUNKS)
    assert engine.save(prompt).wait(0)
    assert (
        main(["compress", str(node.run_dir), "--codec", codec, f"--namespace={engine.producer.namespace.hex()}"]) == 0
    )
    until(lambda: counters(node)["gather_dram_encoded_chunks"] >= CHUNKS, "they are encoded")
    assert engine.load(prompt).chunks == CHUNKS


def test_chunks_that_do_not_fit_the_staging_buffers_are_decoded_on_the_host(
    engine: DeviceEngine, node: Node, device: torch.device
) -> None:
    prompt = engine.prompt(8, CHUNKS)
    assert engine.save(prompt).wait(0)
    before = counters(node)["gather_dram_encoded_chunks"]
    assert main(["compress", str(node.run_dir), "--codec=split", f"--namespace={engine.producer.namespace.hex()}"]) == 0
    until(lambda: counters(node)["gather_dram_encoded_chunks"] - before >= CHUNKS, "they are encoded")
    small = Transfers(device, piece_bytes=4 * LAYOUT.page_bytes, staging_bytes=4 * LAYOUT.page_bytes)
    pool = DevicePool(engine.device_pool.pages, small)
    assert not pool.can_decode(Codec.SPLIT, 4 * LAYOUT.page_bytes + 1)
    engine.memory.pool = EnginePages(pool)
    assert engine.load(prompt).chunks == CHUNKS
    small.close()


def test_pages_of_another_size_are_refused(engine: DeviceEngine) -> None:
    prompt = engine.prompt(6, 1)
    with pytest.raises(ValueError, match="the pool has 64 pages"):
        engine.producer.save(prompt, engine.pages, np.full((1, LAYOUT.chunk_pages(CHUNK_TOKENS)), PAGES, np.int32))


def test_no_copy_crosses_the_border_of_two_pinned_pieces(
    node: Node, device: torch.device, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """To the driver they are two memories; and an arena is unpinned only when nobody copies any more."""
    runtime, piece = FakeRuntime(tmp_path), 4096
    with DeviceEngine(node.run_dir, device, "raw", request.node.name) as engine:
        pool, arena = Watched(engine.device_pool, piece), PinnedArena(runtime, piece)
        engine.pages = engine.memory.pool = EnginePages(pool, arena)
        until_whole(node, engine)
        prompt = engine.prompt(7, CHUNKS)
        assert engine.save(prompt).wait(0)
        assert engine.load(prompt).chunks == CHUNKS
        assert pool.crossed == {"save_into": 0, "load_from": 0} and pool.elsewhere, "chunks are larger than a piece"
        pinned = arena._pinned
        assert pinned is not None and pinned.wait(10) and runtime.pinned_now

        other = native.Region(np.zeros(2 * piece, np.uint8))
        with arena.use(pinned._region):
            with arena.use(other):  # of a node that was started anew, while a load from the one before is under way
                assert arena.is_one_memory(memoryview(bytearray(3 * piece))), "none of it is pinned"
            assert runtime.pinned_now == pinned.done_bytes and arena._pinned is pinned
        with arena.use(other):
            assert arena._pinned is not None and arena._pinned.wait(10)
            assert runtime.pinned_now == other.nbytes
        arena.close()
        assert not runtime.pinned_now


class Watched:
    """A pool that looks where it is to copy from and to. The arena begins at a page, so pieces do."""

    def __init__(self, pool: DevicePool, piece: int) -> None:
        self.pages, self._pool, self._piece = pool.pages, pool, piece
        self.chunk_bytes = pool.chunk_bytes
        self.crossed = {"save_into": 0, "load_from": 0}
        self.elsewhere = 0

    def _see(self, name: str, hosts: list[memoryview]) -> None:
        for host in hosts:
            in_arena = not isinstance(host.obj, bytearray)
            self.elsewhere += not in_arena
            start = np.frombuffer(host, np.uint8).ctypes.data
            self.crossed[name] += in_arena and start // self._piece != (start + len(host) - 1) // self._piece

    def save_into(self, page_ids: PageIds, hosts: list[memoryview], after: Any) -> Any:
        self._see("save_into", hosts)
        return self._pool.save_into(page_ids, hosts, after)

    def load_from(self, page_ids: PageIds, hosts: list[memoryview], after: Any) -> Any:
        self._see("load_from", hosts)
        return self._pool.load_from(page_ids, hosts, after)
