"""Real vLLM engines for tests. `Engine` lives in this process: it is driven step by step, looked into, and taken down
again without a trace. `EngineProcess` and `ServerProcess` (processes.py) live in processes of their own.
"""

from __future__ import annotations

import gc
import itertools
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import engine_settings as settings
import numpy as np
import torch
from processes import EngineProcess, ServerProcess
from vllm import LLM, SamplingParams
from vllm.distributed.kv_transfer import kv_transfer_state
from vllm.lora.request import LoRARequest
from vllm.outputs import RequestOutput

__all__ = ["Engine", "EngineProcess", "ServerProcess", "prompt"]

RESET_S = 30.0


def prompt(length: int, seed: int = 0, vocabulary: int = 512) -> list[int]:
    """Random tokens, the same for the same arguments; a shorter prompt is a prefix of a longer one of its seed."""
    return np.random.default_rng(seed).integers(0, vocabulary, length).tolist()


def greedy(max_tokens: int, **sampling: Any) -> SamplingParams:
    """Exactly `max_tokens` tokens, each the likeliest, unless `sampling` says otherwise."""
    return SamplingParams(**{"temperature": 0.0, "max_tokens": max_tokens, "ignore_eos": True} | sampling)


class Engine:
    """An `LLM` without a tokenizer. One at a time in a process: vLLM's worker-side connector is a global.

    `connector` is a kv_transfer_config; role and failure policy have defaults. `overrides` are arguments of `LLM`.
    """

    def __init__(self, model: Path, connector: dict[str, Any] | None = None, **overrides: Any) -> None:
        if kv_transfer_state._KV_CONNECTOR_AGENT is not None:
            raise RuntimeError("another engine with a connector is open in this process: use an EngineProcess")
        self.llm = LLM(**{"disable_log_stats": False} | settings.arguments(model, connector, overrides))
        self._ids = itertools.count()
        self._finished: dict[str, list[int]] = {}

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    # What it computes

    def generate(
        self, prompts: list[list[int]], max_tokens: int = 16, lora: LoRARequest | None = None, **sampling: Any
    ) -> list[list[int]]:
        """The tokens that follow each prompt; all prompts are in flight together."""
        return [list(output.outputs[0].token_ids) for output in self.outputs(prompts, max_tokens, lora, **sampling)]

    def outputs(
        self, prompts: list[list[int]], max_tokens: int = 16, lora: LoRARequest | None = None, **sampling: Any
    ) -> list[RequestOutput]:
        """The same with all that vLLM says about it: `num_cached_tokens`, `metrics`, `finish_reason`."""
        wanted = [{"prompt_token_ids": prompt} for prompt in prompts]
        params = greedy(max_tokens, detokenize=False, **sampling)
        return self.llm.generate(wanted, params, use_tqdm=False, lora_request=lora)

    def add_request(
        self, prompt: list[int], max_tokens: int = 16, lora: LoRARequest | None = None, **sampling: Any
    ) -> str:
        """Queue a request for `step`; returns its id."""
        name = f"stepped-{next(self._ids)}"
        params = greedy(max_tokens, detokenize=False, **sampling)
        self.llm.llm_engine.add_request(name, {"prompt_token_ids": prompt}, params, lora_request=lora)
        return name

    def step(self) -> dict[str, list[int]]:
        """One step of the engine: the tokens so far of the requests that got one."""
        return {output.request_id: list(output.outputs[0].token_ids) for output in self.llm.llm_engine.step()}

    def drain(self) -> dict[str, list[int]]:
        """Step until nothing is left; the tokens of what ended."""
        tokens: dict[str, list[int]] = {}
        while self.llm.llm_engine.has_unfinished_requests():
            tokens |= self.step()
        return tokens

    def abort(self, *names: str) -> None:
        """The clients of these requests went away."""
        self.llm.llm_engine.abort_request(list(names))

    def reset_prefix_cache(self, connector: bool = False) -> bool:
        """Forget what vLLM's own prefix cache holds; with `connector`, tell the connector to do so too.

        vLLM refuses as long as any block is in use, so what the finished still wait for is waited for.
        """
        end_s = time.monotonic() + RESET_S
        while self.scheduler.has_requests() and not self.llm.llm_engine.has_unfinished_requests():
            assert time.monotonic() < end_s, "blocks of finished requests do not come free"
            self.llm.llm_engine.step()
        return self.llm.reset_prefix_cache(reset_connector=connector)

    # What is inside

    @property
    def core(self) -> Any:
        return self.llm.llm_engine.engine_core.engine_core

    @property
    def scheduler(self) -> Any:
        return self.core.scheduler

    @property
    def scheduler_connector(self) -> Any:
        """The connector object of the scheduler's side, or None."""
        return self.scheduler.connector

    @property
    def worker_connector(self) -> Any:
        """The connector object of the worker's side, or None."""
        return kv_transfer_state._KV_CONNECTOR_AGENT

    @property
    def runner(self) -> Any:
        return self.core.model_executor.driver_worker.worker.model_runner

    @property
    def kv_caches(self) -> dict[str, torch.Tensor]:
        """The tensor of each layer as the attention kernel sees it; layers of different groups may share bytes."""
        layers = self.runner.compilation_config.static_forward_context
        return {name: layer.kv_cache for name, layer in layers.items() if isinstance(layer.kv_cache, torch.Tensor)}

    @property
    def free_blocks(self) -> int:
        """Blocks that no request holds: back at the old number when nothing leaks."""
        return self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()

    def scramble(self) -> None:
        """Overwrite the whole KV cache with noise, so that who uses it afterwards computes other tokens."""
        noise = torch.Generator().manual_seed(1)
        for tensor in self.kv_caches.values():
            tensor.normal_(generator=noise)

    def close(self) -> None:
        """Shut the engine core down and leave the process as if it had not been, so that the next engine can start."""
        if not hasattr(self, "llm"):
            return
        self.llm.llm_engine.renderer.shutdown()
        self.llm.llm_engine.engine_core.shutdown()  # with the process groups of torch.distributed
        del self.llm
        gc.collect()
