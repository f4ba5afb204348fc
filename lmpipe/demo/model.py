"""The demo's model: a Llama architecture built offline from a config, with seeded normal weights. Knows no pipeline.

The weights mean nothing, but they are not small: with the usual tiny initialisation attention is nearly flat and
scrambled KV would go unnoticed. Here query and key weights give attention scores a standard deviation of about three,
so every prompt token matters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lmpipe.demo.tokens import BEGIN, END, PAD, VOCABULARY

SEED = 20251122
SCORE_STD = 3.0


@dataclass(frozen=True, slots=True)
class ModelSize:
    """Dimensions of the model; `full` takes over two seconds for 4K tokens on two cores."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    feed_forward: int


FULL = ModelSize(512, 8, 8, 2, 1408)
QUICK = ModelSize(256, 4, 8, 2, 704)


def build(size: ModelSize) -> LlamaForCausalLM:
    """The same model in every process, in fp32 and ready for generate."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=size.hidden,
        intermediate_size=size.feed_forward,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        max_position_embeddings=16384,
        tie_word_embeddings=False,
        pad_token_id=PAD,
        bos_token_id=BEGIN,
        eos_token_id=END,
        dtype="float32",
    )
    model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(SEED)
    attention_std = math.sqrt(SCORE_STD / size.hidden)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2:
                scores = "q_proj" in name or "k_proj" in name
                std = 1.0 if "embed" in name else attention_std if scores else 1 / math.sqrt(weight.shape[1])
                weight.normal_(0.0, std, generator=generator)
    return model.eval()
