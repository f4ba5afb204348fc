"""Which node a command means: by name, by run directory, by topology file, or the only one there is."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TypeAlias

from lmpipe import topology
from lmpipe.errors import LmpipeError, NodeError
from lmpipe.rundir import RunDir, default_parent
from lmpipe.topology import NodeInfo

Subparsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"  # pyright: ignore[reportPrivateUsage]


class NodeAbsent(NodeError):
    """There is no such node."""


class UsageError(LmpipeError):
    """An argument that cannot be what is meant."""


def add_verb(verbs: Subparsers, name: str, summary: str, examples: str) -> argparse.ArgumentParser:
    """The parser of a verb, with its examples at the end of --help."""
    text = "examples:\n" + "\n".join(f"  {line}" for line in examples.strip().splitlines())
    return verbs.add_parser(
        name, help=summary, description=summary, epilog=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def add_node_arguments(parser: argparse.ArgumentParser) -> None:
    """NODE and --run-dir."""
    parser.add_argument(
        "node", nargs="?", metavar="NODE", help="name, run directory or topology file (default: the only node there is)"
    )
    parser.add_argument("--run-dir", type=Path, metavar="DIR", help="the node's run directory")


def run_dir_of(args: argparse.Namespace) -> RunDir:
    """The run directory that the arguments mean; it need not exist. Raises NodeAbsent when nothing says which."""
    run_dir: Path | None = args.run_dir
    name: str | None = args.node
    if run_dir is not None:
        return RunDir(run_dir.absolute())
    if name is not None:
        if name.endswith((".yaml", ".yml")):
            return RunDir(Path(topology.load(name).run_dir))
        return RunDir(Path(name).absolute() if "/" in name else default_parent() / name)
    found = nodes_here()
    if len(found) == 1:
        return found[0]
    if not found:
        raise NodeAbsent("no node is up; start one with: lmpipe up FILE")
    names = ", ".join(paths.path.name for paths in found)
    raise NodeAbsent(f"several nodes are here: {names}; say which")


def nodes_here() -> list[RunDir]:
    """Every node of this user in the default place, living or left by a dead supervisor."""
    parent = default_parent()
    return (
        [RunDir(path) for path in sorted(parent.iterdir()) if RunDir(path).node_json.exists()]
        if parent.is_dir()
        else []
    )


def node_of(args: argparse.Namespace) -> NodeInfo:
    """The note of the node that the arguments mean. Raises NodeAbsent."""
    paths = run_dir_of(args)
    if not paths.node_json.exists():
        raise NodeAbsent(f"no node at {paths.path}; start one with: lmpipe up FILE")
    return NodeInfo.read(paths.path)
