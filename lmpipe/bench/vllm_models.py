"""Tiny models for vLLM, written as its loader reads them: config.json and model.safetensors, no tokenizer.

Seeded normal weights mean nothing, but they are not small: query and key weights give attention scores a standard
deviation of about three, so that every token of a prompt matters and scrambled KV changes what is generated. Vectors
are all ones, which suits norms. Knows the names that Hugging Face gives to weights, and no engine.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file  # pyright: ignore[reportUnknownVariableType]

SEED = 20261122
SCORE_STD = 3.0
LORA_STD = 2.0
"""Of what an adapter adds, in units of what it is added to: enough to change every token."""

LATENT, ROPE = 512, 64
"""The only MLA geometry that vLLM's kernel for CPUs has: 576 numbers a token."""

Weights: TypeAlias = dict[str, NDArray[np.float32]]


@dataclass(frozen=True, slots=True)
class ModelSize:
    """Dimensions of a model; `head` must be one that vLLM's attention on CPUs has: 32, 64, 80, 96, 112, 128, …"""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head: int
    feed_forward: int
    vocabulary: int
    positions: int


LARGE = ModelSize(512, 8, 8, 2, 64, 1408, 4096, 16384)
"""For measurements; half a second for 4K tokens on two cores."""

SMALL = ModelSize(128, 4, 4, 2, 32, 352, 512, 8192)
"""For tests."""


def write_llama(directory: Path, size: ModelSize = SMALL, seed: int = SEED) -> Path:
    """A Llama with grouped-query attention in all layers. Returns `directory`, which is made."""
    return _write(directory, _llama_config(size), _llama_weights(size, seed))


def write_hybrid(directory: Path, size: ModelSize = SMALL, window: int = 64, seed: int = SEED) -> Path:
    """The same Llama, but its even layers see the last `window` tokens only: two groups of KV cache in vLLM."""
    kinds = ["full_attention" if layer % 2 else "sliding_attention" for layer in range(size.layers)]
    config = _llama_config(size) | {"layer_types": kinds, "sliding_window": window}
    return _write(directory, config, _llama_weights(size, seed))


def write_mla(directory: Path, size: ModelSize = SMALL, seed: int = SEED) -> Path:
    """A DeepSeek-V2 without experts: one latent a token instead of keys and values; `kv_heads` is not used."""
    config = _config(size, "DeepseekV2ForCausalLM", "deepseek_v2") | {
        "num_key_value_heads": size.heads,
        "q_lora_rank": None,
        "kv_lora_rank": LATENT,
        "qk_nope_head_dim": size.head,
        "qk_rope_head_dim": ROPE,
        "v_head_dim": size.head,
        "n_routed_experts": 1,  # none where all layers are dense, but its type is int
        "first_k_dense_replace": size.layers,
    }
    make = _Maker(seed)
    weights = make.frame(size)
    for prefix in _layers(size):
        scale = math.sqrt(SCORE_STD)
        attention = f"{prefix}.self_attn"
        weights[f"{attention}.q_proj.weight"] = make.matrix(size.heads * (size.head + ROPE), size.hidden, scale)
        weights[f"{attention}.kv_a_proj_with_mqa.weight"] = make.matrix(LATENT + ROPE, size.hidden, scale)
        weights[f"{attention}.kv_a_layernorm.weight"] = make.ones(LATENT)
        weights[f"{attention}.kv_b_proj.weight"] = make.matrix(size.heads * 2 * size.head, LATENT, scale)
        weights[f"{attention}.o_proj.weight"] = make.matrix(size.hidden, size.heads * size.head)
    return _write(directory, config, weights)


def write_lora(directory: Path, size: ModelSize = SMALL, rank: int = 8, seed: int = SEED + 1) -> Path:
    """An adapter for `write_llama`'s model in PEFT's format; it changes keys and values, so KV must not be shared."""
    directory.mkdir(parents=True)
    targets = ["q_proj", "k_proj", "v_proj"]
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank, "target_modules": targets}
    make = _Maker(seed)
    weights: Weights = {}
    for prefix in _layers(size):
        for target in targets:
            name = f"base_model.model.{prefix}.self_attn.{target}"
            rows = size.head * (size.heads if target == "q_proj" else size.kv_heads)
            weights[f"{name}.lora_A.weight"] = make.matrix(rank, size.hidden)
            weights[f"{name}.lora_B.weight"] = make.matrix(rows, rank, LORA_STD)
    (directory / "adapter_config.json").write_text(json.dumps(config, indent=1))
    save_file(weights, directory / "adapter_model.safetensors")
    return directory


class _Maker:
    """Draws weights in the order in which they are asked for."""

    def __init__(self, seed: int) -> None:
        self._random = np.random.default_rng(seed)

    def matrix(self, rows: int, columns: int, scale: float = 1.0) -> NDArray[np.float32]:
        """`[rows, columns]` that turns numbers of standard deviation one into numbers of `scale`."""
        return self._random.standard_normal((rows, columns), np.float32) * np.float32(scale / math.sqrt(columns))

    @staticmethod
    def ones(length: int) -> NDArray[np.float32]:
        return np.ones(length, np.float32)

    def frame(self, size: ModelSize) -> Weights:
        """All but attention."""
        weights: Weights = {
            "model.embed_tokens.weight": self.matrix(size.vocabulary, size.hidden, math.sqrt(size.hidden)),
            "model.norm.weight": self.ones(size.hidden),
            "lm_head.weight": self.matrix(size.vocabulary, size.hidden),
        }
        for prefix in _layers(size):
            weights[f"{prefix}.input_layernorm.weight"] = self.ones(size.hidden)
            weights[f"{prefix}.post_attention_layernorm.weight"] = self.ones(size.hidden)
            weights[f"{prefix}.mlp.gate_proj.weight"] = self.matrix(size.feed_forward, size.hidden)
            weights[f"{prefix}.mlp.up_proj.weight"] = self.matrix(size.feed_forward, size.hidden)
            weights[f"{prefix}.mlp.down_proj.weight"] = self.matrix(size.hidden, size.feed_forward)
        return weights


def _layers(size: ModelSize) -> list[str]:
    return [f"model.layers.{layer}" for layer in range(size.layers)]


def _config(size: ModelSize, architecture: str, model_type: str) -> dict[str, object]:
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "torch_dtype": "float32",
        "hidden_act": "silu",
        "hidden_size": size.hidden,
        "intermediate_size": size.feed_forward,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "vocab_size": size.vocabulary,
        "max_position_embeddings": size.positions,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }


def _llama_config(size: ModelSize) -> dict[str, object]:
    own = {"num_key_value_heads": size.kv_heads, "head_dim": size.head, "attention_bias": False}
    return _config(size, "LlamaForCausalLM", "llama") | own


def _llama_weights(size: ModelSize, seed: int) -> Weights:
    make = _Maker(seed)
    weights = make.frame(size)
    scale = math.sqrt(SCORE_STD)
    for prefix in _layers(size):
        attention = f"{prefix}.self_attn"
        weights[f"{attention}.q_proj.weight"] = make.matrix(size.heads * size.head, size.hidden, scale)
        weights[f"{attention}.k_proj.weight"] = make.matrix(size.kv_heads * size.head, size.hidden, scale)
        weights[f"{attention}.v_proj.weight"] = make.matrix(size.kv_heads * size.head, size.hidden)
        weights[f"{attention}.o_proj.weight"] = make.matrix(size.hidden, size.heads * size.head)
    return weights


def _write(directory: Path, config: dict[str, object], weights: Weights) -> Path:
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config, indent=1))
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return directory
