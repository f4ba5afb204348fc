"""A child process that is asked on its stdin and answers on its stdout, one line of JSON each; stderr is its log.

The driver's end: starts it, asks, ends it. Knows nothing of what is asked.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import orjson

from lmpipe.errors import LmpipeError

GROUP_S = 20.0
STEP_S = 0.02


class EngineFailed(LmpipeError):
    """The engine process ended or did not answer in time."""


class AskedProcess:
    """A context manager: nothing of the process is left afterwards.

    `own_group`: it leads a process group of its own, which ends with it: for a process that starts others.
    """

    def __init__(self, argv: Sequence[str], log: Path, env: Mapping[str, str], *, own_group: bool = False) -> None:
        self.log, self._own_group = log, own_group
        with log.open("ab") as stderr:
            self._process = subprocess.Popen(
                argv,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                bufsize=0,
                env=env,
                start_new_session=own_group,
            )
        self._rest = b""

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    def ask(self, question: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
        """The answer to a question. Raises EngineFailed."""
        assert self._process.stdin is not None
        try:
            # Unbuffered: a pipe takes a long line in pieces.
            data = memoryview(orjson.dumps(question) + b"\n")
            while data:
                data = data[self._process.stdin.write(data) or 0 :]
        except BrokenPipeError:
            raise self._ended() from None
        return self.answer(timeout_s)

    def answer(self, timeout_s: float) -> dict[str, Any]:
        """The next line that it says. Raises EngineFailed."""
        assert self._process.stdout is not None
        end_s = time.monotonic() + timeout_s
        while b"\n" not in self._rest:
            if not select.select([self._process.stdout], [], [], max(end_s - time.monotonic(), 0.0))[0]:
                raise EngineFailed(f"the engine process did not answer within {timeout_s:.0f} s; its log: {self.log}")
            piece = os.read(self._process.stdout.fileno(), 1 << 16)
            if not piece:
                raise self._ended()
            self._rest += piece
        line, _, self._rest = self._rest.partition(b"\n")
        return orjson.loads(line)

    def finish(self, *, at_once: bool = False) -> None:
        """Tell it to end, whatever it is doing or when it has done that, and do not wait."""
        if at_once:
            self._process.terminate()
        if self._process.stdin is not None:
            self._process.stdin.close()

    def close(self, timeout_s: float = 30.0) -> None:
        """End the process in order, by force when it is late, and what it has left in its group."""
        self.finish()
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
        if self._own_group:
            self._end_group()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _end_group(self) -> None:
        """What the process has left. It may have shared memory to remove, so it is asked first."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            deadline_s = time.monotonic() + GROUP_S
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)
                while time.monotonic() < deadline_s:
                    time.sleep(STEP_S)
                    os.killpg(self._process.pid, 0)

    def _ended(self) -> EngineFailed:
        status = self._process.wait()
        tail = self.log.read_text(errors="replace").strip().splitlines()[-5:]
        return EngineFailed(
            f"the engine process ended with status {status}; its log {self.log} ends:\n" + "\n".join(tail)
        )
