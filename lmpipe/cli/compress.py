"""`lmpipe compress`: store chunks that lie in DRAM in fewer bytes, now."""

from __future__ import annotations

import argparse
import json

from lmpipe.cli.asking import REF, ask, new_session
from lmpipe.cli.lookup import namespace_of
from lmpipe.cli.nodes import Subparsers, UsageError, add_node_arguments, add_verb, node_of
from lmpipe.cli.picture import size
from lmpipe.codecs import CODECS
from lmpipe.handles import Codec, Tier
from lmpipe.keys import namespace_id
from lmpipe.messages import Recode, Recoded
from lmpipe.topology import NodeInfo

EXAMPLES = """
lmpipe compress                                what lies in DRAM, by the codec of tiers.dram, or else by split
lmpipe compress local --codec split            without loss
lmpipe compress --codec int4h --namespace 3f…9a   with a bounded error; only this model and tenant

A chunk is compressed when every tier below has it, when it becomes smaller, and, by a lossy codec, when it is exact so
far. Chunks on SSD and in the remote tier stay as they are, and chunks that are saved later are stored as the topology
says (tiers.dram.codec). Engines read compressed chunks as before; they decode them as they load.
"""
DEFAULT_CODEC = "split"


def add(verbs: Subparsers) -> None:
    """Registers the verb."""
    parser = add_verb(verbs, "compress", "store what lies in DRAM in fewer bytes", EXAMPLES)
    add_node_arguments(parser)
    names = sorted(codec.name for codec in CODECS.values() if codec.number != Codec.RAW)
    parser.add_argument(
        "--codec", choices=names, help=f"{', '.join(names)} (default: that of tiers.dram, or {DEFAULT_CODEC})"
    )
    add_recode_arguments(parser)
    parser.set_defaults(run=run)


def add_recode_arguments(parser: argparse.ArgumentParser) -> None:
    """What `compress` and `decompress` share."""
    parser.add_argument(
        "--tier", choices=[Tier.DRAM.value], default=Tier.DRAM.value, help="the tier whose chunks are meant"
    )
    parser.add_argument("--namespace", metavar="HEX", help="only this one, 64 hex digits (Producer.namespace.hex())")
    parser.add_argument("--timeout", type=float, default=600.0, metavar="S", help="how long to wait (default: 600 s)")
    parser.add_argument("--json", action="store_true", help="the answer as JSON")


def run(args: argparse.Namespace) -> int:
    """Exit status 0 when gather has carried it out."""
    info = node_of(args)
    in_dram = info.topology.tiers.dram.codec
    codec: str = args.codec or (in_dram if in_dram != "raw" else DEFAULT_CODEC)
    if codec not in {known.name for known in CODECS.values()}:
        raise UsageError(f"the node's codec for DRAM is {codec}, which is not known here; choose one with --codec")
    return recode(args, info, codec)


def recode(args: argparse.Namespace, info: NodeInfo, codec: str) -> int:
    """Have gather store its chunks by another codec, and print what it says."""
    namespace = namespace_id(namespace_of(args.namespace)) if args.namespace else 0
    answer = ask(info, Recode(new_session(), REF, codec, namespace), Recoded, args.timeout)
    if args.json:
        counts = {"codec": codec, "recoded": answer.recoded, "left": answer.left}
        print(json.dumps(counts | {"before_bytes": answer.before_bytes, "after_bytes": answer.after_bytes}))
        return 0
    print(f"{answer.recoded:,} chunks are {codec} now: {size(answer.before_bytes)} became {size(answer.after_bytes)}")
    for reason, chunks in sorted(answer.left.items()):
        print(f"{chunks:,} stay as they are: {reason}")
    return 0
