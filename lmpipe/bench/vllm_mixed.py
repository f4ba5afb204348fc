"""Throughput of a mixed multi-turn workload: conversations that share a system prompt, more of them than the engine's
own KV cache has room for; turn by turn all at once, as users would return, in engines that take turns.

Each round is a workload of its own for every engine. What an engine has answered becomes part of its next prompts.
Inside the clock: the calls of `generate` of all turns, saves and evictions that go on meanwhile included.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from lmpipe.bench.report import Figure, Goal
from lmpipe.bench.vllm_client import Engine

THROUGHPUT = Goal("ratio", ">=", 1.0)
FIRST_TOKEN = 64


@dataclass(frozen=True, slots=True)
class Workload:
    """Sizes in tokens, but `rounds`, `conversations` and `turns`."""

    rounds: int
    conversations: int
    turns: int
    system: int
    question: int
    answer: int
    vocabulary: int
    seed: int = 20261123

    @property
    def longest(self) -> int:
        """Of a conversation at its end."""
        return self.system + self.turns * (self.question + self.answer)


@dataclass(frozen=True, slots=True)
class Outcome:
    """One workload in one engine. `cached`: of the prompt tokens, how many were not computed."""

    seconds: float
    answered: int
    prompted: int
    cached: int


def run(engine: Engine, workload: Workload, turn: int) -> Outcome:
    """One round."""
    random = np.random.default_rng((workload.seed, turn))

    def tokens(count: int) -> list[int]:
        return random.integers(FIRST_TOKEN, workload.vocabulary, count).tolist()

    system = tokens(workload.system)
    prompts = [list(system) for _ in range(workload.conversations)]
    seconds, prompted, cached = 0.0, 0, 0
    for _ in range(workload.turns):
        for prompt in prompts:
            prompt += tokens(workload.question)
        answers = engine.generate(prompts, workload.answer)
        seconds += answers.seconds
        prompted += sum(map(len, prompts))
        cached += sum(answers.cached)
        for prompt, answer in zip(prompts, answers.tokens, strict=True):
            prompt += answer
    return Outcome(seconds, workload.conversations * workload.turns * workload.answer, prompted, cached)


def measure(plain: Engine, attached: Sequence[Engine], workload: Workload, say: Callable[[str], None]) -> list[Figure]:
    """All engines in turns; each against `plain`. The first round is thrown away where there are several."""
    engines = [plain, *attached]
    outcomes: dict[str, list[Outcome]] = {engine.name: [] for engine in engines}
    warm_ups = int(workload.rounds > 1)
    for turn in range(-warm_ups, workload.rounds):
        say(f"mixed: {'warming up' if turn < 0 else f'{turn + 1} of {workload.rounds}'}")
        first = turn % len(engines)
        for engine in [*engines[first:], *engines[:first]]:
            outcome = run(engine, workload, turn + warm_ups)
            if turn >= 0:
                outcomes[engine.name].append(outcome)
    figures: list[Figure] = []
    for engine in engines:
        mine, limits = outcomes[engine.name], outcomes[plain.name] if engine is not plain else []
        goal = THROUGHPUT if limits else None
        figures += [
            Figure.of(f"mixed, {engine.name}", _rates(mine), "tokens/s", limits=_rates(limits), goal=goal),
            Figure.of(f"mixed, {engine.name}", _seconds(mine), "s", limits=_seconds(limits)),
            Figure.of(f"mixed, {engine.name}: not computed", _found(mine), "% of prompts", limits=_found(limits)),
        ]
    return figures


def _rates(outcomes: Sequence[Outcome]) -> list[float]:
    return [one.answered / one.seconds for one in outcomes]


def _seconds(outcomes: Sequence[Outcome]) -> list[float]:
    return [one.seconds for one in outcomes]


def _found(outcomes: Sequence[Outcome]) -> list[float]:
    return [100 * one.cached / one.prompted for one in outcomes]
