"""`lmpipe clear`: forget chunks, of one namespace or all, in some tiers or all."""

from __future__ import annotations

import argparse
import json

from lmpipe.cli.asking import REF, ask, new_session
from lmpipe.cli.lookup import namespace_of
from lmpipe.cli.nodes import Subparsers, add_node_arguments, add_verb, node_of
from lmpipe.errors import NodeError
from lmpipe.handles import Tier
from lmpipe.keys import namespace_id
from lmpipe.messages import Invalidate, Invalidated

EXAMPLES = """
lmpipe clear                              everything, everywhere
lmpipe clear local --tier dram            only what lies in DRAM
lmpipe clear --namespace 3f…9a            one model and tenant (Producer.namespace.hex())
"""


def add(verbs: Subparsers) -> None:
    """Registers the verb."""
    parser = add_verb(verbs, "clear", "forget chunks", EXAMPLES)
    add_node_arguments(parser)
    parser.add_argument(
        "--tier", action="append", choices=[tier.value for tier in Tier], help="only here; may be repeated"
    )
    parser.add_argument("--namespace", metavar="HEX", help="only this one, 64 hex digits")
    parser.add_argument("--timeout", type=float, default=30.0, metavar="S", help="how long to wait (default: 30 s)")
    parser.add_argument("--json", action="store_true", help="the answer as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Exit status 0 when gather has answered."""
    namespace = namespace_id(namespace_of(args.namespace)) if args.namespace else 0
    info = node_of(args)
    tiers = [tier for tier in info.topology.tier_names if not args.tier or tier.value in args.tier]
    if not tiers:
        raise NodeError(f"{info.topology.name} has no tier {', '.join(args.tier)}")
    request = Invalidate(new_session(), REF, namespace, tiers)
    removed = ask(info, request, Invalidated, args.timeout, insist=True).removed
    names = [tier.value for tier in tiers]
    print(
        json.dumps({"removed": removed, "tiers": names})
        if args.json
        else f"{removed:,} rows removed from {', '.join(names)}"
    )
    return 0
