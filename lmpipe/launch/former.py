"""The workers that outlived their supervisor: who they are, whether the next one can go on with them, and their end.

A worker goes on for good when its supervisor dies: engines notice nothing. It is known by the lock of its role, which
the kernel says who holds, and from then on by a pidfd; a pid alone is never believed. Those that are the same lmpipe
running the same topology on segments that are still there are adopted as they are. All others are drained, in flow
order, and ended.
"""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import msgspec

from lmpipe.child import Survivor
from lmpipe.errors import LmpipeError, NodeError, SegmentError
from lmpipe.index import reader_identity
from lmpipe.launch.claim import WorkerNote, lock_holder
from lmpipe.launch.link import StageLink
from lmpipe.rundir import RunDir
from lmpipe.shm.descriptor import SegmentKind
from lmpipe.shm.node import NodeWords
from lmpipe.shm.segment import Segment
from lmpipe.shm.session import SessionDir
from lmpipe.supervisor import NodeState
from lmpipe.topology import NodeInfo, Topology

TERM_S = 5.0

Report = Callable[[str], None]


class Former:
    """What a dead supervisor left running in a run directory that the caller has claimed.

    Raises:
        NodeError: a worker lives where it cannot be signalled.
    """

    def __init__(self, paths: RunDir) -> None:
        self.paths = paths
        self.state = NodeState.read(paths.up("supervisor"))
        """What it published last."""
        self.survivors: dict[str, Survivor] = {}
        try:
            for path in sorted(paths.ups.glob("*.lock")):
                survivor = _survivor(path)
                if survivor is not None:
                    self.survivors[path.stem] = survivor
        except BaseException:
            self.close()
            raise

    def node(self, topology: Topology, version: str, report: Report) -> NodeInfo | None:
        """The note of the node to go on with; None when nothing lives, or, as is reported, it cannot be gone on with.

        Afterwards `survivors` are those that were ready; who was still starting is ended.
        """
        ready = {name for name in self.survivors if self._is_ready(name)}
        if not ready:
            return None
        try:
            info = NodeInfo.read(self.paths.path)
            problem = self._unfit(info, topology, version, ready)
        except LmpipeError as error:
            problem = str(error)
        else:
            if not problem:
                self._end([*self.survivors.keys() - ready])
                return info
        report(f"what a former supervisor left running is not taken over: {problem}")
        return None

    def end(self, report: Report, hurry: Callable[[], bool] = lambda: False) -> None:
        """Drains and ends everybody, with a line for each."""
        for name, survivor in self.survivors.items():
            report(f"{name}: pid {survivor.pid} was left by a supervisor that died; ending it")
        self._drain(report, hurry)
        self._end([*self.survivors])

    def hand_over(self) -> dict[str, Survivor]:
        """The survivors, whose pidfds are the caller's from now on."""
        survivors, self.survivors = self.survivors, {}
        return survivors

    def close(self) -> None:
        """Lets go of those that nobody has adopted; they go on."""
        while self.survivors:
            os.close(self.survivors.popitem()[1].pidfd)

    def _is_ready(self, name: str) -> bool:
        note = WorkerNote.read(self.paths.up(name))
        return note is not None and note.pid == self.survivors[name].pid and note.state == "ready"

    def _unfit(self, info: NodeInfo, topology: Topology, version: str, ready: set[str]) -> str:
        if info.lmpipe != version or info.index_identity != reader_identity():
            return f"it is lmpipe {info.lmpipe} with {info.index_identity}, this is {version} with {reader_identity()}"
        if info.topology != topology:
            was, now = (cast("dict[str, Any]", msgspec.to_builtins(tree)) for tree in (info.topology, topology))
            return f"the topology was changed: {', '.join(_differences(was, now))}"
        if self.state is None or self.state.state in ("draining", "stopping"):
            return "it was being stopped"
        if strangers := ready - {process.name for process in topology.processes}:
            return f"the topology has no process {', '.join(sorted(strangers))}"
        try:
            _check_shared_memory(info)
        except SegmentError as error:
            return str(error)
        return ""

    def _drain(self, report: Report, hurry: Callable[[], bool]) -> None:
        """What is in DRAM alone goes on to the tiers below, as far as time allows."""
        ready = {name for name in self.survivors if self._is_ready(name)}
        try:
            info = NodeInfo.read(self.paths.path)
        except LmpipeError:
            return  # of another version: it drains itself when it is told to end
        if not ready or self.state is None or self.state.state == "stopping":
            return

        def lives(process: str) -> bool:
            return process in ready and not _wait(self.survivors[process].pidfd, 0.0)

        link = StageLink(info)
        try:
            if late := link.drain(lives, info.topology.drain_ms / 1000, hurry):
                report(f"not drained in time: {', '.join(late)}")
        finally:
            link.close()

    def _end(self, names: list[str]) -> None:
        ending = [self.survivors.pop(name).pidfd for name in names]
        try:
            for pidfd in ending:
                _send(pidfd, signal.SIGTERM)
                _send(pidfd, signal.SIGCONT)
            deadline_s = time.monotonic() + TERM_S
            for pidfd in ending:
                if not _wait(pidfd, deadline_s - time.monotonic()):
                    _send(pidfd, signal.SIGKILL)
                    _wait(pidfd, TERM_S)
        finally:
            for pidfd in ending:
                os.close(pidfd)


def _survivor(role: Path) -> Survivor | None:
    pid = lock_holder(role)
    if pid < 0:
        raise NodeError(f"{role.stem} still runs in another container; end it there first")
    if not pid:
        return None
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return None
    # Asked again with the pidfd in hand: it is still this worker that the descriptor means.
    if lock_holder(role) == pid:
        return Survivor(pid, pidfd)
    os.close(pidfd)
    return None


def _check_shared_memory(info: NodeInfo) -> None:
    paths, topology = info.paths, info.topology
    Segment.attach(paths.arena, SegmentKind.SLOTS, id=bytes.fromhex(info.arena_id)).close()
    NodeWords.attach(paths.node_shm).close()
    for stage in topology.rings_needed:
        Segment.attach(paths.ring(stage), SegmentKind.SLOTS).close()
    if info.sessions_identity != SessionDir(paths.path).identity():
        raise SegmentError(f"{paths.sessions}: is not the directory that the workers know")
    for tier in topology.tier_names:
        if not any(paths.index.glob(f"{tier.value}-*")):
            raise SegmentError(f"{paths.index}: the index of {tier.value} is gone")


def _differences(was: dict[str, Any], now: dict[str, Any], at: str = "") -> list[str]:
    """Paths of what differs, as errors of a topology name them."""
    found: list[str] = []
    for name in was.keys() | now.keys():
        old, new = was.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            found += _differences(cast("dict[str, Any]", old), cast("dict[str, Any]", new), f"{at}{name}.")
        elif old != new:
            found.append(at + name)
    return sorted(found)


def _send(pidfd: int, number: signal.Signals) -> None:
    try:
        signal.pidfd_send_signal(pidfd, number)
    except ProcessLookupError:
        return  # it is gone, which is what was wanted


def _wait(pidfd: int, timeout_s: float) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(max(0.0, timeout_s) * 1000))
