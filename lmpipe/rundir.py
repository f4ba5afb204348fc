"""Every path below a node's run directory, and the one beside it. Knows no content but that small files are replaced
whole.
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from pathlib import Path

PAGES_SUFFIX = ".pages"


@dataclass(frozen=True, slots=True)
class RunDir:
    """Every path below a node's run directory."""

    path: Path

    @property
    def node_json(self) -> Path:
        """NodeInfo, written last."""
        return self.path / "node.json"

    @property
    def supervisor_lock(self) -> Path:
        """Locked for the supervisor's life; holds its pid as text."""
        return self.path / "supervisor.lock"

    @property
    def keep_dram(self) -> Path:
        """Put there to ask the supervisor to leave the arena when it stops."""
        return self.path / "keep-dram"

    @property
    def node_shm(self) -> Path:
        """The NODE segment."""
        return self.path / "node.shm"

    @property
    def arena(self) -> Path:
        """The DRAM tier's SLOTS segment."""
        return self.path / "arena.shm"

    def ring(self, stage: str) -> Path:
        """The SLOTS segment of a stage's transit slots."""
        return self.path / f"ring.{stage}.shm"

    @property
    def index(self) -> Path:
        """Parent of the LMDB environments."""
        return self.path / "index"

    @property
    def sessions(self) -> Path:
        """Session locks and hold segments."""
        return self.path / "sessions"

    @property
    def pages(self) -> Path:
        """Parent of the segments that engines keep their KV cache in (shm/pages.py). Beside the run directory, because
        it may be there before the node is, and after.
        """
        return self.path.with_name(f"{self.path.name}{PAGES_SUFFIX}")

    @property
    def counters(self) -> Path:
        """Counter segments."""
        return self.path / "counters"

    def counters_of(self, name: str, pid: int) -> Path:
        """The counter segment of one process or producer."""
        return self.counters / f"{name}-{pid}.shm"

    def engine_counters(self, name: str, session: int, pid: int) -> Path:
        """That of a producer, whose pid may be one of another namespace: its session tells whether it lives."""
        return self.counters_of(f"{name}.{session_mark(session)}", pid)

    @property
    def sockets(self) -> Path:
        """Parent of the ipc sockets."""
        return self.path / "sockets"

    def socket(self, stage: str, channel: str) -> Path:
        """The socket file of one channel of a stage."""
        return self.sockets / f"{stage}.{channel}"

    def endpoint(self, stage: str, channel: str) -> str:
        """The same as a ZeroMQ address."""
        return f"ipc://{self.socket(stage, channel)}"

    @property
    def logs(self) -> Path:
        """Parent of the logs."""
        return self.path / "log"

    def log(self, process: str) -> Path:
        """What a worker prints."""
        return self.logs / f"{process}.log"

    def trace(self, process: str) -> Path:
        """A worker's Chrome trace, when the topology asks for one."""
        return self.logs / f"{process}.trace.json"

    def engine_trace(self, pid: int) -> Path:
        """The Chrome trace of an engine's process, when the topology asks for traces."""
        return self.trace(f"engine-{pid}")

    def engine_traces(self) -> list[Path]:
        """Those that there are."""
        return sorted(self.logs.glob("engine-*.trace.json"))

    @property
    def ups(self) -> Path:
        """Parent of the state files."""
        return self.path / "up"

    def up(self, process: str) -> Path:
        """Written by a worker when it is ready; `up/supervisor.json` by the supervisor."""
        return self.ups / f"{process}.json"

    def role(self, process: str) -> Path:
        """Locked by the one worker that is this process, for its life."""
        return self.ups / f"{process}.lock"

    @property
    def layouts(self) -> Path:
        """Parent of the book of layouts."""
        return self.path / "layouts"

    def layout(self, layout_id: int) -> Path:
        """The layout of an id."""
        return self.layouts / f"{layout_id:016x}.json"

    @property
    def namespaces(self) -> Path:
        """Parent of the book of namespaces."""
        return self.path / "namespaces"

    def namespace(self, namespace_id: int) -> Path:
        """The tenant of a namespace."""
        return self.namespaces / f"{namespace_id:016x}"

    @property
    def directories(self) -> tuple[Path, ...]:
        """Every directory of the tree, parents first."""
        return (
            self.path,
            self.index,
            self.sessions,
            self.counters,
            self.sockets,
            self.logs,
            self.ups,
            self.layouts,
            self.namespaces,
        )


def write_atomically(path: Path, data: bytes) -> None:
    """`path` has either its old content or `data`, mode 0600, whatever happens in between."""
    partial = path.with_name(f".{path.name}.{threading.get_native_id()}")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def session_mark(session: int) -> str:
    """The end of a session's number, by which people tell engines of one name apart."""
    return f"{session & 0xFFFF:04x}"


def default_parent() -> Path:
    """Where this user's nodes are unless their topology says otherwise."""
    return Path(f"/dev/shm/lmpipe-{os.getuid()}")
