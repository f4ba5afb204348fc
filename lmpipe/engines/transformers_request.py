"""What one call of `generate` asks for, or why it goes without the cache. Knows no producer and no KV tensor.

A request is taken only if everything that shapes its KV is known: token ids, a left-padded mask, and generation
settings from the list below. Whatever else reaches the model's forward (pixel values, token types, position ids…) is
refused by default, not by name.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.configuration_utils import GenerationMode

from lmpipe.errors import UnsupportedError
from lmpipe.keys import Tokens, as_tokens

MODES = {GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE, GenerationMode.BEAM_SEARCH, GenerationMode.BEAM_SAMPLE}
BEAMS = {GenerationMode.BEAM_SEARCH, GenerationMode.BEAM_SAMPLE}

PLAIN = {
    "inputs",
    "input_ids",
    "attention_mask",
    "generation_config",
    "logits_processor",
    "stopping_criteria",
    "prefix_allowed_tokens_fn",
    "streamer",
    "tokenizer",
}
"""Arguments of `generate` that are understood, or that touch logits only."""


REFUSED = {
    "output_attentions": "attentions of the whole prompt are asked for",
    "output_hidden_states": "hidden states of the whole prompt are asked for",
    "token_healing": "it changes the prompt",
    "guidance_scale": "classifier-free guidance",
    "prefill_chunk_size": "chunked prefill",
    "is_assistant": "the model is an assistant of another",
}
"""Settings that make a request go without the cache, and why."""


class Settings(Protocol):
    """What is used of `GenerationConfig`, with types."""

    def to_dict(self) -> dict[str, Any]:
        """Every setting."""
        ...

    def update(self, defaults_only: bool = False, allow_custom_entries: bool = False, **kwargs: Any) -> dict[str, Any]:
        """Take over settings; returns what are none."""
        ...

    def get_generation_mode(self, assistant_model: Any = None) -> GenerationMode:
        """How tokens are chosen."""
        ...


@dataclass(frozen=True, slots=True)
class Row:
    """One prompt of a batch: its tokens without padding, and how many columns of padding stand before them."""

    tokens: Tokens
    pad: int


@dataclass(frozen=True, slots=True)
class Request:
    """A call of `generate` that can be cached.

    `mask` is what generate is given (it would infer the same); `expand` rows of the model's batch stand for each
    prompt; with `beams` the answers' KV is not in order of the returned sequences.
    """

    arguments: dict[str, Any]
    mask: torch.Tensor
    rows: list[Row]
    columns: int
    expand: int
    beams: bool
    pad_token: int | None


def parse(model: PreTrainedModel, generate: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Request:
    """Understand a call of `generate`.

    Raises:
        UnsupportedError: the call cannot be cached rightly; the text says what is in the way.
    """
    arguments = _named(generate, args, kwargs)
    settings, left = _settings(model, arguments)
    ids = _input_ids(arguments)
    _refuse_unknown(arguments, left)
    chosen = settings.to_dict()
    mode = settings.get_generation_mode(arguments.get("assistant_model"))
    _refuse_settings(mode, chosen)
    if model.training:
        raise UnsupportedError("the model is in training mode (call model.eval())")
    if torch.is_autocast_enabled(ids.device.type):
        raise UnsupportedError("torch.autocast is on: it changes the KV's dtype")
    if "prepare_inputs_for_generation" in vars(model):
        raise UnsupportedError("model.prepare_inputs_for_generation was replaced (prompt tuning?)")
    pads = _tokens(chosen.get("pad_token_id"))
    mask = _mask(ids, arguments.get("attention_mask"), pads, _tokens(chosen.get("eos_token_id")))
    rows = _rows(ids, mask)
    if any(row.pad for row in rows) and "position_ids" not in inspect.signature(model.forward).parameters:
        raise UnsupportedError("left padding needs a model whose forward takes position_ids")
    expand = max(int(chosen.get("num_beams") or 1), int(chosen.get("num_return_sequences") or 1))
    return Request(arguments, mask, rows, ids.shape[1], expand, mode in BEAMS, pads[0] if pads else None)


def _named(generate: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments by name, whatever the order of this version's signature; those that are None are left out."""
    bound = inspect.signature(generate).bind(*args, **kwargs).arguments
    arguments = {**bound, **bound.pop("kwargs", {})}
    return {name: value for name, value in arguments.items() if name != "kwargs" and value is not None}


def _settings(model: PreTrainedModel, arguments: dict[str, Any]) -> tuple[Settings, dict[str, Any]]:
    """The generation settings in effect, by generate's own rules, and what of the arguments is no setting."""
    given = arguments.get("generation_config")
    settings = cast(Settings, copy.deepcopy(given) if given is not None else GenerationConfig())
    rest = {name: value for name, value in arguments.items() if name != "generation_config"}
    try:
        defaults = cast(Settings, model.generation_config).to_dict()
        settings.update(defaults_only=True, allow_custom_entries=True, **defaults)
        return settings, settings.update(**rest)
    except (ValueError, TypeError) as error:
        raise UnsupportedError(f"generation settings that generate itself will refuse: {error}") from error


def _input_ids(arguments: dict[str, Any]) -> torch.Tensor:
    ids = arguments.get("inputs", arguments.get("input_ids"))
    if not isinstance(ids, torch.Tensor) or ids.ndim != 2 or ids.dtype not in (torch.int64, torch.int32):
        raise UnsupportedError("token ids [batch, tokens] are needed (input_ids)")
    if not ids.shape[0] or not ids.shape[1]:
        raise UnsupportedError("the prompt is empty")
    if "inputs" in arguments and "input_ids" in arguments:
        raise UnsupportedError("both inputs and input_ids are given")
    return ids


def _refuse_unknown(arguments: dict[str, Any], left: dict[str, Any]) -> None:
    if "assistant_model" in arguments:
        raise UnsupportedError("assisted decoding (assistant_model)")
    for name in left:
        if name not in PLAIN:
            raise UnsupportedError(f"the argument {name} may change the KV in a way that keys do not cover")


def _refuse_settings(mode: GenerationMode, chosen: dict[str, Any]) -> None:
    if mode not in MODES:
        raise UnsupportedError(f"generation mode {mode.value}")
    if chosen.get("use_cache") is False:
        raise UnsupportedError("use_cache=False")
    # generate itself takes "hybrid" for a default of old checkpoints and drops it.
    if (cache := chosen.get("cache_implementation")) not in (None, "hybrid"):
        raise UnsupportedError(f"cache_implementation={cache!r}: only the default, a DynamicCache, is supported")
    for name, why in REFUSED.items():
        if chosen.get(name) not in (None, False):
            raise UnsupportedError(f"{name}: {why}")


def _mask(ids: torch.Tensor, given: object, pads: list[int], ends: list[int]) -> torch.Tensor:
    """The attention mask: as given, or as generate infers it from padding tokens."""
    if given is not None:
        if not isinstance(given, torch.Tensor) or given.shape != ids.shape:
            raise UnsupportedError("attention_mask must have the shape of input_ids")
        return given
    if not pads or pads[0] in ends:
        return torch.ones_like(ids, dtype=torch.long)
    return ids.ne(pads[0]).long()


def _rows(ids: torch.Tensor, mask: torch.Tensor) -> list[Row]:
    tokens = ids.detach().cpu().numpy()
    seen = mask.detach().cpu().numpy()
    if not np.isin(seen, (0, 1)).all():
        raise UnsupportedError("an attention mask of other values than 0 and 1")
    if not seen[:, -1].all():
        raise UnsupportedError("right padding: a decoder-only model must be padded on the left")
    if (np.diff(seen.astype(np.int8), axis=1) < 0).any():
        raise UnsupportedError("an attention mask with holes")
    pads = seen.shape[1] - seen.astype(np.int64).sum(axis=1)
    return [Row(as_tokens(row[pad:]), int(pad)) for row, pad in zip(tokens, pads, strict=True)]


def _tokens(setting: Any) -> list[int]:
    """A token setting, which may be one id, several or a tensor, as a list."""
    if setting is None:
        return []
    return [int(token) for token in np.asarray(setting).reshape(-1)]
