"""The supervisor's line to the stages: Ping for a sign of life, Drain before the end. Knows messages, no process."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable

from lmpipe.bus import Client, Poller
from lmpipe.handles import SessionId
from lmpipe.messages import Drain, Drained, Ping, Pong
from lmpipe.topology import NodeInfo

STEP_MS = 50


class StageLink:
    """One client for each stage. A process is alive when its first stage answers: all of them share one loop."""

    def __init__(self, info: NodeInfo) -> None:
        self._session = SessionId(secrets.randbits(62) + 1)
        self._stages = [stage for stage in info.topology.stages if stage in info.endpoints]
        self._process = {stage: info.topology.process_of(stage).name for stage in self._stages}
        self._asked = {process.name: process.stages[0] for process in info.topology.processes}
        self._clients = {
            stage: Client({"load": info.endpoints[stage]["load"], "save": info.endpoints[stage]["save"]})
            for stage in self._stages
        }

    def ping(self, process: str) -> None:
        """Asks the process for a sign of life."""
        self._clients[self._asked[process]].send("load", Ping(self._session, time.monotonic_ns()))

    def answered(self, process: str) -> bool:
        """Whether the process has said since the last call that it is at work, not at its end."""
        client, heard = self._clients[self._asked[process]], False
        while (message := client.recv()) is not None:
            heard = heard or (isinstance(message, Pong) and message.state == "ready")
        return heard

    def drain(self, lives: Callable[[str], bool], timeout_s: float, hurry: Callable[[], bool]) -> list[str]:
        """Empties the stages from the engine's side down, one after the other; returns those that live and were too
        slow.
        """
        deadline_s = time.monotonic() + timeout_s
        late: list[str] = []
        for ref, stage in enumerate(self._stages, 1):
            process = self._process[stage]
            if not self._drain_one(stage, ref, deadline_s, lambda process=process: hurry() or not lives(process)):
                late += [stage] if lives(process) else []
        return late

    def _drain_one(self, stage: str, ref: int, deadline_s: float, enough: Callable[[], bool]) -> bool:
        client, poller, sent = self._clients[stage], Poller(), False
        poller.register(client)
        while time.monotonic() < deadline_s and not enough():
            sent = sent or client.send("load", Drain(self._session, ref))
            poller.poll(STEP_MS)
            while (message := client.recv()) is not None:
                if isinstance(message, Drained) and message.ref == ref:
                    return True
        return False

    def close(self) -> None:
        """Closes the sockets."""
        for client in self._clients.values():
            client.close()
