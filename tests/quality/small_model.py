"""A tiny model of bytes with seeded weights."""

from __future__ import annotations

import torch
import transformers as hf

CONTEXT = 1024
TEXT_BYTES = 5000


def tiny() -> hf.LlamaForCausalLM:
    """Large weights: with small ones attention is flat, and wrong KV would go unnoticed."""
    config = hf.LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=CONTEXT,
    )
    model = hf.LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(0.0, 0.2, generator=generator)
    return model.eval()
