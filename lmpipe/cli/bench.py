"""`lmpipe bench`: runs benchmarks, each as a process of its own, and shows their figures against limits and goals."""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Generator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path

import orjson
from rich.console import Console
from rich.status import Status

from lmpipe.bench import NEEDS, NEEDS_GPU, SUMMARIES
from lmpipe.bench.report import Figure, Report, table
from lmpipe.cli.console import wide_console
from lmpipe.cli.nodes import Subparsers, add_verb
from lmpipe.errors import LmpipeError
from lmpipe.launch.devices import DRIVERS

EXAMPLES = """
lmpipe bench save load            two benchmarks, a table for each
lmpipe bench all --out out/bench  all of them, with NAME.json and NAME.png
lmpipe bench hop --json           one JSON object (of several names a list) and nothing else
lmpipe bench all --quick          tiny runs that prove that each works; their figures mean nothing
.venv-vllm/bin/lmpipe bench vllm  where vLLM is; "all" leaves out what cannot run in this environment
"""
NOTES = "\n".join(f"  {name:10}{summary}" for name, summary in SUMMARIES.items())
ALL = "all"
PLOT_S = 120.0
CLEAN_UP_S = 60.0


def add(verbs: Subparsers) -> None:
    """Registers the verb."""
    parser = add_verb(verbs, "bench", "measure against the machine's own limits", EXAMPLES)
    parser.epilog = f"benchmarks:\n{NOTES}\n\n{parser.epilog}\n\nexit status: 0 every goal met, 1 one was missed"
    choices = [*SUMMARIES, ALL]
    parser.add_argument("names", nargs="+", choices=choices, metavar="NAME", help=f"one of {', '.join(choices)}")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON; progress goes to stderr")
    parser.add_argument("--quick", action="store_true", help="tiny sizes; goals are not judged")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write NAME.json and NAME.png there")
    parser.add_argument(
        "--disk", type=Path, default=Path("out"), metavar="DIR", help="where the ssd benchmark writes (default: out)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Exit status 0 when no goal was missed, else 1."""
    names = [name for name in SUMMARIES if not missing(name)] if ALL in args.names else list(dict.fromkeys(args.names))
    as_json: bool = args.json
    quick: bool = args.quick
    out: Path | None = args.out
    disk: Path = args.disk
    console = wide_console(stderr=as_json)
    reports: list[Report] = []
    for name in names:
        report = Report.of(name, measure(name, disk=disk, quick=quick, console=console), judged=not quick)
        reports.append(report)
        if not as_json:
            console.print(table(report))
        if out is not None:
            for line in write(report, out):
                console.print(line, highlight=False)
    if as_json:
        shapes = [report.json() for report in reports]
        sys.stdout.write(
            orjson.dumps(shapes if len(names) > 1 else shapes[0], option=orjson.OPT_INDENT_2).decode() + "\n"
        )
    missed = [f"{report.name}: {figure.name}" for report in reports for figure in report.missed]
    if missed and not as_json:
        console.print(f"[bold red]missed:[/] {'; '.join(missed)}")
    return 1 if missed else 0


def missing(name: str) -> str:
    """What a benchmark needs and is not here, or empty."""
    return _lack(name)[0]


def _lack(name: str) -> tuple[str, str]:
    """What it needs and is not here, and what to do about it, or why that is so."""
    package, mend = NEEDS.get(name, ("", ""))
    spec = find_spec(package) if package else None
    if package and (spec is None or spec.origin is None):  # without an origin it is a directory of that name
        return package, mend
    if name in NEEDS_GPU and not any(driver.exists() for driver in DRIVERS):
        return "a GPU", f"there is none of {', '.join(map(str, DRIVERS))}"
    return "", ""


def measure(name: str, *, disk: Path, quick: bool, console: Console) -> list[Figure]:
    """Run one benchmark, its progress on the console. Raises LmpipeError with the end of what it said when it fails."""
    lack, why = _lack(name)
    if lack:
        raise LmpipeError(f"bench {name} needs {lack}: {why}")
    argv = [sys.executable, "-P", "-m", f"lmpipe.bench.{name.replace('-', '_')}", "--disk", str(disk)]
    argv += ["--quick"] * quick
    last: deque[str] = deque(maxlen=12)
    with (
        _terminated_like_interrupted(),
        Status(f"{name}: starting", console=console) as status,
        subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process,
    ):
        assert process.stdout is not None and process.stderr is not None
        try:
            for line in process.stderr:
                last.append(line.decode(errors="replace").rstrip())
                status.update(f"{name}: {last[-1]}")
            figures = process.stdout.read()
        except BaseException:
            process.terminate()  # it ends what it started and removes what it made
            with suppress(subprocess.TimeoutExpired):
                process.wait(CLEAN_UP_S)
            raise
    if process.returncode:
        said = "\n".join(last)
        raise LmpipeError(f"bench {name} ended with status {process.returncode}:\n{said}")
    return [Figure(**figure) for figure in orjson.loads(figures)]


@contextmanager
def _terminated_like_interrupted() -> Generator[None]:
    """SIGTERM raises SystemExit, so that the benchmark is ended too."""

    def stop(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def write(report: Report, out: Path) -> list[str]:
    """Write a report's JSON and its picture; what to tell the user."""
    out.mkdir(parents=True, exist_ok=True)
    as_json, picture = out / f"{report.name}.json", out / f"{report.name}.png"
    as_json.write_bytes(orjson.dumps(report.json(), option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))
    if find_spec("matplotlib") is None:
        return [f"figures: {as_json}", "plot:    needs matplotlib (pip install 'lmpipe[plot]')"]
    argv = [sys.executable, "-P", "-m", "lmpipe.bench.plot", str(as_json), str(picture)]
    drawn = subprocess.run(argv, capture_output=True, text=True, timeout=PLOT_S, check=False)
    if drawn.returncode:
        return [f"figures: {as_json}", f"plot:    failed: {drawn.stderr.strip().splitlines()[-1:]}"]
    return [f"figures: {as_json}", f"plot:    {picture}"]
