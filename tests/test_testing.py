"""The node for tests: real processes that come, are killed, come again, and leave nothing."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from lmpipe import KVLayout, native
from lmpipe.errors import NodeError
from lmpipe.producer import Producer
from lmpipe.testing import Node, merged

LAYOUT = KVLayout.paged(2, 2, 64, "bfloat16", 16)
PAGES = 32
DRAM_ONLY = {"tiers": {"ssd": None}}


class Pool:
    """Engine pages in private memory."""

    def __init__(self, seed: int | None = None) -> None:
        nbytes = PAGES * LAYOUT.page_bytes
        self.bytes: npt.NDArray[np.uint8] = np.zeros((LAYOUT.plane_count, nbytes), np.uint8)
        if seed is not None:
            self.bytes[:] = np.random.default_rng(seed).integers(0, 255, self.bytes.shape, np.uint8)
        planes = LAYOUT.plane_count
        each = np.full(planes, LAYOUT.page_bytes, np.uint64)
        starts = np.arange(planes, dtype=np.uint64) * np.uint64(nbytes)
        region = native.Region(memoryview(self.bytes).cast("B"))
        self.pool = native.PagePool([region], np.zeros(planes, np.uint32), starts, each, each, PAGES)


PAGE_IDS = np.arange(PAGES, dtype=np.int32).reshape(PAGES, 1)
TOKENS = np.arange(PAGES * LAYOUT.page_tokens)


@pytest.fixture
def node() -> Iterator[Node]:
    with Node(DRAM_ONLY) as node:
        yield node


def save(producer: Producer, pool: Pool) -> None:
    prompt = producer.prompt(TOKENS)
    ticket = producer.save(prompt, pool.pool, PAGE_IDS)
    assert producer.flush(prompt, timeout_s=20, tiers=("dram",))
    assert ticket.saved == PAGES


def loads(producer: Producer, pool: Pool) -> bool:
    fresh = Pool()
    found = producer.lookup(producer.prompt(TOKENS))
    result = producer.load(found, fresh.pool, PAGE_IDS)
    return result.tokens == len(TOKENS) and bool((fresh.bytes == pool.bytes).all())


def test_state_and_pids(node: Node) -> None:
    state = node.status()
    assert (state.state, state.pid) == ("ready", node.pid("supervisor"))
    assert [(p.name, p.state) for p in state.processes] == [("gather", "ready")]
    assert os.getsid(node.pid("gather")) == node.pid("gather")
    assert node.info.supervisor_pid == node.pid("supervisor")
    with pytest.raises(NodeError, match="persist is not running"):
        node.pid("persist")


def test_what_is_saved_outlives_every_process(node: Node) -> None:
    producer, pool = node.producer(LAYOUT), Pool(1)
    assert producer.state == "ready"
    save(producer, pool)
    assert loads(producer, pool)

    node.wait_restarted("gather", node.kill("gather"))
    assert loads(producer, pool)

    node.kill("all")
    assert loads(producer, pool), "no process of the node lives, and nothing is missing"
    node.start()
    assert loads(producer, pool)

    node.kill("supervisor")
    node.start()
    assert "gather: adopted, pid" in node.output
    assert loads(producer, pool)

    node.stop(keep_dram=True)
    node.start()
    with Producer(node.run_dir, LAYOUT, model="test", wait_s=20) as another:
        assert loads(another, pool)

    node.restart(keep_dram=False)
    with Producer(node.run_dir, LAYOUT, model="test", wait_s=20) as another:
        assert not loads(another, pool)


def test_a_stopped_worker_is_replaced() -> None:
    with Node(DRAM_ONLY | {"heartbeat_ms": 50, "watchdog_ms": 500}) as node:
        old = node.kill("gather", signal.SIGSTOP)
        node.wait_restarted("gather", old)
        assert "killed by SIGKILL (no answer for" in node.output


def test_close_ends_what_is_stopped() -> None:
    with Node(DRAM_ONLY) as node:
        run_dir = node.run_dir
        node.kill("all", signal.SIGSTOP)
    assert not run_dir.exists()
    assert not node.directory.exists()


def test_close_ends_what_a_dead_supervisor_left() -> None:
    with Node(DRAM_ONLY) as node:
        gather = node.pid("gather")
        node.kill("supervisor")
    command = Path(f"/proc/{gather}/cmdline")
    assert not command.exists() or not command.read_bytes(), "not ended; a zombie is left to whoever adopts orphans"
    assert not node.run_dir.exists()


def test_a_node_that_cannot_start_says_why_and_leaves_nothing() -> None:
    node = Node(DRAM_ONLY | {"tiers": {"dram": {"capacity": "1000TiB"}, "ssd": None}})
    with pytest.raises(NodeError, match=r"bytes are wanted and \d+ bytes are free"):
        node.start()
    assert not node.run_dir.exists()
    node.close()
    assert not node.directory.exists()


def test_merged() -> None:
    plain = {"a": 1, "b": {"c": 2, "d": 3}, "e": [1]}
    assert merged(plain, {"a": None, "b": {"c": 4}, "e": [2]}) == {"b": {"c": 4, "d": 3}, "e": [2]}
