"""The far end of the hop benchmark: `python -m lmpipe.bench.echo DIR`, a process with one stage that answers at once.

The stage sits in a real runner behind a real server, as every stage does; beside it, on a thread of its own that is
asleep while the stage is asked, plain pyzmq echoes. Says READY on stdout, ends on SIGTERM.
"""

from __future__ import annotations

import sys
import threading
from pathlib import Path

from lmpipe import messages as m
from lmpipe.bench.raw_ipc import RawClient, echo
from lmpipe.bus import Server
from lmpipe.handles import SessionId, Tier
from lmpipe.metrics import worker_counters
from lmpipe.rundir import RunDir
from lmpipe.shm.counters import Counters
from lmpipe.shm.session import Session
from lmpipe.spans import Spans
from lmpipe.stages.base import Context, Peer
from lmpipe.stages.runner import Runner

NAME = "echo"


class Echo:
    """A stage that has everything it is given on disk already."""

    name = NAME

    def __init__(self, context: Context) -> None:
        self._context = context

    def handle(self, peer: Peer | None, message: m.Message) -> None:
        """A Save is answered with Persisted and the same records."""
        if peer is not None and isinstance(message, m.Save):
            self._context.reply(peer, m.Persisted(self._context.session.id, Tier.SSD, message.chunks))

    def step(self, now_s: float) -> float | None:
        """Nothing that was not asked for."""
        return None

    def below_changed(self, chain: dict[str, SessionId]) -> None:
        """There is nothing below."""

    def busy(self) -> bool:
        """Never."""
        return False

    def accepts_saves(self) -> bool:
        """Always."""
        return True

    def close(self) -> None:
        """Nothing to let go of."""


def raw_path(directory: Path) -> Path:
    """Where plain pyzmq listens."""
    return directory / "raw"


def serve(directory: Path) -> int:
    """Runs until SIGTERM; the runner's exit status."""
    paths = RunDir(directory)
    echoing = threading.Thread(target=echo, args=(raw_path(directory),))
    with Session.create(directory) as session:
        counters = Counters.create(paths.counters / "echo.shm", worker_counters([NAME]))
        server = Server({"load": paths.endpoint(NAME, "load"), "save": paths.endpoint(NAME, "save")}, session.id)
        runner = Runner(counters, Spans(NAME))
        seat = runner.seat(NAME, session, server)
        echoing.start()
        print("READY", flush=True)
        try:
            return runner.run([Echo(seat)])
        finally:
            RawClient(raw_path(directory)).close(stop=True)
            echoing.join()
            counters.close()


if __name__ == "__main__":
    sys.exit(serve(Path(sys.argv[1])))
