"""Hugging Face transformers: `generate` loads the longest saved prefix, computes the rest, saves new chunks of both.

Supported is what was shown to give the same tokens: decoder-only text models whose cache has full-attention layers
only; greedy search, sampling and beam search; batches with left padding. Everything else goes through `generate`
untouched, with the reason said once (or raised). Trouble in lmpipe is a miss.

Loaded KV is bit for bit what was saved. What is computed on top of it may round differently than in one long prefill,
since matrix products of another shape do: greedy tokens are equal wherever two logits are further apart.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter, deque
from pathlib import Path
from types import MethodType
from typing import Any, Protocol, cast

import torch
from transformers import DynamicCache, PreTrainedModel

from lmpipe.engines import transformers_cache as kv
from lmpipe.engines.adapter import AttachOptions, RequestInfo
from lmpipe.engines.transformers_pass import Pass
from lmpipe.engines.transformers_prefill import PrefillClock
from lmpipe.engines.transformers_producers import KERNEL_DEVICES, ProducerSet
from lmpipe.engines.transformers_request import parse
from lmpipe.errors import LmpipeError, UnsupportedError
from lmpipe.producer import Producer, SaveTicket

log = logging.getLogger("lmpipe.transformers")

TROUBLE = Exception
"""What must not reach the caller of `generate` from lmpipe's side of it: everything. A bug costs the hit and is logged
with its trace, for here it is the engine that would die of it."""


class Generator(Protocol):
    """What is used of `GenerationMixin`, with types."""

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Token ids, or an output with `.sequences`."""
        ...


class TransformersEngine:
    """The adapter registered as `transformers`.

    KV on one device of the types in `kernel_devices` is moved by kernels in this process; Triton's interpreter runs
    them on "cpu" too.
    """

    def __init__(self, kernel_devices: frozenset[str] = KERNEL_DEVICES) -> None:
        self._kernel_devices = kernel_devices

    def claims(self, model: object) -> bool:
        """Any transformers model, also inside PEFT's wrapper."""
        return isinstance(_unwrapped(model), PreTrainedModel)

    def attach(self, model: object, run_dir: Path, options: AttachOptions) -> TransformersAttachment:
        """Wrap `model.generate`.

        Raises:
            UnsupportedError: it is attached already, or (with `on_unsupported="raise"`) the model cannot be cached
            rightly.
        """
        inner = _unwrapped(model)
        if not isinstance(inner, PreTrainedModel):
            raise UnsupportedError(f"{type(model).__qualname__} is not a transformers model")
        return TransformersAttachment(inner, run_dir, options, self._kernel_devices)


def _unwrapped(model: object) -> object:
    """The transformers model inside PEFT's wrapper, whose generate calls it."""
    return model.get_base_model() if isinstance(model, kv.Wrapper) else model


class _Generate:
    """What stands as `model.generate`. A deep copy of the model gets its class's own generate back."""

    def __init__(self, attachment: TransformersAttachment) -> None:
        self._attachment = attachment
        self.__wrapped__ = attachment.original

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._attachment.generate(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        model = self._attachment.model
        return MethodType(cast("type[Generator]", type(model)).generate, memo.get(id(model), model))


class TransformersAttachment:
    """A model with lmpipe switched on. `generate` may be called from several threads."""

    def __init__(
        self,
        model: PreTrainedModel,
        run_dir: Path,
        options: AttachOptions,
        kernel_devices: frozenset[str],
    ) -> None:
        if isinstance(vars(model).get("generate"), _Generate):
            raise UnsupportedError("lmpipe is attached to this model already (detach it first)")
        self.model = model
        self.original = cast(Generator, model).generate
        self._options = options
        self._producers = ProducerSet(model, run_dir, options, kernel_devices)
        self._saving = threading.Lock()
        self._tickets: deque[SaveTicket] = deque()
        self._counts: Counter[str] = Counter()
        self._said: set[str] = set()
        self.last: RequestInfo | None = None
        if not model.training:
            try:
                self._producers.current()
            except UnsupportedError as error:
                self._refused(error)
        vars(model)["generate"] = _Generate(self)

    @property
    def producer(self) -> Producer | None:
        """The producer of the latest request; None while nothing could be cached."""
        return self._producers.latest

    def wait_ready(self, timeout_s: float) -> bool:
        """Wait until registered with the node."""
        producer = self._producers.latest
        return producer is not None and producer.wait_ready(timeout_s)

    def stats(self) -> dict[str, int]:
        """Counters of this attachment (requests, hits, bypassed…) and, summed, of its producers."""
        total = self._producers.stats()
        total.update({f"generate_{name}": count for name, count in self._counts.items()})
        return dict(total)

    def flush(self, timeout_s: float = 30.0) -> bool:
        """Wait until every save is answered. False: not in this time."""
        return self._producers.flush(timeout_s)

    def detach(self) -> None:
        """Give the model its own generate back and close the producers; queued saves are finished first."""
        if isinstance(vars(self.model).get("generate"), _Generate):
            del vars(self.model)["generate"]
        self._producers.close()

    def __enter__(self) -> TransformersAttachment:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """`model.generate`, with the longest saved prefix loaded before and new chunks saved after.

        One argument is ours: `lmpipe_exact=True` takes no KV that lost information in a codec, or was computed on such.

        Raises:
            UnsupportedError: the call cannot be cached rightly, and `on_unsupported` is "raise".
        """
        exact = bool(kwargs.pop("lmpipe_exact", False))
        try:
            begun = self._begin(args, kwargs, exact)
        except UnsupportedError as error:
            self._refused(error)
            begun = None
        except TROUBLE as error:
            begun = self._trouble("before generate", error)
        if begun is None:
            return self.original(*args, **kwargs)
        arguments = {**begun.request.arguments, "attention_mask": begun.request.mask, "past_key_values": begun.cache}
        with PrefillClock(self.model) as clock:
            output = self.original(**arguments)
        try:
            begun.producer.admission.observe_prefill(begun.computed_tokens, clock.seconds)
            sequences = output if isinstance(output, torch.Tensor) else cast(torch.Tensor, output.sequences)
            with self._saving:
                begun.save(sequences, self._options.save_answers, self._tickets)
            self.last = begun.info
        except TROUBLE as error:
            self._trouble("after generate", error)
        return output

    def _begin(self, args: tuple[Any, ...], kwargs: dict[str, Any], exact: bool) -> Pass | None:
        """Look up and load. None: without the cache, for a reason that is not worth a word."""
        request = parse(self.model, self.original, args, kwargs)
        opened = self._producers.current()
        producer = opened.producer
        self._counts["requests"] += 1
        longest = max(len(row.tokens) for row in request.rows)
        skipped = "" if producer.mapped else f"lmpipe {producer.state}"
        if skipped or longest < self._options.min_tokens:
            self.last = RequestInfo(sum(len(row.tokens) for row in request.rows), reason=skipped or "short")
            self._counts["skipped"] += 1
            return None
        begun = Pass(request, opened, lambda: DynamicCache(config=self.model.config), exact)
        try:
            begun.load(self._options.load_deadline_ms)
        except TROUBLE as error:
            self._trouble("while loading", error)
            begun.forget()
        self._counts["hits"] += bool(begun.info.hit_tokens)
        self._counts["hit_tokens"] += begun.info.hit_tokens
        return begun

    def _refused(self, error: UnsupportedError) -> None:
        """Raise, or say it once and count it."""
        if self._options.on_unsupported == "raise":
            raise error
        reason = str(error)
        self._counts["bypassed"] += 1
        self.last = RequestInfo(reason=reason)
        if reason not in self._said:
            self._said.add(reason)
            log.warning("generate runs without lmpipe: %s", reason)

    def _trouble(self, where: str, error: Exception) -> None:
        self._counts["trouble"] += 1
        self.last = RequestInfo(reason=f"trouble {where}: {error}")
        words = "lmpipe failed %s, generate goes on without it: %s: %s"
        expected = isinstance(error, (LmpipeError, OSError, MemoryError, torch.OutOfMemoryError))
        log.warning(words, where, type(error).__name__, error, exc_info=None if expected else error)
