"""The signals that ask a process to stop, as a number and a pollable file. Knows nobody who waits on it."""

from __future__ import annotations

import contextlib
import os
import signal
from types import FrameType


class SignalPipe:
    """SIGTERM, SIGINT and SIGHUP as a number that grows and a pollable file; the old handlers come back on close."""

    NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

    def __init__(self) -> None:
        self.count = 0
        self._read, self._write = os.pipe()
        os.set_blocking(self._read, False)
        os.set_blocking(self._write, False)
        self._before_fd = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._before = [(number, signal.signal(number, self._note)) for number in self.NUMBERS]

    def fileno(self) -> int:
        """Readable after a signal."""
        return self._read

    def clear(self) -> None:
        """Empties the pipe; the count stays."""
        with contextlib.suppress(BlockingIOError):
            os.read(self._read, 4096)

    def close(self) -> None:
        """Puts the former handlers back."""
        for number, handler in self._before:
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._before_fd)
        os.close(self._read)
        os.close(self._write)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
