"""`lmpipe demo`: the main job shown on a real workload, and proved token by token."""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import orjson
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from lmpipe.cli.nodes import Subparsers, add_verb
from lmpipe.demo import gpu
from lmpipe.demo.report import Report
from lmpipe.demo.scale import Room, Scale, choose
from lmpipe.demo.story import Story
from lmpipe.errors import LmpipeError

EXAMPLES = """
lmpipe demo                     the whole of it; without a GPU under four minutes on two cores
lmpipe demo --device cuda       a model of billions of weights on the GPU, or the reason why not
lmpipe demo --quick             a smaller model and workload, about a minute
lmpipe demo --json > demo.json  the table as JSON; progress goes to stderr
lmpipe demo --keep              leave tiers and logs for a look
"""

NEEDED = ("torch", "transformers")


def add(verbs: Subparsers) -> None:
    """Registers the verb."""
    parser = add_verb(verbs, "demo", "run a real workload through every tier, and check every token", EXAMPLES)
    parser.add_argument("--json", action="store_true", help="print the table as JSON")
    parser.add_argument("--out", type=Path, default=Path("out/demo"), metavar="DIR", help="for demo.json and demo.png")
    parser.add_argument("--keep", action="store_true", help="keep the temporary directory with tiers and logs")
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="what computes; cuda: the GPU that torch sees, NVIDIA's or AMD's (default: that, where it has room)",
    )
    parser.add_argument("--quick", action="store_true", help="a smaller model and workload")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Exit status 0 when every token was right and scrambled KV was not, else 1."""
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        raise LmpipeError(f"the demo needs {' and '.join(missing)}: pip install 'lmpipe[demo]'")
    as_json: bool = args.json
    console = Console(stderr=as_json, soft_wrap=True, highlight=False)
    scale = choose(args.device, lambda: _room(console), quick=args.quick)
    work = Path(tempfile.mkdtemp(prefix="lmpipe-demo-"))
    keep = True
    try:
        report = _run(console, work, scale)
        keep = args.keep or bool(report.problems)
    finally:
        if keep:
            console.print(f"kept: {work}")
        else:
            shutil.rmtree(work, ignore_errors=True)
    out: Path = args.out
    out.mkdir(parents=True, exist_ok=True)
    table, plot = report.write(out)
    if as_json:
        sys.stdout.buffer.write(orjson.dumps(report.to_json(), option=orjson.OPT_INDENT_2) + b"\n")
    console.print(report.table())
    _conclude(console, report)
    console.print(f"table: {table}")
    console.print(f"plot:  {plot}" if plot else "plot:  needs matplotlib (pip install 'lmpipe[plot]')")
    return 1 if report.problems else 0


def _room(console: Console) -> Room | None:
    """What is free, if there is a GPU."""
    found = gpu.ask()
    if found is None:
        return None
    shared, disk = (shutil.disk_usage(place).free for place in ("/dev/shm", tempfile.gettempdir()))
    room = Room(found.free_bytes, shared, disk)
    console.print(f"{found.name}: {room} are free")
    return room


def _run(console: Console, work: Path, scale: Scale) -> Report:
    """A bar on a terminal, lines elsewhere."""
    columns = (
        SpinnerColumn(),
        BarColumn(24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    model = scale.model
    console.print(f"{model.weights / 1e9:.2f} billion random weights in {model.dtype} on {scale.device}")
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("starting")

        def say(words: str) -> None:
            is_request = words.endswith(" tokens")
            progress.update(task, description=words, advance=int(is_request))
            if not (is_request and console.is_terminal):
                progress.console.print(words)

        story = Story(work, scale, say=say)
        progress.update(task, total=story.steps)
        report = story.run()
        progress.update(task, description="done")
    return report


def _conclude(console: Console, report: Report) -> None:
    for problem in report.problems:
        console.print(f"[bold red]wrong:[/] {problem}")
    if not report.problems:
        ties = f" but for what follows {report.ties} ties of rounding" if report.ties else ""
        console.print(
            f"every token equals the run without a cache{ties}; scrambled KV does not. {report.seconds:.0f} s in all.",
        )
