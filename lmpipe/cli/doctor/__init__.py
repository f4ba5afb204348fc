"""`lmpipe doctor`: looks at a machine and a running node, and says what is wrong and what to do about it."""

from __future__ import annotations

import argparse

import msgspec
import rich.box
from rich.table import Table
from rich.text import Text

from lmpipe import topology as tp
from lmpipe.cli.console import wide_console
from lmpipe.cli.doctor import contents, disk, leftovers, machine, node
from lmpipe.cli.doctor.finding import Finding, Level, fail, ok
from lmpipe.cli.nodes import NodeAbsent, Subparsers, add_node_arguments, add_verb, nodes_here, run_dir_of
from lmpipe.codecs.checks import conflicts
from lmpipe.errors import NodeError
from lmpipe.launch.overview import overview
from lmpipe.rundir import RunDir, default_parent
from lmpipe.topology import NodeInfo, Topology

EXAMPLES = """
lmpipe doctor                           this machine, and the node that runs here, if there is one
lmpipe doctor topologies/local.yaml     whether this machine can carry that node; and the node, if it runs
lmpipe doctor local --no-disk           without the short trial of the SSD tier's disk
lmpipe doctor --json                    [{"check": …, "level": "ok" | "warn" | "fail", "seen": …, "todo": …}, …]
"""

COLOURS = {Level.OK: "green", Level.WARN: "yellow", Level.FAIL: "red"}


def add(verbs: Subparsers) -> None:
    """Registers the verb."""
    parser = add_verb(verbs, "doctor", "check this machine and a running node, and say what to do", EXAMPLES)
    add_node_arguments(parser)
    parser.add_argument("--json", action="store_true", help="the findings as JSON")
    parser.add_argument("--no-disk", action="store_true", help="do not try the SSD tier's disk (64 MiB, a few seconds)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Exit status 0, warnings or not; 1 when something does not work."""
    found = examine(args)
    if args.json:
        print(msgspec.json.format(msgspec.json.encode(found)).decode())
    else:
        wide_console().print(picture(found))
    return 1 if any(finding.level is Level.FAIL for finding in found) else 0


def examine(args: argparse.Namespace) -> list[Finding]:
    """Everything, the machine first. Raises NodeAbsent when a node is named that cannot be meant, TopologyError."""
    name: str | None = args.node
    paths = run_dir_of(args) if name or args.run_dir or len(nodes_here()) == 1 else None
    if paths and name and not name.endswith((".yaml", ".yml")) and not paths.path.exists():
        raise NodeAbsent(f"no node at {paths.path}; start one with: lmpipe up FILE")
    info, about = _node_at(paths)
    topology = info.topology if info else None
    if name and name.endswith((".yaml", ".yml")):
        topology = tp.load(name, conflicts)
    place = paths.path if paths else default_parent()
    found = machine.examine(topology, place)
    if topology and topology.tiers.ssd:
        found += disk.examine(topology.tiers.ssd, measure=not args.no_disk)
    found += leftovers.examine(leftovers.run_dirs(default_parent(), [place] if paths else []))
    found += about
    if info:
        seen = overview(info)
        found += [*_drift(info, topology), *node.examine(info, seen), *contents.examine(info, seen)]
    return found


def _node_at(paths: RunDir | None) -> tuple[NodeInfo | None, list[Finding]]:
    """The note of a node, or why there is none."""
    if paths is None or not paths.node_json.exists():
        here = ", ".join(paths.path.name for paths in nodes_here())
        return None, [
            ok("node", f"none runs at {paths.path}" if paths else f"say which: {here}" if here else "none runs")
        ]
    try:
        return NodeInfo.read(paths.path), []
    except NodeError as error:
        return None, [
            fail("lmpipe version", str(error), "use the lmpipe that started it, or stop it and start it anew")
        ]


def _drift(info: NodeInfo, topology: Topology | None) -> list[Finding]:
    if topology is None or msgspec.json.encode(topology) == msgspec.json.encode(info.topology):
        return []
    return [Finding("topology", Level.WARN, "the file is not what the node runs", "lmpipe down, lmpipe up")]


def picture(found: list[Finding]) -> Table:
    """A line for each finding, with what to do below it."""
    table = Table(box=rich.box.SIMPLE_HEAD, header_style="bold", pad_edge=False)
    for column in ("", "check", "seen"):
        table.add_column(column, no_wrap=column != "seen", overflow="fold")
    for finding in found:
        seen = Text(finding.seen)
        if finding.todo:
            seen.append(f"\n→ {finding.todo}", COLOURS[finding.level])
        table.add_row(Text(finding.level, COLOURS[finding.level]), finding.check, seen)
    return table
