"""The driver's end of vLLM engine processes: what each is given, and how it is asked. Knows neither vLLM nor lmpipe."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from lmpipe.bench.report import Goal
from lmpipe.demo.asked_process import AskedProcess

PROGRAM = [sys.executable, "-P", "-m", "lmpipe.bench.vllm_engine"]
START_S = 240.0
ANSWER_S = 300.0
IDLE_S = 0.05
REST_S = 1.2
"""vLLM's processes poll for a second after their last message before they sleep, each on a processor of its own."""
WAKE_TOKENS = 48
"""Of the short prompt before each one that counts; less than any block, so that nobody saves it."""


@dataclass(frozen=True, slots=True)
class Plan:
    """An engine to be started: a name for people, what its LLM gets beside the common options, its environment, and
    what is wanted of it. `judged`: its wrong tokens are counted against the goal.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    env: Mapping[str, str] = field(default_factory=dict[str, str])
    goal: Goal | None = None
    judged: bool = True


@dataclass(frozen=True, slots=True)
class Common:
    """What all engines of a run have in common.

    `processes`: vLLM as it is by default, API, scheduler and worker in a process each; else all in one, which starts
    faster.
    """

    model: Path
    dtype: str
    longest_tokens: int
    kv_bytes: int
    processes: bool
    logs: Path

    def options(self) -> dict[str, Any]:
        """For `vllm.LLM`."""
        return {
            "model": str(self.model),
            "dtype": self.dtype,
            "max_model_len": self.longest_tokens,
            "kv_cache_memory_bytes": self.kv_bytes,
            "enforce_eager": True,
            "skip_tokenizer_init": True,
            "enable_prefix_caching": True,
            "seed": 0,
        }

    def env(self) -> dict[str, str]:
        """For the process; engines may use the processors that this process may use."""
        return {
            **os.environ,
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, sorted(os.sched_getaffinity(0)))),
            "VLLM_ENABLE_V1_MULTIPROCESSING": str(int(self.processes)),
            "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }


@dataclass(frozen=True, slots=True)
class Answers:
    """To the prompts of one call. `cached`: prompt tokens that were not computed, for each prompt."""

    seconds: float
    tokens: list[list[int]]
    cached: list[int]


class Engine(AskedProcess):
    """One vLLM with all its processes. Nothing of it is left after the `with`."""

    def __init__(self, common: Common, plan: Plan) -> None:
        options = orjson.dumps({**common.options(), **plan.options}).decode()
        log = common.logs / f"{plan.name.replace(' ', '-').replace(',', '')}.log"
        super().__init__([*PROGRAM, options], log, {**common.env(), **plan.env}, own_group=True)
        self.name = plan.name
        self._asked = 0

    def wait_started(self) -> None:
        """Until the model is loaded. Raises EngineFailed."""
        self.answer(START_S)

    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> Answers:
        """Greedy tokens of all prompts at once. Raises EngineFailed."""
        got = self.ask({"op": "generate", "prompts": prompts, "new_tokens": new_tokens}, ANSWER_S)
        return Answers(got["seconds"], got["tokens"], got["cached"])

    def get_ready(self) -> None:
        """Awake and idle, while all others sleep."""
        time.sleep(REST_S)
        self._asked += 1
        self.generate([[1 + self._asked % 64] * WAKE_TOKENS], 1)
        time.sleep(IDLE_S)

    def first_token(self, prompt: Sequence[int]) -> Answers:
        """The first token of one prompt, from an engine that is ready."""
        self.get_ready()
        return self.generate([prompt], 1)


def group_of(leader: int) -> list[int]:
    """The processes of a process group."""
    found: list[int] = []
    for entry in Path("/proc").iterdir():
        with suppress(ValueError, ProcessLookupError):
            if os.getpgid(int(entry.name)) == leader:
                found.append(int(entry.name))
    return found


def processor_s(pids: Sequence[int]) -> float:
    """Processor time that the living threads of these processes have had."""
    total_ns = 0
    for pid in pids:
        for path in Path(f"/proc/{pid}/task").glob("*/schedstat"):
            with suppress(OSError):  # a thread may end
                total_ns += int(path.read_bytes().split()[0])
    return total_ns / 1e9


@contextmanager
def running(common: Common, plans: Sequence[Plan], at_once: int = 2) -> Generator[list[Engine]]:
    """An engine for each plan, some of them starting at the same time; all of them end together."""
    with ExitStack() as stack:
        engines: list[Engine] = []
        waiting: list[Engine] = []
        try:
            for plan in plans:
                if len(waiting) == at_once:
                    waiting.pop(0).wait_started()
                engines.append(stack.enter_context(Engine(common, plan)))
                waiting.append(engines[-1])
            for engine in waiting:
                engine.wait_started()
            yield engines
        except BaseException:
            for engine in engines:
                engine.finish(at_once=True)
            raise
        for engine in engines:
            engine.finish()
