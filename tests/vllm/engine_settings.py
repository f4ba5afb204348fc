"""What all engines of these tests have in common. Importing this sets the environment that vLLM is to start in."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

_CORES = [str(core) for core in sorted(os.sched_getaffinity(0))[:2]]

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": ",".join(_CORES),
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "TORCH_COMPILE_DISABLE": "1",  # else some functions go through a C++ compiler, enforce_eager or not
    "OMP_WAIT_POLICY": "PASSIVE",  # threads that spin would keep the node from its two cores
}
for _name, _value in ENVIRONMENT.items():
    os.environ.setdefault(_name, _value)  # a parent process may have said otherwise: which cores

COMMON: dict[str, Any] = {
    "enforce_eager": True,
    "skip_tokenizer_init": True,
    "dtype": "float32",
    "max_model_len": 4096,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 4096,
    "kv_cache_memory_bytes": 1 << 26,
    "block_size": 32,
    "use_tqdm_on_load": False,
}
"""Arguments of `vllm.LLM`; a test overrides what it is about. Fewer batched tokens mean chunked prefill."""


def arguments(model: Path, connector: dict[str, Any] | None, overrides: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `vllm.LLM`, fit for JSON. `connector` is a kv_transfer_config without role and failure policy."""
    usual = {"kv_role": "kv_both", "kv_load_failure_policy": "recompute"}
    transfer = {} if connector is None else {"kv_transfer_config": usual | connector}
    return {"model": str(model)} | COMMON | transfer | overrides


def environment(arguments: dict[str, Any]) -> dict[str, str]:
    """For a process that runs an engine with these arguments: a core for each rank, both for one."""
    ranks = arguments.get("tensor_parallel_size", 1)
    bind = ",".join(_CORES) if ranks == 1 else "|".join(_CORES[rank % len(_CORES)] for rank in range(ranks))
    return os.environ | {"VLLM_CPU_OMP_THREADS_BIND": bind, "PYTHONWARNINGS": "ignore"}
