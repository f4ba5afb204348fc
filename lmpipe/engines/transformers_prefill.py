"""How long `generate` takes to its first token, from first forward to second. Knows the model only."""

from __future__ import annotations

import threading
import time
from typing import Any

import torch


class PrefillClock:
    """Context around one call of generate. By the second forward the first token is on the host, also on a GPU."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._thread = threading.get_ident()
        self._started = self._ended = 0.0
        self._hook = model.register_forward_pre_hook(self._forward)

    def _forward(self, module: torch.nn.Module, inputs: Any) -> None:
        if threading.get_ident() != self._thread:
            return
        if not self._started:
            self._started = time.perf_counter()
        elif not self._ended:
            self._ended = time.perf_counter()
            self._hook.remove()

    @property
    def seconds(self) -> float:
        """Time of the prefill; 0 when there was none."""
        return self._ended - self._started

    def __enter__(self) -> PrefillClock:
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.remove()
        if self._started and not self._ended:
            self._ended = time.perf_counter()
