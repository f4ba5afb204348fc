"""Who asks for exact KV never gets any that lost something, or was computed on such; others are told what they got."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import yaml
from rig import CALM, CHUNK_TOKENS, WAIT_S, Engine, Memory, counters, until, until_whole

from lmpipe.handles import Fidelity, Tier
from lmpipe.keys import Prompt
from lmpipe.layout import KVLayout
from lmpipe.producer import LoadResult
from lmpipe.testing import Node

LAYOUT = KVLayout.paged(2, 2, 64, "float16", 4)
FP8 = {"tiers": {"ssd": {"codec": "fp8"}}, **CALM}
CHUNKS = 6


class Numbers(Memory):
    """KV as models have it, which fp8 can keep only roughly."""

    def content(self, key: npt.NDArray[np.uint8], pages: int) -> npt.NDArray[np.uint8]:
        rng = np.random.default_rng(int.from_bytes(key.tobytes(), "little"))
        shape = (self.layout.plane_count, pages, self.layout.page_bytes // 2)
        return rng.standard_normal(shape).astype(np.float16).view(np.uint8)


class NumbersEngine(Engine):
    """Loads without a claim; `exactly` says whether what came is what was saved."""

    memory_kind = Numbers

    def __init__(self, run_dir: Path, **options: Any) -> None:
        super().__init__(run_dir, layout=LAYOUT, **options)

    def loaded(self, prompt: Prompt, *, exact: bool = False) -> tuple[LoadResult, bool]:
        """What a load gives, and whether it is bit for bit what was saved."""
        found = self.producer.lookup(prompt, exact=exact)
        ids = self.memory.allocate(found.chunks, CHUNK_TOKENS)
        self.memory.memory[:, ids.ravel()] = 0xEE
        result = self.producer.load(found, self.memory.pool, ids, deadline_ms=1000 * WAIT_S)
        assert result.fidelity <= found.fidelity
        exactly = self.memory.wrong(prompt.keys[: result.chunks], ids) == []
        near = [
            np.allclose(
                _numbers(self.memory.memory[:, pages]), _numbers(self.memory.content(key, len(pages))), 0.1, 0.1
            )
            for key, pages in zip(prompt.keys[: result.chunks], ids, strict=False)
        ]
        assert all(near), "another chunk"
        self.memory.free(ids)
        return result, exactly

    def save_as(self, prompt: Prompt, fidelity: int, first: int = 0, exact: bool = True) -> tuple[int, int]:
        """Save chunks from `first` on as computed on something of this fidelity; (saved, known)."""
        ids = self.prefill(prompt, first)
        pool = None if self.mapped else self.memory.pool
        ticket = self.producer.save(prompt, pool, ids, first_chunk=first, fidelity=fidelity, exact=exact)
        assert ticket.wait(WAIT_S), ticket.dropped
        self.memory.free(ids)
        return ticket.saved, ticket.known

    def chunks(self, prompt: Prompt, *, exact: bool) -> int:
        """How many chunks are found."""
        with self.producer.lookup(prompt, exact=exact) as found:
            return found.chunks


def _numbers(pages: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    return np.ascontiguousarray(pages).view(np.float16).astype(np.float32)


@pytest.fixture
def node() -> Iterator[Node]:
    with Node(FP8) as started:
        yield started


@pytest.fixture(params=[False, True], ids=["private", "mapped"])
def engine(node: Node, request: pytest.FixtureRequest) -> Iterator[NumbersEngine]:
    with NumbersEngine(node.run_dir, pages_in=node.directory if request.param else None) as made:
        yield made


def test_what_a_codec_lost_is_not_for_exact_requests(engine: NumbersEngine) -> None:
    prompt = engine.save_below(1, CHUNKS)
    assert engine.chunks(prompt, exact=True) == 0
    result, exactly = engine.loaded(prompt)
    assert (result.chunks, result.fidelity, exactly) == (CHUNKS, Fidelity.FP8, False)
    assert result.by_tier == {Tier.SSD: CHUNKS}
    assert engine.chunks(prompt, exact=True) == 0, "nor when it is raw again, in DRAM"
    result, exactly = engine.loaded(prompt)
    assert (result.fidelity, exactly, result.by_tier) == (Fidelity.FP8, False, {Tier.DRAM: CHUNKS})
    assert engine.loaded(prompt, exact=True)[0].chunks == 0


def test_exact_chunks_take_the_place_of_others(engine: NumbersEngine) -> None:
    prompt = engine.save_below(1, CHUNKS)
    assert engine.save_as(prompt, Fidelity.INT4H) == (0, CHUNKS), "better ones are known"
    engine.loaded(prompt)
    assert engine.save_as(prompt, Fidelity.FP8) == (0, CHUNKS)
    assert engine.save_as(prompt, Fidelity.EXACT, exact=False) == (0, CHUNKS), "nobody has asked for better ones"
    assert engine.save_as(prompt, Fidelity.EXACT) == (CHUNKS, 0)
    for exact in (True, False):
        result, exactly = engine.loaded(prompt, exact=exact)
        assert (result.chunks, result.fidelity, exactly) == (CHUNKS, Fidelity.EXACT, True)
    assert engine.save_as(prompt, Fidelity.EXACT) == engine.save_as(prompt, Fidelity.FP8) == (0, CHUNKS)


def test_what_was_computed_on_a_lossy_prefix_is_never_exact(engine: NumbersEngine) -> None:
    prefix, prompt = engine.save_below(1, 2), engine.prompt(1, CHUNKS)
    loaded, _ = engine.loaded(prefix)
    assert engine.save_as(prompt, loaded.fidelity, first=2) == (CHUNKS - 2, 0)
    assert engine.chunks(prompt, exact=False) == CHUNKS and engine.chunks(prompt, exact=True) == 0
    assert engine.save_as(prefix, Fidelity.EXACT) == (2, 0)
    assert engine.chunks(prompt, exact=True) == 2, "its own bytes are as saved, but what they were computed on was not"
    assert engine.save_as(prompt, Fidelity.EXACT) == (CHUNKS - 2, 2)
    assert engine.chunks(prompt, exact=True) == CHUNKS


def test_a_producer_that_is_exact(node: Node, engine: NumbersEngine) -> None:
    prompt = engine.save_below(1, CHUNKS)
    with NumbersEngine(node.run_dir, exact=True, name="exact") as exact:
        assert exact.producer.exact and not engine.producer.exact
        assert exact.chunks(prompt, exact=False) == 0 and engine.chunks(prompt, exact=False) == CHUNKS
        assert exact.producer.prefetch(prompt) == 0 and engine.producer.prefetch(prompt, exact=True) == 0


def test_an_exact_topology_finds_nothing_that_a_former_one_made_lossy(node: Node) -> None:
    with NumbersEngine(node.run_dir) as engine:
        prompt = engine.save_below(1, CHUNKS)
        node.stop()
        changed = yaml.safe_load(node.file.read_text())
        changed["engines"]["exact"] = True
        changed["tiers"]["ssd"]["codec"] = "zstd"
        node.file.write_text(yaml.safe_dump(changed))
        node.start()
        until(lambda: engine.producer.exact and engine.producer.state == "ready", "registered with the new node")
        until_whole(node, engine)
        assert engine.producer.lookup(prompt).chunks == 0
        assert engine.save_as(prompt, Fidelity.EXACT) == (CHUNKS, 0)
        assert engine.producer.flush(prompt, tiers=[Tier.SSD])
        until(
            lambda: counters(node, "persist")["persist_written_chunks"] == CHUNKS, "the SSD's lossy ones are replaced"
        )
        engine.drop_from(prompt, Tier.DRAM)
        result, exactly = engine.loaded(prompt)
        assert (result.chunks, result.fidelity, exactly) == (CHUNKS, Fidelity.EXACT, True)


def test_a_tenant_that_is_exact_beside_one_that_is_not(tmp_path: Path) -> None:
    tenants = [{"name": "acme", "exact": True, "codec": "zstd"}]
    with Node({**FP8, "tenants": tenants}) as node:
        made = [NumbersEngine(node.run_dir, tenant=tenant, name=tenant) for tenant in ("acme", "other")]
        with made[0] as acme, made[1] as other:
            for epoch in (0, 7):  # another namespace, of the same tenant
                if epoch:
                    acme.producer.renew(epoch)
                prompt = acme.save_below(1 + epoch, CHUNKS)
                result, exactly = acme.loaded(prompt)
                assert (result.chunks, result.fidelity, exactly) == (CHUNKS, Fidelity.EXACT, True)
                assert result.by_tier == {Tier.SSD: CHUNKS}
            result, exactly = other.loaded(other.save_below(1, CHUNKS))
            assert (result.chunks, result.fidelity, exactly) == (CHUNKS, Fidelity.FP8, False)
            lossy = acme.prompt(99, CHUNKS)
            acme.save_as(lossy, Fidelity.FP8)
            assert acme.producer.lookup(lossy).chunks == 0
