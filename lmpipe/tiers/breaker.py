"""A circuit breaker: a store that fails is left alone for a while, then asked once. Knows no store; for any thread."""

from __future__ import annotations

import threading
from collections.abc import Callable

FAILURES = 3
"""So many in a row open the circuit."""
OPEN_S = (1.0, 30.0)
"""How long it stays open at first and at most; it doubles with every trial that fails."""


class Breaker:
    """Closed: everybody may ask. Open: nobody. Half open: one caller tries, the others wait for what he finds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.reason = ""
        """The last failure, while the circuit is not closed."""
        self._clock = clock
        self._lock = threading.Lock()
        self._failures = 0
        self._open_s = OPEN_S[0]
        self._until_s = 0.0

    def allows(self) -> bool:
        """Whether the store may be asked now. After True, `succeeded` or `failed` must follow."""
        with self._lock:
            if self._failures < FAILURES:
                return True
            if self._clock() < self._until_s:
                return False
            self._until_s = self._clock() + self._open_s  # the trial is this caller's
            return True

    def succeeded(self) -> None:
        """The store answered, be it that it has no such object."""
        with self._lock:
            self._failures, self._open_s, self.reason = 0, OPEN_S[0], ""

    def failed(self, reason: str) -> None:
        """The store did not answer, or not as a store does."""
        with self._lock:
            self._failures += 1
            if self._failures >= FAILURES:
                self.reason = reason
                self._until_s = self._clock() + self._open_s
                self._open_s = min(self._open_s * 2, OPEN_S[1])
