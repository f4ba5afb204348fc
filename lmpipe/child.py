"""One supervised process: how it is spawned or adopted, says READY, is signalled and is found dead.

Owns the pid (by pidfd, so that no signal ever reaches a stranger), the READY pipe and the exit reason. A process that
another supervisor has spawned is watched in the same way; only how it ended is told to its parent alone.
Knows no stage and no policy.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
from collections import deque
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

READY_LINE = b"READY\n"


class ChildState(StrEnum):
    """Where a process is in its life."""

    STARTING = "starting"
    ADOPTED = "adopted"  # of a former supervisor; has not answered this one yet
    READY = "ready"
    WAITING = "waiting"  # dead, to be started again
    DOWN = "down"  # dead, budget spent: only a new `up` starts it again
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class ProcessSpec:
    """What to run. `--ready-fd N` is appended to `argv`: the pipe on which the process says READY."""

    name: str
    argv: tuple[str, ...]
    log: Path


@dataclass(frozen=True, slots=True)
class Survivor:
    """A living process that another supervisor has spawned. `pidfd` is for who adopts it to close."""

    pid: int
    pidfd: int


@dataclass(slots=True)
class Child:
    """A process by its name, through all its lives."""

    spec: ProcessSpec
    state: ChildState = ChildState.STOPPED
    pid: int = 0
    started: float = 0.0  # wall clock
    since_s: float = 0.0  # monotonic: begin of the present state
    restarts: int = 0
    last_exit: str = ""
    deaths_s: deque[float] = field(default_factory=deque[float])
    silent_s: float = 0.0  # seconds without a sign of life, as seen while the supervisor itself was running
    pidfd: int = -1
    ready_fd: int = -1
    _popen: subprocess.Popen[bytes] | None = None
    _why_killed: str = ""

    @property
    def name(self) -> str:
        """Name of the process."""
        return self.spec.name

    @property
    def living(self) -> bool:
        """True from spawn or adoption to reap."""
        return self.pidfd >= 0

    def spawn(self, now_s: float, wall_s: float) -> None:
        """Starts the process in a session of its own: a Ctrl-C at the terminal is for the supervisor alone."""
        ready_read, ready_write = os.pipe()
        try:
            with self.spec.log.open("ab") as log:
                self._popen = subprocess.Popen(
                    [*self.spec.argv, "--ready-fd", str(ready_write)],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    pass_fds=(ready_write,),
                    start_new_session=True,
                )
        except OSError:
            os.close(ready_read)
            raise
        finally:
            os.close(ready_write)
        os.set_blocking(ready_read, False)
        self.ready_fd = ready_read
        self.pid = self._popen.pid
        self.pidfd = os.pidfd_open(self.pid)
        self.state, self.started, self.since_s, self.silent_s, self._why_killed = (
            ChildState.STARTING,
            wall_s,
            now_s,
            0.0,
            "",
        )

    def adopt(self, survivor: Survivor, now_s: float) -> None:
        """Watches a process that is there already."""
        self.pid, self.pidfd = survivor.pid, survivor.pidfd
        self.state, self.since_s, self.silent_s, self._why_killed = ChildState.ADOPTED, now_s, 0.0, ""

    def answered(self, now_s: float) -> None:
        """A sign of life of an adopted process: from now on it is as one of its own."""
        self.state, self.since_s = ChildState.READY, now_s

    def read_ready(self, now_s: float) -> bool:
        """Reads the READY pipe; True once the process has said so. An end without it is left to the pidfd."""
        try:
            data = os.read(self.ready_fd, 64)
        except BlockingIOError:
            return False
        self._close_ready()
        if data != READY_LINE:
            return False
        self.state, self.since_s, self.silent_s = ChildState.READY, now_s, 0.0
        return True

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal if the process lives."""
        if self.pidfd >= 0:
            try:
                signal.pidfd_send_signal(self.pidfd, number)
            except ProcessLookupError:
                return  # dead and not reaped yet

    def kill(self, why: str) -> None:
        """SIGKILL; `why` becomes the exit reason."""
        self._why_killed = why
        self.signal(signal.SIGKILL)

    def reap(self, now_s: float) -> str:
        """Collects the dead process and returns the reason of its end, in words."""
        code = self._popen.wait() if self._popen is not None else -signal.SIGKILL if self._why_killed else None
        if code is None:
            reason = "ended; its exit status went to who started it"
        elif code < 0:
            reason = f"killed by {_signal_name(-code)}" + (f" ({self._why_killed})" if self._why_killed else "")
        else:
            reason = f"exit status {code}"
        self.last_exit, self._popen, self.pid, self.since_s = reason, None, 0, now_s
        os.close(self.pidfd)
        self.pidfd = -1
        self._close_ready()
        return reason

    def wait(self, timeout_s: float) -> bool:
        """Waits for the end of the process without reaping its state; True when it ended in time."""
        if self.pidfd < 0:
            return True
        poll = select.poll()
        poll.register(self.pidfd, select.POLLIN)
        return bool(poll.poll(timeout_s * 1000))

    def last_words(self, lines: int = 5) -> str:
        """The end of the log."""
        try:
            with self.spec.log.open("rb") as log:
                log.seek(max(0, log.seek(0, os.SEEK_END) - 4096))
                return "\n".join(log.read().decode(errors="replace").splitlines()[-lines:])
        except OSError:
            return ""

    def _close_ready(self) -> None:
        if self.ready_fd >= 0:
            os.close(self.ready_fd)
            self.ready_fd = -1


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
