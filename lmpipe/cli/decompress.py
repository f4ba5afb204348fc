"""`lmpipe decompress`: store chunks that lie encoded in DRAM as the engine's own bytes again, now."""

from __future__ import annotations

import argparse

from lmpipe.cli.compress import add_recode_arguments, recode
from lmpipe.cli.nodes import Subparsers, add_node_arguments, add_verb, node_of

EXAMPLES = """
lmpipe decompress                          everything in DRAM
lmpipe decompress local --namespace 3f…9a  only this model and tenant

Loads get faster, as they need not decode; what takes room for it is evicted as for a save. What a lossy codec has taken
does not come back: such chunks stay marked as inexact. Chunks on SSD and in the remote tier stay as they are, chunks
that are saved later are stored as the topology says (tiers.dram.codec), and so are all of them after a restart.
"""


def add(verbs: Subparsers) -> None:
    """Registers the verb."""
    parser = add_verb(verbs, "decompress", "store what lies in DRAM uncompressed again", EXAMPLES)
    add_node_arguments(parser)
    add_recode_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Exit status 0 when gather has carried it out."""
    return recode(args, node_of(args), "raw")
