"""What a disk that becomes half as fast costs: saves, loads from DRAM, the SSD tier's own rates.

    python profiling/slow_disk.py [--seconds 8] [--disk out]

    saves      an engine saves new prompts of 16 chunks, 32 MiB, one after the other, into DRAM: bytes per second
    persisted  meanwhile: bytes per second that persist writes (raw, flush `each`)
    dram       meanwhile: loads of a prompt that lies in DRAM: p50 and p99 in ms
    ssd        after that: loads of prompts that only the SSD has: bytes per second
    refused    chunks that the SSD tier did not get in time, for DRAM had to give them up

First as fast as the disk is, then with its writes and its reads each slowed to half of what was just seen (by
tests/multiproc/io_faults.cpp: the calls of the tier wait as long as a disk of that rate would take).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "multiproc"))

from io_faults import IoFaults
from rig import BIG, CHUNK_TOKENS, Engine, counters, until

from lmpipe.handles import Tier
from lmpipe.testing import Node

CHUNKS = 16
MIB = 1 << 20


def measure(node: Node, engine: Engine, seconds: float, seed: int) -> dict[str, float]:
    """One round with prompts that nobody has saved before."""
    known = engine.prompt(seed, 4)
    assert engine.save(known).wait(0)
    engine.producer.pin(known)
    took_ms: list[float] = []
    over = threading.Event()

    def load() -> None:
        ids = engine.memory.allocate(4, CHUNK_TOKENS)
        while not over.wait(0.02):
            began_s = time.perf_counter()
            found = engine.producer.lookup(known)
            assert engine.producer.load(found, engine.memory.pool, ids).by_tier == {Tier.DRAM: 4}
            took_ms.append(1000 * (time.perf_counter() - began_s))

    loader = threading.Thread(target=load)
    loader.start()
    before, began_s = _written(node), time.monotonic()
    saved, number, kept = 0, seed + 1, []
    ids = engine.prefill(engine.prompt(number, CHUNKS))
    while time.monotonic() < began_s + seconds:
        prompt = engine.prompt(number, CHUNKS)
        ticket = engine.send(prompt, ids)
        ticket.wait(30)
        saved += ticket.saved
        kept.append(prompt)
        number += 1
    took_s = time.monotonic() - began_s
    written = _written(node)
    over.set()
    loader.join()
    engine.producer.unpin(known)
    until(lambda: counters(node)["gather_unpersisted_rows"] == 0, "all is written", 120)
    there = [prompt for prompt in kept if engine.producer.flush(prompt, tiers=("ssd",), timeout_s=0.01)][-4:]
    for prompt in there:
        engine.drop_from(prompt, Tier.DRAM)
    began_s, loaded = time.monotonic(), 0
    for prompt in there:
        loaded += engine.producer.load(
            engine.producer.lookup(prompt), engine.memory.pool, ids, deadline_ms=60_000
        ).nbytes
    return {
        "saves_mib_s": saved * engine.producer.chunk_bytes / MIB / took_s,
        "persisted_mib_s": (written["bytes"] - before["bytes"]) / MIB / took_s,
        "dram_p50_ms": statistics.median(took_ms),
        "dram_p99_ms": sorted(took_ms)[len(took_ms) * 99 // 100],
        "ssd_mib_s": loaded / MIB / max(time.monotonic() - began_s, 1e-9),
        "refused_chunks": float(written["refused"] - before["refused"]),
    }


def _written(node: Node) -> dict[str, int]:
    refused = counters(node)["gather_refused_ssd_chunks"]
    return {"bytes": counters(node, "persist")["persist_written_bytes"], "refused": refused}


def main() -> None:
    """Print one JSON object for each speed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--disk", type=Path, default=Path("out"))
    options = parser.parse_args()
    options.disk.mkdir(exist_ok=True)
    disk = options.disk.resolve()
    with tempfile.TemporaryDirectory(dir=disk) as directory:
        faults = IoFaults(Path(directory))
        os.environ.update(faults.environment)
        ssd = {
            "directory": f"{directory}/ssd",
            "capacity": "6GiB",
            "segment": "256MiB",
            "codec": "raw",
            "flush": "each",
        }
        changes = {"tiers": {"dram": {"capacity": "512MiB", "slots": 1024}, "ssd": ssd}, "watchdog_ms": 20_000}
        with Node(changes) as node, Engine(node.run_dir, layout=BIG, pages=64, pages_in=node.directory) as engine:
            measure(node, engine, 2.0, 1)  # everything is touched once
            whole = measure(node, engine, options.seconds, 10_000)
            print(json.dumps({"disk": "as it is", **whole}), flush=True)
            rates = {"write": whole["persisted_mib_s"], "read": whole["ssd_mib_s"]}
            faults.set(*(f"{directory}/ssd {way} rate={int(rate * MIB / 2)}" for way, rate in rates.items()))
            print(json.dumps({"disk": "half as fast", **measure(node, engine, options.seconds, 20_000)}), flush=True)


if __name__ == "__main__":
    main()
