"""An engine with lmpipe switched on: its settings, when it is ready, what it has done; and prompts to give it."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from harness import Engine, greedy

from lmpipe.cli import main
from lmpipe.producer import Producer
from lmpipe.testing import Node

CHUNK = 64
"""Tokens of a chunk in these tests: two blocks of the engine."""
VOCABULARY = 512
WAIT_S = 30.0

_seeds = itertools.count(1)


def connector(node: Node | Path, **settings: Any) -> dict[str, Any]:
    """The kv_transfer_config of an engine on this node; `settings` as in the extra config, without the prefix."""
    run_dir = node.run_dir if isinstance(node, Node) else node
    extra = {f"lmpipe.{name}": value for name, value in {"node": str(run_dir), **settings}.items()}
    return {
        "kv_connector": "LMPipeConnector",
        "kv_connector_module_path": "lmpipe.engines.vllm",
        "kv_connector_extra_config": extra,
    }


def tiers(directory: Path, codec: str = "raw", **changes: Any) -> dict[str, Any]:
    """A node with all three tiers, for `Node`; a busy machine is not taken for a dead one."""
    remote = {"url": f"file://{directory}/remote", "capacity": "64MiB", "codec": codec}
    return {
        "chunk_tokens": CHUNK,
        "heartbeat_ms": 300,
        "restarts": {"budget": 1000, "window_s": 1},
        "admission": {"prefill_tokens_per_s": 1},  # every load is faster than that: what is found is loaded
        "tiers": {"dram": {"capacity": "32MiB"}, "ssd": {"codec": codec}, "remote": remote, **changes},
    }


def tokens(length: int, seed: int | None = None) -> list[int]:
    """A prompt that no other test has, or the one of a seed."""
    rng = np.random.default_rng(next(_seeds) + 10_000 if seed is None else seed)
    return rng.integers(1, VOCABULARY, length).tolist()


def until(condition: Callable[[], object], what: str, timeout_s: float = WAIT_S) -> None:
    """Wait for something that has to happen; nothing is expected to be fast."""
    end_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end_s, f"not in {timeout_s:g} s: {what}"
        time.sleep(0.01)


def producers(engine: Engine) -> list[Producer]:
    """The scheduler's and the workers' producers of an engine in this process."""
    worker = [group.producer for group in engine.worker_connector._worker._groups]
    return [engine.scheduler_connector._scheduler._producer, *worker]


def ready(engine: Engine) -> Engine:
    """The engine, when lmpipe has registered it."""
    for producer in producers(engine):
        assert producer.wait_ready(WAIT_S), producer.reason
    return engine


def stats(engine: Engine) -> dict[str, int]:
    """The counters of the worker's producers together."""
    total: dict[str, int] = {}
    for producer in producers(engine)[1:]:
        for name, value in producer.stats().items():
            total[name] = total.get(name, 0) + value
    return total


def settled(engine: Engine, *where: str, prompt: list[int] | None = None) -> None:
    """Wait until all saves are answered and, given a prompt, until the tiers in `where` have its whole chunks."""
    for producer in producers(engine)[1:]:
        keyed = producer.prompt(prompt) if prompt is not None else None
        assert producer.flush(keyed, timeout_s=WAIT_S, tiers=where)


def idle(engine: Engine) -> None:
    """Step until vLLM has nothing left, blocks that wait for their saves too."""
    until(lambda: (engine.llm.llm_engine.step(), not engine.scheduler.has_requests())[1], "the engine is idle")


def only(node: Node, tier: str) -> None:
    """Leave what is saved in one tier."""
    above = {"dram": [], "ssd": ["dram"], "remote": ["dram", "ssd"]}[tier]
    if above:
        assert main(["clear", str(node.run_dir), *(f"--tier={name}" for name in above)]) == 0


def ask(engine: Engine, prompts: list[list[int]], max_tokens: int = 8, **how: Any) -> tuple[list[list[int]], list[int]]:
    """The tokens that follow each prompt, and how many of each were not computed."""
    outputs = engine.outputs(prompts, max_tokens, **how)
    cached = [output.num_cached_tokens or 0 for output in outputs]
    return [list(output.outputs[0].token_ids) for output in outputs], cached


def scramble(engine: Engine, prompt: list[int], **prompted: Any) -> None:
    """Overwrite what DRAM has of a prompt with noise: a negative control, where greedy tokens have to change."""
    for worker in producers(engine)[1:]:
        with worker.lookup(worker.prompt(prompt, **prompted)) as found:
            assert found.attachment is not None
            arena, noise = found.attachment.arena, np.random.default_rng(1)
            for place in found.records["place"].tolist():
                size = int(found.records["nbytes"][0]) // 4
                slot = np.frombuffer(arena.segment.buf, np.float32, size, arena.offset(place >> 32))
                slot[:] = noise.standard_normal(size, np.float32)


def ask_with_salt(engine: Engine, prompt: list[int], salt: str) -> int:
    """How much of a prompt with a cache salt was not computed."""
    request = {"prompt_token_ids": prompt} | ({"cache_salt": salt} if salt else {})
    (output,) = engine.llm.generate([request], greedy(1, detokenize=False), use_tqdm=False)
    return output.num_cached_tokens or 0
