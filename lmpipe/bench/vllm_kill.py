"""SIGKILL of each lmpipe process under a real vLLM engine: what the first token costs, and when hits are back.

    a load      a prompt that lies below DRAM alone; the process dies just after the engine was asked
    a save      a new prompt; the process dies half-way through its prefill
    unrelated   the next prompt, in the engine's own prefix cache, while the process is away
    hits back   from the restarted process's being ready until a stored prompt is found again

First tokens are compared with computing prompts of the same size, in the same engine, in turns, with nobody killed. A
first token is wrong if it is not the one that the engine which saved the prompt had computed: in fp32 (a quick run) the
run fails then.
"""

from __future__ import annotations

import statistics
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from lmpipe.bench.harness import Setting, main
from lmpipe.bench.recovery import PATIENCE_S, forget_in
from lmpipe.bench.report import Figure, Goal
from lmpipe.bench.vllm import common_of, scratch
from lmpipe.bench.vllm_caches import LmpipeCache, lmpipe_options, wait_attached
from lmpipe.bench.vllm_client import Engine, Plan, running
from lmpipe.bench.vllm_models import LARGE, SMALL
from lmpipe.bench.vllm_ttft import FIRST_TOKEN, LEAST_CHUNK, QUESTION_TOKENS
from lmpipe.errors import LmpipeError
from lmpipe.handles import Tier
from lmpipe.testing import Node

TOKENS, QUICK_TOKENS = 1024, 512
ROUNDS = 5
PROBES = 12
"""Stored prompts asked one after the other until one of them is found again."""
KILL_AFTER_S = (0.001, 0.004, 0.012)
"""How long after a load has begun; by round."""
LATE = Goal("value", "<=", 100)
BACK = Goal("value", "<=", 2)
NONE = Goal("value", "<=", 0)


@dataclass(slots=True)
class Seen:
    """Of one process: milliseconds of first tokens, seconds until hits were back."""

    load_ms: list[float] = field(default_factory=list[float])
    save_ms: list[float] = field(default_factory=list[float])
    unrelated_ms: list[float] = field(default_factory=list[float])
    back_s: list[float] = field(default_factory=list[float])


class Trial:
    """One node and an engine that loads from it; `stored` are prompts that only the node has, with their tokens."""

    def __init__(self, node: Node, engine: Engine, stored: Iterator[tuple[list[int], int]], fresh: Iterator[list[int]]):
        self._node, self._engine, self._stored, self._fresh = node, engine, stored, fresh
        self.cold_ms: list[float] = []
        self.own_ms: list[float] = []
        self.wrong = 0
        self._last: list[int] = []

    def calm(self) -> None:
        """One prompt computed, and found again in the own prefix cache, while all goes well."""
        self._last = next(self._fresh)
        self.cold_ms.append(self._engine.first_token(self._last).seconds * 1e3)
        self.own_ms.append(self._engine.first_token(self._last).seconds * 1e3)

    def kill(self, process: str, turn: int) -> tuple[float, float, float, float]:
        """First tokens (ms) with the process killed in a load, in a save, and after it; seconds until hits are back."""
        prompt, token = next(self._stored)
        load_ms, _ = self._killed(process, prompt, KILL_AFTER_S[turn % len(KILL_AFTER_S)], token)
        half_s = statistics.median(self.cold_ms) / 2e3
        save_ms, pid = self._killed(process, next(self._fresh), half_s, None, wait=False)
        unrelated_ms = self._engine.generate([self._last], 1).seconds * 1e3
        if process != "supervisor":
            self._node.wait_restarted(process, pid, PATIENCE_S)
        return load_ms, save_ms, unrelated_ms, self._until_found()

    def _killed(
        self, process: str, prompt: list[int], after_s: float, token: int | None, *, wait: bool = True
    ) -> tuple[float, int]:
        pids: list[int] = []
        self._engine.get_ready()
        timer = threading.Timer(after_s, lambda: pids.append(self._node.kill(process)))
        timer.start()
        answers = self._engine.generate([prompt], 1)
        timer.join()
        self._judge(answers.tokens[0][0], token)
        if process == "supervisor":
            self._node.start()
        elif wait:
            self._node.wait_restarted(process, pids[0], PATIENCE_S)
            self._until_found()
        return answers.seconds * 1e3, pids[0]

    def _until_found(self) -> float:
        began_s = time.monotonic()
        for _ in range(PROBES):
            prompt, token = next(self._stored)
            answers = self._engine.generate([prompt], 1)
            self._judge(answers.tokens[0][0], token)
            if answers.cached[0] >= len(prompt) - QUESTION_TOKENS - LEAST_CHUNK:
                return time.monotonic() - began_s
        raise LmpipeError(f"{PROBES} stored prompts were computed again; the engine's log: {self._engine.log}")

    def _judge(self, token: int, right: int | None) -> None:
        self.wrong += right is not None and token != right


def run(setting: Setting) -> list[Figure]:
    """One saver, one loader, and every process of the node killed in turn."""
    tokens, model = (QUICK_TOKENS, SMALL) if setting.quick else (TOKENS, LARGE)
    rounds = setting.size(ROUNDS, 1)
    with scratch(setting.disk) as work:
        common = common_of(work, model, tokens, quick=setting.quick)
        cache = LmpipeCache(work / "lmpipe", tiers=("DRAM",))
        with cache:
            node = cache.node
            processes = [*(process.name for process in node.topology.processes), "supervisor"]
            count = rounds * len(processes) * (3 + PROBES // 2)
            prompts = _prompts(tokens + QUESTION_TOKENS, model.vocabulary)
            setting.say(f"computing and saving {count} prompts")
            wanted = [next(prompts) for _ in range(count)]
            with running(common, cache.savers()) as (saver,):
                cache.attached([saver])
                saved = [(prompt, saver.generate([prompt], 1).tokens[0][0]) for prompt in wanted]
                cache.saved(count * tokens)
            with running(common, [Plan("loader", lmpipe_options(node))]) as (loader,):
                wait_attached(node, loader)
                forget_in(node, Tier.DRAM)
                trial = Trial(node, loader, iter(saved), prompts)
                trial.calm()
                seen = {process: Seen() for process in processes}
                for turn in range(rounds):
                    for process in processes:
                        setting.say(f"{process}: {turn + 1} of {rounds}")
                        trial.calm()
                        _note(seen[process], trial.kill(process, turn))
    if trial.wrong and common.dtype == "float32":
        raise LmpipeError(f"{trial.wrong} wrong first tokens")
    return figures(seen, trial.cold_ms[1:], trial.own_ms[1:], trial.wrong)


def _prompts(tokens: int, vocabulary: int) -> Iterator[list[int]]:
    random = np.random.default_rng(4)
    while True:
        yield random.integers(FIRST_TOKEN, vocabulary, tokens).tolist()


def _note(seen: Seen, found: tuple[float, float, float, float]) -> None:
    for values, value in zip((seen.load_ms, seen.save_ms, seen.unrelated_ms, seen.back_s), found, strict=True):
        values.append(value)


def figures(seen: dict[str, Seen], cold_ms: list[float], own_ms: list[float], wrong: int) -> list[Figure]:
    """What is to be reported: medians, and by how much they are later than computing the prompt."""

    def later(values_ms: list[float], than_ms: list[float]) -> list[float]:
        return [max(statistics.median(values_ms) - statistics.median(than_ms), 0.0)]

    made = [Figure.of("computed", cold_ms, "ms"), Figure.of("own prefix cache", own_ms, "ms")]
    for process, of in seen.items():
        made += [
            Figure.of(f"{process} killed in a load", of.load_ms, "ms", limits=cold_ms),
            Figure.of(f"{process} killed in a load, later than computed", later(of.load_ms, cold_ms), "ms", goal=LATE),
            Figure.of(f"{process} killed in a save", of.save_ms, "ms", limits=cold_ms),
            Figure.of(f"{process} killed in a save, later than computed", later(of.save_ms, cold_ms), "ms", goal=LATE),
            Figure.of(f"{process} away, unrelated prompt", of.unrelated_ms, "ms", limits=own_ms),
            Figure.of(f"{process} away, unrelated, later than else", later(of.unrelated_ms, own_ms), "ms", goal=LATE),
            Figure.of(f"{process} back, until hits are", of.back_s, "s", goal=BACK),
        ]
    return [*made, Figure.of("wrong first tokens", [wrong], "prompts", goal=NONE)]


if __name__ == "__main__":
    sys.exit(main(run))
