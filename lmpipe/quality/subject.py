"""The model that codecs are tried on, and the text it reads. Knows no codec.

The model computes in fp32, so that what differs between two runs is what a codec did and not how they were rounded; its
KV is kept in the type of its weights, as an engine would keep it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedModel

from lmpipe.engines.transformers_cache import full_layers, probe, require_text_decoder
from lmpipe.errors import LmpipeError
from lmpipe.layout import CHUNK_TOKENS, KVLayout

LONGEST = 8192
"""Tokens of the longest context that is chosen without being asked for."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
BYTES = 256


@dataclass(frozen=True, slots=True)
class Subject:
    """A causal model with the layout of its chunks. `kv_dtype`: of the KV in the cache."""

    name: str
    model: PreTrainedModel
    layout: KVLayout
    kv_dtype: torch.dtype
    max_tokens: int

    @classmethod
    def load(cls, directory: Path) -> Subject:
        """Load a Hugging Face model.

        Raises:
            LmpipeError: there is none, or its files do not fit together.
            UnsupportedError: its cache is not the K and V of every token and layer.
        """
        if not (directory / "config.json").is_file():
            raise LmpipeError(f"{directory} has no config.json: it is no Hugging Face model")
        try:
            stored = cast(Any, AutoConfig).from_pretrained(directory).dtype
            model = cast(Any, AutoModelForCausalLM).from_pretrained(directory, dtype=torch.float32).eval()
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise LmpipeError(f"{directory}: the model cannot be loaded: {error}") from error
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return cls.of(directory.resolve().name, model.to(device), stored)

    @classmethod
    def of(cls, name: str, model: PreTrainedModel, stored: torch.dtype | None) -> Subject:
        """A model in memory, in fp32; `stored`: the type of its weights on disk."""
        require_text_decoder(model)
        shape = probe(model)
        kv_dtype = stored if stored in (torch.bfloat16, torch.float16) else torch.float32
        layout = KVLayout.dense(shape.layers, shape.kv_heads, shape.head_dim, str(kv_dtype).removeprefix("torch."))
        return cls(name, model, layout, kv_dtype, int(model.config.to_dict().get("max_position_embeddings", LONGEST)))

    @property
    def vocabulary(self) -> int:
        """Number of different tokens."""
        return int(self.model.config.to_dict()["vocab_size"])

    def contexts(self, asked: list[int]) -> list[int]:
        """Context lengths to measure at: those asked for, else a quarter, half and all of the model's.

        Raises:
            LmpipeError: the model cannot have one of them, or it is too short for a chunk and something after it.
        """
        whole = min(self.max_tokens, LONGEST)
        found = asked or [whole // part for part in (4, 2, 1) if prefix_tokens(whole // part)]
        for context in found:
            if context > self.max_tokens:
                raise LmpipeError(f"a context of {context} tokens: {self.name} goes up to {self.max_tokens}")
            if not prefix_tokens(context):
                raise LmpipeError(f"a context of {context} tokens has no chunk of {CHUNK_TOKENS} in its first 3/4")
        if not found:
            raise LmpipeError(f"the context of {self.name}, {self.max_tokens} tokens, is too short for a chunk")
        return found

    def read(self, tokens: Tensor, past: Tensor | None = None) -> tuple[Tensor, DynamicCache]:
        """Logits `[batch, tokens, vocabulary]` of tokens behind a prefix, and the cache after them.

        Args:
            past: KV of the prefix, `[layer][K|V][batch][head][token][dim]`.
        """
        cache = DynamicCache()
        for at, (keys, values) in enumerate(past.float() if past is not None else ()):
            cast(Any, cache).update(keys, values, at)
        logits = self.more(tokens, cache)
        return logits, cache

    @torch.no_grad()
    def more(self, tokens: Tensor, cache: DynamicCache) -> Tensor:
        """Logits of the next tokens; the cache grows."""
        return self.model(input_ids=tokens, past_key_values=cache, use_cache=True).logits

    def prefix_kv(self, tokens: Tensor) -> Tensor:
        """KV `[layer][K|V][batch][head][token][dim]` of the first tokens of a prompt, in the type of the cache."""
        _, cache = self.read(tokens)
        return torch.stack([torch.stack(pair) for pair in full_layers(cache)]).to(self.kv_dtype)


def prefix_tokens(context: int) -> int:
    """Tokens of a context that come from a cache: whole chunks, at most three quarters of it."""
    return context * 3 // 4 // CHUNK_TOKENS * CHUNK_TOKENS


def tokens_of(model: Path, text: Path, vocabulary: int) -> Tensor:
    """A text as token ids, by the model's tokenizer; bytes where it has none.

    Raises:
        LmpipeError: there is no such text, or no tokenizer and a vocabulary of less than bytes.
    """
    try:
        data = text.read_bytes()
    except OSError as error:
        raise LmpipeError(f"{text}: {error.strerror}") from error
    if any((model / name).is_file() for name in TOKENIZER_FILES):
        tokenizer = cast(Any, AutoTokenizer).from_pretrained(model)
        ids = tokenizer(data.decode(errors="replace"), add_special_tokens=False, verbose=False)["input_ids"]
        return torch.tensor(ids)
    if vocabulary < BYTES:
        raise LmpipeError(f"{model} has no tokenizer, and {vocabulary} tokens are too few for bytes")
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).long()


def windows_of(ids: Tensor, tokens: int, most: int) -> Tensor:
    """Up to `most` windows `[window][token]` that do not overlap, spread evenly over a text.

    Raises:
        LmpipeError: the text is shorter than one.
    """
    there = len(ids) // tokens
    if not there:
        raise LmpipeError(f"the text has {len(ids)} tokens, one window has {tokens}")
    count = min(there, most)
    starts = [(len(ids) - tokens) * at // max(count - 1, 1) for at in range(count)]
    return torch.stack([ids[start : start + tokens] for start in starts])
