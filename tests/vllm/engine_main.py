"""An engine in a process of its own: JSON lines in, JSON lines out. `processes.EngineProcess` speaks to it."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what vLLM and its workers print is not an answer
    made = json.loads(sys.stdin.readline())

    from harness import Engine  # noqa: PLC0415  the workers of a spawning executor import this file, and not the engine

    def answer(value: dict[str, Any]) -> None:
        print(json.dumps(value), file=answers, flush=True)

    with Engine(Path(made["model"]), made["connector"], **made["overrides"]) as engine:
        answer({})
        for line in sys.stdin:
            asked = json.loads(line)
            match asked.pop("do"):
                case "generate":
                    outputs = engine.outputs(asked["prompts"], asked["max_tokens"], **asked["sampling"])
                    tokens = [list(output.outputs[0].token_ids) for output in outputs]
                    answer({"tokens": tokens, "cached": [output.num_cached_tokens for output in outputs]})
                case "reset":
                    answer({"reset": engine.reset_prefix_cache()})
                case "exit":
                    break
    answer({})


if __name__ == "__main__":
    main()
