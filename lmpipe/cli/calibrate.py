"""`lmpipe calibrate`: which layers, heads, K or V of a model need more bits."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NoReturn

from lmpipe.cli.nodes import Subparsers, UsageError, add_verb
from lmpipe.cli.quality import become
from lmpipe.quality.job import CalibrationJob

EXAMPLES = """
lmpipe calibrate MODEL --budget 3.25 --data TEXT                  writes MODEL's name with .calibration.json, and .png
lmpipe calibrate MODEL --budget 3.5 --data TEXT --out llama.json
lmpipe quality MODEL --data OTHER_TEXT --calibration llama.json   what it does to the model's answers
"""
NOTES = """\
Every layer's K and V go through the codec at 3 bits, one at a time, and how far the model's next tokens move is what
that layer's K or V can lose. Its heads share this by their errors: K's weighted by the covariance of the queries that
read them, V's by the attention that tokens get. Then bits go where each saves most, until the budget is spent.
"""
LEAST, MOST = 3.0, 8.0


def add(verbs: Subparsers) -> None:
    """Registers the verb."""
    parser = add_verb(
        verbs, "calibrate", "share bits among a model's layers and heads, for the adaptive codec", EXAMPLES
    )
    parser.epilog = f"{NOTES}\n{parser.epilog}"
    parser.add_argument("model", type=Path, metavar="MODEL", help="directory of a Hugging Face causal model")
    parser.add_argument("--budget", type=float, required=True, metavar="BITS", help="mean bits of a number, 3 to 8")
    parser.add_argument("--data", type=Path, required=True, metavar="FILE", help="text like the one to be served")
    parser.add_argument("--context", type=int, default=0, metavar="N", help="default: the model's, up to 8192 tokens")
    parser.add_argument("--windows", type=int, default=8, metavar="N", help="of the text (default: 8)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: MODEL's name with .calibration.json")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> NoReturn:
    """Becomes the process that measures."""
    if not LEAST <= args.budget <= MOST:
        raise UsageError(f"--budget {args.budget:g}: bits of a number are {LEAST:g} to {MOST:g}")
    if args.windows < 1 or args.context < 0:
        raise UsageError("--windows and --context are at least 1")
    model: Path = args.model
    out: Path = args.out or Path(f"{model.resolve().name}.calibration.json")
    become(
        CalibrationJob(
            model=str(model),
            data=str(args.data),
            budget_bits=args.budget,
            context=args.context,
            windows=args.windows,
            out=str(out),
        )
    )
