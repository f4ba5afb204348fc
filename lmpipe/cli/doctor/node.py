"""A running node: its processes, versions, answers, descriptors and clock. Changes nothing; asks with Ping alone."""

from __future__ import annotations

import os
import statistics
import time
from importlib.metadata import version
from pathlib import Path

from lmpipe.bus import Client, Poller
from lmpipe.cli.doctor.finding import Finding, fail, ok, warn
from lmpipe.handles import SessionId
from lmpipe.index import may_map, reader_identity
from lmpipe.launch.overview import Overview, ProcessView
from lmpipe.messages import Ping, Pong
from lmpipe.topology import NodeInfo

PINGS = 5
SLOW_S = 0.01
STEP_S = 5.0
"""Wall clock and uptime are noted at moments that lie a little apart."""
FULL_PART = 0.8
NOBODY = SessionId(1)


def examine(info: NodeInfo, seen: Overview) -> list[Finding]:
    """Everything about the processes of a node."""
    here = seen.supervisor_pid >= 0  # else in another pid namespace, where its pids mean others
    found = [state(info, seen), *deaths(info, seen), lmpipe_version(info), index_identity(info), *asking(seen)]
    found += [answers(info, process.name) for process in seen.processes if process.pid]
    if here:
        found += [f for process in seen.processes if process.pid for f in descriptors(process, Path("/proc"))]
        found += wall_clock([process for process in seen.processes if process.pid], Path("/proc"))
    return found


def state(info: NodeInfo, seen: Overview) -> Finding:
    """What the supervisor says."""
    text = f"{seen.name} is {seen.state}"
    down = ", ".join(process.name for process in seen.processes if process.state == "down")
    if seen.state == "degraded":
        return fail("node", f"{text}: {down} stays down", f"see {info.paths.logs}; lmpipe down, lmpipe up")
    if seen.state == "dead":
        todo = "lmpipe up FILE goes on with what lies in DRAM; lmpipe down removes it"
        return fail("node", f"{text}: none of its processes lives", todo)
    if seen.state == "orphaned":
        todo = "lmpipe up FILE takes the workers over that live; lmpipe down ends them"
        return fail("node", f"{text}: its supervisor is dead", todo)
    if seen.state != "ready":
        return warn("node", text, "wait, and look again")
    return ok("node", text)


def deaths(info: NodeInfo, seen: Overview) -> list[Finding]:
    """Processes that had to be started again."""
    return [
        warn(
            "restarts", f"{p.name}: {p.restarts}, last {p.last_exit or 'end unknown'}", f"see {info.paths.log(p.name)}"
        )
        for p in seen.processes
        if p.restarts
    ]


def lmpipe_version(info: NodeInfo) -> Finding:
    """Whether the node is of this installation."""
    mine = version("lmpipe")
    if info.lmpipe not in ("", mine):
        return fail("lmpipe version", f"node {info.lmpipe}, here {mine}", "use the same lmpipe on both sides")
    return ok("lmpipe version", mine)


def index_identity(info: NodeInfo) -> Finding:
    """Whether engines that run here may map the index."""
    mine = reader_identity()
    if not may_map(info.index_identity):
        todo = "engines here look up by message; the same LMDB and pid namespace (docker run --pid=…) saves them that"
        return warn("index readers", f"node: {info.index_identity}; here: {mine}", todo)
    return ok("index readers", mine)


def asking(seen: Overview) -> list[Finding]:
    """Engines that cannot map the index."""
    found: list[Finding] = []
    for name, values in seen.counters.items():
        if values.get("lookups_by_message"):
            text = f"{name} asks gather: {values['lookups_by_message']} times, {values['lookups_unanswered']} in vain"
            found.append(
                warn("lookups", text, "its log says why; the same LMDB and pid namespace as the node's is best")
            )
    return found


def answers(info: NodeInfo, process: str) -> Finding:
    """How long a process takes to answer, as its supervisor asks it."""
    check, limit_s = f"answer of {process}", info.topology.watchdog_ms / 1000
    stage = next(p.stages[0] for p in info.topology.processes if p.name == process)
    times = ping({"load": info.endpoints[stage]["load"], "save": info.endpoints[stage]["save"]}, limit_s)
    if len(times) < PINGS:
        todo = f"it hangs, and its supervisor ends it after that time; see {info.paths.log(process)}"
        return fail(check, f"none within {limit_s:g} s", todo)
    median_s = statistics.median(times)
    seen = f"{median_s * 1000:.2g} ms, at worst {max(times) * 1000:.2g} ms"
    if median_s > SLOW_S:
        return warn(check, seen, "the machine is overloaded, or the process has too few CPUs: processes[].cpus")
    return ok(check, seen)


def ping(endpoints: dict[str, str], limit_s: float) -> list[float]:
    """Seconds of each of `PINGS` answers; fewer when one took longer than `limit_s`."""
    client, poller, times = Client({"load": endpoints["load"], "save": endpoints["save"]}), Poller(), list[float]()
    poller.register(client)
    try:
        for number in range(1, PINGS + 1):
            begin_s, sent = time.monotonic(), False
            while True:
                now_s = time.monotonic()
                if now_s - begin_s > limit_s:
                    return times
                if not sent:
                    begin_s, sent = (now_s, True) if client.send("load", Ping(NOBODY, number)) else (begin_s, False)
                poller.poll(5 if sent else 1)
                answer = client.recv()
                if isinstance(answer, Pong) and answer.sent_ns == number:
                    times.append(time.monotonic() - begin_s)
                    break
        return times
    finally:
        client.close()


def descriptors(process: ProcessView, proc: Path) -> list[Finding]:
    """Open files of a process, when they come near its limit."""
    try:
        used = len(list((proc / str(process.pid) / "fd").iterdir()))
        text = (proc / str(process.pid) / "limits").read_text()
    except OSError:
        return []  # it has ended, or is not ours to look at
    line = next(line for line in text.splitlines() if line.startswith("Max open files"))
    limit = line.removeprefix("Max open files").split()[0]
    if limit.isdigit() and used > FULL_PART * int(limit):
        return [fail(f"files of {process.name}", f"{used} of {limit} open", "raise ulimit -n, and start it again")]
    return []


def wall_clock(processes: list[ProcessView], proc: Path) -> list[Finding]:
    """Whether the wall clock, which chunks expire by, was set since the processes started."""
    steps = [step for process in processes if (step := _step_s(process, proc)) is not None]
    worst_s = max(steps, key=abs, default=0.0)
    if abs(worst_s) > STEP_S:
        todo = "chunks with a ttl live so much longer or shorter; let chrony slew the clock instead of setting it"
        return [warn("wall clock", f"was set by about {worst_s:+.0f} s since the node started", todo)]
    return [ok("wall clock", "in step since the node started")] if steps else []


def _step_s(process: ProcessView, proc: Path) -> float | None:
    """How much more time has passed for the wall clock than for the kernel."""
    try:
        stat = (proc / str(process.pid) / "stat").read_text()
    except OSError:
        return None
    ticks = int(stat.rpartition(")")[2].split()[19])
    age_s = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return process.uptime_s - age_s
