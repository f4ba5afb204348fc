"""How a model's answers differ when the KV of their prefix went through a codec. Knows no tier.

Of each window of a text the first part is the prefix: its KV is computed, and kept by the codec in chunks. The rest is
read on what came back, and on the KV itself:

    perplexity   of the rest; its change is that of the same windows
    KL           of the exact next-token distribution from the other, mean over the rest, in nats
    top-1        how often both find the same token most likely
    generated    tokens that greedy decoding makes behind the prefix, up to the first that differs from the exact run's
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from lmpipe.codecs import ChunkCodec
from lmpipe.quality.passage import Passage, through
from lmpipe.quality.report import NONE, Row
from lmpipe.quality.subject import Subject, prefix_tokens, windows_of

BATCH_TOKENS = 16384
LOGITS_AT_ONCE = 64 << 20
NUMBER_BITS = {torch.bfloat16: 16, torch.float16: 16, torch.float32: 32}


@dataclass(frozen=True, slots=True)
class Answers:
    """What a model makes of the rest of some windows. `losses`: the mean of each; `log_probs`: of every next token."""

    losses: Tensor
    log_probs: Tensor
    generated: Tensor

    @classmethod
    def on(cls, subject: Subject, past: Tensor, rest: Tensor, new_tokens: int) -> Answers:
        """Read the rest behind a prefix; then, behind the same prefix, generate from the rest's first token on."""
        logits, _ = subject.read(rest, past)
        log_probs = log_softmax(logits[:, :-1].float(), dim=-1)
        losses = cross_entropy(log_probs.transpose(1, 2), rest[:, 1:], reduction="none").mean(dim=1)
        token, made = rest[:, :1], list[Tensor]()
        logits, cache = subject.read(token, past)
        for _ in range(new_tokens):
            token = logits[:, -1:].argmax(dim=-1)
            made.append(token)
            logits = subject.more(token, cache)
        return cls(losses, log_probs, torch.cat(made, dim=1))


@dataclass(slots=True)
class Tally:
    """Sums over windows."""

    losses: list[float] = field(default_factory=list[float])
    changes: list[float] = field(default_factory=list[float])
    scored: int = 0
    kl: float = 0.0
    same_top: int = 0
    generated: int = 0
    same_generated: int = 0
    raw_bytes: int = 0
    encoded_bytes: int = 0
    chunks: int = 0
    refused: int = 0

    def add(self, passage: Passage, answers: Answers, exact: Answers) -> None:
        self.losses += map(float, answers.losses)
        self.changes += map(float, answers.losses - exact.losses)
        self.scored += exact.log_probs.shape[0] * exact.log_probs.shape[1]
        self.kl += float(kl_div(answers.log_probs, exact.log_probs, reduction="sum", log_target=True))
        self.same_top += int((answers.log_probs.argmax(-1) == exact.log_probs.argmax(-1)).sum())
        self.generated += exact.generated.numel()
        self.same_generated += int((answers.generated == exact.generated).cumprod(dim=1).sum())
        self.raw_bytes += passage.raw_bytes
        self.encoded_bytes += passage.encoded_bytes
        self.chunks += passage.chunks
        self.refused += passage.refused

    def row(self, codec: str, context: int, number_bits: int) -> Row:
        changes = torch.tensor(self.changes, dtype=torch.float64)
        spread = float(changes.std() / math.sqrt(len(changes))) if len(changes) > 1 else math.nan
        return Row(
            codec=codec,
            context=context,
            prefix=prefix_tokens(context),
            windows=len(changes),
            scored_tokens=self.scored,
            raw_bytes=self.raw_bytes,
            encoded_bytes=self.encoded_bytes,
            bits=number_bits * self.encoded_bytes / self.raw_bytes,
            perplexity=math.exp(sum(self.losses) / len(self.losses)),
            change_percent=100 * math.expm1(float(changes.mean())),
            change_error_percent=100 * spread,
            kl=self.kl / self.scored,
            top1=self.same_top / self.scored,
            generated=self.same_generated / self.generated,
            chunks=self.chunks,
            refused=self.refused,
        )


def rows(
    subject: Subject,
    ids: Tensor,
    codecs: dict[str, ChunkCodec],
    *,
    contexts: Iterable[int],
    windows: int,
    new_tokens: int,
    say: Callable[[str], None],
) -> Iterator[Row]:
    """A row for the exact run and for each codec, at each context length.

    Args:
        codecs: by the name that their rows get.
        windows: at most so many of each length.
        new_tokens: to generate behind each prefix; at most the rest of the context.
    """
    for context in contexts:
        prefix = prefix_tokens(context)
        texts = windows_of(ids, context, windows).to(subject.model.device)
        tallies = {NONE: Tally()} | {name: Tally() for name in codecs}
        count = _batch(context, context - prefix, subject)
        for at in range(0, len(texts), count):
            batch = texts[at : at + count]
            say(f"context {context}: window {at + 1} of {len(texts)}")
            rest, more = batch[:, prefix:], min(new_tokens, context - prefix - 1)
            kv = subject.prefix_kv(batch[:, :prefix])
            exact = Answers.on(subject, kv, rest, more)
            nothing = kv.numel() * kv.element_size()
            tallies[NONE].add(Passage(kv, nothing, nothing, 0, 0), exact, exact)
            for name, codec in codecs.items():
                passage = through(codec, kv, subject.layout)
                tallies[name].add(passage, Answers.on(subject, passage.kv, rest, more), exact)
        for name, tally in tallies.items():
            yield tally.row(name, context, NUMBER_BITS[subject.kv_dtype])


def _batch(context: int, rest: int, subject: Subject) -> int:
    return max(1, min(BATCH_TOKENS // context, LOGITS_AT_ONCE // (rest * subject.vocabulary)))
