"""A Llama with random weights whose KV cache is an engine's pages: `[layer][K|V][token][head][dim]`.

Enough of one to cost what one costs: RMSNorm, rotary embedding, grouped-query attention, SwiGLU, the output projection
of the last token. No sampling, no batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from lmpipe.cuda.pages import DevicePages
from lmpipe.layout import KVLayout

PAGE_TOKENS = 16
MLP_TOKENS = 8192
"""That go through the MLP at a time: what it computes with is the largest part of a prefill."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Of a model."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    vocabulary: int

    @property
    def layout(self) -> KVLayout:
        """Of its KV."""
        return KVLayout.paged(self.layers, self.kv_heads, self.head_dim, "bfloat16", PAGE_TOKENS)

    @property
    def weight_bytes(self) -> int:
        """In bf16."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return 2 * (self.layers * (attention + 3 * self.hidden * self.inner) + 2 * self.vocabulary * self.hidden)

    def kv_bytes(self, tokens: int) -> int:
        """Of so many tokens."""
        return tokens * self.layout.token_bytes


LLAMA_8B = Shape(32, 4096, 32, 8, 128, 14336, 128_256)
TINY = Shape(2, 64, 4, 2, 32, 128, 256)


class Llama:
    """The weights."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        self.shape, self._device = shape, device
        every = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
        self._embedding = self._weights(shape.vocabulary, shape.hidden)
        self._head = self._weights(shape.vocabulary, shape.hidden)
        self._attention = [self._weights(every, shape.hidden) for _ in range(shape.layers)]
        self._output = [self._weights(shape.hidden, shape.heads * shape.head_dim) for _ in range(shape.layers)]
        self._gate_up = [self._weights(2 * shape.inner, shape.hidden) for _ in range(shape.layers)]
        self._down = [self._weights(shape.hidden, shape.inner) for _ in range(shape.layers)]
        steps = torch.arange(0, shape.head_dim, 2, device=device, dtype=torch.float32) / shape.head_dim
        self._frequencies = 500_000.0**-steps

    def cache(self, tokens: int) -> torch.Tensor:
        """Empty: `[layers, 2, pages, page tokens, heads, dim]`."""
        shape = self.shape
        pages = -(-tokens // PAGE_TOKENS)
        size = (shape.layers, 2, pages, PAGE_TOKENS, shape.kv_heads, shape.head_dim)
        return torch.zeros(size, dtype=torch.bfloat16, device=self._device)

    def pages(self, cache: torch.Tensor) -> DevicePages:
        """The cache as an engine registers it."""
        return DevicePages.of(self.shape.layout, list(cache.flatten(0, 1)))

    def prompt(self, tokens: int) -> torch.Tensor:
        """Random token ids."""
        return torch.randint(self.shape.vocabulary, (tokens,), device=self._device)

    def forward(
        self,
        prompt: torch.Tensor,
        cache: torch.Tensor,
        first: int,
        before_layer: Callable[[int], None] = lambda _: None,
    ) -> torch.Tensor:
        """Logits of the last token; its KV and that of the others go into the cache.

        Args:
            prompt: all tokens, or with `first` > 0 the one after those that the cache has.
            cache: as `cache` made it.
            first: tokens that the cache has.
            before_layer: called before a layer reads the cache.
        """
        count, shape = len(prompt), self.shape
        angles = torch.arange(first, first + count, device=self._device)[:, None] * self._frequencies
        turn = torch.cat((angles.cos(), angles.sin()), dim=1).to(torch.bfloat16)[:, None, :]
        hidden = F.embedding(prompt, self._embedding)
        sizes = [shape.heads, shape.kv_heads, shape.kv_heads]
        for layer in range(shape.layers):
            projected = F.linear(_normed(hidden), self._attention[layer]).view(count, -1, shape.head_dim)
            query, key, value = torch.split(projected, sizes, dim=1)
            before_layer(layer)
            keys, values = cache[layer].flatten(1, 2)
            keys[first : first + count] = _turned(key, turn)
            values[first : first + count] = value
            attended = F.scaled_dot_product_attention(
                _turned(query, turn).transpose(0, 1)[None],
                keys[: first + count].transpose(0, 1)[None],
                values[: first + count].transpose(0, 1)[None],
                is_causal=count > 1,
                enable_gqa=True,
            )
            hidden = hidden + F.linear(attended[0].transpose(0, 1).reshape(count, -1), self._output[layer])
            for some in torch.split(hidden, MLP_TOKENS):
                gate, up = F.linear(_normed(some), self._gate_up[layer]).chunk(2, dim=1)
                some += F.linear(F.silu(gate) * up, self._down[layer])
        return F.linear(_normed(hidden[-1:]), self._head)

    def _weights(self, rows: int, columns: int) -> torch.Tensor:
        return torch.randn((rows, columns), dtype=torch.bfloat16, device=self._device).mul_(columns**-0.5)


def _normed(hidden: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(hidden, (hidden.shape[-1],))


def _turned(vectors: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of `[tokens, heads, dim]`."""
    cos, sin = turn.chunk(2, dim=2)
    left, right = vectors.chunk(2, dim=2)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=2)
