"""The demo's model: a Llama architecture built offline from a config, with seeded normal weights. Knows no pipeline.

The weights mean nothing, but they are not small: with the usual tiny initialisation attention is nearly flat and
scrambled KV would go unnoticed. Here query and key weights give attention scores a standard deviation of about three,
so every prompt token matters; logits have one of about 1.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from lmpipe.demo.scale import ModelSize
from lmpipe.demo.tokens import BEGIN, END, PAD, VOCABULARY

SEED = 20251122
SCORE_STD = 3.0
CONTEXT_TOKENS = 32768
ADDING = ("o_proj", "down_proj")
"""The weights of what a layer adds."""


def build(size: ModelSize, device: str = "cpu") -> LlamaForCausalLM:
    """The same model in every process on the same device, ready for generate."""
    model = architecture(size, device)
    generator = torch.Generator(device).manual_seed(SEED)
    attention_std = math.sqrt(SCORE_STD / size.hidden)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2:
                scores = "q_proj" in name or "k_proj" in name
                std = 1.0 if "embed" in name else attention_std if scores else 1 / math.sqrt(weight.shape[1])
                scale = size.residual if any(part in name for part in ADDING) else 1.0
                weight.normal_(0.0, std * scale, generator=generator)
    return model.eval()


def architecture(size: ModelSize, device: str) -> LlamaForCausalLM:
    """The model with weights that transformers chose, which were never elsewhere than on the device."""
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[size.dtype]
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=size.hidden,
        intermediate_size=size.feed_forward,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        max_position_embeddings=CONTEXT_TOKENS,
        tie_word_embeddings=False,
        pad_token_id=PAD,
        bos_token_id=BEGIN,
        eos_token_id=END,
    )
    with torch.device(device):
        return cast(LlamaForCausalLM, cast(Any, AutoModelForCausalLM).from_config(config, dtype=dtype))
