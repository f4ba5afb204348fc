"""What each layer, head and K|V of a model loses at fewer bits. Knows no file and no budget.

Two measurements make a distortion:

    how much     K or V of one layer goes through the codec at the fewest bits, the rest of the prefix stays as it is:
                 the KL of the model's next tokens, in nats. This puts all layers, K and V on one scale.
    which head   its share of this: the error of K weighted by the second moments of the queries that read it (the
                 error of the attention logits), that of V by each token's squared attention (of what is read).

Errors at more bits are weighted the same way. Errors are those of the codec itself, with its sinks and its rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax
from transformers import AttentionInterface, AttentionMaskInterface

from lmpipe.codecs.adaptive import AdaptiveCodec
from lmpipe.codecs.calibration import BITS, VERSION, Calibration
from lmpipe.errors import UnsupportedError
from lmpipe.layout import KVLayout
from lmpipe.quality.passage import through
from lmpipe.quality.subject import Subject, prefix_tokens, windows_of

WATCHED = "lmpipe_watched"
"""The name under which transformers knows the attention that is watched."""
SDPA = "sdpa"
ATTENTION, MASKS = cast(Any, AttentionInterface()), cast(Any, AttentionMaskInterface())
"""Where transformers keeps its attentions by name, and what makes the mask of each."""


class Watch:
    """Attention as torch computes it, and how the prefix is read: by which queries, and which tokens.

    `moments`: by layer `[head][dim][dim]`, the mean of q qᵀ over the queries that read a KV head. `attention`: by layer
    `[batch][head][token]` of the prefix, the mean square of what a query gives to a token.
    """

    def __init__(self) -> None:
        self.moments: dict[int, Tensor] = {}
        self.attention: dict[int, Tensor] = {}

    def __call__(
        self,
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        **rest: Any,  # what a later transformers passes too is for its own attention
    ) -> tuple[Tensor, None]:
        """As transformers calls it: query `[batch][head][token][dim]`, of the last tokens of key and value."""
        layer = module.layer_idx
        assert isinstance(layer, int)
        batch, _, count, dim = query.shape
        heads, before = key.shape[1], key.shape[2] - count
        queries = query.reshape(batch, heads, -1, dim)
        self.moments[layer] = torch.einsum("bhqd,bhqe->hde", queries, queries) / (batch * queries.shape[2])
        scores = queries @ key.transpose(2, 3) * (dim**-0.5 if scaling is None else scaling)
        later = torch.ones(count, count, dtype=torch.bool, device=query.device).triu(1)
        scores[..., before:].masked_fill_(later.repeat(queries.shape[2] // count, 1), -torch.inf)
        self.attention[layer] = scores.softmax(-1)[..., :before].square().mean(dim=2)
        return ATTENTION[SDPA](module, query, key, value, attention_mask, scaling=scaling, **rest)

    def weighted(self, layer: int, errors: Tensor) -> Tensor:
        """Squared errors `[K|V][batch][head][token][dim]` of a layer's KV as the model feels them: `[K|V][head]`."""
        keys, values = errors
        logits = torch.einsum("bhtd,hde,bhte->h", keys, self.moments[layer], keys)
        read = torch.einsum("bht,bhtd->h", self.attention[layer], values.square())
        return torch.stack([logits, read])


@contextmanager
def watching(subject: Subject) -> Generator[Watch]:
    """The model's attention is watched meanwhile.

    Raises:
        UnsupportedError: it has no attention that can be replaced.
    """
    watch = Watch()
    ATTENTION.register(WATCHED, watch)
    MASKS.register(WATCHED, MASKS[SDPA])
    model = cast(Any, subject.model)
    before = model.config._attn_implementation
    try:
        model.set_attn_implementation(WATCHED)
        yield watch
    except ValueError as error:
        raise UnsupportedError(f"the attention of {subject.name} cannot be watched: {error}") from error
    finally:
        model.set_attn_implementation(before)
    if sorted(watch.moments) != list(range(subject.layout.layers)):
        raise UnsupportedError(f"the attention of {subject.name} was seen in layers {sorted(watch.moments)} only")


def distortions(
    subject: Subject, ids: Tensor, *, context: int, windows: int, say: Callable[[str], None]
) -> npt.NDArray[np.float64]:
    """Nats `[layer][K|V][head][3, 4, 8 bits]` by which the next tokens move, mean over what follows a prefix."""
    layout, prefix = subject.layout, prefix_tokens(context)
    codecs = [uniform(layout, bits) for bits in BITS]
    texts = windows_of(ids, context, windows).to(subject.model.device)
    moved = torch.zeros(layout.layers, 2, dtype=torch.float64)
    shares = torch.zeros(layout.layers, 2, layout.kv_heads, len(BITS), dtype=torch.float64)
    scored = 0
    for at, text in enumerate(texts):
        kv, rest = subject.prefix_kv(text[None, :prefix]), text[None, prefix:]
        came_back = [through(codec, kv, layout).kv for codec in codecs]
        with watching(subject) as watch:
            exact = _log_probs(subject, kv, rest)
        for layer in range(layout.layers):
            say(f"window {at + 1} of {len(texts)}, layer {layer}")
            for width, other in enumerate(came_back):
                error = other[layer].float() - kv[layer].float()
                shares[layer, :, :, width] += watch.weighted(layer, error).cpu().double()
            for side in range(2):
                changed = kv.clone()
                changed[layer, side] = came_back[0][layer, side]
                other = _log_probs(subject, changed, rest)
                moved[layer, side] += float(kl_div(other, exact, reduction="sum", log_target=True))
        scored += rest.shape[1]
    of_layer = shares[..., :1].sum(dim=2, keepdim=True)
    per_head = moved[:, :, None, None] / scored * shares / of_layer.clamp_min(torch.finfo(torch.float64).tiny)
    return per_head.clamp_min(0).numpy()


def uniform(layout: KVLayout, bits: int) -> AdaptiveCodec:
    """The adaptive codec with the same bits everywhere."""
    table = np.full((layout.layers, layout.kv, layout.kv_heads), bits).tolist()
    nothing = np.zeros((layout.layers, layout.kv, layout.kv_heads, len(BITS))).tolist()
    shape = layout.layers, layout.kv, layout.kv_heads, layout.head_dim
    return AdaptiveCodec(Calibration(VERSION, "", *shape, float(bits), table, nothing))


def _log_probs(subject: Subject, past: Tensor, rest: Tensor) -> Tensor:
    logits, _ = subject.read(rest, past)
    return log_softmax(logits.float(), dim=-1)
