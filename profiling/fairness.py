"""What two engines on one node get, and what one's flood of saves costs the other's loads.

    python profiling/fairness.py [--seconds 5] [--rounds 3]

    share    two engines save new prompts as fast as they can, at the same time: bytes saved by each. The ratio is
             the smaller by the larger, 1 is fair. Private pages (the engines copy), mapped pages (gather copies), one
             of each
    loads    one engine loads prompts of 16 chunks, 32 MiB in all, one after the other: from DRAM, or from SSD, where
             each is before its turn and nowhere else (inside the clock are lookup and load only). Alone; while another
             engine saves as fast as it can; and while another process does nothing but copy memory, which is what a
             flood costs on two cores even if it is perfectly fair. The three take turns

Each engine is a process of its own. Everything runs on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from lmpipe import messages as m
from lmpipe.engines.paged import PagedEngine
from lmpipe.handles import Tier
from lmpipe.layout import KVLayout
from lmpipe.producer import Producer
from lmpipe.testing import Node

LAYOUT = KVLayout.paged(16, 8, 64, "bfloat16", 16)
CHUNK_TOKENS, CHUNKS = 64, 16
"""2 MiB a chunk."""
READY_S, ANSWER_S = 30.0, 60.0
DEADLINE_MS = 20_000.0
BURNT_BYTES = 64 << 20


class Engine:
    """One engine, and the prompts that nobody else has."""

    def __init__(self, run_dir: Path, pages: str, seed: int) -> None:
        segment = Path(pages) / f"pages-{os.getpid()}.shm" if pages else None
        self.memory = PagedEngine(LAYOUT, 64 * LAYOUT.chunk_pages(CHUNK_TOKENS), segment=segment)
        source = self.memory.source
        self.producer = Producer(run_dir, LAYOUT, model="fair", tenant=f"t{seed}", pages=source, wait_s=READY_S)
        if self.producer.state != "ready":
            raise SystemExit(f"the producer is {self.producer.state}: {self.producer.reason}")
        self.memory.memory[:] = np.random.default_rng(seed).integers(0, 16, self.memory.memory.shape[-1], np.uint8)
        self.ids = self.memory.allocate(CHUNKS, CHUNK_TOKENS)
        self._seed = seed

    def prompt(self, number: int) -> Any:
        """Tokens of a prompt by its number."""
        tokens = np.random.default_rng([self._seed, number]).integers(0, 50_000, CHUNKS * CHUNK_TOKENS, np.uint32)
        return self.producer.prompt(tokens)

    def save(self, number: int) -> Any:
        """A save on its way."""
        return self.producer.save(self.prompt(number), None if self.memory.source else self.memory.pool, self.ids)

    def close(self) -> None:
        """End it."""
        self.producer.close()
        self.memory.close()


def flood(engine: Engine, seconds: float) -> dict[str, float]:
    """Save as fast as it goes, four at a time; what became of it."""
    begin_s, number = time.monotonic(), 0
    open_ones: list[Any] = []
    saved = dropped = 0
    while time.monotonic() < begin_s + seconds or open_ones:
        if time.monotonic() < begin_s + seconds and len(open_ones) < 4:
            open_ones.append(engine.save(number))
            number += 1
            continue
        ticket = open_ones.pop(0)
        ticket.wait(ANSWER_S)
        if time.monotonic() < begin_s + seconds:  # what was done while the other one was at it too
            saved += ticket.saved
            dropped += sum(ticket.dropped.values())
    chunk_bytes = engine.producer.chunk_bytes
    return {"mb_per_s": saved * chunk_bytes / seconds / 1e6, "dropped": dropped}


def loads(engine: Engine, seconds: float, tier: str) -> dict[str, Any]:
    """Milliseconds of each load, and how many brought less than all."""
    taken_ms: list[float] = []
    short = number = 0
    end_s = time.monotonic() + seconds
    prompt = engine.prompt(10**6)
    while time.monotonic() < end_s or not taken_ms:
        if engine.producer.lookup(prompt, CHUNKS * CHUNK_TOKENS).chunks < CHUNKS or tier == Tier.SSD:
            number += 1
            prompt = engine.prompt(10**6 + number)
            engine.save(10**6 + number).wait(ANSWER_S)
        if tier == Tier.SSD:
            engine.producer.flush(prompt, timeout_s=ANSWER_S, tiers=[tier])
            _drop_from_dram(engine, prompt)
        begin_s = time.perf_counter()
        with engine.producer.lookup(prompt) as found:
            done = engine.producer.load(found, engine.memory.pool, engine.ids, deadline_ms=DEADLINE_MS)
        taken_ms.append((time.perf_counter() - begin_s) * 1e3)
        short += done.chunks < CHUNKS
    return {"ms": taken_ms, "short": short}


def _drop_from_dram(engine: Engine, prompt: Any) -> None:
    ref = next(engine.producer._ids)
    link, session = engine.producer._link, engine.producer._session()
    link.ask(ref, m.Invalidate(session, ref, 0, [Tier.DRAM], engine.producer._records(prompt)), ANSWER_S)


def burn(seconds: float) -> dict[str, float]:
    """Copy memory, and nothing else."""
    one, other = np.ones(BURNT_BYTES, np.uint8), np.ones(BURNT_BYTES, np.uint8)
    end_s, copied = time.monotonic() + seconds, 0
    while time.monotonic() < end_s:
        np.copyto(other, one)
        copied += BURNT_BYTES
    return {"mb_per_s": copied / seconds / 1e6}


class Other:
    """A process that begins when it is told to, and says what came of it."""

    def __init__(self, role: str, seed: int, run_dir: Path, pages: str, seconds: float, tier: str = "") -> None:
        argv = [sys.executable, __file__, "--role", role, str(seed), str(run_dir), pages, str(seconds), tier]
        self._process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        if self._process.stdout.readline() != "ready\n":
            raise SystemExit(f"{role}: not ready")

    def go(self) -> None:
        """Begin."""
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()

    def result(self) -> dict[str, Any]:
        """What came of it, when it has ended."""
        said, _ = self._process.communicate()
        return json.loads(said)


def role(name: str, seed: int, run_dir: Path, pages: str, seconds: float, tier: str) -> None:
    """What the other processes do."""
    engine = None if name == "burn" else Engine(run_dir, pages, seed)
    print("ready", flush=True)
    sys.stdin.readline()
    work: dict[str, Callable[[Any], dict[str, Any]]] = {
        "flood": lambda e: flood(e, seconds),
        "loads": lambda e: loads(e, seconds, tier),
        "burn": lambda _: burn(seconds),
    }
    print(json.dumps(work[name](engine)), flush=True)
    if engine is not None:
        engine.close()


def together(*others: Other) -> list[dict[str, Any]]:
    """All at the same time."""
    for other in others:
        other.go()
    return [other.result() for other in others]


def share(node: Node, seconds: float, rounds: int) -> None:
    """Two floods."""
    shared = str(node.directory)
    for title, first, second in (
        ("private, private", "", ""),
        ("mapped, mapped", shared, shared),
        ("private, mapped", "", shared),
    ):
        ratios: list[float] = []
        for turn in range(rounds):
            seeds = (10 * turn + 1, 10 * turn + 2)
            found = together(
                Other("flood", seeds[0] + 1000 * len(title), node.run_dir, first, seconds),
                Other("flood", seeds[1] + 1000 * len(title), node.run_dir, second, seconds),
            )
            rates = [each["mb_per_s"] for each in found]
            ratios.append(min(rates) / max(rates))
            print(
                f"share  {title:18} {rates[0]:7.0f} and {rates[1]:7.0f} MB/s, ratio {ratios[-1]:.2f},"
                f" dropped chunks {found[0]['dropped']} and {found[1]['dropped']}",
                flush=True,
            )
        print(f"share  {title:18} median ratio {statistics.median(ratios):.2f}", flush=True)


def latency(node: Node, seconds: float, rounds: int) -> None:
    """Loads with and without company."""
    shared = str(node.directory)
    for tier in (Tier.DRAM, Tier.SSD):
        seen: dict[str, list[float]] = {"alone": [], "beside memory copies": [], "beside a flood": []}
        short = dict.fromkeys(seen, 0)
        for turn in range(rounds):
            for company in seen:
                others = [Other("loads", 7, node.run_dir, "", seconds, tier)]
                if company == "beside a flood":
                    others.append(Other("flood", 20_000 + 100 * turn + len(tier), node.run_dir, shared, seconds))
                elif company == "beside memory copies":
                    others.append(Other("burn", 0, node.run_dir, "", seconds))
                found = together(*others)[0]
                seen[company] += found["ms"]
                short[company] += found["short"]
        for company, taken in seen.items():
            p50, p99 = statistics.median(taken), sorted(taken)[min(int(len(taken) * 0.99), len(taken) - 1)]
            print(
                f"loads  from {tier:5}{company:22} p50 {p50:8.1f} ms, p99 {p99:8.1f} ms, {len(taken)} loads,"
                f" {short[company]} of them short",
                flush=True,
            )


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--role", nargs=6, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.role:
        name, seed, run_dir, pages, seconds, tier = asked.role
        role(name, int(seed), Path(run_dir), pages, float(seconds), tier)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # or the node would be left behind
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
    changes = {
        "chunk_tokens": CHUNK_TOKENS,
        "tiers": {
            "dram": {"capacity": "512MiB", "slots": 1024},
            "ssd": {"capacity": "4GiB", "segment": "64MiB", "flush": "none", "codec": "raw"},
        },
        "rings": {"persist": "64MiB"},
        "heartbeat_ms": 1000,
        "watchdog_ms": 20_000,
        "engines": {"leases": 64, "load_deadline_ms": int(DEADLINE_MS)},
    }
    with Node(changes) as node:
        share(node, asked.seconds, asked.rounds)
        latency(node, asked.seconds, asked.rounds)


if __name__ == "__main__":
    main()
