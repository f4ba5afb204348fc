"""Plain pyzmq over ipc, as little of it as there can be: what lmpipe's messages are measured against. Knows no message.

The only file besides bus.py that imports zmq: the limit must not be made of what is measured.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import zmq

STOP = b"stop"
WAIT_MS = 10_000


class RawClient:
    """A DEALER that sends frames and, for round trips, waits for as many to come back."""

    def __init__(self, path: Path) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.set(zmq.LINGER, 0)
        self._socket.set(zmq.RCVTIMEO, WAIT_MS)
        self._socket.set(zmq.SNDTIMEO, WAIT_MS)
        self._socket.connect(f"ipc://{path}")

    def round_trip(self, frames: Sequence[bytes]) -> float:
        """Seconds from the send to the last frame of the answer."""
        began = time.perf_counter()
        self._socket.send_multipart(frames)
        self._socket.recv_multipart()
        return time.perf_counter() - began

    def send(self, frames: Sequence[bytes]) -> float:
        """Seconds of a send alone, as an engine's thread would see it."""
        began = time.perf_counter()
        self._socket.send_multipart(frames)
        return time.perf_counter() - began

    def wait(self) -> None:
        """For an answer."""
        self._socket.recv_multipart()

    def close(self, *, stop: bool = False) -> None:
        """`stop` ends the other side too."""
        if stop:
            self._socket.set(zmq.LINGER, 1000)
            self._socket.send_multipart([STOP])
        self._socket.close()
        self._context.term()


def echo(path: Path) -> None:
    """Binds a ROUTER and sends back whatever comes, until it is told to stop."""
    context = zmq.Context()
    socket = context.socket(zmq.ROUTER)
    socket.set(zmq.LINGER, 0)
    socket.bind(f"ipc://{path}")
    while True:
        frames = socket.recv_multipart()
        if frames[1] == STOP:
            break
        socket.send_multipart(frames)
    socket.close()
    context.term()
    path.unlink(missing_ok=True)
