"""`python -m tests.chaos`: see the package."""

from __future__ import annotations

import argparse
import secrets
import shlex
import signal
import sys
import time
from pathlib import Path

from .faults import FAULTS
from .record import Sums
from .run import Plan, run_world


def main() -> int:
    """Run worlds; 1 when an invariant was violated."""
    arguments = _parse()
    signal.signal(signal.SIGTERM, _leave)
    if arguments.list:
        for fault in FAULTS.values():
            print(f"{fault.name:18} {fault.weight:3}  {(fault.act.__doc__ or '').strip().splitlines()[0]}")
        return 0
    seed = secrets.randbelow(1_000_000) if arguments.seed is None else arguments.seed
    plan = Plan(arguments.rounds, arguments.storm, arguments.rate, tuple(arguments.only), not arguments.no_mounts)
    path = arguments.record or Path("out") / "chaos" / f"{seed}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    sums, end_s = Sums(), time.monotonic() + (arguments.seconds or 0)
    print(f"seed {seed}, recorded in {path}")
    try:
        with path.open("a") as file:
            while True:
                violated = run_world(seed, plan, sums, file, lambda line: print(line, flush=True))
                if violated:
                    print("\n".join(sums.violations[-violated:]))
                    print(f"again: {_again(seed, plan)}", flush=True)
                if time.monotonic() >= end_s or (violated and not arguments.go_on):
                    break
                seed += 1
    finally:
        print("\n".join(sums.lines()))
    return 1 if sums.violations else 0


def _leave(*_: object) -> None:
    """Once: the world is ended on the way out, and nothing may get in between."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(143)


def _again(seed: int, plan: Plan) -> str:
    words = ["python", "-m", "tests.chaos", "--seed", str(seed), "--rounds", str(plan.rounds)]
    words += ["--storm", f"{plan.storm_s:g}", "--rate", f"{plan.rate:g}"]
    words += [word for name in plan.only for word in ("--only", name)]
    return shlex.join(words + ([] if plan.mounts else ["--no-mounts"]))


def _parse() -> argparse.Namespace:
    plan = Plan()
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description="A node and its engines under faults.")
    parser.add_argument("--seed", type=int, help="of the first world; without: drawn")
    parser.add_argument("--seconds", type=float, help="begin no world after so long; without: one world")
    parser.add_argument("--rounds", type=int, default=plan.rounds, help="storms of each world")
    parser.add_argument("--storm", type=float, default=plan.storm_s, help="seconds of a storm")
    parser.add_argument("--rate", type=float, default=plan.rate, help="faults per second of a storm")
    parser.add_argument("--only", action="append", default=[], choices=sorted(FAULTS), help="this fault; repeatable")
    parser.add_argument("--no-mounts", action="store_true", help="no small file systems, even as root")
    parser.add_argument("--go-on", action="store_true", help="do not stop at the first violation")
    parser.add_argument("--record", type=Path, help="where the account goes, JSON lines; out/chaos/SEED.jsonl")
    parser.add_argument("--list", action="store_true", help="the faults, how often each is drawn, what it does")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
