"""The command `lmpipe`. Each verb has a file with `add(subparsers)` and `run(args) -> int`.

Exit status: 0 done, 1 failed or the answer is no, 2 wrong usage or topology, 3 there is no such node.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from lmpipe.cli import (
    bench,
    calibrate,
    check,
    clear,
    compress,
    decompress,
    demo,
    doctor,
    down,
    lookup,
    profile,
    quality,
    status,
    up,
)
from lmpipe.cli.nodes import NodeAbsent, UsageError
from lmpipe.errors import LmpipeError, TopologyError

VERBS = (up, down, check, doctor, status, lookup, clear, compress, decompress, demo, bench, quality, calibrate, profile)

EPILOG = """\
examples:
  lmpipe check topologies/local.yaml      what would run where, and whether this machine has the room
  lmpipe doctor                           what is wrong with this machine or the node on it, and what to do
  lmpipe up topologies/local.yaml         run the node in the foreground, Ctrl-C stops it in order
  lmpipe up topologies/local.yaml -d      the same in the background
  lmpipe status --watch                   processes, tiers, engines, once a second
  lmpipe down local --keep-dram           stop, and find the DRAM tier as it was at the next `up`

exit status: 0 done, 1 failed or the answer is no, 2 wrong usage or topology, 3 no such node
"""


def parser() -> argparse.ArgumentParser:
    """The command line of every verb."""
    top = argparse.ArgumentParser(
        prog="lmpipe",
        description="The KV cache of LLM inference engines, kept outside the engine.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = top.add_subparsers(title="verbs", metavar="VERB", required=True)
    for verb in VERBS:
        verb.add(verbs)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status."""
    try:
        args = parser().parse_args(argv)
    except SystemExit as stop:  # argparse has said why
        return stop.code if isinstance(stop.code, int) else 2
    try:
        return args.run(args)
    except (TopologyError, UsageError) as error:
        return _fail(error, 2)
    except NodeAbsent as error:
        return _fail(error, 3)
    except LmpipeError as error:
        return _fail(error, 1)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader, `head` say, has seen enough
        sys.stderr.close()
        return 1


def _fail(error: Exception, status: int) -> int:
    print(f"lmpipe: {error}", file=sys.stderr)
    return status
