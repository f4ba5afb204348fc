"""Which model this is, to the last weight: the parts of the key namespace that a transformers model answers for.

Two models may share KV only if config, code path (class, attention implementation, major version of transformers),
rotary settings, weights and active adapters are all equal. Weights are sampled, not read whole: up to 256 values of
every tensor, evenly strided, so that another checkpoint, a merged adapter or one fine-tuning step gives another
namespace. They are sampled again when a tensor's address or version counter changes. (Writing through `tensor.data`
moves neither: attach again after it, or set `cache_salt`.)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol, cast, runtime_checkable

import orjson
import torch
import transformers
from transformers import PreTrainedModel

from lmpipe import native
from lmpipe.errors import UnsupportedError

SAMPLES_PER_TENSOR = 256
NOT_IDENTITY = {"_name_or_path", "transformers_version", "architectures", "use_cache"}
"""Config entries that do not change the KV."""

MOVING_ROPE = ("dynamic", "longrope")
"""Rotary schemes whose frequencies depend on the length of the whole prompt: a prefix has no KV of its own."""


@runtime_checkable
class TunerLayer(Protocol):
    """What PEFT calls a tuner layer: a module around a base layer, with named adapters."""

    active_adapters: list[str]
    disable_adapters: bool
    merged_adapters: list[str]


@runtime_checkable
class ScaledLayer(Protocol):
    """A tuner layer whose adapters have a factor each."""

    scaling: dict[str, float]


@dataclass(frozen=True, slots=True)
class Identity:
    """What the namespace takes from the model. `weights`: 63 bits of the hash of the sampled weights."""

    model: str
    rope: str
    adapter: str
    weights: int


def _digest(data: bytes) -> bytes:
    return native.blake3_many(data, len(data)).tobytes()


def _bytes_of(tensor: torch.Tensor) -> bytes:
    """Up to `SAMPLES_PER_TENSOR` values of a tensor, evenly strided, with its shape and dtype."""
    flat = tensor.detach().reshape(-1) if tensor.is_contiguous() else tensor.detach().flatten()
    some = flat[:: max(1, flat.numel() // SAMPLES_PER_TENSOR)][:SAMPLES_PER_TENSOR].cpu().contiguous()
    return f"{tuple(tensor.shape)}{tensor.dtype}".encode() + some.view(torch.uint8).numpy().tobytes()


def config_digest(model: PreTrainedModel) -> str:
    """Hash of the config, the model's class and what else selects the code that computes KV."""
    fields = {name: value for name, value in model.config.to_dict().items() if name not in NOT_IDENTITY}
    code = {
        "class": f"{type(model).__module__}.{type(model).__qualname__}",
        "transformers": transformers.__version__.split(".")[0],
        "attention": model.config._attn_implementation,  # pyright: ignore[reportPrivateUsage]  no public name for it
    }
    return _digest(
        orjson.dumps([fields, code], default=str, option=orjson.OPT_SORT_KEYS | orjson.OPT_NON_STR_KEYS)
    ).hex()


def rope_of(model: PreTrainedModel) -> str:
    """The rotary settings as text.

    Raises:
        UnsupportedError: the KV of a prefix depends on what follows it.
    """
    rope: dict[str, Any] = model.config.to_dict().get("rope_parameters") or {}
    text = orjson.dumps(rope, default=str, option=orjson.OPT_SORT_KEYS | orjson.OPT_NON_STR_KEYS).decode()
    kinds = [rope, *(cast("dict[str, Any]", part) for part in rope.values() if isinstance(part, dict))]
    for kind in kinds:
        name = str(kind.get("rope_type", "default"))
        if any(moving in name for moving in MOVING_ROPE):
            raise UnsupportedError(f"rotary embeddings of type {name!r} change with the length of the whole prompt")
    return text


class ModelIdentity:
    """Follows a model's identity from request to request.

    Raises:
        UnsupportedError: no prefix of this model has a KV of its own.
    """

    def __init__(self, model: PreTrainedModel, name: str | None) -> None:
        self._model = model
        given = name if name is not None else str(model.config.name_or_path or type(model).__name__)
        self._name = f"{given}#{config_digest(model)[:32]}"
        self._rope = rope_of(model)
        self._marks: list[object] = []
        self._tuners: dict[str, TunerLayer] = {}
        self._weights = 0
        self._adapters: dict[str, bytes] = {}

    def current(self) -> Identity:
        """The identity now: a pass over version counters, and over the weights where one has moved.

        Raises:
            UnsupportedError: weights are not in memory, or it cannot be said which adapters are active.
        """
        if self._marks != self._look():
            self._sample()
            self._marks = self._look()
        return Identity(self._name, self._rope, self._adapter(), self._weights)

    def _look(self) -> list[object]:
        """Moves whenever a weight does, or an adapter is merged into the weights (PEFT does so behind the counters)."""
        marks: list[object] = []
        for tensor in self._model.parameters():
            version = 0 if tensor.is_inference() else tensor._version  # pyright: ignore[reportPrivateUsage]
            marks.append((tensor.data_ptr(), version))
        marks += [list(layer.merged_adapters) for layer in self._tuners.values()]
        return marks

    def _sample(self) -> None:
        modules = cast("Iterator[tuple[str, torch.nn.Module]]", self._model.named_modules())
        self._tuners = {name: module for name, module in modules if isinstance(module, TunerLayer)}
        inside = tuple(f"{name}." for name in self._tuners)
        base: list[bytes] = []
        parts: dict[str, list[bytes]] = {}
        for name, tensor in self._tensors():
            if tensor.is_meta:
                raise UnsupportedError(f"the weights of {name} are not in memory (meta device)")
            if inside and name.startswith(inside) and ".base_layer." not in name:
                for part in name.split("."):
                    parts.setdefault(part, []).append(name.encode() + _bytes_of(tensor))
            else:
                base.append(name.replace(".base_layer.", ".").encode() + _bytes_of(tensor))
        self._weights = int.from_bytes(_digest(b"".join(base))[:8], "little") >> 1
        self._adapters = {part: _digest(b"".join(found)) for part, found in parts.items()}

    def _tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self._model.named_parameters()
        yield from self._model.named_buffers()

    def _adapter(self) -> str:
        """Names, weights and factors of the active adapters; empty without any."""
        active = {() if layer.disable_adapters else tuple(layer.active_adapters) for layer in self._tuners.values()}
        if len(active) > 1:
            raise UnsupportedError("layers differ in their active adapters")
        names = next(iter(active), ())
        merged = sorted({name for layer in self._tuners.values() for name in layer.merged_adapters})
        if not names and not merged:
            return ""
        if missing := [name for name in (*names, *merged) if name not in self._adapters]:
            raise UnsupportedError(f"the weights of the active adapter {missing[0]!r} were not found")
        scales = [layer.scaling for layer in self._tuners.values() if isinstance(layer, ScaledLayer)]
        weights = b"".join(self._adapters[name] for name in (*names, *merged))
        fields = [names, merged, scales, weights.hex()]
        return f"{'+'.join((*names, *merged))}:{_digest(orjson.dumps(fields)).hex()[:32]}"
