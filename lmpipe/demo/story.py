"""The demo from start to end: the same workload without lmpipe, then warm from one tier after another. Knows no torch.

Every answer is compared, token by token, with the answer of the same engine before lmpipe was attached. In bf16 a token
may be another where its logit was as good as even.
"""

from __future__ import annotations

import contextlib
import os
import platform
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lmpipe.demo import workload as wl
from lmpipe.demo.client import Answer, EngineProcess
from lmpipe.demo.node import DemoNode
from lmpipe.demo.report import Report, Row, Sample
from lmpipe.demo.scale import Scale
from lmpipe.demo.workload import Request, WorkloadSize

Say = Callable[[str], None]
"""Told each step, in a few words."""

BELOW_DRAM = ["ssd", "remote"]


@dataclass(frozen=True, slots=True)
class Reference:
    """One request and its answer without lmpipe."""

    request: Request
    answer: Answer

    @property
    def sequence(self) -> list[int]:
        """Prompt and answer."""
        return self.request.tokens + self.answer.tokens


class Story:
    """Runs in `work`, which holds tiers and logs."""

    def __init__(self, work: Path, scale: Scale, *, say: Say) -> None:
        self._work, self._scale, self._say = work, scale, say
        self._size: WorkloadSize = scale.workload
        self._references: list[Reference] = []
        self.report = Report()

    def run(self) -> Report:
        """The whole of it; processes are gone afterwards, whatever happens."""
        started = time.monotonic()
        with contextlib.ExitStack() as stack:
            first = stack.enter_context(self._engine())
            self._say(f"lmpipe up: gather, compress, persist, replicate; tiers in {self._work}")
            node = DemoNode(self._work, self._scale)
            stack.enter_context(node)
            self._say("engine 1: building the model")
            self._machine(first.wait_started())
            self._without(first)
            self._first_engine(node, first)
            first.close()
            second = stack.enter_context(self._engine())
            self._say("engine 2: building the model")
            second.wait_started()
            self._second_engine(node, second)
            self._tiers(node, second)
            second.close()
            self._say("stopping")
        self.report.seconds = time.monotonic() - started
        return self.report

    def _engine(self) -> EngineProcess:
        return EngineProcess(self._scale.name, self._work / "engine.log")

    def _machine(self, computes: dict[str, Any]) -> None:
        self.report.machine = {
            "processor": platform.processor() or platform.machine(),
            "cores": len(os.sched_getaffinity(0)),
            **computes,
            "weights": self._scale.model.weights,
            "dtype": self._scale.model.dtype,
            **{name: version(name) for name in ("torch", "transformers", "lmpipe")},
        }

    def _without(self, engine: EngineProcess) -> None:
        """The reference: every request without lmpipe."""
        engine.generate(wl.tokens_of("warm up the kernels. ") * 8, 2)
        for request in wl.document_requests(self._size):
            self._refer(engine, request)
        history: list[int] = []
        for turn in range(self._size.turns):
            self._refer(engine, wl.turn_request(self._size, turn, history))
            history = self._references[-1].sequence
        same = ((one.request, one.answer) for one in self._references)
        samples = [Sample(request.name, len(request.tokens), answer, answer) for request, answer in same]
        self.report.rows.append(Row("cold, no lmpipe", samples))

    def _refer(self, engine: EngineProcess, request: Request) -> None:
        self._say(f"cold, no lmpipe: {request.name}, {len(request.tokens):,} tokens")
        self._references.append(Reference(request, engine.generate(request.tokens, request.new_tokens)))

    def _first_engine(self, node: DemoNode, engine: EngineProcess) -> None:
        """lmpipe attached to the same engine: what is new is computed and saved, what was seen is loaded."""
        self._say("engine 1: attach")
        engine.attach(node.run_dir)
        cold, warm = Row("cold, attached", expected_tier="none"), Row("DRAM, same engine", expected_tier="dram")
        for reference in self._references:
            (cold if reference.request.first else warm).samples.append(self._again(engine, reference, "engine 1"))
            engine.flush([], [])
        self.report.rows += [cold, warm]
        self._say("waiting until all of it is on SSD and in the remote tier")
        engine.flush(self._lasts_tokens(), BELOW_DRAM)

    def _second_engine(self, node: DemoNode, engine: EngineProcess) -> None:
        """Another process finds what the first one left, and the controls."""
        engine.attach(node.run_dir)
        self._row("DRAM, new process", engine, self._references, "dram")
        reference = self._references[0]
        self._say("controls: loaded KV as it is, and scrambled")
        straight, scrambled = engine.control(reference.request.tokens, reference.answer.tokens)
        self.report.straight_control_equal = self._scale.agrees(straight)
        self.report.negative_control_differs = not self._scale.agrees(scrambled)

    def _tiers(self, node: DemoNode, engine: EngineProcess) -> None:
        """lmpipe is killed three times under a living engine, and each time it comes back with one tier less."""
        self._say(f"SIGKILL to all {node.kill_all()} processes of lmpipe")
        engine.wait_lost()
        self._row("DRAM, lmpipe dead", engine, self._lasts(), "dram")
        self._back(node, engine)
        self._row("DRAM, after kill", engine, self._lasts(), "dram")
        for label, tier, without in (("SSD", "ssd", "the arena"), ("remote", "remote", "the arena and the SSD tier")):
            self._say(f"SIGKILL to all {node.kill_all()} processes of lmpipe, and {without} removed")
            engine.wait_lost()
            node.remove_arena()
            if tier == "remote":
                node.remove_ssd()
            self._back(node, engine)
            engine.flush(self._lasts_tokens(), [tier])  # a node is ready before it has listed what it stores
            self._row(f"{label}, after kill", engine, self._lasts(), tier)

    def _back(self, node: DemoNode, engine: EngineProcess) -> None:
        started = time.monotonic()
        node.start()
        self._say(f"lmpipe is back after {time.monotonic() - started:.1f} s; the engine registers again by itself")
        engine.wait_ready()

    def _lasts(self) -> list[Reference]:
        """The longest request of each document and of the conversation."""
        return [reference for reference in self._references if reference.request.last]

    def _lasts_tokens(self) -> list[list[int]]:
        return [reference.request.tokens for reference in self._lasts()]

    def _row(self, label: str, engine: EngineProcess, references: Iterable[Reference], tier: str) -> None:
        samples = [self._again(engine, reference, label) for reference in references]
        self.report.rows.append(Row(label, samples, tier))

    def _again(self, engine: EngineProcess, reference: Reference, label: str) -> Sample:
        request = reference.request
        self._say(f"{label}: {request.name}, {len(request.tokens):,} tokens")
        answer = engine.generate(request.tokens, request.new_tokens, reference.answer.tokens)
        return Sample(request.name, len(request.tokens), reference.answer, answer, self._scale.tie)

    @property
    def steps(self) -> int:
        """How many requests there are in all, for a progress bar."""
        asked = self._size.documents * self._size.questions + self._size.turns
        return 3 * asked + 4 * (self._size.documents + 1)
