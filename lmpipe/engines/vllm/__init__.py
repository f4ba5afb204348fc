"""vLLM: its connector, by role.

    --kv-transfer-config '{"kv_connector": "LMPipeConnector", "kv_connector_module_path": "lmpipe.engines.vllm",
                           "kv_role": "kv_both", "kv_load_failure_policy": "recompute"}'

    engine core ── Orders with each step ──▶ one worker for each rank
    Scheduler: keys, lookups, what to     Worker: pages in shared memory, copies what is loaded,
    load and save  ◀── Reports ──────────  tells gather what to copy for saves

vLLM is imported when the connector is asked for, not before.
"""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["LMPipeConnector"]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name != "LMPipeConnector":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module("lmpipe.engines.vllm.connector").LMPipeConnector
