"""The demo's engine process: `python -m lmpipe.demo.engine SCALE`, driven by JSON lines on stdin, answered on stdout.

An ordinary program around `model.generate`: the one line that concerns lmpipe is `attach`. Everything that prints
goes to stderr.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import asdict
from typing import Any, BinaryIO, cast

import orjson
import torch
from transformers import DynamicCache, LlamaForCausalLM
from transformers.cache_utils import DynamicLayer
from transformers.generation.streamers import BaseStreamer

from lmpipe.demo import model as demo_model
from lmpipe.demo.scale import SCALES
from lmpipe.demo.tokens import END
from lmpipe.engines import Attachment, attach
from lmpipe.engines.transformers_cache import probe
from lmpipe.engines.transformers_memory import HostMemory, LoadTensors, page_ids
from lmpipe.handles import Tier


class FirstToken(BaseStreamer):
    """Notes when the first generated token is there. generate gives the prompt first, then each token."""

    def __init__(self) -> None:
        self.calls = 0
        self.at_s = 0.0

    def put(self, value: torch.Tensor) -> None:
        """A prompt or a token."""
        self.calls += 1
        if self.calls == 2:
            self.at_s = time.perf_counter()

    def end(self) -> None:
        """Nothing is held back."""


class Engine:
    """A model, and lmpipe when it was asked for."""

    def __init__(self, scale: str) -> None:
        self._model: LlamaForCausalLM = demo_model.build(SCALES[scale].model, SCALES[scale].device)
        self._attached: Attachment | None = None

    @property
    def device(self) -> str:
        """What computes, as its driver calls it."""
        device = self._model.device
        return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type

    def answer(self, question: dict[str, Any]) -> dict[str, Any]:
        """One request of the driver."""
        match question["op"]:
            case "generate":
                return self._generate(question["tokens"], question["new_tokens"], question["expected"])
            case "attach":
                self._attached = attach(self._model, question["run_dir"])
                return self._wait_ready(question["timeout_s"])
            case "wait_ready":
                return self._wait_ready(question["timeout_s"])
            case "wait_lost":
                return self._wait_lost(question["timeout_s"])
            case "flush":
                return self._flush(question["prompts"], question["tiers"], question["timeout_s"])
            case "control":
                return self._control(question["tokens"], question["expected"])
            case unknown:
                raise ValueError(f"unknown op {unknown!r}")

    def close(self) -> None:
        """Detach."""
        if self._attached is not None:
            self._attached.detach()

    def _generate(self, tokens: list[int], new_tokens: int, expected: list[int]) -> dict[str, Any]:
        clock = FirstToken()
        started = time.perf_counter()
        output = self._run(tokens, new_tokens, clock, None)
        info = self._attached.last if self._attached is not None else None
        answer = output.sequences[0, len(tokens) :].tolist()
        return {
            "tokens": answer,
            "margin": _margin(output.logits),
            "lag": _lag(output.logits, answer, expected),
            "ttft_ms": (clock.at_s - started) * 1e3,
            "total_ms": (time.perf_counter() - started) * 1e3,
            "info": asdict(info) if info is not None else None,
        }

    def _run(self, tokens: list[int], new_tokens: int, clock: FirstToken | None, cache: DynamicCache | None) -> Any:
        ids = torch.tensor([tokens], device=self._model.device)
        return cast(Any, self._model).generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
            streamer=clock,
            past_key_values=cache,
        )

    def _wait_ready(self, timeout_s: float) -> dict[str, Any]:
        producer = self._attached.producer if self._attached is not None else None
        ready = producer is not None and producer.wait_ready(timeout_s)
        return {"ready": ready, "reason": producer.reason if producer is not None else "not attached"}

    def _wait_lost(self, timeout_s: float) -> dict[str, Any]:
        producer = self._attached.producer if self._attached is not None else None
        end_s = time.monotonic() + timeout_s
        while producer is not None and producer.state == "ready" and time.monotonic() < end_s:
            time.sleep(0.02)
        return {"lost": producer is not None and producer.state != "ready"}

    def _flush(self, prompts: list[list[int]], tiers: list[str], timeout_s: float) -> dict[str, Any]:
        """Wait until everything is answered, and the chunks of `prompts` are in `tiers`."""
        producer = self._attached.producer if self._attached is not None else None
        if producer is None:
            return {"done": False}
        end_s = time.monotonic() + timeout_s
        # First whatever is queued, then the chunks of each prompt.
        done = producer.flush(timeout_s=timeout_s) and all(
            producer.flush(
                producer.prompt(prompt),
                timeout_s=max(end_s - time.monotonic(), 0.1),
                tiers=[Tier(tier) for tier in tiers],
            )
            for prompt in prompts
        )
        return {"done": done, "stats": producer.stats()}

    def _control(self, tokens: list[int], expected: list[int]) -> dict[str, Any]:
        """An answer's logits on KV loaded by hand: as it is (which must be right), and scrambled (which must not)."""
        producer = self._attached.producer if self._attached is not None else None
        assert producer is not None
        shape = probe(self._model)
        lags: dict[str, float | None] = {}
        for scrambled in (False, True):
            cache = DynamicCache(config=self._model.config)
            found = producer.lookup(producer.prompt(tokens))
            columns = min(found.tokens, len(tokens) - 1)
            tensors = LoadTensors(shape, HostMemory(), 1, columns)
            pages = page_ids(found.chunks, producer.chunk_tokens, 0, columns)
            loaded = producer.load(found, tensors.pool(0), pages)
            columns = min(loaded.tokens, columns)
            tensors.into(cache, columns, 1)
            if scrambled:
                _scramble(cache)
            lags["scrambled" if scrambled else "straight"] = self._largest_lag(cache, tokens[columns:], expected)
        return {**lags, "loaded_tokens": columns}

    @torch.no_grad()
    def _largest_lag(self, cache: DynamicCache, rest: list[int], expected: list[int]) -> float | None:
        """How far any other token is ahead of the expected one, which all follow; None: each is the best."""
        ids = torch.tensor([rest + expected], device=self._model.device)
        logits = self._model(ids, past_key_values=cache).logits[0, len(rest) - 1 : -1].float()
        logits[:, END] = -torch.inf  # no answer ends early
        lags = logits.max(dim=1).values - logits.gather(1, ids[0, len(rest) :, None])[:, 0]
        return float(lags.max()) or None


def _margin(logits: tuple[torch.Tensor, ...]) -> float:
    """The least distance between the best two logits of any step: how far rounding was from changing a token."""
    return min(float(torch.diff(step[0].topk(2).values.flip(0))) for step in logits)


def _lag(logits: tuple[torch.Tensor, ...], answer: list[int], expected: list[int]) -> float | None:
    """How far the first token that is not the expected one was ahead of that; None: there is none."""
    for step, token, wanted in zip(logits, answer, expected, strict=False):
        if token != wanted:
            return float(step[0, token] - step[0, wanted])
    return None


def _scramble(cache: DynamicCache) -> None:
    """Move values by one token against their keys. (To permute whole tokens changes nothing: keys carry positions.)"""
    for layer in cache.layers:
        assert isinstance(layer, DynamicLayer) and layer.values is not None
        layer.values = layer.values.roll(1, dims=2)


def serve(scale: str, stdin: BinaryIO, stdout: BinaryIO) -> None:
    """Answer until stdin ends."""
    engine = Engine(scale)
    try:
        stdout.write(orjson.dumps({"threads": torch.get_num_threads(), "device": engine.device}) + b"\n")
        for line in stdin:
            stdout.write(orjson.dumps(engine.answer(orjson.loads(line)), option=orjson.OPT_NON_STR_KEYS) + b"\n")
    finally:
        engine.close()


def main() -> None:
    """Keeps stdout for answers: whatever a library prints goes to stderr."""
    with os.fdopen(os.dup(1), "wb", buffering=0) as answers:
        os.dup2(2, 1)
        serve(sys.argv[1], sys.stdin.buffer, answers)


if __name__ == "__main__":
    main()
