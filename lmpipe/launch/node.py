"""A node from start to end, in the supervisor's process: claim, segments, workers, and nothing left behind; or from the
adoption of the workers that a dead supervisor left.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Generator
from importlib.metadata import version
from pathlib import Path

import msgspec

from lmpipe.child import ProcessSpec
from lmpipe.errors import NodeError
from lmpipe.exposition import Exporter, serve
from lmpipe.index import reader_identity
from lmpipe.launch.claim import Claim
from lmpipe.launch.counter_files import CounterFiles
from lmpipe.launch.devices import lacking
from lmpipe.launch.former import Former
from lmpipe.launch.link import StageLink
from lmpipe.launch.segments import Progress, Segments
from lmpipe.rundir import RunDir
from lmpipe.shm.session import SessionDir
from lmpipe.signals import SignalPipe
from lmpipe.supervisor import Policy, Supervisor
from lmpipe.topology import NODE_VERSION, NodeInfo, Topology

Report = Callable[[str], None]


class Interrupted(NodeError):
    """A signal came before the node was ready."""


def run_node(
    topology: Topology,
    *,
    report: Report,
    progress: Progress,
    on_ready: Callable[[NodeInfo], None],
    keep_dram: bool = False,
) -> None:
    """Runs the node until a signal asks it to stop. Living workers of a supervisor that died are gone on with.

    Raises:
        NodeError: it runs already, a worker did not start, or a GPU is named and there is none; nothing is left behind.
        SegmentError: there is no room for its segments; nothing is left behind.
    """
    if problem := lacking(topology):
        raise NodeError(str(problem))
    paths = RunDir(Path(topology.run_dir))
    with contextlib.ExitStack() as undo:
        signals = SignalPipe()
        undo.callback(signals.close)
        claim = Claim(paths, topology.name)
        undo.callback(claim.release)
        was_ready = False
        former = Former(paths)
        undo.callback(former.close)
        left = former.node(topology, version("lmpipe"), report)

        def clear() -> None:
            # What a former life left in DRAM is not a failed start's to throw away.
            found = left is not None or segments.took_over
            claim.clear(keep_dram=keep_dram or paths.keep_dram.exists() if was_ready else found)

        def watched(segment: str, done: int, total: int) -> None:
            if signals.count:
                raise Interrupted("stopped before it was ready")
            progress(segment, done, total)

        segments = Segments(paths, topology, report, watched)
        if left is None:
            former.end(report, lambda: bool(signals.count))
            claim.remove_leftovers()
            undo.callback(clear)
            info = _info(topology, paths, segments.build())
        else:
            paths.keep_dram.unlink(missing_ok=True)
            info = msgspec.structs.replace(left, supervisor_pid=os.getpid())
        info.write()

        def ready() -> None:
            nonlocal was_ready
            was_ready = True
            on_ready(info)

        with _supervisor(info, signals, report, former) as supervisor:
            if left is not None:  # from here on they are this one's to end
                undo.callback(clear)
            supervisor.run(ready)
        if not was_ready:
            raise Interrupted("stopped before it was ready")


@contextlib.contextmanager
def _supervisor(info: NodeInfo, signals: SignalPipe, report: Report, former: Former) -> Generator[Supervisor]:
    topology, paths = info.topology, info.paths
    counted = CounterFiles(paths)
    with contextlib.ExitStack() as undo:
        link = StageLink(info)
        undo.callback(link.close)
        if topology.metrics.port is not None:
            exporter = _serve(topology.metrics.host, topology.metrics.port, counted)
            undo.callback(exporter.close)
            report(f"metrics: http://{topology.metrics.host}:{exporter.port}/metrics")
        yield Supervisor(
            [_spec(paths, process.name) for process in topology.processes],
            policy_of(topology),
            link,
            paths.up("supervisor"),
            signals,
            report=report,
            buried=counted.retire,
            tidy=counted.sweep,
            survivors=former.hand_over(),
            former=former.state,
        )


def _serve(host: str, port: int, counted: CounterFiles) -> Exporter:
    try:
        return serve(host, port, counted.samples)
    except OSError as error:
        raise NodeError(f"metrics.port: {host}:{port}: {error.strerror}") from None


def policy_of(topology: Topology) -> Policy:
    """The supervisor's limits."""
    watchdog_s = topology.watchdog_ms / 1000
    return Policy(
        ready_s=topology.ready_ms / 1000,
        ping_s=max(topology.heartbeat_ms / 1000, watchdog_s / 5),
        watchdog_s=watchdog_s,
        budget=topology.restarts.budget,
        window_s=topology.restarts.window_s,
        drain_s=topology.drain_ms / 1000,
    )


def _spec(paths: RunDir, process: str) -> ProcessSpec:
    argv = (sys.executable, "-P", "-m", "lmpipe.launch", str(paths.path), process)
    return ProcessSpec(process, argv, paths.log(process))


def _info(topology: Topology, paths: RunDir, arena_id: bytes) -> NodeInfo:
    channels = ("load", "save")
    return NodeInfo(
        NODE_VERSION,
        topology,
        str(paths.path),
        arena_id.hex(),
        {stage: {channel: paths.endpoint(stage, channel) for channel in channels} for stage in topology.stages},
        os.getpid(),
        time.time(),
        reader_identity(),
        SessionDir(paths.path).identity(),
        version("lmpipe"),
    )
