"""A node of real processes for tests, yours too: short deadlines, a place of its own, nothing left behind.

with Node() as node:
    producer = node.producer(layout)
    …
    node.kill("gather", signal.SIGKILL)
    node.wait(lambda state: state.state == "ready")
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import yaml

from lmpipe import topology as tp
from lmpipe.errors import NodeError
from lmpipe.launch.stop import stop_node, tidy_up
from lmpipe.layout import KVLayout
from lmpipe.producer import Producer
from lmpipe.rundir import RunDir
from lmpipe.shm.pages import sweep
from lmpipe.supervisor import NodeState
from lmpipe.topology import NodeInfo, Topology

START_S = 60.0
STEP_S = 0.01


def small_topology(run_dir: Path, directory: Path) -> dict[str, Any]:
    """DRAM and an SSD tier that keeps chunks raw, sized for tests; `directory` takes the SSD tier's files."""
    return {
        "name": "test",
        "run_dir": str(run_dir),
        "chunk_tokens": 16,
        "tiers": {
            "dram": {"capacity": "32MiB", "slots": 2048},
            "ssd": {
                "directory": str(directory / "ssd"),
                "capacity": "64MiB",
                "segment": "8MiB",
                "flush": "each",
                "codec": "raw",
            },
        },
        "rings": {"compress": "8MiB", "persist": "8MiB", "replicate": "8MiB"},
        "index": {"dram": "4MiB", "ssd": "4MiB", "remote": "4MiB"},
        "heartbeat_ms": 100,
        "watchdog_ms": 3000,
        "ready_ms": 30_000,
        "drain_ms": 5000,
        "engines": {"leases": 8, "hold_entries": 1024, "load_deadline_ms": 5000},
    }


class Node:
    """A supervisor with its workers. Processes are addressed by the pids that they recorded, never by name."""

    def __init__(self, changes: Mapping[str, Any] | None = None, *, base: Path | None = None) -> None:
        """`changes` are laid over `small_topology` or the file `base`: mappings merge, None removes."""
        self.directory = Path(tempfile.mkdtemp(prefix="lmpipe-test-"))
        run_dir = Path("/dev/shm") / f"lmpipe-test-{secrets.token_hex(6)}"
        plain: dict[str, Any] = small_topology(run_dir, self.directory)
        if base is not None:
            plain = cast("dict[str, Any]", yaml.safe_load(base.read_text())) | {"run_dir": str(run_dir)}
        self.file = self.directory / "topology.yaml"
        self.file.write_text(yaml.safe_dump(merged(plain, changes or {})))
        self.topology: Topology = tp.load(self.file)
        self.paths = RunDir(Path(self.topology.run_dir))
        self._supervisor: subprocess.Popen[bytes] | None = None
        self._producers: list[Producer] = []

    @property
    def run_dir(self) -> Path:
        """Where producers attach."""
        return self.paths.path

    @property
    def info(self) -> NodeInfo:
        """The node's note."""
        return NodeInfo.read(self.paths.path)

    @property
    def output(self) -> str:
        """What the supervisors have said so far."""
        path = self.directory / "up.log"
        return path.read_text() if path.exists() else ""

    def __enter__(self) -> Node:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def start(self) -> None:
        """Starts a supervisor and waits until the node is ready. Raises NodeError with what it said when it fails."""
        with (self.directory / "up.log").open("ab") as log:
            argv = [sys.executable, "-P", "-m", "lmpipe", "up", str(self.file)]
            self._supervisor = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self.wait(lambda state: state.state in ("ready", "degraded"), START_S)

    def status(self) -> NodeState:
        """What the living supervisor published last. Raises NodeError when it did not yet."""
        state = NodeState.read(self.paths.up("supervisor"))
        if state is None or self._supervisor is None or state.pid != self._supervisor.pid:
            raise NodeError("the supervisor has published nothing")
        return state

    def wait(self, done: Callable[[NodeState], bool], timeout_s: float = 30.0) -> NodeState:
        """Waits until the node's state is as wanted. Raises NodeError when it does not become so."""
        deadline_s = time.monotonic() + timeout_s
        while time.monotonic() < deadline_s:
            if self._supervisor is None or self._supervisor.poll() is not None:
                raise NodeError(f"the supervisor has ended:\n{self.output}")
            try:
                state = self.status()
            except NodeError:
                state = None
            if state is not None and done(state):
                return state
            time.sleep(STEP_S)
        raise NodeError(f"not in {timeout_s:g} s; {NodeState.read(self.paths.up('supervisor'))}\n{self.output}")

    def pid(self, process: str) -> int:
        """Pid of a worker, or of the "supervisor". Raises NodeError when it is not running."""
        if process == "supervisor":
            if self._supervisor is None or self._supervisor.poll() is not None:
                raise NodeError("the supervisor is not running")
            return self._supervisor.pid
        pid = next((p.pid for p in self.status().processes if p.name == process), 0)
        if not pid:
            raise NodeError(f"{process} is not running")
        return pid

    def kill(self, process: str, number: signal.Signals = signal.SIGKILL) -> int:
        """Signals a worker, the "supervisor", or "all" (the supervisor first: it restarts none); its pid."""
        if process != "all":
            pid = self.pid(process)
            os.kill(pid, number)
            if process == "supervisor" and number is signal.SIGKILL and self._supervisor is not None:
                self._supervisor.wait()
            return pid
        workers = [p.pid for p in self.status().processes if p.pid]
        pid = self.kill("supervisor", number)
        for worker in workers:
            os.kill(worker, number)
        return pid

    def wait_restarted(self, process: str, old_pid: int, timeout_s: float = 30.0) -> int:
        """Waits until a worker is ready under another pid, and returns that."""
        state = self.wait(
            lambda state: any(p.name == process and p.state == "ready" and p.pid != old_pid for p in state.processes),
            timeout_s,
        )
        return next(p.pid for p in state.processes if p.name == process)

    def stop(self, *, keep_dram: bool = False) -> None:
        """An orderly stop; producers stay and find the node again after `start`. Raises NodeError when late."""
        if keep_dram:
            self.paths.keep_dram.touch(mode=0o600)
        if self._supervisor is not None:
            self._supervisor.terminate()
            try:
                self._supervisor.wait(START_S)
            except subprocess.TimeoutExpired:
                raise NodeError(f"the supervisor does not stop:\n{self.output}") from None

    def restart(self, *, keep_dram: bool = True) -> None:
        """`stop` if it still runs, then `start`."""
        if self._supervisor is not None and self._supervisor.poll() is None:
            self.stop(keep_dram=keep_dram)
        self.start()

    def producer(
        self, layout: KVLayout, *, model: str = "test", name: str = "engine", wait_s: float = 20.0
    ) -> Producer:
        """A producer attached to the node, closed with it."""
        producer = Producer(self.run_dir, layout, model=model, name=name, wait_s=wait_s)
        self._producers.append(producer)
        return producer

    def close(self) -> None:
        """Stops everything, stopped or hung processes too, and removes every file."""
        for producer in self._producers:
            producer.close()
        self._producers.clear()
        supervisor = self._supervisor
        if supervisor is not None and supervisor.poll() is None:
            state = NodeState.read(self.paths.up("supervisor"))
            # Whatever a test has stopped goes on: it takes part in the orderly end.
            for pid in [p.pid for p in state.processes if p.pid] if state else []:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)
            supervisor.send_signal(signal.SIGCONT)
            supervisor.terminate()
            try:
                supervisor.wait(START_S / 2)
            except subprocess.TimeoutExpired:
                supervisor.kill()
                supervisor.wait()
                self._await_starting(state)
        stop_node(self.paths, keep_dram=False, timeout_s=START_S / 2)  # one that the test itself has started
        if self.paths.path.exists():
            tidy_up(self.paths, keep_dram=False, report=lambda _: None)
        sweep(self.paths.pages)
        shutil.rmtree(self.directory, ignore_errors=True)

    def _await_starting(self, state: NodeState | None) -> None:
        """Workers of a killed supervisor that were still starting end themselves; others are ended by their notes."""
        starting = [p.pid for p in state.processes if p.state == "starting"] if state else []
        deadline_s = time.monotonic() + 5.0
        while any(Path(f"/proc/{pid}").exists() for pid in starting) and time.monotonic() < deadline_s:
            time.sleep(STEP_S)


def merged(plain: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`changes` over `plain`: mappings are merged, None removes, everything else replaces."""
    result = dict(plain)
    for name, value in changes.items():
        if value is None:
            result.pop(name, None)
        elif isinstance(value, Mapping) and isinstance(result.get(name), Mapping):
            result[name] = merged(result[name], cast("Mapping[str, Any]", value))
        else:
            result[name] = value
    return result
