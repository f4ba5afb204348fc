"""What keeps KV outside vLLM, for the benchmarks: the engines that save into it, and those that load from it later.

Knows vLLM's connectors by their configuration only.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from lmpipe.bench.report import Goal
from lmpipe.bench.vllm_client import Engine, Plan
from lmpipe.demo.node import DemoNode
from lmpipe.errors import LmpipeError
from lmpipe.launch.overview import overview
from lmpipe.testing import Node

SAVED_S = 60.0
STEADY_S = 0.3
STEP_S = 0.02
PARTS = 2

COLD = Goal("ratio", "<=", 1.03)
DRAM = Goal("ratio", "<=", 1.2)
SSD = Goal("ratio", "<=", 2.5)


class Cache:
    """One way to keep KV. A context manager; what it has started and written is gone afterwards."""

    def __init__(self) -> None:
        self.stack = ExitStack()

    def savers(self) -> Sequence[Plan]:
        """Engines that compute and save; asked for first."""
        return []

    def loaders(self) -> Sequence[Plan]:
        """Engines that find what was saved; asked for when all savers have ended."""
        return []

    def attached(self, engines: Sequence[Engine]) -> None:
        """Called when the engines asked for last have started: waits until what they save is taken, and found."""

    def saved(self, tokens: int) -> None:
        """Called when a saver has answered a prompt of so many new tokens: waits until all of it is stored."""

    def pids(self) -> Sequence[int]:
        """Its processes beside the engines asked for last."""
        return []

    def __enter__(self) -> Cache:
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()


class LmpipeCache(Cache):
    """A node that is saved into, and nodes that have lost the tiers above: each tier shows when it is the fastest."""

    def __init__(self, work: Path, *, tiers: Sequence[str] = ("DRAM", "SSD", "remote")) -> None:
        super().__init__()
        self._work, self._tiers = work, tiers
        self._used: list[Node] = []
        """Nodes of the engines asked for last."""
        self._top = self._node("DRAM")
        self._chunk_tokens = self._top.topology.chunk_tokens
        self._wanted_rows = 0

    @property
    def node(self) -> Node:
        """The one that is saved into."""
        return self._top

    def savers(self) -> Sequence[Plan]:
        self._used = [self._top]
        return [Plan("cold, lmpipe attached", lmpipe_options(self._top), goal=COLD)]

    def loaders(self) -> Sequence[Plan]:
        plans: list[Plan] = []
        self._used = []
        for tier, goal in (("DRAM", DRAM), ("SSD", SSD), ("remote", None)):
            if tier in self._tiers:
                node = self._top if tier == "DRAM" else self._node(tier)
                self._used.append(node)
                plans.append(Plan(f"lmpipe, {tier}", lmpipe_options(node), goal=goal))
        return plans

    def attached(self, engines: Sequence[Engine]) -> None:
        for node, engine in zip(self._used, engines, strict=True):
            wait_attached(node, engine)

    def saved(self, tokens: int) -> None:
        self._wanted_rows += tokens // self._chunk_tokens
        deadline_s = time.monotonic() + SAVED_S
        rows, since_s = -1, 0.0
        while time.monotonic() < deadline_s:
            counters = _gather(self._top)
            now_s, seen = time.monotonic(), counters["gather_committed_chunks"]
            if seen != rows or counters["gather_unpersisted_rows"]:
                rows, since_s = seen, now_s
            elif rows >= self._wanted_rows and now_s - since_s > STEADY_S:
                return
            time.sleep(STEP_S)
        raise LmpipeError(f"lmpipe has {rows} of {self._wanted_rows} chunks after {SAVED_S:g} s")

    def pids(self) -> Sequence[int]:
        return [
            pid for node in self._used for pid in (node.pid("supervisor"), *(p.pid for p in node.status().processes))
        ]

    def _node(self, tier: str) -> Node:
        """Started on copies of what the first node has in this tier and those below."""
        work = self._work / tier
        work.mkdir(parents=True)
        kept = {"DRAM": (), "SSD": ("ssd", "remote"), "remote": ("remote",)}[tier]
        for name in kept:
            shutil.copytree(self._work / "DRAM" / name, work / name)
        return self.stack.enter_context(DemoNode(work))


class ExampleCache(Cache):
    """vLLM's own ExampleConnector: a file for each layer of each prompt.

    It saves what the first step computes, so that a step has to take a whole prompt; its cold run is no comparison.
    """

    def __init__(self, directory: Path, longest_tokens: int) -> None:
        super().__init__()
        directory.mkdir()
        config = connector("ExampleConnector", {"shared_storage_path": str(directory)})
        self._options = {**config, "max_num_batched_tokens": longest_tokens}

    def savers(self) -> Sequence[Plan]:
        return [Plan("cold, ExampleConnector attached", self._options, judged=False)]

    def loaders(self) -> Sequence[Plan]:
        return [Plan("ExampleConnector, files", self._options, judged=False)]


def connector(name: str, extra: dict[str, Any], module: str | None = None) -> dict[str, Any]:
    """The option of `vllm.LLM` that attaches a connector; what cannot be loaded is computed."""
    config = {"kv_connector": name, "kv_role": "kv_both", "kv_load_failure_policy": "recompute"}
    path = {"kv_connector_module_path": module} if module else {}
    return {"kv_transfer_config": {**config, **path, "kv_connector_extra_config": extra}}


def lmpipe_options(node: Node) -> dict[str, Any]:
    """Attaches lmpipe."""
    return connector("LMPipeConnector", {"lmpipe.node": str(node.run_dir)}, "lmpipe.engines.vllm")


def wait_attached(node: Node, engine: Engine) -> None:
    """Until the node has registered the engine's scheduler and its worker. Raises LmpipeError."""
    deadline_s = time.monotonic() + SAVED_S
    while time.monotonic() < deadline_s:
        parts = sum(_group(view.pid) == engine.pid for view in overview(node.info).engines)
        if parts >= PARTS and _gather(node)["gather_producers"] >= parts:
            return
        time.sleep(STEP_S)
    raise LmpipeError(f"{engine.name}: lmpipe has not registered the engine within {SAVED_S:g} s")


def _group(pid: int) -> int:
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return 0


def _gather(node: Node) -> dict[str, int]:
    return next(values for values in overview(node.info).counters.values() if "gather_producers" in values)
