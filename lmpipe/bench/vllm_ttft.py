"""Time to first token of vLLM engines that take turns, prompt by prompt, first cold, then warm.

cold   an engine without a connector, and each cache's saver: nothing is found, everything is saved, and stored before
       the next engine has its turn. Against the engine without
warm   the same engine again, which has the prompt in its own prefix cache, and each cache's loader: a new process with
       an empty prefix cache, each prompt once. Against the own prefix cache

Inside the clock: one call of `generate` for one token, all processes of the engine idle before. Just before, the same
engine has answered a prompt of the same size that it has in its own prefix cache, and a short one: nobody is measured
waking up. All other engines have gone to sleep before, which vLLM's do after a second of polling.

Prompts differ from their first token on. Each is whole chunks and a question of 64 tokens behind them, so that whoever
finds all there is to find computes the same 64 tokens.

Beside the first token stands the processor time of a cold prompt: of the engine, and of the cache's own processes until
all is stored. What a neighbour on the machine takes from the engine is not in it.

A first token is wrong if it is neither the one computed cold nor the one of the own prefix cache. In fp32 the run fails
then; in bf16 such tokens are counted, since rounding depends on how a prompt was cut.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from lmpipe.bench.report import Figure, Goal
from lmpipe.bench.vllm_caches import Cache
from lmpipe.bench.vllm_client import Answers, Common, Engine, Plan, group_of, processor_s, running
from lmpipe.errors import LmpipeError

COLD, OWN = "cold", "own prefix cache"
PROCESSOR = ", processor time"
NONE = Goal("value", "<=", 0)
QUESTION_TOKENS = 64
LEAST_CHUNK = 256
"""A loader may leave out as much of a prompt: its last chunk."""
FIRST_TOKEN = 64
"""Smaller ones are for the short prompts."""


@dataclass(frozen=True, slots=True)
class Prompts:
    """How long prompts are, how many rounds count and how many come before these."""

    sizes: Sequence[int]
    rounds: int
    warm_ups: int
    vocabulary: int
    seed: int = 20261122

    def all(self) -> list[tuple[int, int, list[int]]]:
        """Round (negative: does not count), size without the question, tokens."""
        random = np.random.default_rng(self.seed)
        return [
            (turn, size, random.integers(FIRST_TOKEN, self.vocabulary, size + QUESTION_TOKENS).tolist())
            for turn in range(-self.warm_ups, self.rounds)
            for size in self.sizes
        ]


@dataclass(frozen=True, slots=True)
class Seen:
    """One first token: in which round, of a prompt of which size, by which engine, after how many seconds."""

    turn: int
    size: int
    name: str
    seconds: float
    token: int
    processor_s: float = 0.0
    """Of cold ones."""


def measure(
    common: Common,
    caches: Sequence[Cache],
    prompts: Prompts,
    say: Callable[[str], None],
    rivals: Sequence[tuple[str, str, Goal]] = (),
) -> list[Figure]:
    """Cold, then warm, and the figures; of `rivals`, the first is measured against the second too.

    Raises LmpipeError when a prompt was, or was not, found.
    """
    run = _Run(common, caches, prompts, say)
    say("starting the engine without a connector")
    with running(common, [Plan("plain")]) as (plain,):
        savers = run.phase("cold", plain)
        loaders = run.phase("warm", plain)
    figures = [figure for size in prompts.sizes for figure in _figures(run.seen, size, savers, loaders, rivals)]
    judged = {plan.name for plan in (*savers, *loaders) if plan.judged}
    return [*figures, *_wrong(run.seen, judged, strict=common.dtype == "float32")]


class _Run:
    def __init__(self, common: Common, caches: Sequence[Cache], prompts: Prompts, say: Callable[[str], None]) -> None:
        self._common, self._caches, self._prompts, self._say = common, caches, prompts.all(), say
        self._sizes = prompts.sizes
        self.seen: list[Seen] = []
        self._before: dict[tuple[str, int], list[int]] = {}
        """What an engine was asked last of a size, once all engines are warm."""

    def phase(self, name: Literal["cold", "warm"], plain: Engine) -> list[Plan]:
        """All prompts through all savers, or through all loaders. Returns these."""
        by_cache = [cache.savers() if name == "cold" else cache.loaders() for cache in self._caches]
        plans = [plan for some in by_cache for plan in some]
        owners = [cache for cache, some in zip(self._caches, by_cache, strict=True) for _ in some]
        self._say(f"{name}: starting {len(plans)} engines")
        with running(self._common, plans) as engines:
            for cache in self._caches:
                cache.attached([engine for engine, owner in zip(engines, owners, strict=True) if owner is cache])
            entrants = [(plain, None), *zip(engines, owners, strict=True)]
            for number, (turn, size, prompt) in enumerate(self._prompts):
                self._say(f"{name}: {number + 1} of {len(self._prompts)}")
                first = number // len(self._sizes) % len(entrants)
                for engine, owner in [*entrants[first:], *entrants[:first]]:
                    if name == "cold":
                        self._cold(turn, size, prompt, engine, owner)
                    else:
                        self._warm(turn, size, prompt, engine, owner)
        return plans

    def _cold(self, turn: int, size: int, prompt: list[int], engine: Engine, owner: Cache | None) -> None:
        engine.get_ready()
        others: Sequence[int] = owner.pids() if owner else ()
        own = group_of(engine.pid)
        began_s, others_began_s = processor_s(own), processor_s(others)
        answers = engine.generate([prompt], 1)
        spent_s = processor_s(own) - began_s
        if answers.cached[0]:
            raise LmpipeError(f"{engine.name}: {answers.cached[0]} tokens of a new prompt were found")
        if owner:
            owner.saved(size)
            spent_s += processor_s(others) - others_began_s
        self._note(turn, size, engine.name if owner else COLD, answers, spent_s)

    def _warm(self, turn: int, size: int, prompt: list[int], engine: Engine, owner: Cache | None) -> None:
        # All engines have just done such a computation: none is measured finding its pages and code in memory again.
        # The one without a connector may have given this prompt up since; the others must not have it before.
        before = self._before.get((engine.name, size)) if owner else prompt
        if before is not None:
            engine.generate([before], 1)
        self._before[engine.name, size] = prompt
        answers = engine.first_token(prompt)
        # Just after a start the parts of a cache may not have found each other: a miss is allowed.
        if turn >= 0 and answers.cached[0] < size - LEAST_CHUNK:
            raise LmpipeError(f"{engine.name}: {answers.cached[0]} of {size} tokens were found; its log: {engine.log}")
        self._note(turn, size, engine.name if owner else OWN, answers)

    def _note(self, turn: int, size: int, name: str, answers: Answers, processor_s: float = 0.0) -> None:
        self.seen.append(Seen(turn, size, name, answers.seconds, answers.tokens[0][0], processor_s))


def _figures(
    seen: Sequence[Seen],
    size: int,
    savers: Sequence[Plan],
    loaders: Sequence[Plan],
    rivals: Sequence[tuple[str, str, Goal]],
) -> list[Figure]:
    def ms(name: str) -> list[float]:
        who = name.removesuffix(PROCESSOR)
        counted = [one for one in seen if (one.name, one.size) == (who, size) and one.turn >= 0]
        return [(one.processor_s if who != name else one.seconds) * 1e3 for one in counted]

    def figure(name: str, against: str = "", goal: Goal | None = None, title: str = "") -> Figure:
        title = title or f"{size // 1024}K, {name}"
        return Figure.of(title, ms(name), "ms", limits=ms(against) if against else (), goal=goal, paired=True)

    return [
        figure(COLD),
        *(figure(plan.name, COLD, plan.goal) for plan in savers),
        figure(COLD + PROCESSOR),
        *(figure(plan.name + PROCESSOR, COLD + PROCESSOR) for plan in savers),
        figure(OWN, COLD),
        *(figure(plan.name, OWN, plan.goal) for plan in loaders),
        *(figure(one, other, goal, f"{size // 1024}K, {one} / {other}") for one, other, goal in rivals),
    ]


def _wrong(seen: Sequence[Seen], judged: set[str], *, strict: bool) -> list[Figure]:
    right: dict[tuple[int, int], set[int]] = defaultdict(set)
    for one in seen:
        if one.name in (COLD, OWN):
            right[one.turn, one.size].add(one.token)
    counts = Counter(one.name for one in seen if one.token not in right[one.turn, one.size])
    if strict and (counts or any(len(tokens) > 1 for tokens in right.values())):
        raise LmpipeError(f"wrong first tokens: {dict(counts)}, {dict(right)}")
    total = Figure.of("wrong first tokens", [sum(counts[name] for name in judged)], "prompts", goal=NONE)
    return [total, *(Figure.of(f"wrong first tokens: {name}", [counts[name]], "prompts") for name in sorted(counts))]
