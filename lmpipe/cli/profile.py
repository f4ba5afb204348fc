"""`lmpipe profile`: a topology or the demo under load, with a flame graph of every process and one time line of all."""

from __future__ import annotations

import argparse
import shlex
import subprocess
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from shutil import which

import orjson
import rich.box
from rich.console import Console
from rich.table import Table

from lmpipe import topology as tp
from lmpipe.cli.console import wide_console
from lmpipe.cli.nodes import Subparsers, add_verb
from lmpipe.errors import LmpipeError
from lmpipe.profiler import Profile, SpanTime, nsys_command, profile

EXAMPLES = """
lmpipe profile                              the demo's model and documents for half a minute
lmpipe profile topologies/local.yaml        that topology, under a built-in load of saves and loads
lmpipe profile topologies/local.yaml --seconds 60 --out out/local
lmpipe profile demo --json                  paths and times as JSON
lmpipe profile topologies/single-gpu.yaml   under Nsight Systems as well, where it is installed (--no-nsys: not)

out/profile/NAME.svg are flame graphs, for a browser; out/profile/trace.json opens at https://ui.perfetto.dev
"""
DEMO = "demo"
SHOWN = 24


def add(verbs: Subparsers) -> None:
    """Registers the verb."""
    parser = add_verb(verbs, "profile", "see where the time goes, in every process", EXAMPLES)
    parser.add_argument("what", nargs="?", default=DEMO, metavar="FILE|demo", help="topology file (default: demo)")
    parser.add_argument("--seconds", type=float, default=30.0, metavar="N", help="how long to watch (default: 30)")
    parser.add_argument(
        "--out", type=Path, default=Path("out/profile"), metavar="DIR", help="where results go (default: out/profile)"
    )
    parser.add_argument(
        "--nsys",
        action=argparse.BooleanOptionalAction,
        help="run under Nsight Systems, or say how (default: where the topology names GPUs)",
    )
    parser.add_argument("--json", action="store_true", help="print paths and times as JSON; progress goes to stderr")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Exit status 0 when there is a time line with something on it."""
    what: str = args.what
    if what == DEMO and (missing := [name for name in ("torch", "transformers") if find_spec(name) is None]):
        raise LmpipeError(f"the demo needs {' and '.join(missing)}: pip install 'lmpipe[demo]'; or profile a topology")
    out: Path = args.out
    as_json: bool = args.json
    console = wide_console(stderr=as_json)
    file = None if what == DEMO else Path(what)
    if args.nsys or (args.nsys is None and file is not None and tp.load(file).engines.devices):
        arguments = [what, "--seconds", str(args.seconds), "--out", str(out), *["--json"] * as_json]
        command = nsys_command(out, arguments)
        if which(command[0]):
            out.mkdir(parents=True, exist_ok=True)
            return subprocess.run(command, check=False).returncode
        console.print(f"Nsight Systems is not installed; with it: {shlex.join(command)}", highlight=False)
    with console.status("starting") as status:
        found = profile(file, args.seconds, out, status.update)
    if as_json:
        print(orjson.dumps(asdict(found), option=orjson.OPT_INDENT_2, default=str).decode())
    else:
        _show(console, found)
    return 0 if found.spans else 1


def _show(console: Console, found: Profile) -> None:
    _show_spans(console, f"where {found.seconds:.0f} s went", found.spans, found)
    if found.device_spans:
        _show_spans(console, "what devices did meanwhile", found.device_spans, found)
    for problem in found.problems:
        console.print(f"[yellow]{problem}[/]", highlight=False)
    for path in found.flames:
        console.print(f"flame graph: {path}", highlight=False)
    console.print(f"time line:   {found.trace}  (open it at https://ui.perfetto.dev)", highlight=False)


def _show_spans(console: Console, title: str, spans: list[SpanTime], found: Profile) -> None:
    table = Table(title=title, box=rich.box.SIMPLE_HEAD)
    for column in ("process", "span", "count", "total ms", "share", "mean ms", "longest ms", "GB/s"):
        table.add_column(column, justify="left" if column in ("process", "span") else "right", no_wrap=True)
    for span in spans[:SHOWN]:
        table.add_row(
            span.process,
            f"{span.track}: {span.name}" if span.track else span.name,
            f"{span.count:,}",
            f"{span.total_ms:,.1f}",
            f"{span.total_ms / found.seconds / 10:.1f} %",
            f"{span.total_ms / span.count:.3f}",
            f"{span.longest_ms:.2f}",
            f"{span.nbytes / span.total_ms / 1e6:.2f}" if span.nbytes and span.total_ms else "",
        )
    console.print(table)
    if len(spans) > SHOWN:
        console.print(f"{len(spans) - SHOWN} more in {found.trace}", highlight=False)
