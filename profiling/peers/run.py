"""Time to first token in vLLM with lmpipe and with LMCache, in turns: `.venv-peers/bin/python profiling/peers/run.py`.

Warm from DRAM in a new engine process, and the price of saving: cold with a cache attached, nothing to load. Beside
them, in the same run, vLLM without a connector, cold and from its own prefix cache. `lmpipe/bench/vllm_ttft.py` says
what is inside the clock. The exit status is 1 when lmpipe misses its goal beside any of LMCache's modes.
"""

from __future__ import annotations

import argparse
import signal
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from lmcache_cache import MODES, LmcacheCache
from rich.console import Console

from lmpipe.bench import vllm_ttft
from lmpipe.bench.harness import Setting, keep_to_two_cores
from lmpipe.bench.report import Goal, Report, table
from lmpipe.bench.vllm import PROMPTS, common_of, scratch
from lmpipe.bench.vllm_caches import Cache, LmpipeCache
from lmpipe.bench.vllm_models import LARGE
from lmpipe.bench.vllm_ttft import PROCESSOR
from lmpipe.cli.bench import write

WIDTH = 130
WARM, SAVING = Goal("ratio", "<=", 0.9), Goal("ratio", "<=", 1.0)


def main() -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(description="lmpipe and LMCache in the same vLLM, in turns")
    parser.add_argument("--modes", nargs="+", choices=[*MODES, "none"], default=[*MODES], help="of LMCache")
    parser.add_argument("--rounds", type=int, default=PROMPTS.rounds)
    parser.add_argument("--sizes", type=int, nargs="+", default=[*PROMPTS.sizes], help="tokens of a prompt")
    parser.add_argument("--without-lmpipe", action="store_true", help="LMCache alone")
    parser.add_argument("--out", type=Path, help="write peers.json and peers.png there")
    parser.add_argument("--disk", type=Path, default=Path("out"), help="for models, logs and lmpipe's tiers")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, _stop)
    keep_to_two_cores()
    prompts = replace(PROMPTS, rounds=args.rounds, sizes=args.sizes)
    modes = [mode for mode in args.modes if mode != "none"]
    with scratch(args.disk) as work, ExitStack() as stack:
        common = common_of(work, LARGE, max(prompts.sizes), quick=False)
        caches: list[Cache] = []
        if not args.without_lmpipe:
            caches.append(stack.enter_context(LmpipeCache(work / "lmpipe", tiers=("DRAM",))))
        caches += [stack.enter_context(LmcacheCache(mode, common.logs)) for mode in modes]
        pairs = [] if args.without_lmpipe else [pair for mode in modes for pair in rivals(mode)]
        figures = vllm_ttft.measure(common, caches, prompts, Setting.say, pairs)
    report = Report.of("peers", figures)
    console = Console() if Console().is_terminal else Console(width=WIDTH)
    console.print(table(report))
    for line in write(report, args.out) if args.out else []:
        console.print(line, highlight=False)
    return 1 if any("LMCache" in figure.name for figure in report.missed) else 0


def rivals(mode: str) -> list[tuple[str, str, Goal]]:
    """What is put beside what, and how much of it is allowed."""
    return [
        ("lmpipe, DRAM", f"LMCache, {mode}", WARM),
        ("cold, lmpipe attached", f"cold, LMCache attached, {mode}", SAVING),
        ("cold, lmpipe attached" + PROCESSOR, f"cold, LMCache attached, {mode}" + PROCESSOR, SAVING),
    ]


def _stop(number: int, _: object) -> None:
    raise SystemExit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
