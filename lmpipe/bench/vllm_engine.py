"""An engine process of the vLLM benchmarks: one `LLM`, asked on stdin, answering on stdout, one line of JSON each.

    python -m lmpipe.bench.vllm_engine '{"model": …}'      the options of `vllm.LLM`

    {"op": "generate", "prompts": [[token, …], …], "new_tokens": n}
        → {"seconds", "tokens": [[…], …], "cached": [n, …]}     seconds of the call alone; prompt tokens not computed
    anything else → the process ends with an error

Knows nothing of lmpipe: a connector comes with the options. vLLM's processes get stderr for their stdout.
"""

from __future__ import annotations

import os
import sys
import time
from importlib import import_module
from typing import Any

import orjson


def main() -> None:
    """Until stdin ends."""
    questions, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb", buffering=0)
    with open(os.devnull, "rb") as nothing:  # noqa: PTH123
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)
    vllm: Any = import_module("vllm")
    engine = vllm.LLM(**orjson.loads(sys.argv[1]))
    answers.write(b'{"started": true}\n')
    for line in questions:
        question = orjson.loads(line)
        if question["op"] != "generate":
            raise ValueError(f"unknown op {question['op']!r}")
        answers.write(orjson.dumps(_generate(vllm, engine, question["prompts"], question["new_tokens"])) + b"\n")


def _generate(vllm: Any, engine: Any, prompts: list[list[int]], new_tokens: int) -> dict[str, Any]:
    greedy = vllm.SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
    asked = [{"prompt_token_ids": prompt} for prompt in prompts]
    began = time.perf_counter()
    outputs = engine.generate(asked, greedy, use_tqdm=False)
    seconds = time.perf_counter() - began
    return {
        "seconds": seconds,
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "cached": [output.num_cached_tokens or 0 for output in outputs],
    }


if __name__ == "__main__":
    main()
