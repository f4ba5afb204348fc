"""`lmpipe status`."""

from __future__ import annotations

import argparse

from lmpipe.cli.nodes import Subparsers, add_verb


def add(verbs: Subparsers) -> None:
    """Registers the verb."""
    add_verb(verbs, "status", "later", "").set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Later."""
    return 1
