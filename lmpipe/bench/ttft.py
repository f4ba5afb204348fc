"""Time to first token of the demo's model on the demo's text, about 4K tokens a prompt: without lmpipe, from each tier.

cold, without   an engine process that has never heard of lmpipe: the limit of all the others
cold, attached  another process, lmpipe attached, the same prompts in turns with the first: nothing is found, everything
                is saved, and has reached every tier before the next prompt comes
warm            the attached engine again: from DRAM; from SSD, after all of lmpipe was killed and the arena removed;
                from the remote tier, after the SSD tier was removed too. Each prompt once for each tier, since what was
                loaded once lies in DRAM

Every prompt differs from its first token on. The tokens generated must equal those without lmpipe.
"""

from __future__ import annotations

import sys
import tempfile
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path

from lmpipe.bench.harness import Setting, main
from lmpipe.bench.report import Figure, Goal
from lmpipe.demo import workload
from lmpipe.demo.client import Answer, EngineProcess
from lmpipe.demo.node import DemoNode

COLD = Goal("ratio", "<=", 1.03)
NEW_TOKENS = 4
BELOW = ["ssd", "remote"]


def run(setting: Setting) -> list[Figure]:
    """Cold in turns, then each tier."""
    if missing := [name for name in ("torch", "transformers") if find_spec(name) is None]:
        raise RuntimeError(f"ttft needs {' and '.join(missing)}: pip install 'lmpipe[demo]'")
    with tempfile.TemporaryDirectory(prefix="lmpipe-bench-ttft-") as directory, ExitStack() as stack:
        work, size = Path(directory), "quick" if setting.quick else "full"
        setting.say("building the model, twice")
        plain = stack.enter_context(EngineProcess(size, work / "plain.log"))
        attached = stack.enter_context(EngineProcess(size, work / "attached.log"))
        node = DemoNode(work)
        stack.enter_context(node)
        plain.wait_started()
        attached.wait_started()
        attached.attach(node.run_dir)
        bench = _Ttft(setting, node, plain, attached)
        return [bench.cold(), bench.warm("DRAM", "dram"), *bench.below()]


class _Ttft:
    """The two engines, and what the one without lmpipe has answered."""

    def __init__(self, setting: Setting, node: DemoNode, plain: EngineProcess, attached: EngineProcess) -> None:
        self._setting, self._node, self._plain, self._attached = setting, node, plain, attached
        rounds = setting.runs + setting.warm_ups
        tokens = setting.size(workload.FULL.document_tokens, workload.QUICK.document_tokens)
        texts = [workload.text_of(name) for name in workload.DOCUMENTS]
        self._prompts = [
            workload.tokens_of(f"{turn} {texts[turn % len(texts)][:tokens]}\n\nAnswer:") for turn in range(rounds)
        ]
        self._limits: list[float] = []
        self._answers: list[Answer] = []

    def cold(self) -> Figure:
        """Every prompt once in each engine."""
        values: list[float] = []
        for turn, prompt in enumerate(self._prompts):
            self._setting.say(f"cold: {turn + 1} of {len(self._prompts)}")
            # Each goes first every other time.
            if turn % 2:
                warm, cold = self._attached.generate(prompt, NEW_TOKENS), self._plain.generate(prompt, NEW_TOKENS)
            else:
                cold, warm = self._plain.generate(prompt, NEW_TOKENS), self._attached.generate(prompt, NEW_TOKENS)
            if warm.hit_tokens or warm.tokens != cold.tokens:
                raise RuntimeError(f"cold: {warm.hit_tokens} tokens were found, tokens {warm.tokens} and {cold.tokens}")
            self._attached.flush([prompt], BELOW)
            self._answers.append(cold)
            if turn >= self._setting.warm_ups:
                values.append(warm.ttft_ms)
                self._limits.append(cold.ttft_ms)
        return Figure.of("cold, lmpipe attached", values, "ms", limits=self._limits, goal=COLD)

    def warm(self, name: str, tier: str) -> Figure:
        """Every prompt once more, from one tier."""
        values: list[float] = []
        for turn, (prompt, cold) in enumerate(zip(self._prompts, self._answers, strict=True)):
            self._setting.say(f"warm from {name}: {turn + 1} of {len(self._prompts)}")
            answer = self._attached.generate(prompt, NEW_TOKENS)
            if turn < self._setting.warm_ups:
                continue  # just after a start the stages may not have found each other: a miss is allowed
            if not answer.hit_tokens or set(answer.hit_by_tier) != {tier} or answer.tokens != cold.tokens:
                raise RuntimeError(
                    f"warm from {name}: {answer.hit_by_tier} {answer.reason}, tokens {answer.tokens} and {cold.tokens}"
                )
            self._attached.flush([], [])
            values.append(answer.ttft_ms)
        return Figure.of(f"warm from {name}", values, "ms", limits=self._limits)

    def below(self) -> list[Figure]:
        """The tiers below DRAM, which show when those above them are gone."""
        figures: list[Figure] = []
        for name, tier in (("SSD", "ssd"), ("the remote tier", "remote")):
            self._setting.say("killing all of lmpipe")
            self._node.kill_all()
            self._attached.wait_lost()
            self._node.remove_arena()
            if tier == "remote":
                self._node.remove_ssd()
            self._node.start()
            self._attached.wait_ready()
            figures.append(self.warm(name, tier))
        return figures


if __name__ == "__main__":
    sys.exit(main(run))
