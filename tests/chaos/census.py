"""Which processes of a world live: by an environment variable that all of them inherit, not by what files say of them.

A signal goes through a pidfd that was opened before the process was looked at, so it never reaches a stranger.
"""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from pathlib import Path

MARK = "LMPIPE_CHAOS_WORLD"


@dataclass(frozen=True, slots=True)
class Process:
    """A living process: `supervisor`, `engine`, or a worker by its name. `state` is /proc's letter."""

    name: str
    pid: int
    state: str

    @property
    def stopped(self) -> bool:
        """Whether it has been stopped by a signal."""
        return self.state == "T"


def living(world: str) -> list[Process]:
    """Every process that bears this mark and is not a zombie; neither this one nor helpers."""
    found: list[Process] = []
    mark = f"{MARK}={world}".encode()
    for entry in os.scandir("/proc"):
        if entry.name.isdigit() and int(entry.name) != os.getpid() and (process := _look(int(entry.name), mark)):
            found.append(process)
    return found


def send(world: str, process: Process, number: signal.Signals) -> bool:
    """Signal a process if it is still the one that was seen. False: it is gone."""
    try:
        descriptor = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return False
    try:
        now = _look(process.pid, f"{MARK}={world}".encode())
        if now is None or now.name != process.name:
            return False
        signal.pidfd_send_signal(descriptor, number)
    except ProcessLookupError:
        return False
    finally:
        os.close(descriptor)
    return True


def descriptors(pid: int) -> list[str]:
    """What a process has open, as /proc names it."""
    found: list[str] = []
    for entry in os.scandir(f"/proc/{pid}/fd"):
        try:
            found.append(str(Path(entry.path).readlink()))
        except OSError:
            continue
    return found


def private_bytes(pid: int) -> int:
    """Memory that a process has for itself alone."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


def _look(pid: int, mark: bytes) -> Process | None:
    directory = f"/proc/{pid}"
    try:
        if mark not in Path(directory, "environ").read_bytes().split(b"\0"):
            return None
        words = Path(directory, "cmdline").read_bytes().split(b"\0")
        state = Path(directory, "stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return None
    if state in "ZX":
        return None
    if b"lmpipe.launch" in words:
        return Process(words[words.index(b"lmpipe.launch") + 2].decode(), pid, state)
    if b"lmpipe" in words and b"up" in words:
        return Process("supervisor", pid, state)
    return Process("engine", pid, state) if b"chaos.engine" in words else None
