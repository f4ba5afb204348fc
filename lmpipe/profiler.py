"""A node under load, watched: a flame graph of every process, one time line of all of them. Knows no stage.

py-spy samples each worker and the engine from outside; the spans that runners take anyway (spans.py) are written as
Chrome traces and merged, since all clocks are CLOCK_MONOTONIC. py-spy stops a process for a moment at every sample, so
spans are a little longer here than without it. What devices did is in the same files, on tracks of its own.
"""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from lmpipe import topology as tp
from lmpipe.demo import workload
from lmpipe.demo.client import EngineProcess
from lmpipe.demo.node import SIZES, TOPOLOGY
from lmpipe.errors import LmpipeError
from lmpipe.spans import FIRST_TRACK, Spans, read_trace
from lmpipe.testing import Node, merged

RATE_HZ = 100
STARTED_S = 60.0
PY_SPY_S = 60.0
STEP_S = 0.05
NO_PY_SPY = "no flame graphs: py-spy is not installed (pip install 'lmpipe[profile]')"
NO_RIGHTS = (
    "py-spy may not look into another process here: run as root, or `sysctl kernel.yama.ptrace_scope=0`,"
    " or give the container `--cap-add SYS_PTRACE`"
)

Say = Callable[[str], None]


def nsys_command(out: Path, arguments: Sequence[str]) -> list[str]:
    """`lmpipe profile ARGUMENTS` under Nsight Systems, which follows all of a node's processes: what GPUs do, beside
    the nvtx ranges with their bytes and chunks, in `out`/nsys.nsys-rep.
    """
    options = ["--trace=cuda,nvtx,osrt", "--sample=none", "--cpuctxsw=none", "--force-overwrite=true"]
    watched = [sys.executable, "-P", "-m", "lmpipe", "profile", *arguments, "--no-nsys"]
    return [shutil.which("nsys") or "nsys", "profile", *options, f"--output={out / 'nsys'}", *watched]


@dataclass(frozen=True, slots=True)
class SpanTime:
    """All spans of one name in one process, of its threads or on one track. A span that lies in another is counted in
    both.
    """

    process: str
    track: str
    """Of a device; "": of threads."""
    name: str
    count: int
    total_ms: float
    longest_ms: float
    nbytes: int


@dataclass(frozen=True, slots=True)
class Profile:
    """What was written, and where the time went, most first. `problems`: what is missing, and why."""

    trace: Path
    flames: list[Path]
    spans: list[SpanTime]
    """Of threads."""
    device_spans: list[SpanTime]
    """Of what devices did meanwhile."""
    seconds: float
    problems: list[str]


def profile(file: Path | None, seconds: float, out: Path, say: Say) -> Profile:
    """Run a topology file under the built-in load (None: the demo's topology under the demo's engine) and watch it.

    The tiers of the file lie in directories of their own below `out` and are removed again: a node that is up, its
    files and its buckets are left alone.

    Raises:
        TopologyError: the file is wrong.
        LmpipeError: a process did not start, or ended early.
    """
    out.mkdir(parents=True, exist_ok=True)
    base, sizes = (file, {}) if file is not None else (TOPOLOGY, SIZES)
    work = out.absolute() / "work"
    say(f"starting {base}")
    try:
        with Node(merged(sizes, _changes(base, work)), base=base) as node:
            if file is None:
                return _with_demo(node, seconds, out, work, say)
            return _with_load(node, seconds, out, work, say)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _changes(base: Path, work: Path) -> dict[str, Any]:
    shipped = tp.load(base).tiers
    tiers: dict[str, Any] = {}
    if shipped.ssd is not None:
        tiers["ssd"] = {"directory": str(work / "ssd")}
    if shipped.remote is not None:
        tiers["remote"] = {"url": f"file://{work / 'remote'}"}
    work.mkdir(parents=True, exist_ok=True)
    return {"tiers": tiers, "profile": {"trace": True}, "metrics": None}


def _with_load(node: Node, seconds: float, out: Path, work: Path, say: Say) -> Profile:
    trace, log = work / "engine.trace.json", work / "engine.log"
    argv = [sys.executable, "-P", "-m", "lmpipe.bench.engine_load", str(node.run_dir), str(trace)]
    with log.open("wb") as said, subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=said, stderr=said) as engine:
        try:
            deadline_s = time.monotonic() + STARTED_S
            while not trace.exists() and engine.poll() is None and time.monotonic() < deadline_s:
                time.sleep(STEP_S)
            flames = FlameGraphs(_workers(node) | {"engine": engine.pid}, seconds, out)
            _wait(flames, seconds, say)
            if engine.poll() is not None:
                raise LmpipeError(f"the engine process ended with status {engine.returncode}: {log.read_text()[-500:]}")
        finally:
            engine.send_signal(signal.SIGTERM)
            engine.wait()
    return _result(node, [trace], flames, seconds, out)


def _with_demo(node: Node, seconds: float, out: Path, work: Path, say: Say) -> Profile:
    trace = work / "client.trace.json"
    spans = Spans("client: requests of the demo", trace)
    requests = workload.document_requests(workload.FULL)
    with EngineProcess("full", work / "engine.log") as engine:
        say("building the demo's model")
        engine.wait_started()
        engine.attach(node.run_dir)
        flames = FlameGraphs(_workers(node) | {"engine": engine.pid}, seconds, out)
        began = time.monotonic()
        # Twice over the same documents: what was computed and saved the first time is loaded the second.
        for request in (*requests, *requests):
            if time.monotonic() > began + seconds:
                break
            say(f"{request.name}, {time.monotonic() - began:.0f} of {seconds:.0f} s")
            with spans.span(f"request: {request.name}"):
                engine.generate(request.tokens, request.new_tokens)
            engine.flush([], [])  # the next request finds what this one has computed
        _wait(flames, began + seconds - time.monotonic(), say)
    spans.close()
    return _result(node, [trace], flames, time.monotonic() - began, out)


def _workers(node: Node) -> dict[str, int]:
    return {process.name: process.pid for process in node.status().processes}


def _wait(flames: FlameGraphs, seconds: float, say: Say) -> None:
    end_s = time.monotonic() + seconds
    while (left_s := end_s - time.monotonic()) > 0:
        say(f"watching, {left_s:.0f} s left")
        time.sleep(min(left_s, 1.0))
    say("drawing flame graphs")
    flames.finish()


def _result(node: Node, traces: Sequence[Path], flames: FlameGraphs, seconds: float, out: Path) -> Profile:
    time.sleep(1.5 * node.topology.heartbeat_ms / 1000)  # workers write their spans once a heartbeat
    workers = [node.paths.trace(process.name) for process in node.topology.processes]
    paths = [*workers, *node.paths.engine_traces(), *traces]
    events = [event for path in paths if path.exists() for event in read_trace(path)]
    target = out / "trace.json"
    target.write_bytes(orjson.dumps({"traceEvents": one_time_line(events), "displayTimeUnit": "ms"}))
    times = span_times(events)
    hosts, devices = [time for time in times if not time.track], [time for time in times if time.track]
    return Profile(target, flames.drawn, hosts, devices, seconds, flames.problems)


class FlameGraphs:
    """py-spy beside every process, writing `NAME.svg` below `out`. What cannot be drawn is a problem, not an error."""

    def __init__(self, pids: Mapping[str, int], seconds: float, out: Path) -> None:
        self.drawn: list[Path] = []
        self.problems: list[str] = []
        self._running: dict[Path, subprocess.Popen[bytes]] = {}
        beside = Path(sys.executable).with_name("py-spy")
        program = str(beside) if beside.exists() else shutil.which("py-spy")
        if program is None:
            self.problems.append(NO_PY_SPY)
            return
        for name, pid in pids.items():
            path = out / f"{name}.svg"
            path.unlink(missing_ok=True)
            options = ["--duration", str(max(round(seconds), 1)), "--rate", str(RATE_HZ), "--threads", "--nolineno"]
            argv = [program, "record", "--pid", str(pid), "--output", str(path), *options]
            self._running[path] = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
            )

    def finish(self) -> None:
        """Wait for all of them."""
        for path, process in self._running.items():
            try:
                _, said = process.communicate(timeout=PY_SPY_S)
            except subprocess.TimeoutExpired:
                process.kill()
                _, said = process.communicate()
            if path.exists():
                self.drawn.append(path)
                continue
            text = said.decode(errors="replace")
            denied = "ermission" in text or "ptrace" in text
            self.problems.append(f"{path.name}: {NO_RIGHTS if denied else text.strip()[-200:] or 'not drawn'}")
        self._running.clear()


def one_time_line(events: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Events of all processes on one time line that begins at 0, processes in the order given, threads with names,
    tracks below them.
    """
    given = list(events)
    start = min((event["ts"] for event in given if "ts" in event), default=0.0)
    order: dict[int, int] = {}
    rows: set[tuple[int, int]] = set()
    shown: list[dict[str, Any]] = []
    for event in given:
        pid = event["pid"]
        order.setdefault(pid, len(order))
        if "ts" in event:
            rows.add((pid, event["tid"]))
            event = {**event, "ts": event["ts"] - start}
        shown.append(event)
    for pid, place in order.items():
        shown.append({"ph": "M", "name": "process_sort_index", "pid": pid, "args": {"sort_index": place}})
    for pid, tid in sorted(rows):
        if tid >= FIRST_TRACK:  # it has its name
            told: dict[str, Any] = {"name": "thread_sort_index", "args": {"sort_index": tid}}
        else:
            told = {"name": "thread_name", "args": {"name": "loop" if tid == pid else "worker thread"}}
        shown.append({"ph": "M", "pid": pid, "tid": tid, **told})
    return shown


def span_times(events: Iterable[dict[str, Any]]) -> list[SpanTime]:
    """Where the time went, most first."""
    processes: dict[int, str] = {}
    tracks: dict[tuple[int, int], str] = {}
    found: dict[tuple[int, int, str], list[tuple[float, int]]] = defaultdict(list)
    for event in events:
        pid = event["pid"]
        if event["ph"] == "X":
            row = event["tid"] if event["tid"] >= FIRST_TRACK else 0
            found[pid, row, event["name"]].append((event["dur"] / 1e3, event["args"]["bytes"]))
        elif event["name"] == "process_name":
            processes[pid] = event["args"]["name"]
        else:
            tracks[pid, event["tid"]] = event["args"]["name"]
    times = [
        SpanTime(
            processes.get(pid, str(pid)),
            tracks.get((pid, row), ""),
            name,
            len(spans),
            sum(ms for ms, _ in spans),
            max(ms for ms, _ in spans),
            sum(nbytes for _, nbytes in spans),
        )
        for (pid, row, name), spans in found.items()
    ]
    return sorted(times, key=lambda span: -span.total_ms)
