"""From SIGKILL to service again, process by process, and what is lost; on `topologies/local.yaml` in other directories.

    gather        until a save is answered as saved
    compress      until a prompt that lies on the SSD alone, encoded, is loaded
    persist       the same
    replicate     until a prompt that lies in the remote tier alone is loaded
    supervisor    until the `lmpipe up` that is started at once has taken the living workers over and is ready; with it,
                  the longest load from DRAM meanwhile, of an engine that asks all the time
    everything    until the `lmpipe up` that is started at once is ready, and until a prompt on the SSD is loaded

The limit, where there is one, is what the new process cannot go below: a Python that imports what it imports, and ends.
`lost` counts chunks that were answered as saved, or as persisted, and are found in no tier after all of that. Engines
are an engine's memory without a model (`lmpipe.engines.paged`).
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from lmpipe.bench.harness import Setting, main
from lmpipe.bench.report import Figure, Goal
from lmpipe.bus import Client, Poller
from lmpipe.demo.node import TOPOLOGY
from lmpipe.engines.paged import PagedEngine
from lmpipe.handles import SessionId, Tier
from lmpipe.keys import Prompt
from lmpipe.layout import KVLayout
from lmpipe.messages import Invalidate, Invalidated
from lmpipe.producer import Producer
from lmpipe.testing import Node, merged

LAYOUT = KVLayout.paged(16, 4, 128, "bfloat16", 16)
"""8 MiB a chunk of 256 tokens."""
CHUNK_TOKENS = 256
PROMPT_CHUNKS = 4
RUNS = 5
STEP_S = 0.002
PATIENCE_S = 60.0
DEADLINE_MS = 10_000.0
NOTHING = Goal("value", "<=", 0.0)


class Engine:
    """A producer with memory; every prompt is `PROMPT_CHUNKS` long and has a number."""

    def __init__(self, node: Node) -> None:
        self._pages = PagedEngine(LAYOUT, 4 * PROMPT_CHUNKS * LAYOUT.chunk_pages(CHUNK_TOKENS))
        self.producer: Producer = node.producer(LAYOUT, name="bench")
        if not self.producer.wait_ready(PATIENCE_S):
            raise RuntimeError(f"the producer is {self.producer.state}: {self.producer.reason}")
        self._ids = self._pages.allocate(PROMPT_CHUNKS, CHUNK_TOKENS)
        self.acknowledged: set[int] = set()

    def prompt(self, number: int) -> Prompt:
        """The prompt of a number."""
        tokens = np.random.default_rng(number).integers(0, 50_000, PROMPT_CHUNKS * CHUNK_TOKENS, np.uint32)
        return self.producer.prompt(tokens)

    def save(self, number: int) -> bool:
        """Whether it was answered as saved."""
        saved = self.producer.save(self.prompt(number), self._pages.pool, self._ids).wait(DEADLINE_MS / 1000)
        if saved:
            self.acknowledged.add(number)
        return saved

    def persist(self, number: int) -> None:
        """Saved, and told by both tiers below that they have it."""
        if not self.save(number) or not self.producer.flush(self.prompt(number), tiers=(Tier.SSD, Tier.REMOTE)):
            raise RuntimeError("a healthy node does not persist")

    def loads(self, number: int) -> bool:
        """Whether all of it is found and loaded."""
        found = self.producer.lookup(self.prompt(number))
        result = self.producer.load(found, self._pages.pool, self._ids[: found.chunks], deadline_ms=DEADLINE_MS)
        return result.chunks == PROMPT_CHUNKS

    def lost(self) -> int:
        """Chunks that were acknowledged and are in no tier."""
        return sum(PROMPT_CHUNKS - self.producer.lookup(self.prompt(number)).chunks for number in self.acknowledged)


class Asking:
    """An engine that loads one prompt from DRAM all the time; the longest load is what counts."""

    def __init__(self, engine: Engine, number: int) -> None:
        self.longest_s, self.loads, self.misses = 0.0, 0, 0
        self._engine, self._number, self._stop = engine, number, threading.Event()
        self._thread = threading.Thread(target=self._ask)

    def _ask(self) -> None:
        while not self._stop.is_set():
            began_s = time.monotonic()
            self.misses += not self._engine.loads(self._number)
            self.longest_s = max(self.longest_s, time.monotonic() - began_s)
            self.loads += 1

    def __enter__(self) -> Asking:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def run(setting: Setting) -> list[Figure]:
    """One node, whose processes are killed one by one, `RUNS` times each."""
    setting.disk.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix="bench-recovery-", dir=setting.disk) as place,
        Node(_changes(setting, Path(place).absolute()), base=TOPOLOGY) as node,
    ):
        engine, runs = Engine(node), setting.size(RUNS, 1)
        engine.persist(0)
        figures: list[Figure] = []
        workers = [process.name for process in node.topology.processes]
        for worker in workers[: setting.size(len(workers), 1)]:
            setting.say(f"{worker}: {runs} kills")
            import_s = [_import_s("lmpipe.launch.worker") for _ in range(runs)]
            took_s = [_worker(node, engine, worker, turn) for turn in range(runs)]
            figures.append(Figure.of(f"{worker} killed", took_s, "s", limits=import_s))
        figures += _supervisor(setting, node, engine, runs)
        figures += _everything(setting, node, engine, runs)
        figures.append(Figure.of("chunks lost", [engine.lost()], "chunks", goal=NOTHING))
        figures.append(Figure.of("chunks acknowledged", [len(engine.acknowledged) * PROMPT_CHUNKS], "chunks"))
        return figures


def _changes(setting: Setting, place: Path) -> dict[str, Any]:
    tiers = {"ssd": {"directory": str(place / "ssd"), "flush": "each"}, "remote": {"url": f"file://{place / 'remote'}"}}
    small = {"tiers": {"dram": {"capacity": "256MiB"}, "ssd": {"capacity": "1GiB", "segment": "64MiB"}}}
    calm = {"restarts": {"budget": 1000}, "tiers": tiers}
    return merged(calm, small if setting.quick else {})


def _worker(node: Node, engine: Engine, worker: str, turn: int) -> float:
    if worker != "gather":
        forget_in(node, *((Tier.DRAM, Tier.SSD) if worker == "replicate" else (Tier.DRAM,)))
    pid, began_s = node.kill(worker), time.monotonic()
    until(lambda: engine.save(1000 + turn) if worker == "gather" else engine.loads(0))
    took_s = time.monotonic() - began_s
    node.wait_restarted(worker, pid, PATIENCE_S)
    return took_s


def _supervisor(setting: Setting, node: Node, engine: Engine, runs: int) -> list[Figure]:
    setting.say(f"supervisor: {runs} kills")
    import_s = [_import_s("lmpipe.cli.up") for _ in range(runs)]
    took_s: list[float] = []
    with Asking(engine, 0) as asking:
        for _ in range(runs):
            node.kill("supervisor")
            took_s.append(_seconds(node.start))
    return [
        Figure.of("supervisor killed, workers adopted", took_s, "s", limits=import_s),
        Figure.of("longest load from DRAM meanwhile", [asking.longest_s * 1e3], "ms"),
        Figure.of("loads that failed meanwhile", [asking.misses], "loads", goal=NOTHING),
    ]


def _everything(setting: Setting, node: Node, engine: Engine, runs: int) -> list[Figure]:
    setting.say(f"everything at once: {runs} kills")
    ready_s: list[float] = []
    loaded_s: list[float] = []
    for _ in range(runs):
        forget_in(node, Tier.DRAM)
        node.kill("all")
        began_s = time.monotonic()
        node.start()
        ready_s.append(time.monotonic() - began_s)
        until(lambda: engine.loads(0))
        loaded_s.append(time.monotonic() - began_s)
    return [
        Figure.of("everything killed, ready", ready_s, "s"),
        Figure.of("everything killed, loaded from SSD", loaded_s, "s"),
    ]


def forget_in(node: Node, *tiers: Tier) -> None:
    """Leave all that was saved to the other tiers."""
    ends = node.info.endpoints["gather"]
    client, poller = Client({"load": ends["load"], "save": ends["save"]}), Poller()
    poller.register(client)
    try:
        until(lambda: client.send("save", Invalidate(SessionId(1), 1, tiers=list(tiers))))
        until(lambda: (poller.poll(50), isinstance(client.recv(), Invalidated))[1])
    finally:
        client.close()


def until(done: Callable[[], object]) -> None:
    """Asks again and again. Raises RuntimeError when it takes too long."""
    deadline_s = time.monotonic() + PATIENCE_S
    while not done():
        if time.monotonic() > deadline_s:
            raise RuntimeError(f"no service after {PATIENCE_S:g} s")
        time.sleep(STEP_S)


def _import_s(module: str) -> float:
    return _seconds(lambda: subprocess.run([sys.executable, "-P", "-c", f"import {module}"], check=True))


def _seconds(do: Callable[[], object]) -> float:
    began_s = time.monotonic()
    do()
    return time.monotonic() - began_s


if __name__ == "__main__":
    sys.exit(main(run))
