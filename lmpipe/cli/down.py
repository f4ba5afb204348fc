"""`lmpipe down`: stop a node in order, or tidy up after one whose supervisor was killed."""

from __future__ import annotations

import argparse

from lmpipe.cli.nodes import NodeAbsent, Subparsers, add_node_arguments, add_verb, run_dir_of
from lmpipe.launch.stop import stop_node, tidy_up
from lmpipe.shm.pages import sweep

EXAMPLES = """
lmpipe down                        the only node there is
lmpipe down local --keep-dram      the next `up` finds the DRAM tier as it is now
lmpipe down --run-dir /dev/shm/x   a node in another place
"""


def add(verbs: Subparsers) -> None:
    """Registers the verb."""
    parser = add_verb(verbs, "down", "drain a node and stop it", EXAMPLES)
    add_node_arguments(parser)
    parser.add_argument("--keep-dram", action="store_true", help="leave the DRAM tier for the next `up`")
    parser.add_argument(
        "--timeout", type=float, default=60.0, metavar="S", help="give up waiting after (default: 60 s)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Exit status 0 when nothing of the node runs any more."""
    paths = run_dir_of(args)
    if stop_node(paths, keep_dram=args.keep_dram, timeout_s=args.timeout):
        print(f"stopped: {paths.path}")
    elif not paths.path.is_dir() or not (paths.node_json.exists() or paths.arena.exists()):
        if not sweep(paths.pages):
            raise NodeAbsent(f"no node at {paths.path}")
        print(f"no node at {paths.path}; removed what dead engines left in {paths.pages}")
    else:
        tidy_up(paths, keep_dram=args.keep_dram, report=print)
        print(f"tidied up: {paths.path}")
    return 0
