"""The driver's end of an engine process: starts it, asks, ends it. Knows neither torch nor what is generated."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmpipe.demo.asked_process import AskedProcess, EngineFailed


@dataclass(frozen=True, slots=True)
class Answer:
    """One generated answer. `margin`: the least distance of the best two logits of any step; `lag`: how far the first
    token that was not the expected one was ahead of that, None without one.
    """

    tokens: list[int]
    margin: float
    ttft_ms: float
    total_ms: float
    hit_tokens: int
    hit_by_tier: dict[str, int]
    loaded_bytes: int
    reason: str
    lag: float | None = None


class EngineProcess(AskedProcess):
    """A real process with its own copy of the model. A context manager: nothing of it is left afterwards.

    Torch's idle threads sleep instead of spinning: lmpipe's processes work on the same two cores.
    """

    def __init__(self, scale: str, log: Path) -> None:
        """`scale`: its name (demo/scale.py)."""
        argv = [sys.executable, "-P", "-m", "lmpipe.demo.engine", scale]
        super().__init__(argv, log, {"OMP_WAIT_POLICY": "PASSIVE", **os.environ})

    def wait_started(self, timeout_s: float = 120.0) -> dict[str, Any]:
        """Wait for the model to be built. Returns what computes: `device`, by name, and `threads`."""
        return self.answer(timeout_s)

    def attach(self, run_dir: Path, timeout_s: float = 30.0) -> None:
        """Switch lmpipe on and wait until registered."""
        self._ready(self.ask({"op": "attach", "run_dir": str(run_dir), "timeout_s": timeout_s}, timeout_s + 30))

    def wait_ready(self, timeout_s: float = 60.0) -> None:
        """Wait until lmpipe is back."""
        self._ready(self.ask({"op": "wait_ready", "timeout_s": timeout_s}, timeout_s + 30))

    def wait_lost(self, timeout_s: float = 30.0) -> None:
        """Wait until the engine has noticed that lmpipe is gone."""
        if not self.ask({"op": "wait_lost", "timeout_s": timeout_s}, timeout_s + 30)["lost"]:
            raise EngineFailed(f"the engine did not notice within {timeout_s:.0f} s that lmpipe was killed")

    def generate(
        self, tokens: list[int], new_tokens: int, expected: Sequence[int] = (), timeout_s: float = 300.0
    ) -> Answer:
        """Greedy generation of exactly `new_tokens`. `expected`: that it is compared with."""
        ask = {"op": "generate", "tokens": tokens, "new_tokens": new_tokens, "expected": list(expected)}
        got = self.ask(ask, timeout_s)
        info: dict[str, Any] = got["info"] or {}
        return Answer(
            got["tokens"],
            got["margin"],
            got["ttft_ms"],
            got["total_ms"],
            info.get("hit_tokens", 0),
            info.get("hit_by_tier", {}),
            info.get("loaded_bytes", 0),
            info.get("reason", ""),
            got["lag"],
        )

    def flush(self, prompts: list[list[int]], tiers: list[str], timeout_s: float = 60.0) -> None:
        """Wait until all saves are answered and the chunks of `prompts` are in `tiers`."""
        ask: dict[str, Any] = {"op": "flush", "prompts": prompts, "tiers": tiers, "timeout_s": timeout_s}
        got = self.ask(ask, timeout_s + 30)
        if not got["done"]:
            raise EngineFailed(
                f"saves did not reach {', '.join(tiers) or 'DRAM'} within {timeout_s:.0f} s: {got.get('stats')}"
            )

    def control(self, tokens: list[int], expected: list[int]) -> tuple[float | None, float | None]:
        """The largest `lag` within an answer on loaded KV, and on the same KV scrambled."""
        got = self.ask({"op": "control", "tokens": tokens, "expected": expected}, 300.0)
        return got["straight"], got["scrambled"]

    def _ready(self, answer: dict[str, Any]) -> None:
        if not answer["ready"]:
            raise EngineFailed(f"the engine was not registered with lmpipe in time: {answer['reason']}")
