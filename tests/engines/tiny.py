"""Tiny models with seeded normal weights.

The deviation is large: with the usual initialisation attention is flat, and wrong KV would go unnoticed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf

CHUNK = 16
VOCABULARY = 97
PAD, BEGIN, END = 0, 1, 2

_SPECIAL = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "bos_token_id": BEGIN, "eos_token_id": END}
_LLAMA = _SPECIAL | {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
_MHA = {name: value for name, value in _LLAMA.items() if name != "num_key_value_heads"}
_GPT2 = _SPECIAL | {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 512}

FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": lambda: hf.LlamaConfig(**_LLAMA),
    "gpt2": lambda: hf.GPT2Config(**_GPT2),
    "qwen2": lambda: hf.Qwen2Config(**_LLAMA),
    "qwen3": lambda: hf.Qwen3Config(**_LLAMA, head_dim=16),
    "mistral": lambda: hf.MistralConfig(**_LLAMA, sliding_window=None),
    "gemma": lambda: hf.GemmaConfig(**_LLAMA, head_dim=16),
    "neox": lambda: hf.GPTNeoXConfig(**_MHA),
    "opt": lambda: hf.OPTConfig(
        **_SPECIAL,
        hidden_size=64,
        ffn_dim=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=512,
        word_embed_proj_dim=64,
    ),
    "mixtral": lambda: hf.MixtralConfig(**_LLAMA, num_local_experts=4, sliding_window=None),
    "falcon": lambda: hf.FalconConfig(
        **_SPECIAL, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, alibi=False
    ),
    "bloom": lambda: hf.BloomConfig(**_SPECIAL, hidden_size=64, n_layer=3, n_head=4),
    "sliding": lambda: hf.MistralConfig(**_LLAMA, sliding_window=32),
    "hybrid": lambda: hf.Gemma3TextConfig(**_LLAMA, head_dim=16, sliding_window=32),
    "mamba": lambda: hf.MambaConfig(**_SPECIAL, hidden_size=64, num_hidden_layers=2),
    "dynamic rope": lambda: hf.LlamaConfig(
        **_LLAMA, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    ),
}


def build(family: str, seed: int = 0, **changes: int) -> Any:
    """A model of one of `FAMILIES`, the same for the same seed, with changes to its config."""
    config = FAMILIES[family]()
    config.update(changes)
    model = hf.AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(0.0, 0.3, generator=generator)
    return model.eval()


def prompt_of(tokens: int, seed: int = 1, rows: int = 1) -> torch.Tensor:
    """Random token ids without the special ones."""
    return torch.randint(3, VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def greedy(model: Any, ids: torch.Tensor, new_tokens: int = 12, **options: Any) -> list[list[int]]:
    """Greedy tokens after the prompt."""
    return model.generate(ids, max_new_tokens=new_tokens, do_sample=False, **options)[:, ids.shape[1] :].tolist()
