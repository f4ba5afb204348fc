"""A hop between two processes, against plain pyzmq between the same two.

stage to stage  a Save with eight chunk records through lmpipe's bus into the runner of a stage in another process, and
                that stage's answer with the same records back: encode, send, poll, decode, handle, each way. A hop is
                half of it
control         Ping and Pong, as a producer and the supervisor send them; the runner of any stage answers
limit           frames of the same sizes, DEALER to ROUTER over ipc, received blocking and sent back as they are
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from lmpipe import messages as m
from lmpipe.bench.echo import NAME, raw_path
from lmpipe.bench.harness import Setting, main, scaled, shared_directory
from lmpipe.bench.raw_ipc import RawClient
from lmpipe.bench.report import Figure, Goal
from lmpipe.bus import Client, Poller
from lmpipe.handles import CHUNK, SessionId
from lmpipe.rundir import RunDir

RECORDS = 8
RUNS = 2000
ANSWER_MS = 10_000
ME = SessionId(7)


class Far:
    """The other process, and lmpipe's client of it."""

    def __init__(self, directory: Path) -> None:
        paths = RunDir(directory)
        for made in paths.directories[1:]:
            made.mkdir(mode=0o700)
        argv = [sys.executable, "-P", "-m", "lmpipe.bench.echo", str(directory)]
        self._process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        if self._process.stdout.readline() != b"READY\n":
            raise RuntimeError(f"the other process ended with status {self._process.wait()}")
        self._client = Client({"load": paths.endpoint(NAME, "load"), "save": paths.endpoint(NAME, "save")})
        self._poller = Poller()
        self._poller.register(self._client)
        self.raw = RawClient(raw_path(directory))
        deadline_s = time.monotonic() + ANSWER_MS / 1e3
        for channel in ("load", "save"):
            while not self._client.send(channel, m.Ping(ME, 0)):
                if time.monotonic() > deadline_s:
                    raise RuntimeError("the other process takes no messages")
                time.sleep(0.01)
            self._answer()

    def round_trip(self, message: m.Save | m.Ping) -> float:
        """Seconds from the send to the decoded answer."""
        began = time.perf_counter()
        self._client.send("save" if isinstance(message, m.Save) else "load", message)
        self._answer()
        return time.perf_counter() - began

    def _answer(self) -> m.Message:
        """As a runner reads what comes from below: poll, then the channel that is ready."""
        while True:
            ready = self._poller.poll(ANSWER_MS)
            if not ready:
                raise RuntimeError("no answer from the other process")
            for found in ready:
                if found.channel is not None and (message := self._client.recv(found.channel)) is not None:
                    return message

    def close(self) -> None:
        """End the other process."""
        self.raw.close()
        self._client.close()
        self._process.terminate()
        self._process.wait(30)
        if self._process.stdout is not None:
            self._process.stdout.close()


def run(setting: Setting) -> list[Figure]:
    """The hop, then the control round trip."""
    with shared_directory() as directory:
        far = Far(directory)
        try:
            save = m.Save(ME, 1, "arena", _records(), m.no_pages(), -1)
            ping = m.Ping(ME, time.monotonic_ns())
            return [
                _against(setting, far, "stage to stage, one hop", save, 0.5, 2.0),
                _against(setting, far, "control, Ping and Pong", ping, 1.0, 1.5),
            ]
        finally:
            far.close()


def _against(setting: Setting, far: Far, name: str, message: m.Save | m.Ping, share: float, most: float) -> Figure:
    frames = [bytes(frame) for frame in m.encode(message)]
    values, limits = setting.alternate(name, lambda: far.round_trip(message), lambda: far.raw.round_trip(frames), RUNS)
    values, limits = scaled(values, share * 1e6), scaled(limits, share * 1e6)
    return Figure.of(name, values, "µs", limits=limits, goal=Goal("ratio", "<=", most))


def _records() -> np.ndarray[tuple[int], np.dtype[np.void]]:
    records = np.zeros(RECORDS, CHUNK)
    keys = np.random.default_rng(5).integers(0, 256, (RECORDS, 16), np.uint8)
    records["key"] = keys.view("V16").ravel()
    records["anchor"] = np.ascontiguousarray(keys[:, :4]).view("V4").ravel()
    records["position"], records["shards"] = np.arange(RECORDS), 1
    records["raw_bytes"] = records["nbytes"] = 32 << 20
    return records


if __name__ == "__main__":
    sys.exit(main(run))
