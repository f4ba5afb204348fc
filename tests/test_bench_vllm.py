"""The vLLM benchmarks' own rules, without vLLM: engines that are told what to answer."""

from __future__ import annotations

import json
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from lmpipe.bench import vllm_mixed, vllm_ttft
from lmpipe.bench.report import Goal
from lmpipe.bench.vllm_caches import Cache
from lmpipe.bench.vllm_client import Answers, Common, Engine, Plan, running
from lmpipe.bench.vllm_mixed import Workload
from lmpipe.bench.vllm_ttft import Prompts
from lmpipe.demo.asked_process import EngineFailed
from lmpipe.errors import LmpipeError

FAKE = """
import json, pathlib, sys
options = json.loads(sys.argv[1])
if options.get("refuses"):
    sys.exit("no engine today")
shared = pathlib.Path(options["model"])
own = set()
print('{"started": true}', flush=True)
for line in sys.stdin:
    question = json.loads(line)
    if question["op"] != "generate":
        sys.exit("what?")
    keys = [str(prompt) for prompt in question["prompts"]]
    saved = set(json.loads(shared.read_text())) if options.get("shares") and shared.exists() else set()
    cached = [len(p) if k in own | saved else 0 for k, p in zip(keys, question["prompts"])]
    own |= set(keys)
    if options.get("shares"):
        shared.write_text(json.dumps(sorted(own | saved)))
    tokens = [[sum(p) + options.get("off", 0)] * question["new_tokens"] for p in question["prompts"]]
    print(json.dumps({"seconds": 0.5 if cached[0] else 1.0, "tokens": tokens, "cached": cached}), flush=True)
"""
"""Finds a prompt again if it is the same as a whole; `shares` says whether others find it, `off` makes tokens wrong."""


class Shared(Cache):
    """Finds across processes what was asked before."""

    def __init__(self, off: int = 0, judged: bool = True) -> None:
        super().__init__()
        self.stored: list[int] = []
        self._off, self._judged = off, judged

    def savers(self) -> list[Plan]:
        return [Plan("cold, shared", {"shares": True})]

    def loaders(self) -> list[Plan]:
        return [Plan("shared", {"shares": True, "off": self._off}, judged=self._judged)]

    def saved(self, tokens: int) -> None:
        self.stored.append(tokens)


@pytest.fixture
def common(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Common:
    fake = tmp_path / "fake.py"
    fake.write_text(textwrap.dedent(FAKE))
    monkeypatch.setattr("lmpipe.bench.vllm_client.PROGRAM", [sys.executable, str(fake)])
    monkeypatch.setattr("lmpipe.bench.vllm_client.REST_S", 0.0)
    return Common(tmp_path / "shared.json", "bfloat16", 4096, 1 << 20, False, tmp_path)


PROMPTS = Prompts((1024, 2048), rounds=3, warm_ups=1, vocabulary=512)


def test_cold_is_compared_with_cold_and_warm_with_the_own_prefix_cache(common: Common) -> None:
    cache = Shared()
    figures = {figure.name: figure for figure in vllm_ttft.measure(common, [cache], PROMPTS, lambda _: None)}
    assert cache.stored == [1024, 2048] * 4
    assert (figures["1K, cold"].value, figures["1K, cold"].runs) == (1000.0, 3)
    assert (figures["2K, cold, shared"].limit, figures["2K, cold, shared"].ratio) == (1000.0, 1.0)
    assert (figures["2K, shared"].value, figures["2K, shared"].limit) == (500.0, 500.0)
    assert (figures["wrong first tokens"].value, figures["wrong first tokens"].met) == (0, True)


def test_engines_take_turns_in_being_first_with_every_size(common: Common, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, str]] = []

    def note(engine: Engine, prompts: list[list[int]], new_tokens: int, ask: Any = Engine.generate) -> Answers:
        if len(prompts[0]) >= 1024:
            asked.append((len(prompts[0]) // 1024, engine.name))
        return ask(engine, prompts, new_tokens)

    monkeypatch.setattr(Engine, "generate", note)
    rivals = [("cold, shared", "cold", Goal("ratio", "<=", 1.0))]
    figures = vllm_ttft.measure(common, [Shared()], PROMPTS, lambda _: None, rivals)
    for size in (1, 2):
        names = [name for asked_size, name in asked if asked_size == size]
        assert names[:8:2] == ["plain", "cold, shared"] * 2
    assert {figure.name for figure in figures if " / " in figure.name} == {f"{n}K, cold, shared / cold" for n in (1, 2)}


def test_wrong_tokens_are_counted_in_bf16_and_end_a_run_in_fp32(common: Common) -> None:
    figures = {f.name: f for f in vllm_ttft.measure(common, [Shared(off=1)], PROMPTS, lambda _: None)}
    assert (figures["wrong first tokens"].value, figures["wrong first tokens"].met) == (8, False)
    assert figures["wrong first tokens: shared"].value == 8
    assert "wrong first tokens: cold, shared" not in figures
    common.model.unlink()
    figures = {f.name: f for f in vllm_ttft.measure(common, [Shared(off=1, judged=False)], PROMPTS, lambda _: None)}
    assert (figures["wrong first tokens"].value, figures["wrong first tokens: shared"].value) == (0, 8)
    common.model.unlink()
    exact = Common(common.model, "float32", 4096, 1 << 20, False, common.logs)
    with pytest.raises(LmpipeError, match="'shared': 8"):
        vllm_ttft.measure(exact, [Shared(off=1)], PROMPTS, lambda _: None)


def test_a_loader_that_finds_nothing_is_not_measured(common: Common) -> None:
    class Empty(Shared):
        def loaders(self) -> list[Plan]:
            return [Plan("empty")]

    with pytest.raises(LmpipeError, match="empty: 0 of 1024 tokens were found"):
        vllm_ttft.measure(common, [Empty()], PROMPTS, lambda _: None)


def test_a_workload_is_the_same_for_every_engine(common: Common) -> None:
    workload = Workload(2, conversations=3, turns=2, system=32, question=16, answer=4, vocabulary=512)
    with running(common, [Plan("without"), Plan("with")]) as (plain, attached):
        figures = vllm_mixed.measure(plain, [attached], workload, lambda _: None)
        assert vllm_mixed.run(plain, workload, 9) == vllm_mixed.run(attached, workload, 9)
    assert [f.name for f in figures if f.goal] == ["mixed, with"]
    assert {f.value for f in figures if f.unit == "s"} == {2.0}
    assert workload.longest == 72


def test_an_engine_that_does_not_start_says_why_and_nothing_is_left(common: Common) -> None:
    with (
        pytest.raises(EngineFailed, match="no engine today"),
        running(common, [Plan("good"), Plan("bad", {"refuses": True})]),
    ):
        pass


def test_options_of_a_plan_go_before_the_common_ones(common: Common) -> None:
    with Engine(common, Plan("small", {"kv_cache_memory_bytes": 5})) as engine:
        engine.wait_started()
        argv = Path(f"/proc/{engine.pid}/cmdline").read_bytes().split(b"\0")
    options = json.loads(argv[-2])
    assert options["kv_cache_memory_bytes"] == 5
    assert options["max_model_len"] == 4096
