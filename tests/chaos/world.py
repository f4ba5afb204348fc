"""A world: a node and its engines, and who starts again what died. Knows that faults are under way, not which."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import queue
import random
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from io_faults import IoFaults, NoCompiler

from lmpipe.errors import NodeError
from lmpipe.failpoints import VARIABLE, Control
from lmpipe.launch.claim import WorkerNote
from lmpipe.testing import Node

from . import census
from .record import Record
from .shape import MIB, Shape

SSD_ROOM, SHM_ROOM = 72 * MIB, 32 * MIB
PATIENCE_S = 60.0
TESTS = Path(__file__).parent.parent


@cache
def _io_faults() -> IoFaults | None:
    """The library, built once; None where there is no compiler."""
    directory = tempfile.mkdtemp(prefix="lmpipe-chaos-io-")
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    try:
        return IoFaults(Path(directory))
    except NoCompiler:
        return None


class ChaosNode(Node):
    """A node whose supervisor may die at any moment."""

    def launch(self) -> None:
        """Start a supervisor and wait for nothing."""
        with (self.directory / "up.log").open("ab") as log:
            argv = [sys.executable, "-P", "-m", "lmpipe", "up", str(self.file)]
            self._supervisor = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    @property
    def exit(self) -> int | None:
        """The supervisor's exit status, None while it runs."""
        return None if self._supervisor is None else self._supervisor.poll()


class EngineProcess:
    """One life of an engine process (engine.py)."""

    def __init__(self, world: World, number: int) -> None:
        options = {
            "run_dir": str(world.node.run_dir),
            "pages_in": str(world.pages) if world.shape.mapped[number] else None,
            "number": world.next_number(),
        }
        self.number = number
        self._record = world.record
        self._answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._log = (world.node.directory / f"engine{number}.log").open("ab")
        self._process = subprocess.Popen(
            [sys.executable, "-W", "error", "-m", "chaos.engine", json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env={**os.environ, "PYTHONPATH": str(TESTS)},
        )
        self.pid = self._process.pid
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if not line.endswith(b"\n"):
                break  # it was killed while it spoke
            said = json.loads(line)
            if "answer" in said:
                self._answers.put(said["answer"])
            else:
                self._record.hear(self.pid, said)
        self._answers.put(EOFError("the engine has ended"))

    def tell(self, do: str, **arguments: Any) -> None:
        """Begin something; what cannot be told to the dead is not."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps({"do": do, **arguments}).encode() + b"\n")
            self._process.stdin.flush()

    def hear(self, timeout_s: float = 2 * PATIENCE_S) -> Any:
        """The answer to what was told first. Raises EOFError, queue.Empty."""
        answer = self._answers.get(timeout=timeout_s)
        if isinstance(answer, EOFError):
            self._answers.put(answer)  # it is so from now on
            raise answer
        return answer

    def ask(self, do: str, **arguments: Any) -> Any:
        """Do something and wait for the answer."""
        self.tell(do, **arguments)
        return self.hear()

    @property
    def exit(self) -> int | None:
        """The exit status, None while it runs."""
        return self._process.poll()

    def close(self, *, kill: bool = False) -> None:
        """End it and reap it."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            if kill:
                self._process.kill()
            self._process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join()
        self._process.stdout.close()
        self._log.close()


class World:
    """One topology with its engines. Use as a context; `tick` as often as possible."""

    def __init__(self, seed: int, record: Record, *, mounts: bool = True) -> None:
        self.seed, self.record = seed, record
        self.shape = Shape.draw(seed)
        self.name = f"{seed}-{secrets.token_hex(4)}"
        os.environ[census.MARK] = self.name
        self.home = Path(tempfile.mkdtemp(prefix="lmpipe-chaos-"))
        self._control = Control(self.home / "failpoints")
        os.environ[VARIABLE] = str(self.home / "failpoints")
        self.io = _io_faults() if self.shape.failing_io else None
        if self.io is not None:
            self.io.clear()
            os.environ.update(self.io.environment)
        self._mounts: list[Path] = []
        mounts = mounts and os.geteuid() == 0
        self.shm = self._tmpfs("shm", SHM_ROOM) if mounts else None
        disk = self._tmpfs("disk", SSD_ROOM) if mounts and not self.shape.on_disk else None
        self.disk = disk
        """Where a small tmpfs holds the segment files, if it does."""
        self.ssd = (disk or self.home) / "ssd"
        self.remote = self.home / "remote"
        self.pages = self.home / "pages"
        self.pages.mkdir(mode=0o700)
        run_dir = (self.shm or Path("/dev/shm")) / f"lmpipe-test-{self.name}"
        try:
            self.node = ChaosNode(self.shape.topology(run_dir, self.ssd, self.remote))
        except BaseException:
            self._unmake()
            raise
        self.engines: list[EngineProcess | None] = [None] * len(self.shape.mapped)
        self.stormy = False
        self.settled = False
        """Whether the weather is calm and the node was seen to be well: from now on nothing may end."""
        self._draw = random.Random(f"world {seed}")
        self._numbers = 0
        self._due: list[tuple[float, Callable[[], None]]] = []
        self._starts: dict[str, float] = {}
        self._killed: set[int] = set()
        self.stops: list[tuple[int, int, int]] = []
        """(pid, from, to) in monotonic ns: when processes were stopped by us."""
        self._stopped: dict[int, tuple[census.Process, int]] = {}
        self._rules: list[str] = []
        self._storm_ns = 0

    def _tmpfs(self, name: str, nbytes: int) -> Path | None:
        where = self.home / name
        where.mkdir(mode=0o700)
        options = ["-t", "tmpfs", "-o", f"size={nbytes},mode=700", "none", str(where)]
        if subprocess.run(["mount", *options], capture_output=True, check=False).returncode:
            where.rmdir()
            return None
        self._mounts.append(where)
        return where

    def next_number(self) -> int:
        """A number that no engine of this world has had: its vault is its own."""
        self._numbers += 1
        return self._numbers

    def __enter__(self) -> World:
        try:
            self.node.start()
            for number in range(len(self.engines)):
                self.engines[number] = EngineProcess(self, number)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Processes.

    def living(self) -> list[census.Process]:
        """The processes of this world that live now."""
        return census.living(self.name)

    @property
    def workers(self) -> list[str]:
        """Names of the worker processes."""
        return [process.name for process in self.node.topology.processes]

    def arm(self, rule: str) -> None:
        """One more rule for the failpoints of every process of this world, until the storm ends."""
        self._rules.append(rule)
        self._control.arm(*self._rules)

    def signal(self, process: census.Process, number: signal.Signals) -> bool:
        """Send a signal; False when it is dead."""
        return census.send(self.name, process, number)

    def kill(self, process: census.Process) -> bool:
        """SIGKILL; False when it was dead already."""
        if not self.signal(process, signal.SIGKILL):
            return False
        self._killed.add(process.pid)
        self.record.killed(process.name)
        return True

    def stop(self, process: census.Process, seconds: float) -> bool:
        """SIGSTOP now, SIGCONT later; False when it is dead or stopped already."""
        if process.pid in self._stopped or not census.send(self.name, process, signal.SIGSTOP):
            return False
        self._stopped[process.pid] = (process, time.monotonic_ns())
        self.later(seconds, lambda: self._go_on(process.pid))
        return True

    def _go_on(self, pid: int) -> None:
        process, since_ns = self._stopped.pop(pid, (None, 0))
        if process is not None:
            census.send(self.name, process, signal.SIGCONT)
            self.stops.append((pid, since_ns, time.monotonic_ns()))

    def later(self, seconds: float, do: Callable[[], None]) -> None:
        """Do something in this storm, in so many seconds or at its end."""
        self._due.append((time.monotonic() + seconds, do))

    def _do(self, mend: Callable[[], None]) -> None:
        try:
            mend()
        except OSError as error:  # another fault was quicker
            self.record.write("not mended", why=str(error))

    def tick(self) -> None:
        """Do what is due; start again what has died."""
        now_s = time.monotonic()
        for item in sorted((item for item in self._due if item[0] <= now_s), key=lambda item: item[0]):
            self._due.remove(item)
            self._do(item[1])
        self._keep_supervisor(now_s)
        for number, engine in enumerate(self.engines):
            if engine is not None and engine.exit is not None:
                self._bury(engine)
                self.engines[number] = None
                self._starts[f"engine{number}"] = now_s + self._draw.random() * 0.2
            elif engine is None and now_s >= self._starts.get(f"engine{number}", 0.0):
                self.engines[number] = fresh = EngineProcess(self, number)
                if self.stormy:
                    fresh.tell("work", seed=self._draw.randrange(1 << 30))

    def _keep_supervisor(self, now_s: float) -> None:
        if self.node.exit is None:
            return
        if "supervisor" not in self._starts:
            if self.settled:
                self.record.violation("the supervisor ended in calm weather", exit=self.node.exit)
            self._starts["supervisor"] = now_s + self._draw.choice((0.0, 0.0, 0.0, 0.3))
        elif now_s >= self._starts["supervisor"]:
            del self._starts["supervisor"]
            self.record.count("supervisor starts")
            self.node.launch()

    def hold_back_supervisor(self, seconds: float) -> None:
        """Start a dead supervisor again only then, not at once."""
        self._starts["supervisor"] = time.monotonic() + seconds

    def _bury(self, engine: EngineProcess) -> None:
        engine.close()
        self._collect()
        if engine.pid not in self._killed:
            self.record.violation("an engine process ended", exit=engine.exit, log=self.tail(f"engine{engine.number}"))
        for path in self.pages.glob(f"pages-{engine.pid}-*"):
            path.unlink()

    def tail(self, name: str, nbytes: int = 2000) -> str:
        """The end of a log."""
        try:
            return (self.node.directory / f"{name}.log").read_bytes()[-nbytes:].decode(errors="replace")
        except OSError:
            return ""

    # Weather.

    def storm(self) -> None:
        """Put the engines to work."""
        self.stormy, self.settled, self._storm_ns = True, False, time.monotonic_ns()
        for engine in self.engines:
            if engine is not None:
                engine.tell("work", seed=self._draw.randrange(1 << 30))

    def heal(self) -> None:
        """End every fault that is under way; from now on nobody is killed."""
        while self._due:
            self._due.sort(key=lambda item: item[0])
            self._do(self._due.pop(0)[1])
        self._control.arm()
        self._collect()
        self._control.clear()
        self._rules.clear()
        for process in self.living():
            if process.stopped and self.signal(process, signal.SIGCONT):  # by a failpoint, in this storm
                self.stops.append((process.pid, self._storm_ns, time.monotonic_ns()))
        self.stormy = False

    def _collect(self) -> None:
        """Take note of those that failpoints have killed."""
        for name, action, pid in self._control.fired():
            if action == "kill" and pid not in self._killed:
                self._killed.add(pid)
                self.record.killed("at a failpoint")
                self.record.write("fired", name=name, pid=pid)

    def is_whole(self) -> str:
        """Why the node is not well yet; empty when it is."""
        if self.node.exit is not None:
            return "no supervisor"
        try:
            state = self.node.status()
        except NodeError as error:
            return str(error)
        if state.state != "ready":
            return f"state {state.state}: {state.processes}"
        pids = {process.name: process.pid for process in state.processes}
        living = {process.name: process.pid for process in self.living() if process.name in pids}
        if pids != living:
            return f"the status says {pids}, there are {living}"
        return ""

    def gather_session(self) -> int:
        """The session of the gather that lives, by its own note."""
        note = WorkerNote.read(self.node.paths.up(self.node.topology.process_of("gather").name))
        return note.session if note is not None else 0

    def close(self) -> None:
        """End everything and leave nothing."""
        with contextlib.suppress(OSError):
            self.heal()
        for engine in self.engines:
            if engine is not None:
                engine.close(kill=True)
        try:
            self.node.close()
        finally:
            for process in self.living():
                self.signal(process, signal.SIGKILL)
            self._unmake()

    def _unmake(self) -> None:
        for where in self._mounts:
            subprocess.run(["umount", "-l", str(where)], check=True)
        shutil.rmtree(self.home, ignore_errors=True)
        for name in (census.MARK, VARIABLE, *(self.io.environment if self.io is not None else ())):
            os.environ.pop(name, None)
