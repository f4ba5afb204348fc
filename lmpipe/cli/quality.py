"""`lmpipe quality`: what each codec does to a model's answers."""

from __future__ import annotations

import argparse
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

from lmpipe.cli.nodes import Subparsers, UsageError, add_verb
from lmpipe.codecs import CODECS
from lmpipe.errors import LmpipeError
from lmpipe.handles import Codec
from lmpipe.quality.job import Job, QualityJob, packed

EXAMPLES = """
lmpipe quality MODEL --data TEXT                                   every codec, at three context lengths
lmpipe quality MODEL --data TEXT --codecs fp8,int4h --contexts 2048
lmpipe quality MODEL --data TEXT --calibration MODEL.json          with the adaptive codec; see lmpipe calibrate
lmpipe quality MODEL --data TEXT --json --out out/quality          figures as JSON, and quality.png
"""
NOTES = """\
MODEL is a directory with a Hugging Face causal language model; one without a tokenizer reads bytes. Use a text that it
was not trained on. Of each window of the text the first part (at most 3/4, whole chunks of 256 tokens) goes through the
codec; figures are about the rest, which is computed on what came back:
  perplexity, and its change against the run without a codec, with the standard error of that change
  KL         of the exact next-token distribution from the other, mean, in nats
  top-1      how often both find the same token most likely
  generated  tokens of greedy decoding up to the first that differs from the exact run's
"""
NEEDED = ("torch", "transformers")


def add(verbs: Subparsers) -> None:
    """Registers the verb."""
    parser = add_verb(verbs, "quality", "perplexity and agreement of a model for each codec", EXAMPLES)
    parser.epilog = f"{NOTES}\n{parser.epilog}"
    parser.add_argument("model", type=Path, metavar="MODEL", help="directory of a Hugging Face causal model")
    parser.add_argument("--data", type=Path, required=True, metavar="FILE", help="text to read")
    parser.add_argument("--codecs", type=_names, default=[], metavar="NAME,…", help="default: every one")
    parser.add_argument(
        "--contexts", type=_counts, default=[], metavar="N,…", help="default: 1/4, 1/2, all of the model's, up to 8192"
    )
    parser.add_argument("--windows", type=_count, default=32, metavar="N", help="of each length (default: 32)")
    parser.add_argument("--new-tokens", type=_count, default=64, metavar="N", help="generated for each (default: 64)")
    parser.add_argument("--calibration", type=Path, metavar="FILE", help="for the adaptive codec")
    parser.add_argument("--json", action="store_true", help="print figures as JSON; progress goes to stderr")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write quality.json and quality.png there")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> NoReturn:
    """Becomes the process that measures."""
    names = {codec.name for codec in CODECS.values()}
    if unknown := sorted(set(args.codecs) - names):
        raise UsageError(f"no codec {', '.join(unknown)}; there are {', '.join(sorted(names))}")
    if CODECS[Codec.ADAPTIVE].name in args.codecs and args.calibration is None:
        raise UsageError("the adaptive codec needs --calibration FILE; lmpipe calibrate writes one")
    become(
        QualityJob(
            model=str(args.model),
            data=str(args.data),
            codecs=args.codecs,
            contexts=args.contexts,
            windows=args.windows,
            new_tokens=args.new_tokens,
            calibration=str(args.calibration) if args.calibration else None,
            as_json=args.json,
            out=str(args.out) if args.out else None,
        )
    )


def become(job: Job) -> NoReturn:
    """Replace this process by one that loads torch and does the job.

    Raises:
        LmpipeError: torch or transformers is not installed.
    """
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        raise LmpipeError(f"this needs {' and '.join(missing)}: pip install 'lmpipe[transformers,plot]'")
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-P", "-m", "lmpipe.quality", packed(job)])


def _names(text: str) -> list[str]:
    return list(dict.fromkeys(name for name in text.split(",") if name))


def _counts(text: str) -> list[int]:
    return sorted({_count(part) for part in text.split(",")})


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number
