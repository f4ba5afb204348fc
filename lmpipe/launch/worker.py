"""A worker: reads the node's note, takes what its stages need, says READY, and runs them until told to stop."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from pathlib import Path

from lmpipe.bus import Client, Server
from lmpipe.child import READY_LINE
from lmpipe.errors import NodeError
from lmpipe.launch.claim import WorkerNote, lock_holder, take_role
from lmpipe.launch.parts import Parts
from lmpipe.metrics import worker_counters
from lmpipe.rundir import RunDir
from lmpipe.shm.counters import Counters
from lmpipe.shm.session import Session, SessionDir
from lmpipe.spans import Spans
from lmpipe.stages.runner import Runner
from lmpipe.topology import NodeInfo, Topology

DRAIN_S = 3.0
"""Shorter than the supervisor waits between SIGTERM and SIGKILL."""

ROLE_S = 5.0
"""A worker that a dead supervisor has just started may have the role until it sees that it is alone."""


def run_worker(run_dir: Path, process: str, ready_fd: int | None) -> int:
    """Runs one process of a node and returns its exit status.

    Raises:
        LmpipeError: the node is not there, is not this one's, or has no room.
    """
    info = NodeInfo.read(run_dir)
    topology, paths = info.topology, info.paths
    stages = _stages_of(topology, process)
    with contextlib.ExitStack() as undo:
        _check_supervisor(paths, process)
        undo.callback(os.close, take_role(paths, process, ROLE_S))
        # Again: a new supervisor either finds who has the role and ends this process, or holds its own lock by now.
        _check_supervisor(paths, process)
        session = undo.enter_context(Session.create(paths.path))
        WorkerNote(os.getpid(), session.id, "starting").write(paths.up(process))
        counters = Counters.create(paths.counters_of(process, os.getpid()), worker_counters(stages))
        undo.callback(counters.close, unlink=False)
        spans = Spans(process, paths.trace(process) if topology.profile.trace else None)
        undo.callback(spans.close)
        parts = Parts(info, session, spans, undo)
        cpus = next(p.cpus for p in topology.processes if p.name == process)
        beat_s, sessions = topology.heartbeat_ms / 1000, SessionDir(paths.path)
        runner = Runner(counters, spans, heartbeat_s=beat_s, drain_s=DRAIN_S, cpus=cpus, alive=sessions.alive)
        seats = {
            stage: runner.seat(stage, session, _server(info, stage, session), _client_below(info, stage))
            for stage in stages
        }
        made = [parts.stage(stage, seat) for stage, seat in seats.items()]
        WorkerNote(os.getpid(), session.id, "ready").write(paths.up(process))
        if ready_fd is not None:
            os.write(ready_fd, READY_LINE)  # EPIPE when the supervisor has died: so does this process
            os.close(ready_fd)
        return runner.run(made)


def _check_supervisor(paths: RunDir, process: str) -> None:
    if lock_holder(paths.supervisor_lock) != os.getppid():
        raise NodeError(f"{process}: the supervisor is gone")


def _stages_of(topology: Topology, process: str) -> list[str]:
    """In flow order, whatever the file's."""
    for candidate in topology.processes:
        if candidate.name == process:
            return [stage for stage in topology.stages if stage in candidate.stages]
    raise NodeError(f"{topology.name} has no process {process}")


def _server(info: NodeInfo, stage: str, session: Session) -> Server:
    ends = info.endpoints[stage]
    return Server({"load": ends["load"], "save": ends["save"]}, session.id)


def _client_below(info: NodeInfo, stage: str) -> Client | None:
    below = info.topology.below(stage)
    if below is None:
        return None
    ends = info.endpoints[below]
    return Client({"load": ends["load"], "save": ends["save"]})


def log_to_stderr(process: str) -> None:
    """Warnings and what the stages say, on stderr, which the supervisor leads to the process's log."""
    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format=f"%(asctime)s {process} %(levelname)s %(name)s: %(message)s"
    )
