"""`lmpipe up`: run a node, here or in the background."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

from lmpipe import topology as tp
from lmpipe.cli.nodes import Subparsers, add_verb
from lmpipe.codecs.checks import conflicts
from lmpipe.errors import LmpipeError
from lmpipe.launch.node import run_node
from lmpipe.rundir import RunDir
from lmpipe.topology import NodeInfo

EXAMPLES = """
lmpipe up topologies/local.yaml              in the foreground; Ctrl-C drains and stops, a second one hurries
lmpipe up topologies/local.yaml --detach     returns when the node is ready
lmpipe up topologies/local.yaml --json       one JSON object a line
"""


def add(verbs: Subparsers) -> None:
    """Registers the verb."""
    parser = add_verb(verbs, "up", "run the node of a topology file", EXAMPLES)
    parser.add_argument("file", type=Path, metavar="FILE", help="topology file")
    parser.add_argument("-d", "--detach", action="store_true", help="return when the node is ready")
    parser.add_argument("--json", action="store_true", help="progress as JSON lines")
    parser.add_argument("--keep-dram", action="store_true", help="leave the DRAM tier for the next `up` when it stops")
    parser.add_argument("--quiet-when-ready", action="store_true", help=argparse.SUPPRESS)  # output goes to the log
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Exit status 0 after an orderly stop (or, detached, when ready)."""
    topology = tp.load(args.file, conflicts)
    if args.detach:
        return _detach(args, RunDir(Path(topology.run_dir)))
    say = Speaker(json_lines=args.json)

    def ready(info: NodeInfo) -> None:
        say.event({"event": "ready", "run_dir": info.run_dir, "pid": os.getpid()}, f"ready: {info.run_dir}")
        if args.quiet_when_ready:
            _redirect(info.paths.log("supervisor"))

    say.event({"event": "starting", "name": topology.name}, f"{topology.name}: {', '.join(topology.stages)}")
    try:
        run_node(topology, report=say.line, progress=say.progress, on_ready=ready, keep_dram=args.keep_dram)
    except LmpipeError as error:
        if args.json:
            say.event({"event": "failed", "reason": str(error)}, "")
        raise
    say.event({"event": "stopped"}, "stopped")
    return 0


class Speaker:
    """Says what happens, in words or in JSON lines. A reader that has gone is no reason to stop a node."""

    def __init__(self, *, json_lines: bool) -> None:
        self._json = json_lines
        self._told: dict[str, int] = {}

    def event(self, fields: Mapping[str, object], words: str) -> None:
        """One event."""
        try:
            print(json.dumps(fields) if self._json else words, flush=True)
        except OSError:
            _redirect(Path(os.devnull))

    def line(self, words: str) -> None:
        """A line of the supervisor."""
        self.event({"event": "line", "text": words}, words)

    def progress(self, segment: str, done: int, total: int) -> None:
        """A segment grows: told at the end, and every tenth where it takes long."""
        tenth = done * 10 // total
        if tenth == self._told.get(segment, -1) or (total < 1 << 30 and done < total):
            return
        self._told[segment] = tenth
        size = f"{total / (1 << 20):,.0f} MiB"
        words = f"{segment}: {size} ready" if done == total else f"{segment}: {tenth * 10} % of {size}"
        self.event({"event": "progress", "segment": segment, "done": done, "total": total}, words)


def _redirect(path: Path) -> None:
    sys.stdout.flush()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    os.close(descriptor)


def _detach(args: argparse.Namespace, paths: RunDir) -> int:
    """Starts `up` in a session of its own and passes its words on until it is ready."""
    read, write = os.pipe()
    argv = [sys.executable, "-P", "-m", "lmpipe", "up", str(args.file.absolute()), "--json", "--quiet-when-ready"]
    pid = os.posix_spawn(
        sys.executable,
        argv + ["--keep-dram"] * args.keep_dram,
        os.environ,
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_DUP2, write, 1),
        ],
        setsid=True,
    )
    os.close(write)
    try:
        with os.fdopen(read) as lines:
            for line in lines:
                event = json.loads(line)
                if args.json:
                    print(line, end="", flush=True)
                elif event["event"] in ("line", "progress"):
                    print(event.get("text") or f"{event['segment']}: {event['done'] >> 20:,} MiB", flush=True)
                if event["event"] == "ready":
                    if not args.json:
                        print(f"ready: {paths.path}, supervisor pid {pid}")
                    return 0
    except KeyboardInterrupt:
        os.kill(pid, signal.SIGTERM)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
