"""An engine in a process of its own: reads one JSON command a line, answers with one JSON line. Ends with its input."""

from __future__ import annotations

import json
import random
import sys
import time
from pathlib import Path
from typing import Any

from rig import CHUNK_TOKENS, Engine

KEPT: list[Any] = []
"""Finds that are held until the end."""


def save(engine: Engine, seed: int, chunks: int) -> dict[str, Any]:
    ticket = engine.save(engine.prompt(seed, chunks))
    return {"saved": ticket.saved, "known": ticket.known, "dropped": ticket.dropped}


def load(engine: Engine, seed: int, chunks: int, deadline_ms: float = 30_000) -> dict[str, Any]:
    result = engine.load(engine.prompt(seed, chunks), deadline_ms=deadline_ms)
    return {"chunks": result.chunks, "reason": result.reason, "by_tier": result.by_tier}


def found(engine: Engine, seed: int, chunks: int) -> int:
    return engine.found(engine.prompt(seed, chunks))


def lookups(engine: Engine, seed: int, chunks: int, count: int) -> int:
    """Look up `count` times; how often all was found."""
    prompt = engine.prompt(seed, chunks)
    return sum(engine.found(prompt) == chunks for _ in range(count))


def hold(engine: Engine, seed: int, chunks: int) -> int:
    """Look up and keep the holds."""
    prompt = engine.prompt(seed, chunks)
    KEPT.append((prompt, engine.producer.lookup(prompt)))
    return KEPT[-1][1].chunks


def load_held(engine: Engine) -> int:
    """Load what was held first; how many chunks, every byte of them compared."""
    prompt, found = KEPT.pop(0)
    ids = engine.memory.allocate(found.chunks, CHUNK_TOKENS)
    result = engine.producer.load(found, engine.memory.pool, ids)
    assert engine.memory.wrong(prompt.keys[: result.chunks], ids) == []
    return result.chunks


def churn(engine: Engine, seed: int, prompts: int, chunks: int, seconds: float, deadline_ms: float = 5000) -> Any:
    """Save and load prompts at random for a while, checking every byte that is loaded; what came of it."""
    draw, end_s = random.Random(seed), time.monotonic() + seconds
    done = {"saves": 0, "saved": 0, "known": 0, "dropped": 0, "loads": 0, "loaded": 0}
    while time.monotonic() < end_s:
        prompt = engine.prompt(draw.randrange(prompts), draw.randrange(1, chunks + 1))
        if draw.random() < 0.5:
            ticket = engine.save(prompt)
            done["saves"] += 1
            done["saved"] += ticket.saved
            done["known"] += ticket.known
            done["dropped"] += sum(ticket.dropped.values())
            assert ticket.saved + ticket.known + sum(ticket.dropped.values()) == ticket.chunks
        else:
            done["loads"] += 1
            done["loaded"] += engine.load(prompt, deadline_ms=deadline_ms).chunks
        if draw.random() < 0.05:
            engine.producer.invalidate(prompt)
        if draw.random() < 0.05:
            engine.producer.prefetch(prompt)
        if draw.random() < 0.05:
            engine.producer.pin(prompt, ttl_s=0.1)
    return done


def stats(engine: Engine) -> dict[str, int]:
    return engine.producer.stats()


def die_in(engine: Engine, state: str) -> None:
    engine.kill_in(state)


COMMANDS = {f.__name__: f for f in (save, load, found, lookups, hold, load_held, churn, stats, die_in)}


def main() -> None:
    options = json.loads(sys.argv[1])
    pages_in = options.pop("pages_in")
    run_dir = Path(options.pop("run_dir"))
    with Engine(run_dir, pages_in=Path(pages_in) if pages_in else None, **options) as engine:
        print(json.dumps(engine.producer.state), flush=True)
        for line in sys.stdin:
            command = json.loads(line)
            print(json.dumps(COMMANDS[command.pop("do")](engine, **command)), flush=True)
        for _, found in KEPT:
            found.release()


main()
