"""Lookups with a full hit among a million rows: the time from token ids to held slots.

    lookup      Producer.prompt and Producer.lookup of a prompt whose chunks all lie in DRAM. It is hashed anew each
                time, and two dozen others take their turn before it comes again. Holds are really taken; giving them
                back is not timed
    hashing     the two native calls that make the keys, and nothing else: the limit
    per second  one process: hash, look up, give back, one 4K prompt after the other
    int64       the same 128K tokens as engines often have them, int64, checked and narrowed on the way: no goal

Token ids are a uint32 array. Chunks have 256 tokens. No lmpipe process runs: a lookup asks none.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Sequence
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lmpipe import native
from lmpipe.bench.harness import Setting, main, scaled, shared_directory
from lmpipe.bench.pages import Prompts
from lmpipe.bench.report import Figure, Goal
from lmpipe.bench.still_node import StillNode
from lmpipe.keys import KEY_BYTES
from lmpipe.layout import CHUNK_TOKENS, KVLayout
from lmpipe.producer import Producer

LAYOUT = KVLayout.paged(1, 1, 1, "bfloat16", 16)
GOALS_MS = {4096: 0.05, 32768: 0.15, 131072: 0.5}
PROMPTS = 24
RUNS = 400
ATTACH_S = 10.0
PER_SECOND = Goal("value", ">=", 20_000)

Tokens = npt.NDArray[np.uint32]


def run(setting: Setting) -> list[Figure]:
    """Each prompt length; then lookups per second, and wide token ids."""
    goals = {setting.size(tokens, tokens // 8): goal_ms for tokens, goal_ms in GOALS_MS.items()}
    with shared_directory() as directory:
        # In another process, as in life: what a million rows leave in this one's heap is no part of a lookup.
        builder = get_context("spawn").Process(target=_build, args=(setting, directory, list(goals)))
        builder.start()
        builder.join()
        if builder.exitcode:
            raise RuntimeError(f"the index could not be built, status {builder.exitcode}")
        with Producer(directory, LAYOUT, model="bench") as producer:
            prompts = {tokens: _prompts(setting, tokens) for tokens in goals}
            _wait(producer, prompts[max(goals)][0])
            figures: list[Figure] = []
            for tokens, goal_ms in goals.items():
                figures += _one_length(setting, producer, prompts[tokens], goal_ms)
            figures.append(_per_second(setting, producer, prompts[min(goals)]))
            figures.append(_wide(setting, producer, prompts[max(goals)]))
            return figures


def _prompts(setting: Setting, tokens: int) -> list[Tokens]:
    return [Prompts(tokens, seed).fresh() for seed in range(setting.size(PROMPTS, 2))]


def _build(setting: Setting, directory: Path, lengths: list[int]) -> None:
    """A million rows, and the prompts among them."""
    prompts = [prompt for tokens in lengths for prompt in _prompts(setting, tokens)]
    rows, slots = setting.size(1_000_000, 10_000), sum(map(len, prompts)) // CHUNK_TOKENS
    node = StillNode(directory, LAYOUT, CHUNK_TOKENS, slots, setting.size(512 << 20, 16 << 20))
    node.fill(rows, lambda done: setting.say(f"index: {done:,} of {rows:,} rows"))
    with Producer(directory, LAYOUT, model="bench") as producer:
        for tokens in prompts:
            node.add(producer.prompt(tokens))
    node.open()
    node.close()


def _wait(producer: Producer, tokens: Tokens) -> None:
    deadline_s = time.monotonic() + ATTACH_S
    while time.monotonic() < deadline_s:
        found = producer.lookup(producer.prompt(tokens))
        found.release()
        if found.tokens == len(tokens):
            return
        time.sleep(0.05)
    raise RuntimeError(f"not all of {len(tokens)} tokens are found: {producer.reason}")


def _timed(producer: Producer, tokens: npt.NDArray[np.integer]) -> float:
    began = time.perf_counter()
    found = producer.lookup(producer.prompt(tokens))
    took = time.perf_counter() - began
    hit = found.tokens
    found.release()
    if hit != len(tokens):
        raise RuntimeError(f"{hit} of {len(tokens)} tokens found")
    return took


def _one_length(setting: Setting, producer: Producer, prompts: list[Tokens], goal_ms: float) -> list[Figure]:
    turn, other = itertools.cycle(prompts), itertools.cycle(prompts[1:] + prompts[:1])
    namespace, root = producer.namespace, bytes(KEY_BYTES)

    def hashing() -> float:
        tokens = next(other)
        began = time.perf_counter()
        content = native.blake3_many(tokens.data, CHUNK_TOKENS * 4)
        native.chain_keys(namespace, root, content)
        return time.perf_counter() - began

    length = len(prompts[0])
    name = f"lookup, {length // 1024}K tokens" if length >= 1024 else f"lookup, {length} tokens"
    values, limits = setting.alternate(name, lambda: _timed(producer, next(turn)), hashing, RUNS)
    values, limits = scaled(values, 1e3), scaled(limits, 1e3)
    return [
        Figure.of(f"{name}, p50", values, "ms", goal=Goal("value", "<=", goal_ms)),
        Figure.of(f"{name}, against hashing", values, "ms", limits=limits, goal=Goal("ratio", "<=", 2.0)),
        Figure.of(f"{name}, p99", values, "ms", quantile=0.99),
    ]


def _per_second(setting: Setting, producer: Producer, prompts: Sequence[Tokens]) -> Figure:
    count, rates = setting.size(4000, 20), list[float]()
    for turn in range(setting.runs):
        setting.say(f"lookups per second: {turn + 1} of {setting.runs}")
        began = time.perf_counter()
        for tokens in itertools.islice(itertools.cycle(prompts), count):
            producer.lookup(producer.prompt(tokens)).release()
        rates.append(count / (time.perf_counter() - began))
    return Figure.of(f"lookups of {len(prompts[0]) // 1024}K tokens in one process", rates, "1/s", goal=PER_SECOND)


def _wide(setting: Setting, producer: Producer, prompts: Sequence[Tokens]) -> Figure:
    turn = itertools.cycle([tokens.astype(np.int64) for tokens in prompts])
    narrow = itertools.cycle(prompts)
    name = f"lookup, {len(prompts[0]) // 1024}K tokens as int64, against uint32"
    values, limits = setting.alternate(
        name, lambda: _timed(producer, next(turn)), lambda: _timed(producer, next(narrow)), RUNS
    )
    return Figure.of(name, scaled(values, 1e3), "ms", limits=scaled(limits, 1e3))


if __name__ == "__main__":
    sys.exit(main(run))
