"""`lmpipe check`: is a topology file right, what would run where, and has this machine the room."""

from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path

import msgspec

from lmpipe import topology as tp
from lmpipe.cli.nodes import Subparsers, add_verb
from lmpipe.cli.picture import draw, size
from lmpipe.codecs.checks import conflicts
from lmpipe.launch.devices import lacking
from lmpipe.launch.host import memory_bytes
from lmpipe.rundir import RunDir
from lmpipe.topology import Topology

EXAMPLES = """
lmpipe check topologies/local.yaml           draws it, and warns about this machine
lmpipe check topologies/local.yaml --json    the whole tree, with every default
"""


def add(verbs: Subparsers) -> None:
    """Registers the verb."""
    parser = add_verb(verbs, "check", "validate and draw a topology file", EXAMPLES)
    parser.add_argument("file", type=Path, metavar="FILE", help="topology file")
    parser.add_argument("--json", action="store_true", help="topology and warnings as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Exit status 0: right, warnings or not; 2: wrong."""
    topology = tp.load(args.file, conflicts)
    warnings = warnings_of(topology)
    if args.json:
        print(json.dumps({"topology": msgspec.to_builtins(topology), "warnings": warnings}, indent=2))
        return 0
    print(f"{args.file}: right\n\n{draw(topology)}")
    for warning in warnings:
        print(f"\nwarning: {warning}")
    return 0


def warnings_of(topology: Topology) -> list[str]:
    """What on this machine would be in the way."""
    found: list[str] = []
    run_dir = Path(topology.run_dir)
    shared, taken = shared_bytes(topology), bytes_in(RunDir(run_dir))
    free = shutil.disk_usage(existing(run_dir)).free + taken
    if shared > free:
        found.append(f"{size(shared)} of shared memory are wanted, {size(free)} are free at {existing(run_dir)}")
    elif shared > 0.8 * free:
        found.append(f"{size(shared)} of the {size(free)} free at {existing(run_dir)} will be taken")
    if (memory := memory_bytes("MemAvailable")) and shared > memory + taken:
        found.append(f"{size(shared)} of shared memory are wanted, {size(memory)} of memory are available")
    if topology.tiers.ssd:
        directory = existing(Path(topology.tiers.ssd.directory))
        free = shutil.disk_usage(directory).free
        if topology.tiers.ssd.capacity > free:
            found.append(f"tiers.ssd wants {size(topology.tiers.ssd.capacity)}, {size(free)} are free at {directory}")
        if not os.access(directory, os.W_OK):
            found.append(f"{directory} cannot be written")
    if problem := lacking(topology):
        found.append(str(problem))
    cpus = os.sched_getaffinity(0)
    for process in topology.processes:
        if missing := sorted(set(process.cpus or ()) - cpus):
            found.append(f"process {process.name}: this machine has no CPU {', '.join(map(str, missing))} for it")
    return found


def shared_bytes(topology: Topology) -> int:
    """Shared memory that the node takes: arena, rings, indexes."""
    rings = sum(topology.rings.capacity(stage) for stage in topology.rings_needed)
    return topology.tiers.dram.capacity + rings + sum(topology.index.map_bytes(tier) for tier in topology.tier_names)


def bytes_in(paths: RunDir) -> int:
    """What a former life of this node has there already and would give back."""
    return sum(path.stat().st_blocks * 512 for path in paths.path.rglob("*") if path.is_file())


def existing(path: Path) -> Path:
    """The path, or the nearest directory above it that is there."""
    return next(directory for directory in (path, *path.parents) if directory.exists())
